"""group_norm and layer_norm against their NumPy twins."""

import numpy as np
import pytest

from sd_numba import kernels
from tests import reference
from tests.kernels.common import assert_close, assert_same_bits, assert_same_on_any_threads, fenced, misaligned, normal

TOLERANCE = 1.2e-6  # measured: 3e-7 at most

# x shape, groups
GROUPED = [
    ((1, 1, 1, 8), 2),
    ((3, 1, 1, 6), 3),
    ((1, 5, 7, 1), 1),
    ((3, 5, 7, 6), 6),
    ((1, 5, 7, 6), 1),
    ((2, 4, 4, 64), 32),
    ((3, 9, 11, 72), 8),
    ((1, 16, 16, 320), 32),
    ((1, 3, 5, 65), 13),
    ((1, 17, 1, 40), 4),
    ((1, 15, 1, 24), 8),
    ((2, 77, 20), 5),
    ((1, 1, 10), 5),
    ((1, 60, 70, 3), 3),
    ((1, 2, 3, 4, 10), 2),
]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("shape", "groups"), GROUPED, ids=str)
def test_group_norm_matches_twin(shape, groups, silu):
    x, weight, bias = normal(0, *shape), normal(1, shape[-1]), normal(2, shape[-1])
    for eps in (1e-5, 1e-6, 0.5):
        with fenced(*shape) as out:
            assert kernels.group_norm(x, groups, weight, bias, eps, silu, out=out) is out
            assert_close(out, reference.group_norm(x, groups, weight, bias, eps, silu), TOLERANCE)
    found = kernels.group_norm(x, groups, weight, bias, silu=silu)
    with fenced(*shape) as out:
        out[...] = x
        kernels.group_norm(out, groups, weight, bias, silu=silu, out=out)
        assert_close(out, found, TOLERANCE)


@pytest.mark.parametrize(("shape", "groups"), GROUPED, ids=str)
def test_group_statistics(shape, groups):
    """They match the twin's, are those that group_norm takes, and may be another x's."""
    x, y, weight, bias = normal(0, *shape), normal(3, *shape, scale=2), normal(1, shape[-1]), normal(2, shape[-1])
    found = kernels.group_statistics(x, groups)
    np.testing.assert_allclose(found, reference.group_statistics(x, groups), rtol=1e-5, atol=1e-6)
    own = kernels.group_norm(x, groups, weight, bias)
    assert_same_bits(kernels.group_norm(x, groups, weight, bias, statistics=found), own)
    found[..., 1] += 1  # of one value the variance is 0
    with fenced(*shape) as out:
        kernels.group_norm(y, groups, weight, bias, silu=True, statistics=found, out=out)
        assert_close(out, reference.group_norm(y, groups, weight, bias, silu=True, statistics=found), TOLERANCE)


def test_group_statistics_of_a_pair_and_on_any_threads():
    x = normal(0, 2, 30, 41, 12)
    pair = tuple(np.ascontiguousarray(part) for part in np.split(x, [5], axis=-1))
    whole = kernels.group_statistics(x, 3)
    np.testing.assert_array_equal(kernels.group_statistics(pair, 3), whole)
    kernels.set_threads(1)
    try:
        np.testing.assert_array_equal(kernels.group_statistics(x, 3), whole)
    finally:
        kernels.set_threads(0)


def test_wrong_statistics():
    x, weight = normal(0, 2, 5, 6), np.ones(6, np.float32)
    for statistics, error in (
        (np.zeros((2, 3, 2), np.float32), TypeError),
        ([0, 1], TypeError),
        (np.zeros((1, 3, 2)), ValueError),
        (np.zeros((2, 3, 4))[..., ::2], ValueError),
    ):
        with pytest.raises(error, match=r"^statistics: found .*, expected"):
            kernels.group_norm(x, 3, weight, weight, statistics=statistics)
    with pytest.raises(ValueError, match=r"^x: found shape .*, expected at least one pixel"):
        kernels.group_statistics(x[:, :0], 3)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("widths", "groups"), [((1, 1), 1), ((5, 3), 2), ((7, 33), 8), ((640, 320), 32)], ids=str)
def test_group_norm_of_a_pair_is_that_of_the_concatenation(widths, groups, silu):
    """Groups may have channels of both."""
    x, weight, bias = normal(0, 2, 5, 7, sum(widths)), normal(1, sum(widths)), normal(2, sum(widths))
    pair = tuple(np.ascontiguousarray(part) for part in np.split(x, [widths[0]], axis=-1))
    expected = kernels.group_norm(x, groups, weight, bias, silu=silu)
    with fenced(*x.shape) as out:
        assert_same_bits(kernels.group_norm(pair, groups, weight, bias, silu=silu, out=out), expected)
    assert_same_on_any_threads(lambda: kernels.group_norm(pair, groups, weight, bias, silu=silu))


def test_group_norm_of_a_pair_that_does_not_fit():
    a, b = normal(0, 1, 3, 4), normal(1, 1, 3, 2)
    weight = np.ones(6, np.float32)
    for x, message in (
        ((a, b, b), "found 3 arrays"),
        ((a, normal(1, 1, 2, 2)), "the same but for the last axis"),
        ((a, normal(1, 1, 3, 3)), "channels"),
        ((a[0], b[0]), "at least 3"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.group_norm(x, 2, weight, weight)
    whole = normal(0, 18)
    first, second = whole[:12].reshape(1, 3, 4), whole[12:].reshape(1, 3, 2)
    with pytest.raises(ValueError, match="memory"):
        kernels.group_norm((first, second), 2, weight, weight, out=whole.reshape(1, 3, 6))


@pytest.mark.parametrize("mean", [10.0, 1e3, -1e4, 1e6])
@pytest.mark.parametrize("shape", [(2, 5, 7, 12), (1, 40, 41, 12)], ids=str)
def test_group_norm_with_a_large_mean(shape, mean):
    """The variance keeps its digits; what is lost is the rounding of ``x * a + b``, mean / deviation units of it."""
    x = normal(0, *shape) + np.float32(mean)
    x[..., 4:8] *= 3
    weight, bias = normal(1, 12), normal(2, 12)
    tolerance = TOLERANCE + 2e-7 * abs(mean)
    assert_close(kernels.group_norm(x, 3, weight, bias), reference.group_norm(x, 3, weight, bias), tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 1, 1), (2, 6, 7, 8)], ids=str)
def test_group_norm_of_a_constant_is_the_bias(shape):
    """The deviation is then that of eps alone, 0.003, and ``x * a + b`` loses digits to it."""
    x, weight, bias = np.full(shape, 3.7, np.float32), normal(1, shape[-1]), normal(2, shape[-1])
    expected = np.broadcast_to(bias, x.shape)
    np.testing.assert_allclose(kernels.group_norm(x, shape[-1], weight, bias), expected, atol=1e-3)
    np.testing.assert_array_equal(kernels.group_norm(x * 0, shape[-1], weight, bias), expected)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e4, 1e15])
def test_group_norm_of_any_size(scale):
    x, weight, bias = normal(0, 1, 6, 7, 8, scale=scale), normal(1, 8), normal(2, 8)
    expected = reference.group_norm(x, 2, weight, bias)
    assert_close(kernels.group_norm(x, 2, weight, bias), expected, TOLERANCE)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (3, 2), (2, 77, 64), (5, 768), (2, 3, 4, 65), (100, 33), (13,)], ids=str
)
def test_layer_norm_matches_twin(shape):
    x, weight, bias = normal(0, *shape), normal(1, shape[-1]), normal(2, shape[-1])
    for eps in (1e-5, 0.5):
        with fenced(*shape) as out:
            assert kernels.layer_norm(x, weight, bias, eps, out=out) is out
            assert_close(out, reference.layer_norm(x, weight, bias, eps), TOLERANCE)
    found = kernels.layer_norm(x, weight, bias)
    with fenced(*shape) as out:
        out[...] = x
        kernels.layer_norm(out, weight, bias, out=out)
        assert_close(out, found, TOLERANCE)


@pytest.mark.parametrize("mean", [10.0, 1e3, -1e4])
def test_layer_norm_with_a_large_mean(mean):
    """The mean itself is rounded to float32."""
    x, weight, bias = normal(0, 4, 768) + np.float32(mean), normal(1, 768), normal(2, 768)
    tolerance = TOLERANCE + 2e-7 * abs(mean)
    assert_close(kernels.layer_norm(x, weight, bias), reference.layer_norm(x, weight, bias), tolerance)


def test_threads_change_nothing():
    x, weight, bias = normal(0, 3, 31, 29, 40), normal(1, 40), normal(2, 40)
    assert_same_on_any_threads(lambda: kernels.group_norm(x, 8, weight, bias, silu=True))
    assert_same_on_any_threads(lambda: kernels.layer_norm(x, weight, bias))


def test_images_do_not_depend_on_their_neighbours():
    x, weight, bias = normal(0, 3, 9, 9, 40), normal(1, 40), normal(2, 40)
    groups, layers = kernels.group_norm(x, 8, weight, bias), kernels.layer_norm(x, weight, bias)
    for i in range(3):
        assert_same_bits(kernels.group_norm(x[i : i + 1], 8, weight, bias), groups[i : i + 1])
        assert_same_bits(kernels.layer_norm(x[i : i + 1], weight, bias), layers[i : i + 1])


@pytest.mark.parametrize("offset", [1, 2, 6])
def test_inputs_at_any_address(offset):
    x, weight, bias = normal(0, 2, 9, 9, 37), normal(1, 37), normal(2, 37)
    moved = [misaligned(a, offset) for a in (x, weight, bias)]
    expected = kernels.group_norm(x, 37, weight, bias)
    assert_same_bits(kernels.group_norm(moved[0], 37, *moved[1:]), expected)
    assert_same_bits(kernels.layer_norm(*moved), kernels.layer_norm(x, weight, bias))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("at", [(1, 0, 0, 4), (1, 8, 9, 7), (1, 3, 2, 5)])
def test_special_values_spoil_their_group(bad, silu, at):
    x, weight, bias = normal(0, 2, 9, 10, 12), normal(1, 12), normal(2, 12)
    clean = kernels.group_norm(x, 3, weight, bias, silu=silu)
    x[at] = bad
    found = kernels.group_norm(x, 3, weight, bias, silu=silu)
    assert np.isnan(found[1, :, :, 4:8]).all()
    found[1, :, :, 4:8] = clean[1, :, :, 4:8]
    assert_same_bits(found, clean)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_special_values_spoil_their_token(bad):
    x, weight, bias = normal(0, 2, 9, 12), normal(1, 12), normal(2, 12)
    clean = kernels.layer_norm(x, weight, bias)
    x[1, 3, 5] = bad
    found = kernels.layer_norm(x, weight, bias)
    assert np.isnan(found[1, 3]).all()
    found[1, 3] = clean[1, 3]
    assert_same_bits(found, clean)


def test_empty_batches():
    weight, bias = normal(0, 6), normal(1, 6)
    for shape in ((0, 4, 4, 6), (2, 0, 4, 6), (0, 3, 6)):
        assert kernels.group_norm(np.zeros(shape, np.float32), 2, weight, bias).shape == shape
        assert kernels.layer_norm(np.zeros(shape, np.float32), weight, bias).shape == shape


X, W, B = normal(0, 2, 5, 6, 8), normal(1, 8), normal(2, 8)
READ_ONLY = np.zeros(X.shape, np.float32)
READ_ONLY.flags.writeable = False
SHARED = np.zeros(X.size + 8, np.float32)
PART, NEXT = SHARED[: X.size].reshape(X.shape), SHARED[8:].reshape(X.shape)

# arguments of layer_norm; group_norm gets a number of groups after the first
BAD = {
    "x is a list": (TypeError, "x", ([], W, B), {}),
    "x is float64": (TypeError, "x", (X.astype(np.float64), W, B), {}),
    "x is a scalar": (ValueError, "x", (np.zeros((), np.float32), W, B), {}),
    "x is transposed": (ValueError, "x", (X.transpose(0, 2, 1, 3), W, B), {}),
    "weight is a list": (TypeError, "weight", (X, [1.0] * 8, B), {}),
    "weight is float16": (TypeError, "weight", (X, W.astype(np.float16), B), {}),
    "weight is too short": (ValueError, "weight", (X, W[:7], B), {}),
    "weight is a matrix": (ValueError, "weight", (X, W[None], B), {}),
    "weight is strided": (ValueError, "weight", (X, normal(0, 16)[::2], B), {}),
    "bias is None": (TypeError, "bias", (X, W, None), {}),
    "bias is a scalar": (ValueError, "bias", (X, W, np.zeros((), np.float32)), {}),
    "bias is float64": (TypeError, "bias", (X, W, B.astype(np.float64)), {}),
    "eps is None": (TypeError, "float", (X, W, B), {"eps": None}),
    "out has another shape": (ValueError, "out", (X, W, B), {"out": np.zeros((2, 6, 5, 8), np.float32)}),
    "out is float64": (TypeError, "out", (X, W, B), {"out": np.zeros(X.shape)}),
    "out is read-only": (ValueError, "out", (X, W, B), {"out": READ_ONLY}),
    "out is part of x": (ValueError, "out", (PART, W, B), {"out": NEXT}),
    "out is part of weight": (ValueError, "out", (X, SHARED[:8], B), {"out": PART}),
    "out is part of bias": (ValueError, "out", (X, W, SHARED[:8]), {"out": PART}),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    error, name, (x, weight, bias), options = BAD[case]
    with pytest.raises(error, match=rf"^{name}"):
        kernels.layer_norm(x, weight, bias, **options)
    with pytest.raises(error, match=rf"^{name}"):
        kernels.group_norm(x, 2, weight, bias, **options)


@pytest.mark.parametrize("groups", [0, -1, 3, 16, 2.0, None, "2"])
def test_group_norm_refuses_groups(groups):
    with pytest.raises(ValueError, match=r"^groups: found .* expected"):
        kernels.group_norm(X, groups, W, B)


def test_group_norm_refuses_a_matrix():
    with pytest.raises(ValueError, match=r"^x: found 2 dimensions \(3, 8\), expected at least 3"):
        kernels.group_norm(normal(0, 3, 8), 2, W, B)
