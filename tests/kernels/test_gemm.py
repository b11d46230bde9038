"""linear, matmul and pack_linear against their NumPy twins."""

import numpy as np
import pytest

from sd_numba import kernels
from sd_numba.kernels import checks
from sd_numba.kernels.machine.emit import LANES
from sd_numba.kernels.products import driver
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

SHAPES = [
    *((m, 37, 65) for m in range(1, 15)),
    *((5, k, 20) for k in (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 64, 383, 384, 385, 769, 1153)),
    *((9, 50, n) for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 72, 127, 129, 200)),
    *((m, 33, 72) for m in (95, 96, 97, 98, 193, 400, 1601)),
    (1, 1, 1),
    (3, 770, 577),
]


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_linear_matches_twin(m, k, n):
    x, w, b = normal(0, m, k), normal(1, n, k), normal(2, n)
    expected = reference.linear(x, w, b)
    assert_close(kernels.linear(x, w, b), expected, product_tolerance(k))
    with fenced(m, n) as out:
        assert kernels.linear(x, kernels.pack_linear(w), b, out=out) is out
        assert_same_bits(out, kernels.linear(x, w, b))
    with fenced(m, n, fill=2) as out:
        kernels.linear(x, w, b, out=out, accumulate=True)
        assert_close(out, expected + 2, product_tolerance(k))
    with fenced(m, n, fill=2) as out:
        kernels.linear(x, w, out=out, accumulate=True)
        assert_close(out, reference.linear(x, w) + 2, product_tolerance(k))
    with fenced(m, n) as out:
        kernels.linear(x, w, out=out)
        assert_close(out, reference.linear(x, w), product_tolerance(k))


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 2), (3, 5, 6), (7, 64, 64), (13, 50, 70), (97, 401, 130), (8, 20, 640)]
)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "quick_gelu", "geglu"])
def test_activations_match_twins(activation, m, k, n, how):
    x, w, b = normal(0, m, k), store(normal(1, n, k), how), normal(2, n)
    expected = getattr(reference, activation)(reference.linear(x, w, b))
    packed = kernels.pack_linear(w, gated=activation == "geglu")
    tolerance = 3 * product_tolerance(k)
    found = kernels.linear(x, w, b, activation=activation)
    assert_close(found, expected, tolerance)
    with fenced(*expected.shape) as out:
        kernels.linear(x, packed, b, activation=activation, out=out)
        assert_same_bits(out, found)
    with fenced(*expected.shape, fill=2) as out:
        kernels.linear(x, w, b, activation=activation, out=out, accumulate=True)
        assert_close(out, expected + 2, tolerance)
    unbiased = getattr(reference, activation)(reference.linear(x, w))
    assert_close(kernels.linear(x, w, activation=activation), unbiased, tolerance)
    assert_same_on_any_threads(lambda: kernels.linear(x, w, b, activation=activation))


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_matmul_matches_twin(m, k, n):
    a, b = normal(0, m, k), normal(1, k, n)
    with fenced(m, n) as out:
        assert kernels.matmul(a, b, out=out) is out
        assert_close(out, reference.matmul(a, b), product_tolerance(k))
    assert_same_bits(kernels.matmul(a, b), out)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (1, 2, 3), (2, 1, 3, 2)])
def test_linear_keeps_leading_dimensions(lead):
    x, w, b = normal(0, *lead, 19), normal(1, 21, 19), normal(2, 21)
    assert_close(kernels.linear(x, w, b), reference.linear(x, w, b), product_tolerance(19))


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (4, 5, 3), (7, 16, 16), (13, 50, 72), (6, 401, 65), (100, 64, 64)]
)
def test_stored_weights(how, m, k, n):
    x, w, b = normal(0, m, k), store(normal(1, n, k), how), normal(2, n)
    found = kernels.linear(x, w, b)
    assert_close(found, reference.linear(x, w, b), product_tolerance(k))
    assert_same_bits(kernels.linear(x, kernels.pack_linear(w), b), found)
    assert_same_bits(kernels.linear(x, kernels.widen(w), b), found)


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("offset", [1, 2, 6, 12])
def test_weights_at_any_address(how, offset):
    x, w, b = normal(0, 5, 35), store(normal(1, 37, 35), how), normal(2, 37)
    expected = kernels.linear(x, w, b)
    moved = misaligned(w, offset)
    assert_same_bits(kernels.linear(x, moved, b), expected)
    assert_same_bits(kernels.linear(x, kernels.pack_linear(moved), b), expected)
    assert_same_bits(kernels.linear(misaligned(x, offset), moved, misaligned(b, offset)), expected)


@pytest.mark.parametrize(("how", "dtype"), [("f16", np.float16), ("bf16", np.uint16)])
def test_every_half_precision_value(how, dtype):
    """Subnormals, zeros, infinities and NaN too, on the path of whole blocks and on that of partial ones."""
    values = np.arange(65536, dtype=np.uint16).view(dtype)
    wide = kernels.widen(values)
    found = kernels.linear(np.ones((1, 1), np.float32), values.reshape(-1, 1))
    np.testing.assert_array_equal(found[0], wide)

    blocks = np.where(np.isfinite(wide), values, values[:1]).reshape(-1, 16)
    found = kernels.linear(np.eye(16, dtype=np.float32), blocks)
    np.testing.assert_array_equal(found.T, kernels.widen(blocks))

    special = values[~np.isfinite(wide)][:: 1 if how == "bf16" else 41].repeat(16).reshape(-1, 16)
    special[:, 1:] = 0
    found = kernels.linear(np.ones((1, 16), np.float32), special)
    np.testing.assert_array_equal(found[0], kernels.widen(special[:, 0]))


@pytest.mark.parametrize("dtype", [kernels.float8_e4m3, kernels.float8_e5m2], ids=["e4m3", "e5m2"])
def test_every_float8_value(dtype):
    """As the twin's table says, on the path of whole blocks and on that of partial ones."""
    codes = np.arange(256, dtype=np.uint8)
    expected = reference.widen(codes.view(dtype))
    assert_same_numbers(kernels.widen(codes.view(dtype)), expected)
    found = kernels.linear(np.ones((1, 1), np.float32), codes.reshape(-1, 1).view(dtype))
    np.testing.assert_array_equal(found[0], expected)
    for column in range(16):
        w = np.zeros((256, 16), np.uint8)
        w[:, column] = codes
        found = kernels.linear(np.ones((1, 16), np.float32), w.view(dtype))
        np.testing.assert_array_equal(found[0], expected)


def assert_same_numbers(found, expected):
    """Compare the signs of zeros, too, but no bits of NaN."""
    np.testing.assert_array_equal(found, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found[numbers]), np.signbit(expected[numbers]))


def test_float32_subnormals_are_kept():
    w = np.array([[1e-40], [-3e-45], [1.1754942e-38]], np.float32)
    np.testing.assert_array_equal(kernels.linear(np.ones((1, 1), np.float32), w), w.T)


@pytest.mark.parametrize("how", STORED)
def test_the_blocking_changes_nothing(how, monkeypatch):
    """However many rows and panels a task has, packed weights or not, the result is the same."""
    x, w, b = normal(0, 250, 1000), store(normal(1, 334, 1000), how), normal(2, 334)
    packed, gated = kernels.pack_linear(w), kernels.pack_linear(w, gated=True)
    expected, expected_gated = kernels.linear(x, packed, b), kernels.linear(x, gated, b, activation="geglu")
    for rows, panels in ((1, 1), (7, 2), (100, 4), (250, 100), (1000, 1)):
        monkeypatch.setattr(driver, "_PACK_ROWS", rows)
        monkeypatch.setattr(driver, "_GROUP", panels * 1000 * WIDTH * 4)
        assert_same_bits(kernels.linear(x, w, b, activation="geglu"), expected_gated)
        assert_same_bits(kernels.linear(x, w, b), expected)
        assert_same_bits(kernels.linear(x, packed, b), expected)
        with fenced(250, 334, fill=1) as out:
            kernels.linear(x, w, b, out=out, accumulate=True)
        assert_close(out, expected + 1, product_tolerance(1000))


@pytest.mark.parametrize(("n", "activation"), [(96, None), (80, "silu"), (160, "geglu"), (70, None)])
def test_outputs_past_the_caches_are_the_same(n, activation, monkeypatch):
    x, w, b = normal(0, 200, 50), normal(1, n, 50), normal(2, n)
    expected = kernels.linear(x, w, b, activation=activation)
    monkeypatch.setattr(checks, "_STREAM", 0)
    assert_same_bits(kernels.linear(x, w, b, activation=activation), expected)  # a new array, on a cache line
    out = misaligned(np.zeros_like(expected), 4)
    out.flags.writeable = True
    assert_same_bits(kernels.linear(x, w, b, activation=activation, out=out), expected)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 40, 700), (7, 30, 65), (97, 385, 130), (1000, 20, 72)])
def test_threads_change_nothing(m, k, n):
    x, w, b = normal(0, m, k), normal(1, n, k), normal(2, n)
    assert_same_on_any_threads(lambda: kernels.linear(x, w, b))
    assert_same_on_any_threads(lambda: kernels.matmul(x, np.ascontiguousarray(w.T)))


def test_rows_do_not_depend_on_their_neighbours():
    x, w, b = normal(0, 29, 100), normal(1, 70, 100), normal(2, 70)
    whole = kernels.linear(x, w, b)
    for rows in range(1, 29):
        assert_same_bits(kernels.linear(x[:rows], w, b), whole[:rows])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_special_values_stay_in_their_row(bad):
    x, w, b = normal(0, 15, 70), normal(1, 67, 70), normal(2, 67)
    w[:, 33] = np.abs(w[:, 33])
    clean = kernels.linear(x, w, b)
    x[8, 33] = bad
    found = kernels.linear(x, w, b)
    np.testing.assert_array_equal(found[8], np.full(67, bad, np.float32))
    assert_same_bits(np.delete(found, 8, 0), np.delete(clean, 8, 0))
    x[8, 33], w[5, 69] = 1, np.nan
    found = kernels.linear(x, w, b)
    assert np.isnan(found[:, 5]).all()
    assert np.isnan(found).sum() == 15
    b[:] = np.nan
    assert np.isnan(kernels.linear(x, w, b)).all()


def test_matmul_passes_nan():
    a, b = normal(0, 3, 4), normal(1, 4, 5)
    b[2, 1] = np.nan
    assert np.isnan(kernels.matmul(a, b)).sum() == 3


def test_empty_batches():
    w, b = normal(0, 4, 3), normal(1, 4)
    assert kernels.linear(np.zeros((0, 3), np.float32), w, b).shape == (0, 4)
    assert kernels.linear(np.zeros((2, 0, 3), np.float32), kernels.pack_linear(w)).shape == (2, 0, 4)
    assert kernels.matmul(np.zeros((0, 3), np.float32), normal(0, 3, 2)).shape == (0, 2)
    assert kernels.matmul(np.zeros((2, 3), np.float32), np.zeros((3, 0), np.float32)).shape == (2, 0)
    assert (kernels.matmul(np.zeros((2, 0), np.float32), np.zeros((0, 3), np.float32)) == np.zeros((2, 3))).all()


def test_packed_weight_describes_itself():
    packed = kernels.pack_linear(normal(0, 70, 30))
    assert packed.shape == (70, 30)
    assert packed.nbytes == -(-70 // WIDTH) * WIDTH * 30 * 4
    assert packed.panels.ctypes.data % 64 == 0


X, W, B, OUT = normal(0, 6, 8), normal(1, 4, 8), normal(2, 4), np.zeros((6, 4), np.float32)
READ_ONLY = np.zeros((6, 4), np.float32)
READ_ONLY.flags.writeable = False
SHARED = np.zeros(100, np.float32)

BAD_LINEAR = {
    "x is a list": (TypeError, "x", ([[1.0] * 8], W), {}),
    "x is float64": (TypeError, "x", (X.astype(np.float64), W), {}),
    "x is big-endian": (TypeError, "x", (X.astype(">f4"), W), {}),
    "x is a scalar": (ValueError, "x", (np.zeros((), np.float32), W), {}),
    "x is transposed": (ValueError, "x", (np.asfortranarray(X), W), {}),
    "x is strided": (ValueError, "x", (normal(0, 6, 16)[:, ::2], W), {}),
    "x is reversed": (ValueError, "x", (X[::-1], W), {}),
    "x has no channels": (ValueError, "w", (X[:, :0].copy(), W[:, :0].copy()), {}),
    "w is None": (TypeError, "w", (X, None), {}),
    "w is float64": (TypeError, "w", (X, W.astype(np.float64)), {}),
    "w is int16": (TypeError, "w", (X, W.astype(np.int16)), {}),
    "w has other channels": (ValueError, "w", (X, normal(0, 4, 7)), {}),
    "w is a vector": (ValueError, "w", (X, normal(0, 8)), {}),
    "w is a filter": (ValueError, "w", (X, normal(0, 4, 8, 1, 1)), {}),
    "w is transposed": (ValueError, "w", (X, np.asfortranarray(W)), {}),
    "w is empty": (ValueError, "w", (X, W[:0]), {}),
    "w is packed for other channels": (ValueError, "w", (X, kernels.pack_linear(normal(0, 4, 7))), {}),
    "w is packed for conv2d": (ValueError, "w", (X, kernels.pack_conv2d(normal(0, 4, 8, 1, 1))), {}),
    "b is too long": (ValueError, "b", (X, W, normal(0, 5)), {}),
    "b is a matrix": (ValueError, "b", (X, W, normal(0, 1, 4)), {}),
    "b is float16": (TypeError, "b", (X, W, B.astype(np.float16)), {}),
    "b is a list": (TypeError, "b", (X, W, [1.0] * 4), {}),
    "b is strided": (ValueError, "b", (X, W, normal(0, 8)[::2]), {}),
    "out has another shape": (ValueError, "out", (X, W), {"out": np.zeros((4, 6), np.float32)}),
    "out is float64": (TypeError, "out", (X, W), {"out": np.zeros((6, 4))}),
    "out is a list": (TypeError, "out", (X, W), {"out": []}),
    "out is transposed": (ValueError, "out", (X, W), {"out": np.zeros((6, 4), np.float32, order="F")}),
    "out is read-only": (ValueError, "out", (X, W), {"out": READ_ONLY}),
    "out is part of x": (ValueError, "out", (SHARED[:48].reshape(6, 8), W), {"out": SHARED[40:64].reshape(6, 4)}),
    "out is part of w": (ValueError, "out", (X, SHARED[:32].reshape(4, 8)), {"out": SHARED[:24].reshape(6, 4)}),
    "out is part of b": (ValueError, "out", (X, W, SHARED[:4]), {"out": SHARED[:24].reshape(6, 4)}),
    "activation is unknown": (ValueError, "activation", (X, W), {"activation": "relu"}),
    "w has an odd half": (ValueError, "w", (X, normal(0, 3, 8)), {"activation": "geglu"}),
    "w is packed for geglu": (ValueError, "w", (X, kernels.pack_linear(W, gated=True)), {}),
    "w is not packed for geglu": (ValueError, "w", (X, kernels.pack_linear(W)), {"activation": "geglu"}),
    "out is twice as wide": (ValueError, "out", (X, W), {"activation": "geglu", "out": OUT}),
    "nothing to accumulate on": (ValueError, "out", (X, W), {"accumulate": True}),
}


@pytest.mark.parametrize("case", BAD_LINEAR)
def test_linear_refuses(case):
    error, name, args, options = BAD_LINEAR[case]
    with pytest.raises(error, match=f"^{name}: .*expected"):
        kernels.linear(*args, **options)


BAD_MATMUL = {
    "a is a vector": (ValueError, "a", (normal(0, 8), W.T.copy()), {}),
    "a is float16": (TypeError, "a", (X.astype(np.float16), W.T.copy()), {}),
    "b has other rows": (ValueError, "b", (X, normal(0, 7, 4)), {}),
    "b is three-dimensional": (ValueError, "b", (X, normal(0, 8, 4, 1)), {}),
    "b is transposed": (ValueError, "b", (X, W.T), {}),
    "b is packed": (TypeError, "b", (X, kernels.pack_linear(W)), {}),
    "out has another shape": (ValueError, "out", (X, W.T.copy()), {"out": np.zeros((6, 5), np.float32)}),
    "out is a": (ValueError, "out", (SHARED[:64].reshape(8, 8), normal(0, 8, 8)), {"out": SHARED[:64].reshape(8, 8)}),
    "out is b": (ValueError, "out", (normal(0, 8, 8), SHARED[:64].reshape(8, 8)), {"out": SHARED[:64].reshape(8, 8)}),
}


@pytest.mark.parametrize("case", BAD_MATMUL)
def test_matmul_refuses(case):
    error, name, args, options = BAD_MATMUL[case]
    with pytest.raises(error, match=f"^{name}: .*expected"):
        kernels.matmul(*args, **options)


@pytest.mark.parametrize(
    ("error", "w"),
    [
        (TypeError, [[1.0]]),
        (TypeError, W.astype(np.float64)),
        (ValueError, normal(0, 4, 8, 1, 1)),
        (ValueError, W.T),
        (ValueError, np.zeros((4, 0), np.float32)),
    ],
)
def test_pack_linear_refuses(error, w):
    with pytest.raises(error, match=r"^w: .*expected"):
        kernels.pack_linear(w)


# --- several inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("widths", [(1, 1), (5, 3), (LANES, 7), (320, 640), (700, 1, 33)])
def test_several_inputs_are_one(how, widths):
    x, w, b = normal(0, 2, 7, sum(widths)), store(normal(1, 70, sum(widths)), how), normal(2, 70)
    parts = tuple(np.ascontiguousarray(part) for part in np.split(x, np.cumsum(widths)[:-1], axis=-1))
    expected, tolerance = reference.linear(x, w, b), product_tolerance(sum(widths))
    for weight in (w, kernels.pack_linear(w)):
        assert_close(kernels.linear(parts, weight, b), expected, tolerance)
        assert_same_on_any_threads(lambda weight=weight: kernels.linear(parts, weight, b))
        with fenced(2, 7, 70, fill=3) as out:
            kernels.linear(parts, weight, b, out=out, accumulate=True)
            assert_close(out, expected + 3, tolerance)


def test_several_inputs_that_do_not_fit():
    a, b, w = normal(0, 3, 4), normal(1, 3, 5), normal(2, 6, 9)
    for x, message in (
        ((), "empty tuple"),
        ((a, normal(0, 2, 5)), "the same but for the last axis"),
        ((a, b, b), r"w: found shape \(6, 9\) for x \(3, 14\)"),
        ((a, normal(0, 3, 0)), "at least one channel"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.linear(x, w)
    with pytest.raises(TypeError, match="float32"):
        kernels.linear((a, b.astype(np.float64)), w)
    with pytest.raises(ValueError, match="activation"):
        kernels.linear((a, b), w, activation="silu")
    with pytest.raises(ValueError, match="memory"):
        kernels.linear((a, normal(1, 3, 5)), normal(2, 4, 9), out=a)
