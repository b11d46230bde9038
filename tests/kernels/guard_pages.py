"""Run every kernel on arrays that touch pages of memory that nobody may access: one access out of bounds kills.

``python -m tests.kernels.guard_pages`` prints each case before it runs it; with an argument it overruns on purpose.
"""

import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Iterator

import numpy as np

from sd_numba import kernels
from sd_numba.kernels import low_rank, winograd
from sd_numba.kernels.checks import address
from sd_numba.kernels.machine import memory
from sd_numba.kernels.machine.emit import LANES
from sd_numba.kernels.products import driver, operands
from sd_numba.kernels.products.microkernel import WIDTH
from tests.kernels.common import STORED, normal, store

_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(array: np.ndarray, at_end: bool) -> np.ndarray:
    """Copy an array to pages of its own between two forbidden ones: flush with their end, or with their start."""
    page = mmap.PAGESIZE
    size = max(1, -(-array.nbytes // page)) * page
    region = mmap.mmap(-1, size + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for guard in (start, start + page + size):
        if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page + (size - array.nbytes if at_end else 0)
    copy = np.frombuffer(region, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    return copy


def guard_buffers(at_end: bool) -> None:
    """Guard the kernels' own memory, too: buffers, of exactly the size asked for and full of NaN, and padding."""

    def take(self, use: str, floats: int) -> np.ndarray:
        self._buffers[use] = guarded(np.full(floats, np.nan, np.float32), at_end)
        return self._buffers[use]

    memory._Scratch.take = take
    driver.zeros = winograd.zeros = lambda floats: guarded(np.zeros(floats, np.float32), at_end)
    driver.zero_words = lambda count, precision: guarded(operands.zero_words(count, precision), at_end)
    sys.modules["sd_numba.kernels.quantize"].aligned = lambda floats: guarded(np.zeros(floats, np.float32), at_end)


def compare(call: Callable[..., np.ndarray], *arrays: np.ndarray) -> None:
    """Call with guarded arrays, and a guarded `out`; the result is that of the arrays themselves."""
    expected = call(*arrays, out=None)
    for at_end in (True, False):
        guard_buffers(at_end)
        out = guarded(np.zeros_like(expected), at_end)
        call(*(guarded(a, at_end) for a in arrays), out=out)
        assert (out == expected).all()


def products() -> Iterator[str]:
    for how in STORED:
        for m, k, n in ((1, 1, 1), (5, 3, 7), (13, 17, 65), (7, 40, 63), (9, 33, 72), (100, 401, 4), (6, 64, 128)):
            yield f"linear {how} {m, k, n}"
            x, w, b = normal(0, m, k), store(normal(1, n, k), how), normal(2, n)
            compare(lambda x, w, b, out: kernels.linear(x, w, b, out=out), x, w, b)
            compare(lambda x, w, b, out: kernels.linear(x, kernels.pack_linear(w), b, out=out), x, w, b)
    for m, k, n in ((1, 1, 1), (5, 3, 7), (13, 17, 65), (2, 500, 33), (6, 64, 128)):
        yield f"matmul {m, k, n}"
        compare(kernels.matmul, normal(0, m, k), normal(1, k, n))


def low_products() -> Iterator[str]:
    """Of quantized weights in all precisions, and of others in bf16."""

    def multiply(x, values, scales, b, out):
        return linear(x, kernels.QuantizedWeight(values, scales), b, out)

    def linear(x, w, b, out):
        weight = kernels.pack_linear(w, precision=precision) if packed else w
        return kernels.linear(x, weight, b, out=out, precision=precision)

    for precision in kernels.precisions():
        for m, k, n in ((1, 1, 1), (5, 3, 7), (13, 17, 65), (33, 40, 63), (9, 67, 72), (100, 401, 4), (6, 128, 128)):
            for packed in (False, True):
                yield f"linear {precision} {m, k, n} packed={packed}"
                x, w, b = normal(0, m, k), normal(1, n, k), normal(2, n)
                bytes_of_w = kernels.quantize(w)
                compare(multiply, x, bytes_of_w.values, bytes_of_w.scales, b)
                for how in STORED if precision == "bf16" else ():
                    compare(linear, x, store(w, how), b)


def convolutions() -> Iterator[str]:
    shapes = [
        ((1, 1, 1, 1), (1, 1, 3, 3), 1, 1, False),
        ((1, 5, 7, 3), (5, 3, 3, 3), 1, 1, False),
        ((2, 6, 5, 17), (65, 17, 3, 3), 2, ((0, 1), (0, 1)), False),
        ((1, 9, 4, 6), (33, 6, 5, 2), 3, ((4, 0), (1, 3)), False),
        ((1, 4, 5, 12), (72, 12, 1, 1), 1, 0, False),
        ((2, 3, 4, 20), (63, 20, 3, 3), 1, 1, True),
    ]
    for how in STORED:
        for x_shape, w_shape, stride, padding, upsample in shapes:
            yield f"conv2d {how} {x_shape, w_shape}"
            x, w, b = normal(0, *x_shape), store(normal(1, *w_shape), how), normal(2, x_shape[0], w_shape[0])
            options = {"stride": stride, "padding": padding, "upsample": upsample, "algorithm": "direct"}
            compare(lambda x, w, b, out, o=options: kernels.conv2d(x, w, b, **o, out=out), x, w, b)


def winograd_convolutions() -> Iterator[str]:
    chunk, panel = winograd.SMALL_CHUNK, WIDTH
    shapes = [  # x shape, output channels, padding, upsample
        ((1, 1, 1, LANES), LANES, 1, False),
        ((2, 5, 7, LANES), panel + LANES, 1, False),
        ((1, 4, 8, chunk), panel, 0, False),
        ((2, 6, 5, chunk + LANES), LANES, 2, False),
        ((1, 3, 9, 2 * chunk), panel, ((3, 0), (0, 5)), False),
        ((2, 3, 4, LANES), panel, 1, True),
        ((3, 17, 21, chunk + LANES), panel + LANES, 1, False),  # 90 tiles, in two blocks
    ]
    for how in STORED:
        for x_shape, c_out, padding, upsample in shapes:
            yield f"winograd {how} {x_shape, c_out, padding, upsample}"
            w, b = store(normal(1, c_out, x_shape[3], 3, 3), how), normal(2, x_shape[0], c_out)
            options = {"padding": padding, "upsample": upsample, "algorithm": "winograd4"}
            for bias in (b, b[0]):
                for add in (False, True):  # to zeros

                    def convolve(x, w, b, out, options=options, add=add):
                        return kernels.conv2d(x, w, b, **options, out=out, accumulate=add and out is not None)

                    compare(convolve, normal(0, *x_shape), w, bias)
    yield "winograd, several batches"
    winograd._BATCH = 1
    x, w, b = normal(0, 3, 17, 21, LANES), normal(1, LANES, LANES, 3, 3), normal(2, LANES)
    compare(lambda x, w, b, out: kernels.conv2d(x, w, b, out=out, algorithm="winograd4"), x, w, b)


def low_rank_updates() -> Iterator[str]:
    def linear(x, w, up, down, b, out):
        return kernels.linear(x, kernels.add_low_rank(w, [(up, down, 1.0)]), b, out=out)

    def convolve(x, w, up, down, b, out):
        return kernels.conv2d(x, kernels.add_low_rank(w, [(up, down, 1.0)]), b, out=out, algorithm=algorithm)

    for m, k, n, rank in ((1, 1, 1, 1), (13, 17, 65, 5), (9, 33, 72, 64), (100, 401, 4, 3)):
        yield f"low rank, linear {m, k, n, rank}"
        factors = normal(1, n, rank), normal(2, rank, k)
        compare(linear, normal(0, m, k), normal(3, n, k), *factors, normal(4, n))
    for apart in (0.0, math.inf):
        low_rank._APART = apart
        for algorithm in ("direct", "winograd4"):
            for x_shape, c_out, rank in (((1, 5, 7, 3), 5, 1), ((2, 6, 5, winograd.SMALL_CHUNK + 3), WIDTH + 5, 7)):
                yield f"low rank, conv2d {algorithm} {x_shape, c_out, rank} {apart}"
                factors = normal(1, c_out, rank), normal(2, rank, x_shape[3], 3, 3)
                w, b = normal(3, c_out, x_shape[3], 3, 3), normal(4, c_out)
                compare(convolve, normal(0, *x_shape), w, *factors, b)


def attentions() -> Iterator[str]:
    for n, tq, tk, heads, d in (
        (1, 1, 1, 1, 1),
        (1, 5, 77, 2, 7),
        (2, 73, 13, 3, 40),
        (1, 7, 513, 1, 65),
        (1, 6, 64, 1, 64),
        (2, 7, 33, 3, 22),
        (1, 65, 601, 1, 34),
    ):
        q, k, v = normal(0, n, tq, heads * d), normal(1, n, tk, heads * d), normal(2, n, tk, heads * d)
        for causal in (False, True):
            yield f"attention {n, tq, tk, heads, d} {causal}"
            for precision in kernels.precisions():
                options = {"heads": heads, "causal": causal, "precision": precision}
                compare(lambda q, k, v, out, o=options: kernels.attention(q, k, v, **o, out=out), q, k, v)


def elementwise() -> Iterator[str]:
    for shape in ((1, 1, 1, 2), (2, 5, 7, 6), (1, 3, 3, 66), (3, 9, 40), (1, 4097, 2)):
        x, weight, bias = normal(0, *shape), normal(1, shape[-1]), normal(2, shape[-1])
        yield f"norms {shape}"
        for silu in (False, True):
            compare(lambda x, w, b, out, s=silu: kernels.group_norm(x, 2, w, b, silu=s, out=out), x, weight, bias)
        compare(lambda x, w, b, out: kernels.layer_norm(x, w, b, out=out), x, weight, bias)
        for name in ("gelu", "gelu_tanh", "quick_gelu", "silu", "geglu"):
            yield f"{name} {shape}"
            compare(getattr(kernels, name), x)


def main() -> None:
    if len(sys.argv) > 1:
        x = guarded(np.zeros(1024, np.float32), at_end=True)
        np.lib.stride_tricks.as_strided(x, (2000,)).sum()
        return
    assert address(guarded(np.zeros(3, np.float16), at_end=True)) % mmap.PAGESIZE == mmap.PAGESIZE - 6
    for cases in (
        products,
        low_products,
        convolutions,
        winograd_convolutions,
        low_rank_updates,
        attentions,
        elementwise,
    ):
        for case in cases():
            print(case, flush=True)
    print("done")


if __name__ == "__main__":
    main()
