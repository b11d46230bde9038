"""conv2d and pack_conv2d against their NumPy twins: the direct algorithm, and what conv2d refuses."""

import math
from functools import partial

import numpy as np
import pytest

from sd_numba import kernels
from sd_numba.kernels.products import driver
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

conv2d = partial(kernels.conv2d, algorithm="direct")

# x shape, w shape, stride, padding, upsample
CASES = {
    "one pixel, one channel": ((1, 1, 1, 1), (1, 1, 1, 1), 1, 0, False),
    "one pixel, 3x3": ((1, 1, 1, 3), (4, 3, 3, 3), 1, 1, False),
    "one pixel, stride 2": ((3, 1, 1, 5), (3, 5, 3, 3), 2, 1, False),
    "one channel": ((3, 5, 7, 1), (3, 1, 3, 3), 1, 1, False),
    "one row": ((1, 1, 30, 6), (63, 6, 3, 3), 1, 1, False),
    "one column": ((1, 30, 1, 6), (64, 6, 3, 3), 1, 1, False),
    "1x1": ((3, 7, 5, 17), (65, 17, 1, 1), 1, 0, False),
    "1x1, stride 2": ((1, 7, 6, 16), (72, 16, 1, 1), 2, 0, False),
    "1x1, padded": ((1, 3, 4, 5), (4, 5, 1, 1), 1, 2, False),
    "3x3": ((1, 13, 11, 20), (72, 20, 3, 3), 1, 1, False),
    "3x3, batch": ((3, 9, 10, 12), (65, 12, 3, 3), 1, 1, False),
    "3x3, one output": ((1, 12, 13, 16), (1, 16, 3, 3), 1, 1, False),
    "3x3, no padding": ((1, 9, 4, 17), (65, 17, 3, 3), 1, 0, False),
    "3x3, stride 2": ((3, 10, 7, 9), (17, 9, 3, 3), 2, 1, False),
    "3x3, stride 2, right and bottom": ((1, 9, 4, 17), (65, 17, 3, 3), 2, ((0, 1), (0, 1)), False),
    "3x3, stride 3": ((1, 10, 14, 8), (16, 8, 3, 3), 3, 1, False),
    "stride beyond the filter": ((1, 9, 9, 3), (5, 3, 2, 2), 5, 0, False),
    "2x2": ((1, 6, 5, 7), (8, 7, 2, 2), 2, 0, False),
    "4x4, even": ((1, 8, 7, 6), (12, 6, 4, 4), 2, 1, False),
    "5x5, stride 3": ((3, 8, 6, 16), (64, 16, 5, 5), 3, 2, False),
    "7x1": ((1, 11, 3, 5), (63, 5, 7, 1), 1, ((3, 3), (0, 0)), False),
    "1x7": ((1, 3, 11, 5), (4, 5, 1, 7), 1, ((0, 0), (3, 3)), False),
    "filter as large as the image": ((3, 6, 5, 4), (9, 4, 6, 5), 1, 0, False),
    "uneven padding": ((1, 5, 6, 12), (33, 12, 3, 3), 1, ((2, 0), (0, 3)), False),
    "more padding than image": ((1, 2, 3, 4), (6, 4, 3, 3), 1, 5, False),
    "several chunks, 1x1": ((1, 6, 5, 400), (72, 400, 1, 1), 1, 0, False),
    "several chunks, 3x3": ((1, 4, 4, 770), (8, 770, 3, 3), 1, 1, False),
    "many pixels": ((1, 41, 43, 8), (12, 8, 3, 3), 1, 1, False),
    "upsample": ((1, 5, 4, 9), (20, 9, 3, 3), 1, 1, True),
    "upsample, batch": ((3, 3, 7, 16), (65, 16, 3, 3), 1, 1, True),
    "upsample, one pixel": ((1, 1, 1, 3), (4, 3, 3, 3), 1, 1, True),
    "upsample, 1x1": ((1, 3, 2, 5), (7, 5, 1, 1), 1, 0, True),
    "upsample, 5x5, stride 2, uneven": ((1, 4, 3, 6), (10, 6, 5, 5), 2, ((1, 3), (2, 0)), True),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_twin(case):
    x_shape, w_shape, stride, padding, upsample = CASES[case]
    x, w, b = normal(0, *x_shape), normal(1, *w_shape), normal(2, w_shape[0])
    rows = normal(3, x_shape[0], w_shape[0])  # a bias for each image
    options = {"stride": stride, "padding": padding, "upsample": upsample}
    tolerance = product_tolerance(math.prod(w_shape[1:]))
    expected = reference.conv2d(x, w, b, **options)
    found = conv2d(x, w, b, **options)
    assert_close(found, expected, tolerance)
    with fenced(*expected.shape) as out:
        assert conv2d(x, kernels.pack_conv2d(w), b, **options, out=out) is out
        assert_same_bits(out, found)
    with fenced(*expected.shape) as out:
        conv2d(x, w, rows, **options, out=out)
        assert_close(out, reference.conv2d(x, w, rows, **options), tolerance)
    with fenced(*expected.shape, fill=3) as out:
        conv2d(x, w, rows, **options, out=out, accumulate=True)
        assert_close(out, reference.conv2d(x, w, rows, **options) + 3, tolerance)
    with fenced(*expected.shape) as out:
        conv2d(x, w, **options, out=out)
        assert_close(out, reference.conv2d(x, w, **options), tolerance)


RELU_SHAPES = [((3, 5, 7, 1), 1), ((1, 13, 11, 20), 72), ((2, 9, 10, 16), 3), ((1, 256, 256, 4), 64)]


@pytest.mark.parametrize(("x_shape", "c_out"), RELU_SHAPES)
@pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4", "winograd_up"])
def test_relu_comes_last(algorithm, x_shape, c_out):
    """After the bias, and after what is added: the same bits as without it, and zeros; NaN stays NaN."""
    x, w, b = normal(0, *x_shape), normal(1, c_out, x_shape[3], 3, 3), normal(2, c_out)
    options = {"algorithm": algorithm, "upsample": algorithm == "winograd_up"}
    if options["upsample"]:
        x = np.ascontiguousarray(x[:, : -(-x_shape[1] // 2), : -(-x_shape[2] // 2)])
    x[0, 0, 0, 0] = np.nan
    plain = kernels.conv2d(x, w, b, **options)
    assert np.isnan(plain[0, 0, 0]).all()
    assert_same_bits(kernels.conv2d(x, w, b, **options, activation="relu"), np.maximum(plain, 0))
    with fenced(*plain.shape, fill=0.5) as out:
        kernels.conv2d(x, w, b, **options, out=out, accumulate=True, activation="relu")
        np.testing.assert_array_equal(out, np.maximum(plain + np.float32(0.5), 0))


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("w_shape", [(1, 1, 3, 3), (3, 5, 1, 1), (65, 17, 3, 3), (16, 16, 1, 1), (20, 400, 3, 1)])
def test_stored_weights(how, w_shape):
    x, w, b = normal(0, 1, 5, 6, w_shape[1]), store(normal(1, *w_shape), how), normal(2, w_shape[0])
    found = conv2d(x, w, b)
    assert_close(found, reference.conv2d(x, w, b), product_tolerance(math.prod(w_shape[1:])))
    assert_same_bits(conv2d(x, kernels.pack_conv2d(w), b), found)
    for offset in (1, 2, 6):
        moved = misaligned(w, offset)
        assert_same_bits(conv2d(x, moved, b), found)
        assert_same_bits(conv2d(x, kernels.pack_conv2d(moved), b), found)
        assert_same_bits(conv2d(misaligned(x, offset), moved, misaligned(b, offset)), found)


@pytest.mark.parametrize("how", STORED)
def test_the_blocking_changes_nothing(how, monkeypatch):
    """However many rows a task has, packed weights or not, the result is the same."""
    x, w, b = normal(0, 2, 5, 4, 900), store(normal(1, 200, 900, 3, 3), how), normal(2, 2, 200)
    packed = kernels.pack_conv2d(w)
    expected = conv2d(x, packed, b)
    for rows in (1, 7, 1000):
        monkeypatch.setattr(driver, "_PACK_ROWS", rows)
        assert_same_bits(conv2d(x, w, b), expected)
        assert_same_bits(conv2d(x, packed, b), expected)


@pytest.mark.parametrize("case", ["one row", "3x3, batch", "several chunks, 3x3", "many pixels", "upsample, batch"])
def test_threads_change_nothing(case):
    x_shape, w_shape, stride, padding, upsample = CASES[case]
    x, w = normal(0, *x_shape), normal(1, *w_shape)
    b = normal(2, x_shape[0], w_shape[0])
    assert_same_on_any_threads(lambda: conv2d(x, w, b, stride, padding, upsample=upsample))


def test_images_do_not_depend_on_their_neighbours():
    x, w, b = normal(0, 3, 5, 7, 10), normal(1, 20, 10, 3, 3), normal(2, 3, 20)
    whole = conv2d(x, w, b)
    for i in range(3):
        assert_same_bits(conv2d(x[i : i + 1], w, b[i]), whole[i : i + 1])


def test_one_tap_is_a_linear_layer():
    x, w, b = normal(0, 2, 5, 7, 30), normal(1, 20, 30, 1, 1), normal(2, 20)
    assert_same_bits(conv2d(x, w, b, padding=0), kernels.linear(x, w.reshape(20, 30), b))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_special_values_reach_what_they_should(bad):
    x, w, b = normal(0, 1, 8, 9, 5), np.abs(normal(1, 18, 5, 3, 3)), normal(2, 18)
    clean = conv2d(x, w, b)
    x[0, 4, 5, 2] = bad
    found = conv2d(x, w, b)
    hit = np.zeros((1, 8, 9), bool)
    hit[0, 3:6, 4:7] = True
    np.testing.assert_array_equal(found[hit], np.full((9, 18), bad, np.float32))
    assert_same_bits(found[~hit], clean[~hit])


def test_empty_batch():
    x, w = np.zeros((0, 6, 5, 3), np.float32), normal(0, 4, 3, 3, 3)
    assert conv2d(x, w).shape == (0, 6, 5, 4)
    assert conv2d(x, kernels.pack_conv2d(w), stride=2, upsample=True).shape == (0, 6, 5, 4)


X, W, B = normal(0, 2, 5, 6, 3), normal(1, 4, 3, 3, 3), normal(2, 4)
READ_ONLY = np.zeros((2, 5, 6, 4), np.float32)
READ_ONLY.flags.writeable = False
SHARED = np.zeros(500, np.float32)
SHARED_OUT = SHARED[100:340].reshape(2, 5, 6, 4)

BAD = {
    "x is a list": (TypeError, "x", ([], W), {}),
    "x is float16": (TypeError, "x", (X.astype(np.float16), W), {}),
    "x has three dimensions": (ValueError, "x", (X[0], W), {}),
    "x is a scalar": (ValueError, "x", (np.zeros((), np.float32), W), {}),
    "x is a view of channels first": (ValueError, "x", (normal(0, 2, 3, 5, 6).transpose(0, 2, 3, 1), W), {}),
    "x has fewer channels": (ValueError, "w", (X[..., :2].copy(), W), {}),
    "x is smaller than the filter": (ValueError, "x", (X[:, :2].copy(), W), {"padding": 0}),
    "x has no pixels": (ValueError, "x", (X[:, :0].copy(), W), {}),
    "w is a list": (TypeError, "w", (X, []), {}),
    "w is float64": (TypeError, "w", (X, W.astype(np.float64)), {}),
    "w is a matrix": (ValueError, "w", (X, normal(0, 4, 3)), {}),
    "w is channels last": (ValueError, "w", (X, normal(0, 4, 5, 5, 3)), {}),
    "w is strided": (ValueError, "w", (X, normal(0, 4, 3, 3, 6)[..., ::2]), {}),
    "w is empty": (ValueError, "w", (X, W[:, :, :0].copy()), {}),
    "w is packed for linear": (ValueError, "w", (X, kernels.pack_linear(normal(0, 4, 3))), {}),
    "w is packed for other channels": (ValueError, "w", (X, kernels.pack_conv2d(normal(0, 4, 5, 3, 3))), {}),
    "b is a list": (TypeError, "b", (X, W, [0.0] * 4), {}),
    "b is float64": (TypeError, "b", (X, W, B.astype(np.float64)), {}),
    "b is too short": (ValueError, "b", (X, W, B[:3]), {}),
    "b is for more images": (ValueError, "b", (X, W, normal(0, 3, 4)), {}),
    "b is for one image": (ValueError, "b", (X, W, normal(0, 1, 4)), {}),
    "b is a scalar": (ValueError, "b", (X, W, np.zeros((), np.float32)), {}),
    "b is strided": (ValueError, "b", (X, W, normal(0, 4, 2).T), {}),
    "stride is 0": (ValueError, "stride", (X, W), {"stride": 0}),
    "stride is negative": (ValueError, "stride", (X, W), {"stride": -1}),
    "stride is a float": (ValueError, "stride", (X, W), {"stride": 2.0}),
    "stride is a pair": (ValueError, "stride", (X, W), {"stride": (1, 1)}),
    "padding is negative": (ValueError, "padding", (X, W), {"padding": -1}),
    "padding is negative on one side": (ValueError, "padding", (X, W), {"padding": ((0, 1), (0, -1))}),
    "padding is a float": (ValueError, "padding", (X, W), {"padding": 1.0}),
    "padding is a pair": (ValueError, "padding", (X, W), {"padding": (1, 1)}),
    "padding is text": (ValueError, "padding", (X, W), {"padding": "same"}),
    "padding is of floats": (TypeError, "padding", (X, W), {"padding": ((1.5, 1), (1, 1))}),
    "padding is None": (ValueError, "padding", (X, W), {"padding": None}),
    "out has another shape": (ValueError, "out", (X, W), {"out": np.zeros((2, 4, 5, 6), np.float32)}),
    "out is float64": (TypeError, "out", (X, W), {"out": np.zeros((2, 5, 6, 4))}),
    "out is read-only": (ValueError, "out", (X, W), {"out": READ_ONLY}),
    "out is strided": (ValueError, "out", (X, W), {"out": np.zeros((2, 5, 6, 8), np.float32)[..., ::2]}),
    "out overlaps x": (ValueError, "out", (SHARED[:180].reshape(X.shape), W), {"out": SHARED_OUT}),
    "out overlaps w": (ValueError, "out", (X, SHARED[:108].reshape(W.shape)), {"out": SHARED_OUT}),
    "out overlaps b": (ValueError, "out", (X, W, SHARED[100:104]), {"out": SHARED_OUT}),
    "another activation": (ValueError, "activation", (X, W), {"activation": "silu"}),
    "nothing to accumulate on": (ValueError, "out", (X, W), {"accumulate": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    error, name, args, options = BAD[case]
    with pytest.raises(error, match=rf"^{name}: (found|shares)"):
        kernels.conv2d(*args, **options)


@pytest.mark.parametrize(
    ("error", "w"),
    [
        (TypeError, None),
        (TypeError, W.astype(np.int32)),
        (ValueError, normal(0, 4, 3)),
        (ValueError, W.transpose(0, 2, 3, 1)),
        (ValueError, W[:0]),
    ],
)
def test_pack_conv2d_refuses(error, w):
    with pytest.raises(error, match=r"^w: .*expected"):
        kernels.pack_conv2d(w)
