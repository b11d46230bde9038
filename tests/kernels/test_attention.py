"""attention against its NumPy twin."""

import math

import numpy as np
import pytest

from sd_numba import kernels
from sd_numba.kernels.products.microkernel import WIDTH
from tests import reference
from tests.kernels.common import (
    BF16,
    assert_close,
    assert_same_bits,
    assert_same_on_any_threads,
    fenced,
    misaligned,
    normal,
)

TOLERANCE = 3e-6  # measured: 7e-7 at most

# n, tq, tk, heads, d
SHAPES = [
    *((1, 9, 13, 2, d) for d in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 40, 48, 63, 64, 65, 72, 80, 160, 200, 512)),
    *((1, tq, 21, 1, 24) for tq in (1, 2, 5, 6, 7, 11, 12, 13, 71, 72, 73, 145, 300)),
    *((1, 7, tk, 3, 20) for tk in (1, 2, 3, 4, 5, 8, 15, 16, 17, 63, 64, 65, 77, 511, 512, 513, 1025, 1100)),
    (1, 1, 1, 1, 1),
    (3, 5, 77, 4, 6),
    (2, 100, 100, 8, 5),
    (3, 80, 77, 1, 48),
]  # fmt: skip


def qkv(n, tq, tk, heads, d):
    return normal(0, n, tq, heads * d), normal(1, n, tk, heads * d), normal(2, n, tk, heads * d)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_twin(shape, causal):
    q, k, v = qkv(*shape)
    with fenced(*q.shape) as out:
        assert kernels.attention(q, k, v, shape[3], causal, out=out) is out
        assert_close(out, reference.attention(q, k, v, shape[3], causal), TOLERANCE)
    assert_same_bits(kernels.attention(q, k, v, shape[3], causal), out)


@pytest.mark.parametrize("tokens", [1, 6, 72, 77, 513, 600])
def test_causal_sees_no_later_token(tokens):
    q, k, v = qkv(1, tokens, tokens, 2, 9)
    found = kernels.attention(q, k, v, 2, causal=True)
    assert_close(found, reference.attention(q, k, v, 2, True), TOLERANCE)
    assert_close(found[:, 0], v[:, 0], TOLERANCE)
    cut = tokens // 2 + 1
    k[:, cut:], v[:, cut:] = 50, -1e6
    np.testing.assert_allclose(kernels.attention(q, k, v, 2, causal=True)[:, :cut], found[:, :cut], atol=1e-6)


@pytest.mark.parametrize("tk", [3, 77, 600])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e4, 1e6])
def test_large_scores(size, tk):
    """Scores of about `size` make a softmax of one key; float32 scores are off by 1e-7 of their size."""
    q, k, v = qkv(1, 20, tk, 2, 16)
    q, k = q * np.float32(size**0.5), k * np.float32(size**0.5)
    found = kernels.attention(q, k, v, 2)
    assert np.abs(found).max() <= np.abs(v).max() * 1.00001
    assert_close(found, reference.attention(q, k, v, 2), TOLERANCE + 2e-7 * size)


@pytest.mark.parametrize("score", [1e4, -1e4, 1e30, -1e30, 1e36, -1e36])
def test_equal_scores_average_the_values(score):
    """Every score the same, however large: no overflow, no loss to the value that stands for masked keys."""
    q, k, v = np.full((1, 7, 4), 2, np.float32), np.full((1, 77, 4), score / 4, np.float32), normal(2, 1, 77, 4)
    assert_close(kernels.attention(q, k, v, 1), v.mean(1, keepdims=True).repeat(7, 1), TOLERANCE)


def test_keys_in_rising_order():
    """The peak has to move, for a whole panel of queries or less; scores of 170 are off by 1e-5."""
    tk = 1600
    q, v = np.ones((1, WIDTH + 6, 8), np.float32), normal(2, 1, tk, 8)
    k = np.linspace(-60, 60, tk, dtype=np.float32).reshape(1, tk, 1).repeat(8, 2)
    for keys in (k, k[:, ::-1].copy()):
        assert_close(kernels.attention(q, keys, v, 1), reference.attention(q, keys, v, 1), 6e-5)


@pytest.mark.parametrize("score", [15, 25, 90, 1e4, 1e30])
def test_a_late_key_that_outshines_the_others(score):
    """It moves the peak of its query; what becomes of the other queries of the panel does not depend on that."""
    q, k, v = qkv(1, WIDTH, 600, 1, 8)
    clean = kernels.attention(q, k, v, 1)
    q[0, :, 0], k[0, :, 0], k[0, 500, 0] = 0, 0, 1
    without = kernels.attention(q, k, v, 1)
    q[0, 5, 0] = score * math.sqrt(8)
    found = kernels.attention(q, k, v, 1)
    assert_close(found, reference.attention(q, k, v, 1), TOLERANCE)
    assert_same_bits(np.delete(found, 5, 1), np.delete(without, 5, 1))
    assert np.abs(found - clean).max() > 0.1


@pytest.mark.parametrize(("shape", "causal"), [((1, 150, 77, 2, 12), False), ((2, 600, 600, 1, 40), True)])
def test_threads_change_nothing(shape, causal):
    q, k, v = qkv(*shape)
    assert_same_on_any_threads(lambda: kernels.attention(q, k, v, shape[3], causal))


def test_images_do_not_depend_on_their_neighbours():
    q, k, v = qkv(3, 30, 77, 2, 20)
    whole = kernels.attention(q, k, v, 2)
    for i in range(3):
        one = slice(i, i + 1)
        assert_same_bits(kernels.attention(q[one], k[one], v[one], 2), whole[one])


@pytest.mark.parametrize("offset", [1, 2, 6])
def test_inputs_at_any_address(offset):
    arrays = qkv(1, 9, 13, 2, 20)
    assert_same_bits(kernels.attention(*(misaligned(a, offset) for a in arrays), 2), kernels.attention(*arrays, 2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tk", [1, 13, 600])
@pytest.mark.parametrize("tq", [10, WIDTH + 6])
def test_special_values_are_not_lost(bad, tk, tq):
    """A bad query spoils its row, a bad key and a bad value what they reach; other heads and images stay the same."""
    q, k, v = qkv(2, tq, tk, 2, 8)
    clean = kernels.attention(q, k, v, 2)
    token = tk // 2

    spoiled = q.copy()
    spoiled[1, 4, 3] = bad
    found = kernels.attention(spoiled, k, v, 2)
    assert np.isnan(found[1, 4, :8]).all()
    found[1, 4, :8] = clean[1, 4, :8]
    assert_same_bits(found, clean)

    spoiled = k.copy()
    spoiled[1, token, 3] = bad
    found = kernels.attention(q, spoiled, v, 2)
    with np.errstate(invalid="ignore"):
        expected = reference.attention(q, spoiled, v, 2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.isnan(found[1, :, :8]).any()

    spoiled = v.copy()
    spoiled[1, token, 3] = bad
    found = kernels.attention(q, k, spoiled, 2)
    np.testing.assert_array_equal(found[1, :, 3], np.full(tq, bad, np.float32))
    found[1, :, 3] = clean[1, :, 3]
    assert_same_bits(found, clean)


# --- bf16 -------------------------------------------------------------------------------------------------------------


def assert_close_in_bf16(found, q, k, v, heads, causal=False, scores=0.0):
    """Compare with the twin, which rounds q, k and v, but not the weights, whose rounding depends on the peak.

    Each weight of a key is off by 2**-8 of itself at most, half a step of bfloat16, so a result is by that share of
    the average magnitude of v. The rounding of float32 sums comes on top, as in float32; large `scores` add to it.
    """
    expected = reference.attention(q, k, v, heads, causal, precision="bf16")
    average = reference.attention(q, k, np.abs(v), heads, causal, precision="bf16")
    slack = (TOLERANCE + 2e-7 * scores) * np.abs(expected).max()
    assert np.isfinite(found).all()
    assert (np.abs(found - expected) <= 2.0**-8 * average + slack).all()


@BF16
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[4] % 2 == 0], ids=str)
def test_bf16_matches_twin(shape, causal):
    q, k, v = qkv(*shape)
    with fenced(*q.shape) as out:
        assert kernels.attention(q, k, v, shape[3], causal, out=out, precision="bf16") is out
        assert_close_in_bf16(out, q, k, v, shape[3], causal)
    moved = (misaligned(a, 2) for a in (q, k, v))
    assert_same_bits(kernels.attention(*moved, shape[3], causal, precision="bf16"), out)


@BF16
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tq", "tk", "d"), [(9, 13, 40), (80, 77, 64), (70, 600, 8), (5, 6, 160)])
def test_bf16_is_as_far_from_float32_as_its_rounding(tq, tk, d, causal):
    """Each of q and k is off by u = 2**-8 of itself, so each score by (2u + u**2) |q| |k| at most.

    If no score of a query is off by more than e, each share of a softmax is by a factor of exp(2e) at most; the weights
    and v each add a factor of 1 + u. Half of that is never used up: errors of many terms do not all add up.
    """
    q, k, v = qkv(1, tq, tk, 2, d)
    u = 2.0**-8
    split = [np.abs(a.astype(np.float64)).reshape(-1, 2, d).transpose(1, 0, 2) for a in (q, k)]
    scores = (split[0] @ split[1].transpose(0, 2, 1)).max(axis=-1) / math.sqrt(d)  # of |q| and |k|: heads, queries
    factor = np.exp(2 * (2 * u + u * u) * scores) * (1 + u) ** 2 - 1
    average = reference.attention(q, k, np.abs(v), 2, causal)
    error = np.abs(kernels.attention(q, k, v, 2, causal, precision="bf16") - reference.attention(q, k, v, 2, causal))
    assert (error <= factor.T.repeat(d, axis=1)[None] / 2 * average + TOLERANCE).all()
    assert error.max() > 1e-4  # or it is no attention of that precision


@BF16
@pytest.mark.parametrize("shape", [(1, 9, 13, 2, 7), (2, 73, 600, 1, 65), (1, 5, 77, 4, 1)], ids=str)
def test_bf16_of_odd_heads_is_float32(shape):
    q, k, v = qkv(*shape)
    expected = kernels.attention(q, k, v, shape[3])
    assert_same_bits(kernels.attention(q, k, v, shape[3], precision="bf16"), expected)


@pytest.mark.skipif("int8" not in kernels.precisions(), reason="this row has no int8")
def test_int8_is_the_next_best():
    q, k, v = qkv(2, 30, 77, 2, 8)
    instead = "bf16" if "bf16" in kernels.precisions() else "f32"
    expected = kernels.attention(q, k, v, 2, precision=instead)
    assert_same_bits(kernels.attention(q, k, v, 2, precision="int8"), expected)


@BF16
@pytest.mark.parametrize("tk", [3, 77, 600, 601])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e4, 1e6])
def test_bf16_large_scores(size, tk):
    """Rounded alike, large scores differ no more than in float32."""
    q, k, v = qkv(1, WIDTH + 6, tk, 2, 16)
    q, k = q * np.float32(size**0.5), k * np.float32(size**0.5)
    found = kernels.attention(q, k, v, 2, precision="bf16")
    assert np.abs(found).max() <= np.abs(v).max() * (1 + 2.0**-7)
    assert_close_in_bf16(found, q, k, v, 2, scores=size)


@BF16
@pytest.mark.parametrize("score", [1e4, -1e4, 1e30, -1e30, 1e36, -1e36])
def test_bf16_equal_scores_average_the_values(score):
    q, k, v = np.full((1, 7, 4), 2, np.float32), np.full((1, 77, 4), score / 4, np.float32), normal(2, 1, 77, 4)
    expected = reference.round_bf16(v).mean(1, keepdims=True).repeat(7, 1)  # weights of 1 are not rounded
    assert_close(kernels.attention(q, k, v, 1, precision="bf16"), expected, TOLERANCE)


@BF16
def test_bf16_keys_in_rising_order():
    tk = 1600
    q, v = np.ones((1, WIDTH + 6, 8), np.float32), normal(2, 1, tk, 8)
    k = np.linspace(-60, 60, tk, dtype=np.float32).reshape(1, tk, 1).repeat(8, 2)
    for keys in (k, k[:, ::-1].copy()):
        assert_close_in_bf16(kernels.attention(q, keys, v, 1, precision="bf16"), q, keys, v, 1, scores=170)


@BF16
@pytest.mark.parametrize("score", [15, 25, 90, 1e4, 1e30])
def test_bf16_a_late_key_that_outshines_the_others(score):
    q, k, v = qkv(1, WIDTH, 600, 1, 8)
    q[0, :, 0], k[0, :, 0], k[0, 500, 0] = 0, 0, 1
    without = kernels.attention(q, k, v, 1, precision="bf16")
    q[0, 5, 0] = score * math.sqrt(8)
    found = kernels.attention(q, k, v, 1, precision="bf16")
    assert_close_in_bf16(found, q, k, v, 1)
    assert_same_bits(np.delete(found, 5, 1), np.delete(without, 5, 1))


@BF16
@pytest.mark.parametrize("tokens", [1, 6, 72, 77, 513, 600])
def test_bf16_causal_sees_no_later_token(tokens):
    """Not even the one that shares a word with the last that it sees."""
    q, k, v = qkv(1, tokens, tokens, 2, 10)
    found = kernels.attention(q, k, v, 2, causal=True, precision="bf16")
    assert_close(found[:, 0], reference.round_bf16(v[:, 0]), TOLERANCE)
    for cut in (tokens // 2 + 1, tokens // 2):
        k[:, cut:], v[:, cut:] = 50, -1e6
        spoiled = kernels.attention(q, k, v, 2, causal=True, precision="bf16")
        np.testing.assert_allclose(spoiled[:, :cut], found[:, :cut], atol=1e-6)


@BF16
@pytest.mark.parametrize(
    ("shape", "causal"), [((1, 150, 77, 2, 12), False), ((2, 600, 601, 1, 40), True), ((2, 131, 601, 3, 40), False)]
)
def test_bf16_threads_and_neighbours_change_nothing(shape, causal):
    q, k, v = qkv(*shape)
    whole = kernels.attention(q, k, v, shape[3], causal, precision="bf16")
    assert_same_on_any_threads(lambda: kernels.attention(q, k, v, shape[3], causal, precision="bf16"))
    for i in range(shape[0]):
        one = slice(i, i + 1)
        assert_same_bits(kernels.attention(q[one], k[one], v[one], shape[3], causal, precision="bf16"), whole[one])


@BF16
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tk", [1, 13, 600])
@pytest.mark.parametrize("tq", [10, WIDTH + 6])
def test_bf16_special_values_are_not_lost(bad, tk, tq):
    """They reach as far as in float32."""
    q, k, v = qkv(2, tq, tk, 2, 8)
    clean = kernels.attention(q, k, v, 2, precision="bf16")
    token = tk // 2

    spoiled = q.copy()
    spoiled[1, 4, 3] = bad
    found = kernels.attention(spoiled, k, v, 2, precision="bf16")
    assert np.isnan(found[1, 4, :8]).all()
    found[1, 4, :8] = clean[1, 4, :8]
    assert_same_bits(found, clean)

    spoiled = k.copy()
    spoiled[1, token, 3] = bad
    found = kernels.attention(q, spoiled, v, 2, precision="bf16")
    with np.errstate(invalid="ignore"):
        expected = reference.attention(q, spoiled, v, 2, precision="bf16")
    np.testing.assert_allclose(found, expected, atol=2.0**-8 * np.abs(v).max())
    assert np.isnan(found[1, :, :8]).any()

    spoiled = v.copy()
    spoiled[1, token, 3] = bad
    found = kernels.attention(q, k, spoiled, 2, precision="bf16")
    np.testing.assert_array_equal(found[1, :, 3], np.full(tq, bad, np.float32))
    found[1, :, 3] = clean[1, :, 3]
    assert_same_bits(found, clean)


@BF16
def test_bf16_after_another_size():
    """What an earlier call left in the memory that is used again changes nothing."""
    small, large = qkv(1, 5, 3, 1, 2), [a + np.float32(np.nan) for a in qkv(2, 90, 700, 2, 64)]
    expected = kernels.attention(*small, 1, precision="bf16")
    kernels.attention(*large, 2, precision="bf16")
    assert_same_bits(kernels.attention(*small, 1, precision="bf16"), expected)


# --- sizes and arguments ----------------------------------------------------------------------------------------------


def test_empty_batches():
    full, empty = np.zeros((2, 3, 8), np.float32), np.zeros((0, 3, 8), np.float32)
    assert kernels.attention(empty, empty, empty, 2).shape == (0, 3, 8)
    assert kernels.attention(full[:, :0].copy(), full, full, 2).shape == (2, 0, 8)


Q, K, V = qkv(2, 5, 7, 2, 4)
READ_ONLY = np.zeros(Q.shape, np.float32)
READ_ONLY.flags.writeable = False

BAD = {
    "q is a list": (TypeError, "q", ([], K, V, 2), {}),
    "q is float64": (TypeError, "q", (Q.astype(np.float64), K, V, 2), {}),
    "k is float16": (TypeError, "k", (Q, K.astype(np.float16), V, 2), {}),
    "v is None": (TypeError, "v", (Q, K, None, 2), {}),
    "q is a matrix": (ValueError, "q", (Q[0], K, V, 2), {}),
    "k is split into heads": (ValueError, "k", (Q, K.reshape(2, 7, 2, 4), V, 2), {}),
    "v is a scalar": (ValueError, "v", (Q, K, np.zeros((), np.float32), 2), {}),
    "q is part of a joint projection": (ValueError, "q", (normal(0, 2, 5, 24)[:, :, :8], K, V, 2), {}),
    "k is transposed": (ValueError, "k", (Q, np.asfortranarray(K), V, 2), {}),
    "v is reversed": (ValueError, "v", (Q, K, V[:, ::-1], 2), {}),
    "k has another batch": (ValueError, "k", (Q, K[:1], V[:1], 2), {}),
    "k has other channels": (ValueError, "k", (Q, normal(0, 2, 7, 6), V, 2), {}),
    "v has fewer tokens": (ValueError, "k, v", (Q, K, V[:, :6].copy(), 2), {}),
    "no keys": (ValueError, "k, v", (Q, K[:, :0].copy(), V[:, :0].copy(), 2), {}),
    "heads do not divide": (ValueError, "heads", (Q, K, V, 3), {}),
    "heads is 0": (ValueError, "heads", (Q, K, V, 0), {}),
    "heads is negative": (ValueError, "heads", (Q, K, V, -2), {}),
    "heads is a float": (ValueError, "heads", (Q, K, V, 2.0), {}),
    "heads is None": (ValueError, "heads", (Q, K, V, None), {}),
    "no channels": (ValueError, "heads", (Q[..., :0].copy(), K[..., :0].copy(), V[..., :0].copy(), 1), {}),
    "out has another shape": (ValueError, "out", (Q, K, V, 2), {"out": np.zeros_like(K)}),
    "out is float64": (TypeError, "out", (Q, K, V, 2), {"out": np.zeros(Q.shape)}),
    "out is read-only": (ValueError, "out", (Q, K, V, 2), {"out": READ_ONLY}),
    "out is q": (ValueError, "out", (Q, K, V, 2), {"out": Q}),
    "out is k": (ValueError, "out", (Q, Q.copy(), V[:, :5].copy(), 2), {"out": Q}),
    "out is in v": (ValueError, "out", (Q, K, V, 2), {"out": V.reshape(-1)[: Q.size].reshape(Q.shape)}),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    error, name, args, options = BAD[case]
    with pytest.raises(error, match=rf"^{name}.*: .*expected"):
        kernels.attention(*args, **options)
