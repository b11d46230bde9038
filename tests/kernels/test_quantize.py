"""quantize and QuantizedWeight: what is rounded, and that every float32 kernel reads it as what it stands for."""

import math
import sys

import numpy as np
import pytest

from sd_numba import kernels
from sd_numba.kernels.machine.emit import LANES
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
    product_tolerance,
    store,
)

SHAPES = [(1, 1), (3, 5), (70, 33), (1, 4097), (4097, 1), (7, 5, 3, 3), (65, 17, 1, 1), (2, 3, 5, 2)]


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_twin(shape, how):
    w = store(normal(0, *shape), how)
    found, expected = kernels.quantize(w), reference.quantize(w)
    assert (found.values.dtype, found.values.shape, found.shape) == (np.int8, shape, shape)
    assert found.values.flags.c_contiguous
    assert (found.scales.dtype, found.scales.shape) == (np.float32, shape[:1])
    assert_same_bits(found.scales, expected.scales)
    np.testing.assert_array_equal(found.values, expected.values)
    assert_same_bits(found.widen(), reference.widen(expected))
    assert found.nbytes == math.prod(shape) + 4 * shape[0]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_nothing_is_off_by_more_than_half_a_step(size):
    """And the largest value of each channel, with either sign, is 127 and comes back as it was."""
    w = normal(0, 200, 77, scale=size) * np.logspace(-3, 3, 200, dtype=np.float32)[:, None]
    found = kernels.quantize(w)
    assert np.abs(found.values.astype(int)).max(axis=1).tolist() == [127] * 200
    largest = np.abs(w).argmax(axis=1)[:, None]
    assert (np.abs(np.take_along_axis(found.values.astype(int), largest, 1)) == 127).all()
    back = found.widen()
    np.testing.assert_allclose(*(np.take_along_axis(a, largest, 1) for a in (back, w)), rtol=2e-7)
    steps = np.abs(back.astype(np.float64) - w) / found.scales[:, None].astype(np.float64)
    assert steps.max() <= 0.5 + 127 * 2e-7
    assert steps.max() > 0.49


def test_ties_go_to_the_even():
    w = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5], [-127, 125.5, 0, -0.0, 0.49, -0.51, 63.5, 1]])
    for scale in (1, 0.25, 2.0**20):
        found = kernels.quantize((w * scale).astype(np.float32))
        expected = [[127, 0, 2, 2, 0, -2, -2, 126], [-127, 126, 0, 0, 0, -1, 64, 1]]
        np.testing.assert_array_equal(found.values, expected)
        np.testing.assert_array_equal(found.scales, [scale, scale])


def test_zeros_and_what_is_not_finite():
    """They stay in their channel, and come out of a product as such."""
    w = normal(0, 6, 9)
    clean = kernels.quantize(w)
    w[1] = 0
    w[2, 3], w[3, 8], w[4, 0] = np.nan, np.inf, -np.inf
    w[5] = -0.0
    with np.errstate(all="raise"):
        found = kernels.quantize(w)
    assert not found.values[[1, 2, 5]].any()
    np.testing.assert_array_equal(found.scales[[1, 2, 3, 4, 5]], np.float32([0, np.nan, np.inf, np.inf, 0]))
    np.testing.assert_array_equal(found.values[0], clean.values[0])
    assert found.scales[0] == clean.scales[0]
    y = kernels.linear(normal(1, 4, 9), found)
    assert not np.isfinite(y[:, 2:5]).any()
    assert not y[:, [1, 5]].any()
    assert_close(y[:, :1], reference.linear(normal(1, 4, 9), w[:1]), 1 / 64)


def test_the_least_values():
    """A channel of numbers near the least of float32 becomes zeros, or what it is: never anything larger."""
    for value in (1e-36, 1e-37, 1.2e-38, 1e-40, 1.4e-45):
        w = np.full((1, 3), value, np.float32)
        w[0, 1] *= -1
        assert (np.abs(kernels.quantize(w).widen()) <= np.abs(w) * np.float32(1.01)).all()


def test_many_channels_are_rounded_piece_by_piece(monkeypatch):
    w = normal(0, 50, 40)
    expected = kernels.quantize(w)
    for block in (1, 40, 41, 120, 10**6):
        # `kernels.quantize` is the function, not the module
        monkeypatch.setattr(sys.modules["sd_numba.kernels.quantize"], "_BLOCK", block)
        found = kernels.quantize(w)
        np.testing.assert_array_equal(found.values, expected.values)
        assert_same_bits(found.scales, expected.scales)


def test_scales_are_copied_and_values_are_not():
    values, scales = np.ones((3, 4), np.int8), np.ones(3, np.float32)
    w = kernels.QuantizedWeight(misaligned(values, 1), scales)
    scales[:] = 7
    np.testing.assert_array_equal(w.widen(), values)
    values = np.ones((3, 4), np.int8)
    assert np.may_share_memory(kernels.QuantizedWeight(values, scales).values, values)
    assert w.scales.ctypes.data % 64 == 0


# --- in float32 products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (4, 5, 3), (7, 16, 16), (13, 50, 72), (6, 401, 65), (100, 64, 64), (2500, 40, 70)]
)
def test_linear(m, k, n):
    """The same bits as with the weight that it stands for."""
    x, w, b = normal(0, m, k), kernels.quantize(normal(1, n, k)), normal(2, n)
    expected = kernels.linear(x, w.widen(), b)
    assert_close(expected, reference.linear(x, w, b), product_tolerance(k))
    with fenced(m, n) as out:
        kernels.linear(x, w, b, out=out)
        assert_same_bits(out, expected)
    for offset in (1, 2, 6):
        moved = kernels.QuantizedWeight(misaligned(w.values, offset), misaligned(w.scales, offset))
        assert_same_bits(kernels.linear(x, moved, b), expected)
        assert_same_bits(kernels.linear(x, kernels.pack_linear(moved), b), expected)
    assert_same_on_any_threads(lambda: kernels.linear(x, w, b))


@pytest.mark.parametrize("widths", [(1, 1), (5, 3), (LANES, 7), (700, 1, 33)])
def test_several_inputs(widths):
    x, w = normal(0, 7, sum(widths)), kernels.quantize(normal(1, 70, sum(widths)))
    parts = tuple(np.ascontiguousarray(part) for part in np.split(x, np.cumsum(widths)[:-1], axis=-1))
    assert_same_bits(kernels.linear(parts, w), kernels.linear(parts, w.widen()))


@pytest.mark.parametrize("n", [6, 70, WIDTH + 2, 640])
def test_geglu(n):
    x, w, b = normal(0, 13, 50), kernels.quantize(normal(1, n, 50)), normal(2, n)
    expected = kernels.linear(x, w.widen(), b, activation="geglu")
    assert_close(expected, reference.geglu(reference.linear(x, w, b)), 3 * product_tolerance(50))
    assert_same_bits(kernels.linear(x, w, b, activation="geglu"), expected)
    assert_same_bits(kernels.linear(x, kernels.pack_linear(w, gated=True), b, activation="geglu"), expected)


# x shape, w shape, upsample, algorithm
CONVOLUTIONS = {
    "1x1": ((2, 7, 5, 17), (65, 17, 1, 1), False, "direct"),
    "3x3": ((1, 13, 11, 20), (72, 20, 3, 3), False, "direct"),
    "several chunks": ((1, 4, 4, 770), (8, 770, 3, 3), False, "direct"),
    "upsample": ((2, 3, 4, 20), (63, 20, 3, 3), True, "direct"),
    "one channel": ((1, 9, 7, 1), (1, 1, 3, 3), False, "winograd4"),
    "tiles of 2x2": ((1, 6, 6, LANES), (WIDTH + LANES, LANES, 3, 3), False, "winograd2"),
    "tiles of 4x4": ((2, 9, 10, LANES + 3), (WIDTH + 5, LANES + 3, 3, 3), False, "winograd4"),
    "many tiles": ((1, 26, 27, 300), (9, 300, 3, 3), False, "winograd4"),
    "narrow": ((1, 64, 66, 3), (5, 3, 3, 3), False, "winograd4"),
    "phases": ((2, 5, 6, LANES + 1), (WIDTH + LANES - 3, LANES + 1, 3, 3), True, "winograd_up"),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d(case):
    x_shape, w_shape, upsample, algorithm = CONVOLUTIONS[case]
    x, w, b = normal(0, *x_shape), kernels.quantize(normal(1, *w_shape)), normal(2, x_shape[0], w_shape[0])
    options = {"upsample": upsample, "algorithm": algorithm}
    expected = kernels.conv2d(x, w.widen(), b, **options)
    twin = reference.conv2d(x, w, b, upsample=upsample)
    assert_close(expected, twin, 5e-7 * (3 + 3 * math.sqrt(x_shape[3])))
    with fenced(*expected.shape) as out:
        kernels.conv2d(x, w, b, **options, out=out)
        assert_same_bits(out, expected)
    packed = kernels.pack_conv2d(kernels.QuantizedWeight(misaligned(w.values, 2), w.scales))
    assert_same_bits(kernels.conv2d(x, packed, b, **options), expected)


def test_the_output_may_not_be_the_weight():
    memory = np.zeros(64, np.float32)
    w = kernels.QuantizedWeight(memory.view(np.int8)[:32].reshape(4, 8), np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"^out: shares memory"):
        kernels.linear(normal(0, 6, 8), w, out=memory[4:28].reshape(6, 4))


VALUES, SCALES = np.ones((4, 8), np.int8), np.ones(4, np.float32)
BAD = {
    "values are a list": (TypeError, "values", ([[1]], SCALES)),
    "values are uint8": (TypeError, "values", (VALUES.view(np.uint8), SCALES)),
    "values are float32": (TypeError, "values", (VALUES.astype(np.float32), SCALES)),
    "values are a vector": (ValueError, "values", (VALUES[0], SCALES)),
    "values are three-dimensional": (ValueError, "values", (VALUES[..., None], SCALES)),
    "values are a scalar": (ValueError, "values", (np.ones((), np.int8), SCALES)),
    "values are transposed": (ValueError, "values", (np.asfortranarray(VALUES), SCALES)),
    "values are strided": (ValueError, "values", (VALUES[:, ::2], SCALES)),
    "values are empty": (ValueError, "values", (VALUES[:0], SCALES[:0])),
    "rows are empty": (ValueError, "values", (VALUES[:, :0].copy(), SCALES)),
    "scales are a list": (TypeError, "scales", (VALUES, [1.0] * 4)),
    "scales are float64": (TypeError, "scales", (VALUES, SCALES.astype(np.float64))),
    "scales are too few": (ValueError, "scales", (VALUES, SCALES[:3])),
    "scales are a column": (ValueError, "scales", (VALUES, SCALES[:, None])),
    "scales are strided": (ValueError, "scales", (VALUES, np.ones(8, np.float32)[::2])),
}


@pytest.mark.parametrize("case", BAD)
def test_quantized_weight_refuses(case):
    error, name, args = BAD[case]
    with pytest.raises(error, match=f"^{name}: found .*expected"):
        kernels.QuantizedWeight(*args)


W = normal(0, 4, 8)


@pytest.mark.parametrize(
    ("error", "w"),
    [
        (TypeError, [[1.0]]),
        (TypeError, W.astype(np.float64)),
        (TypeError, W.astype(np.int8)),
        (TypeError, kernels.quantize(W)),
        (TypeError, kernels.pack_linear(W)),
        (TypeError, kernels.add_low_rank(W, [(normal(1, 4, 2), normal(2, 2, 8), 1.0)])),
        (ValueError, W[0]),
        (ValueError, W[..., None]),
        (ValueError, W.T),
        (ValueError, W[:0]),
        (ValueError, W[:, :0].copy()),
    ],
)
def test_quantize_refuses(error, w):
    with pytest.raises(error, match=r"^w: found .*expected"):
        kernels.quantize(w)


def test_a_quantized_weight_must_fit_the_kernel():
    rows, filters = kernels.quantize(W), kernels.quantize(normal(0, 4, 8, 3, 3))
    x, image = normal(1, 6, 8), normal(1, 1, 5, 5, 8)
    for call in (
        lambda: kernels.linear(x, filters),
        lambda: kernels.linear(x[:, :7].copy(), rows),
        lambda: kernels.conv2d(image, rows),
        lambda: kernels.pack_linear(filters),
        lambda: kernels.pack_conv2d(rows),
        lambda: kernels.linear(x, kernels.quantize(W[:3]), activation="geglu"),
    ):
        with pytest.raises(ValueError, match=r"^w: found .*expected"):
            call()
