"""F(2x2, 3x3) with products of bfloat16 and of bytes, against a twin that rounds the same transformed values.

Inputs and filters are whole numbers of which the transforms are exact, so that both round the same.
"""

from functools import partial

import numpy as np
import pytest

from sd_numba import kernels
from sd_numba.kernels import winograd
from sd_numba.kernels.products.driver import Geometry
from sd_numba.kernels.products.microkernel import WIDTH
from tests import reference
from tests.kernels.common import (
    BF16,
    LOW,
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
from tests.kernels.winograd.test_winograd import CASES, CHUNK, RAGGED


def whole(seed: int, *shape: int, step: int = 1) -> np.ndarray:
    """Multiples of a step, up to 300 of them: too many digits for either precision."""
    return (np.random.RandomState(seed).randint(-300, 301, shape) * step).astype(np.float32)


def stored_for(precision: str, w: np.ndarray) -> np.ndarray | kernels.QuantizedWeight:
    """The weight as it is, or its values made bytes, with scales that change nothing."""
    if precision == "bf16":
        return w
    values = np.clip(w // 4, -127, 127).astype(np.int8)
    return kernels.QuantizedWeight(values, np.full(len(w), 4, np.float32))


def convolve(precision: str):
    return partial(kernels.conv2d, algorithm="winograd2", precision=precision)


def tolerance(channels: int) -> float:
    """The sums of bytes are exact, and scaled; all are transformed back."""
    return 2 * product_tolerance(16 * channels)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("case", CASES)
def test_matches_twin(case, precision):
    x_shape, c_out, padding, upsample = CASES[case]
    x, w, b = whole(0, *x_shape), whole(1, c_out, x_shape[3], 3, 3, step=4), normal(2, c_out, scale=1e4)
    w, options = stored_for(precision, w), {"padding": padding, "upsample": upsample}
    conv2d, close = convolve(precision), partial(assert_close, tolerance=tolerance(x_shape[3]))
    expected = reference.winograd2(x, w, b, precision=precision, **options)
    with fenced(*expected.shape) as out:
        assert conv2d(x, w, b, out=out, **options) is out
        close(out, expected)
    rows, residual = normal(3, x_shape[0], c_out, scale=1e4), whole(4, *expected.shape, step=1000)
    expected = reference.winograd2(x, w, rows, precision=precision, **options) + residual
    out = residual.copy()
    conv2d(x, w, rows, out=out, accumulate=True, activation="relu", **options)
    close(out, np.maximum(expected, 0))
    assert_same_on_any_threads(lambda: conv2d(x, w, b, **options))


@pytest.mark.parametrize("how", STORED)
@BF16
def test_bf16_takes_every_stored_weight(how):
    x, w = normal(0, 2, 9, 11, CHUNK + 3), store(normal(1, RAGGED, CHUNK + 3, 3, 3), how)
    found = convolve("bf16")(x, w)
    assert_close(found, kernels.conv2d(x, w), 1e-2)
    for offset in (1, 2, 6):
        assert_same_bits(convolve("bf16")(misaligned(x, offset), misaligned(w, offset)), found)


@pytest.mark.parametrize("precision", LOW)
def test_bytes_serve_both(precision):
    x, w = normal(0, 1, 10, 9, 70), kernels.quantize(normal(1, RAGGED, 70, 3, 3))
    found = convolve(precision)(x, w)
    assert_close(found, kernels.conv2d(x, w), {"bf16": 1e-2, "int8": 4e-2}[precision])
    moved = kernels.QuantizedWeight(misaligned(w.values, 1), w.scales)
    assert_same_bits(convolve(precision)(misaligned(x, 2), moved), found)


@BF16
def test_bf16_adds_updates():
    x, w = normal(0, 2, 10, 9, 40), normal(1, RAGGED, 40, 3, 3)
    adapted = kernels.add_low_rank(w, [(normal(2, RAGGED, 5), normal(3, 5, 40, 3, 3), 0.3)])
    merged = kernels.merge(adapted)
    assert_close(convolve("bf16")(x, adapted), kernels.conv2d(x, merged), 1e-2)


@pytest.mark.parametrize("precision", LOW)
def test_an_image_does_not_depend_on_others(precision):
    x, w = normal(0, 3, 13, 8, 33), kernels.quantize(normal(1, 20, 33, 3, 3))
    x[1] *= 1e6
    found = convolve(precision)(x, w)
    for i in range(3):
        assert_same_bits(found[i : i + 1], convolve(precision)(x[i : i + 1], w))


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_spread_to_their_tiles_and_no_further(bad, precision):
    x, w = normal(0, 1, 12, 12, 20), kernels.quantize(normal(1, 17, 20, 3, 3))
    clean = convolve(precision)(x, w)
    x[0, 5, 5, 7] = bad
    found = convolve(precision)(x, w)
    near = np.zeros((12, 12), bool)
    near[4:7, 4:7] = True
    assert not np.isfinite(found[0, near]).any()
    far = np.ones((12, 12), bool)
    far[2:8, 2:8] = False  # tiles of 2x2 outputs read 4x4 inputs
    assert_same_bits(found[0, far], clean[0, far])


@pytest.mark.parametrize("precision", LOW)
def test_zeros_and_tiny_values(precision):
    x, w = np.zeros((1, 8, 8, 20), np.float32), normal(1, 17, 20, 3, 3)
    w[3] = 0
    quantized = kernels.quantize(w)
    assert not convolve(precision)(x, quantized).any()
    x[...] = 1e-30
    found = convolve(precision)(x, quantized)
    assert np.isfinite(found).all() and not found[..., 3].any()
    assert_close(found[:, 1:7, 1:7], kernels.conv2d(x, quantized)[:, 1:7, 1:7], 5e-2)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("blocks", [0, 1])
def test_the_size_of_a_batch_changes_nothing(blocks, precision, monkeypatch):
    x, w = normal(0, 2, 21, 26, 50), kernels.quantize(normal(1, RAGGED, 50, 3, 3))
    expected = convolve(precision)(x, w)
    monkeypatch.setattr(winograd, "_BATCH", blocks * 50 * winograd.BLOCK)
    assert_same_bits(convolve(precision)(x, w), expected)


def test_the_choice():
    def choice(channels: int, side: int, precision: str) -> str:
        costs = winograd.costs(channels, channels, Geometry(2, side, side, side, side, 3, 3, 1, 1, 1), precision)
        return min(costs, key=lambda name: costs[name])

    for channels, side in ((320, 64), (640, 32), (1280, 16), (1280, 8)):
        assert choice(channels, side, "f32") == "winograd4"
        assert choice(channels, side, "bf16") == choice(channels, side, "int8") == "winograd2"
    up = winograd.costs(640, 640, Geometry(2, 32, 32, 64, 64, 3, 3, 1, 1, 1, 1), "bf16")
    assert min(up, key=lambda name: up[name]) == "winograd_up"


def test_bytes_need_bytes():
    x, w = normal(0, 1, 8, 8, 4), normal(1, 4, 4, 3, 3)
    if "int8" in kernels.precisions():
        with pytest.raises(TypeError, match="w: found ndarray, expected what quantize makes of it, for int8"):
            kernels.conv2d(x, w, precision="int8")
    with pytest.raises(ValueError, match="precision: found 'f16', expected one of f32, bf16, int8"):
        kernels.conv2d(x, w, precision="f16")


def test_other_algorithms_stay_exact():
    x, w = normal(0, 1, 8, 8, 4), kernels.quantize(normal(1, WIDTH, 4, 3, 3))
    for precision in kernels.precisions():
        for algorithm in ("direct", "winograd4"):
            exact = kernels.conv2d(x, w, algorithm=algorithm)
            assert_same_bits(kernels.conv2d(x, w, algorithm=algorithm, precision=precision), exact)
