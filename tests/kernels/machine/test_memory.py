"""Memory that is used again: arrays keep theirs for as long as anyone looks at it."""

import gc
import tracemalloc

import numpy as np

from sd_numba import kernels
from sd_numba.kernels.machine.memory import empty
from tests.kernels.common import normal

SHAPE = (256, 256)  # above the size from which memory is recycled


def where(array):
    return array.__array_interface__["data"][0]


def test_memory_of_an_array_that_is_gone_is_used_again():
    with kernels.reuse():
        first = empty(SHAPE)
        place = where(first)
        del first
        again = empty((2, 128, 128))  # half as large
        assert where(again) == place
        assert again.shape == (2, 128, 128) and again.dtype == np.float32 and again.flags.c_contiguous
        assert where(empty(SHAPE)) != place


def test_trim_gives_up_what_is_free_and_nothing_else():
    kernels.trim()  # outside of `reuse` there is nothing
    with kernels.reuse():
        kept, gone = empty(SHAPE), empty(SHAPE)
        kept[...] = 2
        del gone
        tracemalloc.start()
        kernels.trim()
        kernels.trim()
        empty(SHAPE)
        assert tracemalloc.get_traced_memory()[1] >= kept.nbytes
        tracemalloc.stop()
        assert (kept == 2).all()


def test_a_view_keeps_the_memory():
    with kernels.reuse():
        array = empty(SHAPE)
        view = array.reshape(-1)[100:200].reshape(10, 10)
        view[...] = 7
        del array
        others = [empty(SHAPE) for _ in range(3)]
        for other in others:
            other[...] = 1
        assert (view == 7).all()


def test_arrays_outlive_the_block_and_fresh_ones_follow():
    with kernels.reuse():
        array = empty(SHAPE)
        array[...] = 3
    assert (array == 3).all()
    other = empty(SHAPE)
    other[...] = 4
    assert (array == 3).all()
    del array
    gc.collect()


def test_blocks_within_blocks_share():
    with kernels.reuse():
        with kernels.reuse():
            place = where(empty(SHAPE))
        assert where(empty(SHAPE)) == place


def test_small_memory_does_not_pile_up():
    """A request that nothing fits frees what is smaller, so a growing network holds no more than it needs."""
    tracemalloc.start()
    try:
        with kernels.reuse():
            for side in range(256, 1024, 128):
                empty((side, 2 * side))
            held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 2 * 896**2 * 4 <= held < 1.1 * 2 * 896**2 * 4  # the last one only


def test_kernels_return_the_same_with_and_without():
    x, w = normal(0, 300, 64), normal(1, 256, 64)
    expected = kernels.linear(x, w)
    with kernels.reuse():
        for _ in range(3):
            np.testing.assert_array_equal(kernels.linear(x, w), expected)


def test_an_error_ends_the_block():
    try:
        with kernels.reuse():
            raise KeyError
    except KeyError:
        pass
    tracemalloc.start()
    try:
        empty(SHAPE)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < np.empty(SHAPE, np.float32).nbytes  # not kept for another
