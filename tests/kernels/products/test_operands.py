"""linear in bf16 and int8 against twins that round the same inputs; what is left is the rounding of the sums.

In int8 not even that: sums of whole numbers are exact, and two products with scales follow.
"""

import math

import numpy as np
import pytest

from sd_numba import kernels
from sd_numba.kernels import gemm
from sd_numba.kernels.machine.emit import LANES
from sd_numba.kernels.products import driver
from sd_numba.kernels.products.microkernel import WIDTH
from tests import reference
from tests.kernels.common import (
    BF16,
    INT8,
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
from tests.kernels.test_gemm import SHAPES

WEIGHTS = [  # precision, and how the weight is stored
    *(pytest.param("bf16", how, marks=BF16) for how in (*STORED, "int8")),
    pytest.param("int8", "int8", marks=INT8),
]
ULPS = 4 * 2.0**-24  # in int8: the sum and its scale are rounded, and their product; the scale has two roundings before


def stored_for(precision: str, w: np.ndarray) -> np.ndarray | kernels.QuantizedWeight:
    return store(w, "int8" if precision == "int8" else "f32")


def tolerance(precision: str, k: int) -> float:
    """What the sums may be off by, relative to the largest result."""
    return ULPS if precision == "int8" else product_tolerance(k)


def assert_each_close(found: np.ndarray, expected: np.ndarray, ulps: float) -> None:
    """Compare each result with a tolerance relative to itself."""
    assert np.isfinite(found).all()
    assert (np.abs(found.astype(np.float64) - expected) <= ulps * np.abs(expected)).all()


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize(("m", "k", "n"), [*SHAPES, *((3, k, 19) for k in (5, 6, 9, 13, 62, 63, 65, 66, 67))])
def test_matches_twin(m, k, n, precision):
    x, w, b = normal(0, m, k), stored_for(precision, normal(1, n, k)), normal(2, n)
    plain, allowed = reference.linear(x, w, precision=precision), tolerance(precision, k)
    with fenced(m, n) as out:
        assert kernels.linear(x, w, out=out, precision=precision) is out
        assert_close(out, plain, allowed)
        if precision == "int8":
            assert_each_close(out, plain, ULPS)
    with fenced(m, n) as packed:
        kernels.linear(x, kernels.pack_linear(w, precision=precision), out=packed, precision=precision)
        assert_same_bits(packed, out)
    biased = kernels.linear(x, w, b, precision=precision)
    assert_same_bits(biased, out + b)
    with fenced(m, n, fill=2) as added:
        kernels.linear(x, w, b, out=added, accumulate=True, precision=precision)
        assert_same_bits(added, np.float32(2) + biased)


@pytest.mark.parametrize(("precision", "how"), WEIGHTS)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (4, 5, 3), (7, 16, 16), (13, 50, 72), (6, 401, 65), (100, 64, 64), (2, 258, 130)]
)
def test_stored_weights(m, k, n, precision, how):
    """A weight gives the same packed or not, and, of those that bfloat16 holds exactly, widened or not."""
    x, w, b = normal(0, m, k), store(normal(1, n, k), how), normal(2, n)
    found = kernels.linear(x, w, b, precision=precision)
    assert_close(found, reference.linear(x, w, b, precision=precision), tolerance(precision, k) + 2.0**-24)
    packed = kernels.pack_linear(w, precision=precision)
    assert_same_bits(kernels.linear(x, packed, b, precision=precision), found)
    assert packed.shape == (n, k)
    assert packed.nbytes == -(-n // WIDTH) * WIDTH * 4 * -(-k // {"bf16": 2, "int8": 4}[precision])
    if how != "int8":
        assert_same_bits(kernels.linear(x, kernels.widen(w), b, precision=precision), found)


@pytest.mark.parametrize(("precision", "how"), WEIGHTS)
@pytest.mark.parametrize("offset", [1, 2, 6, 12])
def test_weights_at_any_address(offset, precision, how):
    x, w, b = normal(0, 5, 75), store(normal(1, 37, 75), how), normal(2, 37)
    expected = kernels.linear(x, w, b, precision=precision)
    if how == "int8":
        moved = kernels.QuantizedWeight(misaligned(w.values, offset), misaligned(w.scales, offset))
    else:
        moved = misaligned(w, offset)
    x, b = misaligned(x, offset), misaligned(b, offset)
    assert_same_bits(kernels.linear(x, moved, b, precision=precision), expected)
    assert_same_bits(
        kernels.linear(x, kernels.pack_linear(moved, precision=precision), b, precision=precision), expected
    )


@pytest.mark.parametrize(("precision", "how"), WEIGHTS)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 2), (3, 5, 6), (13, 50, 70), (97, 401, 130)])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "quick_gelu", "geglu"])
def test_activations(activation, m, k, n, precision, how):
    x, w, b = normal(0, m, k), store(normal(1, n, k), how), normal(2, n)
    expected = getattr(reference, activation)(reference.linear(x, w, b, precision=precision))
    options = {"activation": activation, "precision": precision}
    found = kernels.linear(x, w, b, **options)
    assert_close(found, expected, 3 * product_tolerance(k))
    packed = kernels.pack_linear(w, gated=activation == "geglu", precision=precision)
    with fenced(*expected.shape) as out:
        kernels.linear(x, packed, b, out=out, **options)
        assert_same_bits(out, found)
    with fenced(*expected.shape, fill=2) as out:
        kernels.linear(x, w, b, out=out, accumulate=True, **options)
        assert_same_bits(out, np.float32(2) + found)


@pytest.mark.parametrize(("precision", "how"), WEIGHTS)
@pytest.mark.parametrize("widths", [(1, 1), (5, 3), (4, 7), (2, 9), (6, 2, 1), (LANES, 7), (320, 640), (700, 1, 33)])
def test_several_inputs(widths, precision, how):
    """They are rounded each by itself, unless a word would straddle two of them."""
    x, w, b = normal(0, 2, 7, sum(widths)), store(normal(1, 70, sum(widths)), how), normal(2, 70)
    x *= np.linspace(0.1, 10, x.shape[-1], dtype=np.float32)  # so that parts differ in what 1 is worth
    cuts = np.cumsum(widths)[:-1]
    parts = tuple(np.ascontiguousarray(part) for part in np.split(x, cuts, axis=-1))
    expected = reference.linear(x, w, b, precision=precision)
    if not any(width % {"bf16": 2, "int8": 4}[precision] for width in widths[:-1]):
        expected = b.astype(np.float64)
        for part, first in zip(parts, (0, *cuts), strict=True):
            columns = slice(first, first + part.shape[-1])
            some = reference.QuantizedWeight(w.values[:, columns], w.scales) if how == "int8" else w[:, columns]
            expected = expected + reference.linear(part, some, precision=precision)
    found = kernels.linear(parts, w, b, precision=precision)
    assert_close(found, expected, product_tolerance(sum(widths)))
    packed = kernels.pack_linear(w, precision=precision)
    assert_same_bits(kernels.linear(parts, packed, b, precision=precision), found)
    with fenced(2, 7, 70, fill=3) as out:
        kernels.linear(parts, w, b, out=out, accumulate=True, precision=precision)
        assert_close(out, expected + 3, product_tolerance(sum(widths)))
    assert_same_on_any_threads(lambda: kernels.linear(parts, w, b, precision=precision))


@pytest.mark.parametrize(("precision", "how"), WEIGHTS)
def test_the_blocking_changes_nothing(precision, how, monkeypatch):
    x, w, b = normal(0, 250, 1000), store(normal(1, 334, 1000), how), normal(2, 334)
    options = {"precision": precision}
    packed, gated = kernels.pack_linear(w, **options), kernels.pack_linear(w, gated=True, **options)
    expected = kernels.linear(x, packed, b, **options)
    expected_gated = kernels.linear(x, gated, b, activation="geglu", **options)
    for rows, panels in ((1, 1), (7, 2), (100, 4), (250, 100), (1000, 1)):
        monkeypatch.setattr(driver, "_PACK_ROWS", rows)
        monkeypatch.setattr(driver, "_GROUP", panels * 1000 * WIDTH)
        assert_same_bits(kernels.linear(x, w, b, activation="geglu", **options), expected_gated)
        assert_same_bits(kernels.linear(x, w, b, **options), expected)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 40, 700), (7, 30, 65), (97, 385, 130), (1000, 21, 72)])
def test_threads_change_nothing(m, k, n, precision):
    x, w, b = normal(0, m, k), stored_for(precision, normal(1, n, k)), normal(2, n)
    assert_same_on_any_threads(lambda: kernels.linear(x, w, b, precision=precision))
    assert_same_on_any_threads(lambda: kernels.pack_linear(w, precision=precision).panels)


@pytest.mark.parametrize("precision", ["f32", *LOW])
def test_calls_of_many_sizes_leave_the_heap_whole(precision):
    """What a kernel writes to must not have been freed: the C library ends a process that damages its lists."""
    w = stored_for(precision, normal(1, 90, 100))
    for m in (60, 96, 5, 300, 49) * 4:
        x = normal(m, m, 100)
        expected = reference.linear(x, w, precision=precision)
        assert_close(kernels.linear(x, w, precision=precision), expected, tolerance(precision, 100))


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 100, 803])
def test_rows_do_not_depend_on_their_neighbours(k, precision):
    x, w, b = normal(0, 39, k), stored_for(precision, normal(1, 70, k)), normal(2, 70)
    x *= np.logspace(-3, 3, 39, dtype=np.float32)[:, None]
    whole = kernels.linear(x, w, b, precision=precision)
    for rows in range(1, 39):
        assert_same_bits(kernels.linear(x[:rows], w, b, precision=precision), whole[:rows])
        assert_same_bits(kernels.linear(x[rows:], w, b, precision=precision), whole[rows:])


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("k", [3, 70, 333])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_special_values_stay_in_their_row(bad, k, precision):
    """Anywhere in the row: in a whole vector, in the last few values, in any part of a word."""
    x, w, b = normal(0, 15, k), stored_for(precision, np.abs(normal(1, 67, k)) + 1), normal(2, 67)
    clean = kernels.linear(x, w, b, precision=precision)
    for column in {0, 1, 2, k // 2, k - 2, k - 1}:
        spoiled = x.copy()
        spoiled[8, column] = bad
        found = kernels.linear(spoiled, w, b, precision=precision)
        expected = np.full(67, bad if precision == "bf16" else np.nan, np.float32)
        np.testing.assert_array_equal(found[8], expected)
        assert_same_bits(np.delete(found, 8, 0), np.delete(clean, 8, 0))


@pytest.mark.parametrize("precision", LOW)
def test_a_bad_channel_spoils_its_outputs(precision):
    x, w = normal(0, 15, 70), normal(1, 67, 70)
    w[5, 69] = np.nan
    found = kernels.linear(x, stored_for(precision, w), precision=precision)
    assert np.isnan(found[:, 5]).all()
    assert np.isnan(found).sum() == 15
    with np.errstate(invalid="ignore"):
        w[5, 69] = np.inf
        assert not np.isfinite(kernels.linear(x, stored_for(precision, w), precision=precision)[:, 5]).any()


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("k", [1, 3, 4, 37, 130])
def test_rows_of_zeros(k, precision):
    x, w, b = normal(0, 9, k), stored_for(precision, normal(1, 20, k)), normal(2, 20)
    x[[0, 4]] = 0
    x[5] = -0.0
    found = kernels.linear(x, w, b, precision=precision)
    np.testing.assert_array_equal(found[[0, 4, 5]], np.tile(b, (3, 1)))
    expected = reference.linear(x, w, b, precision=precision)
    assert_close(found, expected, tolerance(precision, k) + 2.0**-24)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("size", [1e30, 1e-30, 1e36, 1e-34])
def test_huge_and_tiny_rows(size, precision):
    """Next to ordinary ones; what overflows no float32 loses nothing."""
    x, w = normal(0, 12, 77), stored_for(precision, normal(1, 30, 77))
    x[::3] *= np.float32(size)
    found, expected = (module.linear(x, w, precision=precision) for module in (kernels, reference))
    for row in range(12):
        largest = np.abs(expected[row]).max()
        assert_close(found[row] / largest, expected[row] / largest, tolerance(precision, 77) + 2.0**-23)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("value", [1e-37, 1.1754942e-38, 1e-40, 1.4e-45])
def test_subnormal_rows_are_next_to_nothing(value, precision):
    """The least values count as zeros or for what they are, and never for anything else."""
    x, w = np.full((5, 37), value, np.float32), np.abs(normal(1, 30, 37))
    x[::2, ::2] *= -1
    x[3] = 1
    found = kernels.linear(x, stored_for(precision, w), precision=precision)
    ordinary = reference.linear(x[3:4], stored_for(precision, w), precision=precision)
    assert_close(found[3:4], ordinary, tolerance(precision, 37))
    assert (np.abs(np.delete(found, 3, 0)) <= np.float32(value) * w.sum(axis=1) * 1.02).all()
    assert np.isfinite(found).all()


@BF16
def test_bf16_takes_subnormals_for_zeros():
    """As the CPUs' instruction does, in both factors, and unlike float32 products."""
    tiny = np.array([[1e-39], [-1e-40]], np.float32)
    large = np.full((1, 1), 1e30, np.float32)
    for a, b in ((tiny, large), (large, tiny), (large, store(tiny, "bf16"))):
        assert not kernels.linear(a, b, precision="bf16").any()


@BF16
def test_bf16_rounds_to_nearest_even():
    """1 + 2**-8 lies between two of them, 1 + 3 * 2**-8 too: the even ones are 1 and 1 + 2**-6."""
    values = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -1 - 2.0**-8], np.float32)
    rounded = np.array([1, 1 + 2.0**-6, 1 + 2.0**-7, -1], np.float32)
    one = np.ones((1, 1), np.float32)
    np.testing.assert_array_equal(kernels.linear(values[:, None], one, precision="bf16")[:, 0], rounded)
    np.testing.assert_array_equal(kernels.linear(one, values[:, None], precision="bf16")[0], rounded)
    np.testing.assert_array_equal(reference.round_bf16(values), rounded)


@BF16
@pytest.mark.parametrize("how", ["f16", "bf16", "e4m3", "e5m2"])
def test_every_stored_value_in_bf16(how):
    """Whole blocks and partial ones; the twin's rounding, NaN and infinities too."""
    codes = np.arange(1 << (8 if how in {"e4m3", "e5m2"} else 16))
    dtype = {"f16": np.float16, "bf16": np.uint16, "e4m3": kernels.float8_e4m3, "e5m2": kernels.float8_e5m2}[how]
    values = codes.astype(np.uint8 if len(codes) == 256 else np.uint16).view(dtype)
    expected = reference.round_bf16(reference.widen(values))
    found = kernels.linear(np.ones((1, 1), np.float32), values[:, None], precision="bf16")
    np.testing.assert_array_equal(found[0], expected)
    columns = 2 * LANES
    blocks = np.zeros((len(codes) // 16, columns), dtype)
    for column in (0, 1, columns - 1):
        blocks[:, column] = values[::16]
        found = kernels.linear(np.ones((1, columns), np.float32), blocks, precision="bf16")
        np.testing.assert_array_equal(found[0], expected[::16])
        blocks[:, column] = values[:1]


@INT8
def test_int8_is_exact():
    """Whole numbers come out as such, ties of x go to the even, and the extremes of both factors add up."""
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]], np.float32)
    codes = np.array([127, 0, 2, 2, 0, -2, -126])
    w = kernels.QuantizedWeight(np.eye(7, dtype=np.int8), np.ones(7, np.float32))
    np.testing.assert_array_equal(kernels.linear(x, w, precision="int8")[0], codes)
    for sign in (1, -1):
        values = np.full((3, 5000), 127 * sign, np.int8)
        w = kernels.QuantizedWeight(values, np.full(3, 0.5, np.float32))
        found = kernels.linear(np.full((2, 5000), -127, np.float32), w, precision="int8")
        np.testing.assert_array_equal(found, np.full((2, 3), -sign * 127 * 127 * 5000 / 2, np.float32))


@INT8
def test_int8_sums_do_not_overflow():
    """With the largest factors, up to the largest number of columns; beyond it linear refuses."""
    most = gemm._MOST_BYTES
    for value in (127, -128):
        w = kernels.QuantizedWeight(np.full((1, most + 1), value, np.int8), np.ones(1, np.float32))
        with pytest.raises(ValueError, match=f"^w: found .*expected at most {most} columns"):
            kernels.linear(np.ones((1, most + 1), np.float32), w, precision="int8")
        w = kernels.QuantizedWeight(w.values[:, :most].copy(), w.scales)
        for sign in (1, -1):
            found = kernels.linear(np.full((1, most), 127 * sign, np.float32), w, precision="int8")
            np.testing.assert_array_equal(found, np.float32([[127 * sign * value * most]]))


@INT8
def test_int8_weights_of_minus_128():
    """`quantize` makes none, but a QuantizedWeight may hold them."""
    x = normal(0, 6, 40)
    w = kernels.QuantizedWeight(np.full((5, 40), -128, np.int8), np.abs(normal(1, 5)))
    assert_each_close(kernels.linear(x, w, precision="int8"), reference.linear(x, w, precision="int8"), ULPS)


@pytest.mark.parametrize("precision", LOW)
def test_how_far_from_float32(precision):
    """For normal x and w: the two roundings of a term are independent, so a sum's error grows like the sum itself.

    bf16 rounds x and w by up to 2**-8 of themselves, 2**-8 / sqrt(3) in the mean square at most. int8 rounds to steps
    of s = max / 127, by s / sqrt(12) in the mean square, where max is about 4 standard deviations for 1000 values.
    """
    x, w = normal(0, 60, 1000), normal(1, 70, 1000)
    exact = reference.linear(x, w)
    found = kernels.linear(x, stored_for(precision, w), precision=precision)
    error = np.sqrt(np.square(found - exact).mean() / np.square(exact).mean())
    each = 2.0**-8 / math.sqrt(3) if precision == "bf16" else 4 / 127 / math.sqrt(12)
    assert error < math.sqrt(2) * each
    assert error > math.sqrt(2) * each / 2  # or it is no product of that precision


@pytest.mark.parametrize("precision", LOW)
def test_leading_dimensions_and_empty_batches(precision):
    w = stored_for(precision, normal(1, 21, 19))
    for lead in ((), (3,), (2, 3), (2, 1, 3, 2)):
        x = normal(0, *lead, 19)
        expected = reference.linear(x, w, precision=precision)
        assert_close(kernels.linear(x, w, precision=precision), expected, tolerance(precision, 19))
    for lead in ((0,), (2, 0)):
        found = kernels.linear(np.zeros((*lead, 19), np.float32), w, precision=precision)
        assert found.shape == (*lead, 21)


@pytest.mark.parametrize("precision", LOW)
def test_a_weight_packed_for_another_precision(precision):
    x, w = normal(0, 3, 8), kernels.quantize(normal(1, 4, 8))
    for packed, asked in ((precision, "f32"), ("f32", precision)):
        with pytest.raises(ValueError, match=f"^w: found a weight packed for {packed}, expected .* {asked}"):
            kernels.linear(x, kernels.pack_linear(w, precision=packed), precision=asked)


@INT8
def test_int8_needs_a_quantized_weight():
    x, w = normal(0, 3, 8), normal(1, 4, 8)
    adapted = kernels.add_low_rank(kernels.quantize(w), [(normal(2, 4, 2), normal(3, 2, 8), 1.0)])
    for wrong in (w, store(w, "bf16"), adapted):
        for call in (kernels.pack_linear, lambda w, precision: kernels.linear(x, w, precision=precision)):
            with pytest.raises(TypeError, match=r"^w: found .*expected what quantize makes"):
                call(wrong, precision="int8")


@BF16
def test_bf16_takes_no_update():
    x, w = normal(0, 3, 8), normal(1, 4, 8)
    adapted = kernels.add_low_rank(w, [(normal(2, 4, 2), normal(3, 2, 8), 1.0)])
    for call in (kernels.pack_linear, lambda w, precision: kernels.linear(x, w, precision=precision)):
        with pytest.raises(TypeError, match=r"^w: found .*expected what merge makes"):
            call(adapted, precision="bf16")


@pytest.mark.parametrize("precision", ["f16", "BF16", "", None, 8])
def test_unknown_precisions(precision):
    x, w = normal(0, 3, 8), normal(1, 4, 8)
    q = normal(2, 1, 3, 8)
    for call in (
        lambda: kernels.linear(x, w, precision=precision),
        lambda: kernels.pack_linear(w, precision=precision),
        lambda: kernels.attention(q, q, q, 2, precision=precision),
    ):
        with pytest.raises(ValueError, match=r"^precision: found .*expected one of f32, bf16, int8"):
            call()
