"""gelu, gelu_tanh, quick_gelu, silu and geglu against their NumPy twins."""

import numpy as np
import pytest

from sd_numba import kernels
from tests import reference
from tests.kernels.common import assert_same_bits, assert_same_on_any_threads, fenced, misaligned, normal

NAMES = ("gelu", "gelu_tanh", "quick_gelu", "silu")
SHAPES = [
    (1,),
    (2,),
    (3,),
    (7,),
    (15,),
    (16,),
    (17,),
    (63,),
    (65,),
    (1, 1, 1, 1),
    (3, 5, 7),
    (2, 4095),
    (4097,),
    (50001,),
]


def assert_activation_close(found, expected, x):
    """Allow a millionth of x: far below 0 the result is nearly 0, and few of its own digits are right."""
    assert found.dtype == np.float32
    error = np.abs(found.astype(np.float64) - expected)
    assert (error <= 1e-6 * np.abs(x) + 1e-44).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_twin(name, shape):
    x = normal(0, *shape, scale=3)
    with fenced(*shape) as out:
        assert getattr(kernels, name)(x, out=out) is out
        assert_activation_close(out, getattr(reference, name)(x), x)
    assert_same_bits(getattr(kernels, name)(x), out)
    with fenced(*shape) as both:
        both[...] = x
        getattr(kernels, name)(both, out=both)
        assert_same_bits(both, out)


@pytest.mark.parametrize(
    "shape", [(2,), (1, 2), (1, 6), (3, 10), (5, 34), (2, 3, 130), (2, 77, 4, 2), (1500, 12)], ids=str
)
def test_geglu_matches_twin(shape):
    x = normal(0, *shape, scale=3)
    with fenced(*shape[:-1], shape[-1] // 2) as out:
        assert kernels.geglu(x, out=out) is out
        value, gate = np.split(x, 2, axis=-1)
        assert_activation_close(out, reference.geglu(x), value * gate)
    assert_same_bits(kernels.geglu(x), out)


@pytest.mark.parametrize("name", NAMES)
def test_whole_range(name):
    """From subnormals to the largest float32, on both sides, and densely where the function bends."""
    powers = np.logspace(-44.5, 38.5, 4000).astype(np.float32)
    x = np.concatenate([powers, -powers, np.linspace(-20, 20, 40001, dtype=np.float32)])
    with np.errstate(over="ignore"):
        expected = getattr(reference, name)(x)
    found = getattr(kernels, name)(x)
    assert np.isfinite(found).all()
    assert_activation_close(found, expected, x)
    above = x > 0
    np.testing.assert_allclose(found[above], expected[above], rtol=1e-6, atol=1e-44)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_values(name):
    f = getattr(kernels, name)
    x = np.array([0, -0.0, 1e4, -1e4, 3e38, 1e-40, -1e-40, 1e-45], np.float32)
    np.testing.assert_allclose(f(x), [0, 0, 1e4, 0, 3e38, 5e-41, -5e-41, 0], rtol=1e-6, atol=2e-33)


@pytest.mark.parametrize("size", [1, 16, 33])
@pytest.mark.parametrize("name", NAMES)
def test_special_values_are_not_lost(name, size):
    f = getattr(kernels, name)
    for at in range(size):
        x = normal(0, size)
        clean = f(x)
        for bad, expected in ((np.nan, np.nan), (np.inf, np.inf)):
            x[at] = bad
            found = f(x)
            np.testing.assert_array_equal(found[at], np.float32(expected))
            assert_same_bits(np.delete(found, at), np.delete(clean, at))


def test_geglu_passes_special_values():
    x = normal(0, 5, 34)
    x[1, 3], x[2, 20], x[3, 4], x[3, 21] = np.nan, np.nan, np.inf, 2
    found = kernels.geglu(x)
    assert np.isnan(found[1, 3])
    assert np.isnan(found[2, 3])
    assert found[3, 4] == np.inf
    assert np.isfinite(found).sum() == found.size - 3


def test_threads_change_nothing():
    x = normal(0, 3, 40002)
    for f in (kernels.gelu, kernels.gelu_tanh, kernels.quick_gelu, kernels.silu, kernels.geglu):
        assert_same_on_any_threads(lambda f=f: f(x))


@pytest.mark.parametrize("name", [*NAMES, "geglu"])
def test_inputs_at_any_address(name):
    f, x = getattr(kernels, name), normal(0, 3, 38)
    for offset in (1, 2, 6):
        assert_same_bits(f(misaligned(x, offset)), f(x))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 6)], ids=str)
def test_empty(shape):
    x = np.zeros(shape, np.float32)
    for name in NAMES:
        assert getattr(kernels, name)(x).shape == shape
    assert kernels.geglu(x).shape == (*shape[:-1], shape[-1] // 2)


X = normal(0, 6, 8)
READ_ONLY = np.zeros((6, 8), np.float32)
READ_ONLY.flags.writeable = False
SHARED = np.zeros(100, np.float32)

BAD = {
    "x is a number": (TypeError, "x", 1.0, {}),
    "x is a list": (TypeError, "x", [1.0, 2.0], {}),
    "x is float64": (TypeError, "x", X.astype(np.float64), {}),
    "x is float16": (TypeError, "x", X.astype(np.float16), {}),
    "x is an integer array": (TypeError, "x", X.astype(np.int32), {}),
    "x is a scalar": (ValueError, "x", np.zeros((), np.float32), {}),
    "x is transposed": (ValueError, "x", X.T, {}),
    "x is strided": (ValueError, "x", X[:, ::2], {}),
    "out has another shape": (ValueError, "out", X, {"out": np.zeros((8, 6), np.float32)}),
    "out is float64": (TypeError, "out", X, {"out": np.zeros((6, 8))}),
    "out is a list": (TypeError, "out", X, {"out": []}),
    "out is strided": (ValueError, "out", X, {"out": np.zeros((6, 16), np.float32)[:, ::2]}),
    "out is read-only": (ValueError, "out", X, {"out": READ_ONLY}),
    "out is part of x": (ValueError, "out", SHARED[:48].reshape(6, 8), {"out": SHARED[8:56].reshape(6, 8)}),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", BAD)
def test_refuses(name, case):
    error, argument, x, options = BAD[case]
    with pytest.raises(error, match=rf"^{argument}: .*(expected|shares)"):
        getattr(kernels, name)(x, **options)


@pytest.mark.parametrize("case", [case for case in BAD if case.startswith("x")])
def test_geglu_refuses(case):
    error, argument, x, options = BAD[case]
    with pytest.raises(error, match=rf"^{argument}: .*expected"):
        kernels.geglu(x, **options)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (normal(0, 6, 7), None, "x: found 7 channels, expected an even number"),
        (X, np.zeros((6, 8), np.float32), "out: found shape"),
        (X, READ_ONLY[:, :4].copy()[:, ::2], "out: found"),
        (SHARED[:48].reshape(6, 8), SHARED[:24].reshape(6, 4), "out: shares memory"),
    ],
)
def test_geglu_refuses_its_own(x, out, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        kernels.geglu(x, out=out)
