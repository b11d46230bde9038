"""conv2d's second algorithm, Winograd's: against the NumPy twin, its accuracy, and when it is chosen."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from sd_numba import kernels
from sd_numba.kernels import checks, winograd
from sd_numba.kernels.machine.emit import LANES
from sd_numba.kernels.products.driver import Geometry
from sd_numba.kernels.products.microkernel import WIDTH
from tests import reference
from tests.kernels.common import (
    STORED,
    assert_close,
    assert_same_bits,
    assert_same_on_any_threads,
    fenced,
    misaligned,
    normal,
    store,
)

CHUNK, BLOCK = winograd.SMALL_CHUNK, winograd.BLOCK
RAGGED = WIDTH + LANES  # output channels that fill one panel and part of a second one

conv2d = partial(kernels.conv2d, algorithm="winograd4")
small_tiles = partial(kernels.conv2d, algorithm="winograd2")
phases = partial(kernels.conv2d, algorithm="winograd_up", upsample=True)
BOTH = [pytest.param(conv2d, id="4x4"), pytest.param(small_tiles, id="2x2")]
direct = partial(kernels.conv2d, algorithm="direct")


def tolerance(channels: int) -> float:
    """Allow this error relative to the largest of the results; the largest measured are 0.6 of it.

    The transforms cost a constant factor; the running sum over the channels is a random walk.
    """
    return 5e-7 * (3 + math.sqrt(channels))


# x shape, output channels, padding, upsample
CASES = {
    "one pixel": ((1, 1, 1, LANES), LANES, 1, False),
    "one pixel, batch": ((3, 1, 1, LANES), RAGGED, 1, False),
    "one row": ((1, 1, 30, LANES), LANES, 1, False),
    "one column": ((1, 30, 1, LANES), RAGGED, 1, False),
    "one tile": ((1, 4, 4, LANES), WIDTH, 1, False),
    "one pixel more than a tile": ((1, 5, 5, 2 * LANES), LANES, 1, False),
    "no padding, one output": ((1, 3, 3, LANES), LANES, 0, False),
    "no padding": ((3, 9, 8, 2 * LANES), RAGGED, 0, False),
    "padding 2": ((1, 7, 6, LANES), RAGGED, 2, False),
    "padding 2, one pixel": ((1, 1, 1, LANES), LANES, 2, False),
    "more padding than image": ((1, 2, 3, LANES), LANES, 9, False),
    "uneven padding": ((1, 5, 6, LANES), LANES, ((2, 0), (0, 3)), False),
    "right and bottom": ((3, 6, 7, LANES), RAGGED, ((0, 1), (0, 1)), False),
    "left and top": ((1, 10, 9, LANES), LANES, ((1, 0), (4, 0)), False),
    "upsample": ((1, 5, 4, LANES), LANES, 1, True),
    "upsample, batch": ((3, 3, 7, 3 * LANES), RAGGED, 1, True),
    "upsample, one pixel": ((1, 1, 1, LANES), LANES, 1, True),
    "upsample, no padding": ((1, 3, 2, LANES), LANES, 0, True),
    "upsample, uneven padding": ((1, 4, 3, LANES), LANES, ((0, 3), (2, 1)), True),
    "one chunk": ((1, 6, 5, CHUNK), LANES, 1, False),
    "a small last chunk": ((3, 6, 5, CHUNK + LANES), RAGGED, 1, False),
    "several chunks": ((1, 7, 6, 3 * CHUNK), 2 * WIDTH, 1, False),
    "several chunks, a small last one": ((1, 7, 6, 4 * CHUNK - LANES), RAGGED, 1, False),
    "one block of tiles": ((1, 24, 32, LANES), LANES, 1, False),
    "one tile more than a block": ((1, 28, 28, CHUNK + LANES), RAGGED, 1, False),
    "several blocks, across images": ((3, 21, 26, CHUNK + LANES), RAGGED, 1, False),
    "one channel": ((1, 9, 7, 1), 1, 1, False),
    "odd channels": ((3, 9, 10, LANES + 3), WIDTH + 5, 1, False),
    "fewer channels than a vector, upsample": ((2, 5, 6, 3), LANES - 1, 1, True),
    "many tiles, several chunks, odd channels": ((2, 26, 27, 2 * winograd._CHUNK + 5), LANES + 1, 1, False),
    "several blocks, upsample": ((3, 11, 9, LANES), LANES, 1, True),
    "upsample, padding 2": ((2, 5, 6, LANES), RAGGED, 2, True),
    "upsample, more padding than image": ((1, 1, 2, LANES), LANES, ((5, 4), (0, 7)), True),
    "upsample, one row of outputs": ((1, 1, 3, LANES), LANES, ((0, 1), (1, 1)), True),
    "upsample, several chunks, odd channels": ((2, 26, 25, winograd._CHUNK + 5), LANES + 1, 1, True),
    "upsample, several small chunks": ((1, 7, 6, 3 * CHUNK - LANES), RAGGED, 1, True),
}
EVERY = [
    *(pytest.param(conv2d, case, id=f"{case}-4x4") for case in CASES),
    *(pytest.param(small_tiles, case, id=f"{case}-2x2") for case in CASES),
    *(pytest.param(phases, case, id=f"{case}-phases") for case in CASES if CASES[case][3]),
]


@pytest.mark.parametrize(("conv2d", "case"), EVERY)
def test_matches_twin(conv2d, case):
    x_shape, c_out, padding, upsample = CASES[case]
    x, w, b = normal(0, *x_shape), normal(1, c_out, x_shape[3], 3, 3), normal(2, c_out)
    rows = normal(3, x_shape[0], c_out)  # a bias for each image
    options = {"padding": padding, "upsample": upsample}
    close = partial(assert_close, tolerance=tolerance(x_shape[3]))
    expected = reference.conv2d(x, w, b, **options)
    found = conv2d(x, w, b, **options)
    close(found, expected)
    with fenced(*expected.shape) as out:
        assert conv2d(x, kernels.pack_conv2d(w), b, **options, out=out) is out
        assert_same_bits(out, found)
    with fenced(*expected.shape) as out:
        conv2d(x, w, rows, **options, out=out)
        close(out, reference.conv2d(x, w, rows, **options))
    residual = normal(4, *expected.shape, scale=5)
    with fenced(*expected.shape) as out:
        out[...] = residual
        assert conv2d(x, w, rows, **options, out=out, accumulate=True) is out
        close(out, reference.conv2d(x, w, rows, **options) + residual)
    with fenced(*expected.shape, fill=3) as out:
        conv2d(x, w, **options, out=out, accumulate=True)
        close(out, reference.conv2d(x, w, **options) + 3)
    with fenced(*expected.shape) as out:
        conv2d(x, w, **options, out=out)
        close(out, reference.conv2d(x, w, **options))


@pytest.mark.parametrize("conv2d", BOTH)
@pytest.mark.parametrize("height", range(1, 14))
def test_sizes(height, conv2d):
    w, b = normal(1, LANES, LANES, 3, 3), normal(2, LANES)
    for width, padding in itertools.product(range(1, 14), (0, 1, 2)):
        if min(height, width) + 2 * padding >= 3:
            x = normal(0, 1, height, width, LANES)
            expected = reference.conv2d(x, w, b, padding=padding)
            with fenced(*expected.shape) as out:
                conv2d(x, w, b, padding=padding, out=out)
                assert_close(out, expected, tolerance(LANES))


@pytest.mark.parametrize("height", range(1, 11))
def test_sizes_of_enlarged_images(height):
    w, b = normal(1, LANES, LANES, 3, 3), normal(2, LANES)
    for width, top, left in itertools.product(range(1, 11), (0, 1, 2), (1, 2)):
        if 2 * height + top >= 3:
            x, padding = normal(0, 1, height, width, LANES), ((top, 0), (left, 0))
            expected = reference.conv2d(x, w, b, padding=padding, upsample=True)
            with fenced(*expected.shape) as out:
                phases(x, w, b, padding=padding, out=out)
                assert_close(out, expected, tolerance(LANES))


@pytest.mark.parametrize("conv2d", BOTH)
@pytest.mark.parametrize("c_in", sorted({*range(1, 8 * LANES, LANES // 2), CHUNK, CHUNK + LANES, 2 * CHUNK}))
def test_channels(c_in, conv2d):
    """Chunks of input channels and panels of output channels, full and not, are put together rightly."""
    x = normal(0, 2, 5, 6, c_in)
    for c_out in range(1, WIDTH + 4 * LANES, LANES // 2 + 1):
        w, b = normal(c_out, c_out, c_in, 3, 3), normal(2, 2, c_out)
        with fenced(2, 5, 6, c_out) as out:
            conv2d(x, w, b, out=out)
            assert_close(out, reference.conv2d(x, w, b), tolerance(c_in))


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize(
    ("c_in", "c_out"), [(LANES, LANES), (CHUNK, WIDTH), (CHUNK + LANES, RAGGED), (LANES + 3, RAGGED - 5)]
)
@pytest.mark.parametrize("conv2d", [*BOTH, pytest.param(phases, id="phases")])
def test_stored_weights(how, c_in, c_out, conv2d):
    x, w, b = normal(0, 1, 7, 6, c_in), store(normal(1, c_out, c_in, 3, 3), how), normal(2, c_out)
    found = conv2d(x, w, b)
    assert_close(found, reference.conv2d(x, w, b, upsample=found.shape[1] > 7), tolerance(c_in))
    assert_same_bits(conv2d(x, reference.widen(w), b), found)
    assert_same_bits(conv2d(x, kernels.pack_conv2d(w), b), found)
    for offset in (1, 2, 6):
        moved = misaligned(w, offset)  # read-only, too
        assert_same_bits(conv2d(x, moved, b), found)
        assert_same_bits(conv2d(x, kernels.pack_conv2d(moved), b), found)
        assert_same_bits(conv2d(misaligned(x, offset), moved, misaligned(b, offset)), found)


@pytest.mark.parametrize("case", ["several blocks, across images", "several blocks, upsample"])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_size_of_a_batch_changes_nothing(case, blocks, monkeypatch):
    (n, height, width, c_in), c_out, padding, upsample = CASES[case]
    x, w, b = normal(0, n, height, width, c_in), normal(1, c_out, c_in, 3, 3), normal(2, n, c_out)
    out = normal(3, *reference.conv2d(x, w, b, padding=padding, upsample=upsample).shape)
    expected = conv2d(x, w, b, padding=padding, upsample=upsample, out=out.copy(), accumulate=True)
    monkeypatch.setattr(winograd, "_BATCH", blocks * 4 * c_in * BLOCK)
    conv2d(x, w, b, padding=padding, upsample=upsample, out=out, accumulate=True)
    assert_same_bits(out, expected)


def test_the_size_of_a_batch_changes_nothing_for_enlarged_images(monkeypatch):
    x, w, b = normal(0, 3, 11, 19, CHUNK + 3), normal(1, RAGGED, CHUNK + 3, 3, 3), normal(2, 3, RAGGED)
    expected = phases(x, w, b)
    monkeypatch.setattr(winograd, "_BATCH", 25 * 4 * (CHUNK + 3) * (BLOCK // 25))
    assert_same_bits(phases(x, w, b), expected)


def test_outputs_past_the_caches_are_the_same(monkeypatch):
    x, w, b = normal(0, 2, 9, 10, CHUNK), normal(1, RAGGED, CHUNK, 3, 3), normal(2, RAGGED)
    expected = [convolve(x, w, b) for convolve in (conv2d, small_tiles, phases)]
    monkeypatch.setattr(checks, "_STREAM", 0)
    for convolve, right in zip((conv2d, small_tiles, phases), expected, strict=True):
        assert_same_bits(convolve(x, w, b), right)  # new arrays start on a cache line, so vectors go past the caches
        out = misaligned(np.zeros_like(right), 4)
        out.flags.writeable = True
        assert_same_bits(convolve(x, w, b, out=out), right)


@pytest.mark.parametrize(("convolve", "case"), EVERY)
def test_all_steps_at_once_or_one_after_the_other(convolve, case, monkeypatch):
    """Convolutions between few channels do all steps for a block at a time: the same bits."""
    x_shape, c_out, padding, upsample = CASES[case]
    x, w, b = normal(0, *x_shape), normal(1, c_out, x_shape[3], 3, 3), normal(2, x_shape[0], c_out)
    options = {"padding": padding, "upsample": upsample, "activation": "relu"}
    found = convolve(x, w, b, **options)
    monkeypatch.setattr(winograd, "_NARROW", 0)
    assert_same_bits(convolve(x, w, b, **options), found)


@pytest.mark.parametrize("case", ["one pixel", "several chunks", "several blocks, across images", "upsample, batch"])
def test_threads_change_nothing(case):
    x_shape, c_out, padding, upsample = CASES[case]
    x, w, b = normal(0, *x_shape), normal(1, c_out, x_shape[3], 3, 3), normal(2, x_shape[0], c_out)
    assert_same_on_any_threads(lambda: conv2d(x, w, b, padding=padding, upsample=upsample))
    assert_same_on_any_threads(lambda: phases(x, w, b, padding=max(padding, 1)))


def test_callers_in_two_threads_do_not_meet():
    cases = [(normal(i, 1, 9 + i, 30, LANES * (i + 1)), normal(i, WIDTH, LANES * (i + 1), 3, 3)) for i in range(4)]
    expected = [conv2d(x, w) for x, w in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, right in zip(pool.map(lambda case: conv2d(*case), cases), expected, strict=True):
                assert_same_bits(found, right)


def test_upsampling_is_repetition():
    x, w = normal(0, 2, 7, 5, LANES), normal(1, RAGGED, LANES, 3, 3)
    assert_same_bits(conv2d(x, w, upsample=True), conv2d(x.repeat(2, axis=1).repeat(2, axis=2), w))


@pytest.mark.parametrize("size", [(3, 5), (13, 22), (30, 30)])  # tiles: 2, 24 (two images fill a block), 64
def test_images_do_not_depend_on_their_neighbours(size):
    x, w, b = normal(0, 5, *size, CHUNK + LANES), normal(1, RAGGED, CHUNK + LANES, 3, 3), normal(2, 5, RAGGED)
    whole = conv2d(x, w, b)
    for i in range(5):
        assert_same_bits(conv2d(x[i : i + 1], w, b[i]), whole[i : i + 1])
    assert_same_bits(conv2d(x[1:4], w, b[1:4]), whole[1:4])
    x[2] = np.nan
    found = conv2d(x, w, b)
    assert np.isnan(found[2]).all()
    assert_same_bits(np.delete(found, 2, 0), np.delete(whole, 2, 0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [(0, 0), (3, 4), (5, 6), (8, 9)])
def test_special_values_in_x_stay_in_the_tiles_that_read_them(bad, where):
    """What depends on a bad pixel is not finite; in the same tiles other pixels may be lost, none elsewhere."""
    x, w, b = normal(0, 1, 9, 10, CHUNK + LANES), normal(1, RAGGED, CHUNK + LANES, 3, 3), normal(2, RAGGED)
    clean = conv2d(x, w, b)
    x[(0, *where, CHUNK)] = bad
    found = conv2d(x, w, b)
    rows, columns = (np.arange(size) for size in found.shape[1:3])
    near = np.ix_(abs(rows - where[0]) <= 1, abs(columns - where[1]) <= 1)
    assert not np.isfinite(found[0][near]).any()
    # The tile of outputs 4i to 4i + 3 reads pixels 4i - 1 to 4i + 4.
    row_hit, column_hit = (abs(i // 4 * 4 + 1.5 - p) < 3 for i, p in ((rows, where[0]), (columns, where[1])))
    spared = ~(row_hit[:, None] & column_hit)
    assert spared.any()
    assert_same_bits(found[0][spared], clean[0][spared])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", STORED)
def test_special_values_in_a_filter_stay_in_its_channel(bad, how):
    x, w = normal(0, 2, 6, 7, CHUNK + LANES), normal(1, RAGGED, CHUNK + LANES, 3, 3)
    clean = conv2d(x, store(w, how))
    w[LANES + 1, CHUNK + 1, 1, 1] = bad
    found = conv2d(x, store(w, how))
    assert not np.isfinite(found[..., LANES + 1]).any()
    assert_same_bits(np.delete(found, LANES + 1, 3), np.delete(clean, LANES + 1, 3))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_special_values_in_bias_and_residual(bad):
    x, w, b = normal(0, 2, 6, 7, LANES), normal(1, RAGGED, LANES, 3, 3), normal(2, 2, RAGGED)
    out = normal(3, 2, 6, 7, RAGGED)
    expected = conv2d(x, w, b, out=out.copy(), accumulate=True)
    b[1, 3], out[0, 5, 6, WIDTH] = bad, bad
    expected[1, :, :, 3], expected[0, 5, 6, WIDTH] = bad, bad
    np.testing.assert_array_equal(conv2d(x, w, b, out=out, accumulate=True), expected)


def test_zeros_give_the_bias():
    w, b = normal(1, RAGGED, LANES, 3, 3), normal(2, RAGGED)
    found = conv2d(np.zeros((1, 6, 7, LANES), np.float32), w, b)
    assert_same_bits(found, np.ascontiguousarray(np.broadcast_to(b, (1, 6, 7, RAGGED))))
    np.testing.assert_array_equal(conv2d(normal(0, 1, 6, 7, LANES), np.zeros_like(w), b), found)


def test_empty_batch():
    x, w = np.zeros((0, 6, 5, LANES), np.float32), normal(0, RAGGED, LANES, 3, 3)
    assert conv2d(x, w).shape == (0, 6, 5, RAGGED)
    assert conv2d(x, kernels.pack_conv2d(w), upsample=True).shape == (0, 12, 10, RAGGED)


# --- accuracy ---------------------------------------------------------------------------------------------------------

# Channels of the 3x3 convolutions at stride 1 of SD 1.5's UNet and VAE.
UNET = [
    *[(320, 320), (640, 320), (960, 320)],
    *[(320, 640), (640, 640), (960, 640), (1280, 640), (1920, 640)],
    *[(640, 1280), (1280, 1280), (1920, 1280), (2560, 1280)],
]
VAE = [(512, 512), (512, 256), (256, 256), (256, 128), (128, 128)]


def exact(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Convolve in float64, with padding 1, as one product; returns float64."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))  # (n, h, w, c, 3, 3)
    result = patches.reshape(-1, w[0].size) @ w.astype(np.float64).reshape(len(w), -1).T
    return result.reshape(*x.shape[:3], -1)


@pytest.mark.parametrize(("c_in", "c_out"), UNET + VAE)
def test_accuracy(c_in, c_out):
    """Inputs as after a group norm and SiLU, filters that keep the variance, 8x8 pixels.

    Largest errors measured, relative to the largest value, alike on all rows of the dispatch table: direct 2.7e-7 (128
    channels) to 4.9e-7, Winograd 8e-7 (128) to 1.9e-6 (2560). Root mean squares: to 8.2e-8, to 2.2e-7.
    """
    random = np.random.default_rng(c_in + c_out)
    x = random.standard_normal((1, 8, 8, c_in), np.float32)
    x /= 1 + np.exp(-x)
    w = random.standard_normal((c_out, c_in, 3, 3), np.float32) / np.float32(math.sqrt(9 * c_in))
    expected = exact(x, w)
    for convolve, largest, typical in (
        (direct, 1e-6, 1.6e-7),
        (small_tiles, 1.5e-6, 2.4e-7),
        (conv2d, 4e-6, 4.5e-7),
    ):
        error = (convolve(x, w) - expected) / np.abs(expected).max()
        assert np.abs(error).max() < largest
        assert np.sqrt(np.square(error).mean()) < typical
    x = np.ascontiguousarray(x[:, 2:6, 2:6])
    expected = exact(x.repeat(2, axis=1).repeat(2, axis=2), w)
    error = (phases(x, w) - expected) / np.abs(expected).max()
    assert np.abs(error).max() < 1.5e-6
    assert np.sqrt(np.square(error).mean()) < 2.4e-7


# --- the choice of an algorithm ---------------------------------------------------------------------------------------


def geometry(height: int, width: int, taps: int = 3, stride: int = 1, images: int = 1) -> Geometry:
    """A convolution that makes height x width pixels."""
    return Geometry(images, height * stride, width * stride, height, width, taps, taps, stride, taps // 2, taps // 2)


def choice(channels: int, c_out: int, shape: Geometry) -> str:
    costs = winograd.costs(channels, c_out, shape)
    return min(costs, key=lambda name: costs[name])


def test_the_choice():
    for channels in (128, 320, 1280, 2560):
        for side in range(8, 129, 4):
            assert choice(channels, 320, geometry(side, side)) == "winograd4"
        for tiny in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 64), (64, 1)):
            assert choice(channels, 320, geometry(*tiny)) == "direct"
    assert choice(320, 320, geometry(6, 6)) == "winograd2"  # 9 small tiles, or 4 large ones of which half is wasted
    for other in (geometry(64, 64, stride=2), geometry(64, 64, taps=1), geometry(64, 64, taps=5)):
        assert list(winograd.costs(320, 320, other)) == ["direct"]
    for side in (16, 32, 64, 128, 256):  # before the enlargement
        assert choice(320, 320, Geometry(1, side, side, 2 * side, 2 * side, 3, 3, 1, 1, 1, 1)) == "winograd_up"
    few = LANES // 4  # images have 3 channels, latents 4
    assert choice(few, 128, geometry(512, 512)) == "direct"
    assert choice(320, few, geometry(64, 64)) == "direct"


def test_the_choice_does_not_depend_on_the_batch():
    for height, width in itertools.product(range(1, 20), repeat=2):
        answers = {choice(320, 640, geometry(height, width, images=images)) for images in (1, 2, 100)}
        assert len(answers) == 1


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("how", STORED)
def test_auto_is_one_of_them(how, upsample):
    """Images of any number, packed weights or not: each is computed as the choice for one image says."""
    w, b = store(normal(1, RAGGED, CHUNK, 3, 3), how), normal(2, RAGGED)
    chosen = set()
    for size in (1, 3, 4, 6, 8, 9):
        x, out_size = normal(0, 3, size, size, CHUNK), size << upsample
        name = choice(CHUNK, RAGGED, replace(geometry(out_size, out_size), enlarge=int(upsample)))
        chosen.add(name)
        expected = kernels.conv2d(x, w, b, upsample=upsample, algorithm=name)
        assert_same_bits(kernels.conv2d(x, w, b, upsample=upsample), expected)
        assert_same_bits(kernels.conv2d(x, kernels.pack_conv2d(w), b, upsample=upsample), expected)
        assert_same_bits(kernels.conv2d(x[:1], w, b, upsample=upsample), expected[:1])
    assert {"direct", "winograd4"} <= chosen


def test_winograd_is_the_better_of_the_two():
    w = normal(1, LANES, LANES, 3, 3)
    for size, better in ((6, small_tiles), (8, conv2d)):
        x = normal(0, 1, size, size, LANES)
        assert_same_bits(kernels.conv2d(x, w, algorithm="winograd"), better(x, w))


def test_auto_takes_the_direct_one_where_only_that_can():
    x, w = normal(0, 1, 16, 16, LANES), normal(1, LANES, LANES, 3, 3)
    assert_same_bits(kernels.conv2d(x, w, stride=2), direct(x, w, stride=2))


@pytest.mark.parametrize(("taps", "stride"), [(3, 2), (1, 1), (5, 1)])
@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("algorithm", ["winograd", "winograd2", "winograd4", "winograd_up"])
def test_refuses_what_it_cannot_do(taps, stride, images, algorithm):
    x, w = normal(0, images, 8, 8, LANES), normal(1, LANES, LANES, taps, taps)
    message = rf"^algorithm: {algorithm} cannot do {taps}x{taps} filters with stride {stride} .*; expected 3x3 .*$"
    for weight in (w, kernels.pack_conv2d(w)):
        with pytest.raises(ValueError, match=message):
            kernels.conv2d(x, weight, stride=stride, algorithm=algorithm)


def test_phases_are_for_enlarged_images():
    x, w = normal(0, 1, 8, 8, LANES), normal(1, LANES, LANES, 3, 3)
    with pytest.raises(ValueError, match=r"^algorithm: winograd_up cannot .* without upsampling; .* and upsampling$"):
        kernels.conv2d(x, w, algorithm="winograd_up")


@pytest.mark.parametrize("algorithm", ["fft", "", "Winograd", None, 4])
def test_refuses_an_unknown_algorithm(algorithm):
    x, w = normal(0, 1, 8, 8, LANES), normal(1, LANES, LANES, 3, 3)
    with pytest.raises(ValueError, match=r"^algorithm: found .*, expected one of auto, direct, winograd, .*$"):
        kernels.conv2d(x, w, algorithm=algorithm)
