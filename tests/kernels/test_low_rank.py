"""Weights with low-rank updates against their NumPy twin, in every kernel that takes a weight."""

import math

import numpy as np
import pytest

from sd_numba import kernels
from sd_numba.kernels import low_rank, winograd
from sd_numba.kernels.machine.emit import LANES
from sd_numba.kernels.products import driver
from sd_numba.kernels.products.driver import Geometry
from sd_numba.kernels.products.microkernel import WIDTH
from tests import reference
from tests.kernels.common import (
    BF16,
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

SMALL, CHUNK = winograd.SMALL_CHUNK, winograd._CHUNK


def pair(rank: int, n: int, *columns: int, seed: int = 10, how: str = "f32") -> tuple[np.ndarray, np.ndarray, float]:
    """An update about as large as the weight, so that no fault in it stays below the tolerance."""
    scale = 1 / math.sqrt(rank)
    return store(normal(seed, n, rank), how), store(normal(seed + 1, rank, *columns), how), scale


def adapt(w: np.ndarray, *pairs: tuple[np.ndarray, np.ndarray, float]) -> tuple[kernels.AdaptedWeight, np.ndarray]:
    """The weight, and that of the twin."""
    return kernels.add_low_rank(w, pairs), reference.add_low_rank(w, pairs)


# --- linear layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 5, 64, 128])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (5, 3, 7), (13, 37, 65), (9, 50, 72), (7, 385, 129), (100, 769, 20), (2500, 40, 70)]
)
def test_linear(m, k, n, rank):
    x, b = normal(0, m, k), normal(2, n)
    w, merged = adapt(normal(1, n, k), pair(rank, n, k))
    assert w.shape == (n, k)
    expected, tolerance = reference.linear(x, merged, b), product_tolerance(k)
    found = kernels.linear(x, w, b)
    assert_close(found, expected, tolerance)
    with fenced(m, n, fill=2) as out:
        kernels.linear(x, w, b, out=out, accumulate=True)
        assert_close(out, expected + 2, tolerance)
    with fenced(m, n) as out:
        kernels.linear(x, kernels.pack_linear(w), b, out=out)
        assert_same_bits(out, found)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "quick_gelu", "geglu"])
@pytest.mark.parametrize(("m", "k", "n"), [(3, 5, 6), (13, 50, 70), (97, 401, 130), (8, 20, 640)])
def test_activations(activation, m, k, n):
    x, w, b, pairs = normal(0, m, k), normal(1, n, k, scale=1 / math.sqrt(k)), normal(2, n), [pair(7, n, k)]
    gated = activation == "geglu"
    expected = getattr(reference, activation)(reference.linear(x, reference.add_low_rank(w, pairs), b))
    adapted = kernels.add_low_rank(w, pairs, gated=gated)
    found = kernels.linear(x, adapted, b, activation=activation)
    assert_close(found, expected, 3 * product_tolerance(k))
    assert_same_bits(kernels.linear(x, kernels.pack_linear(adapted, gated=gated), b, activation=activation), found)


@pytest.mark.parametrize("widths", [(1, 1), (5, 3), (LANES, 7), (320, 640), (700, 1, 33)])
def test_several_inputs(widths):
    x, k = normal(0, 2, 7, sum(widths)), sum(widths)
    parts = tuple(np.ascontiguousarray(part) for part in np.split(x, np.cumsum(widths)[:-1], axis=-1))
    w, merged = adapt(normal(1, 70, k), pair(6, 70, k))
    expected = reference.linear(x, merged)
    assert_close(kernels.linear(parts, w), expected, product_tolerance(k))
    assert_close(kernels.linear(parts, kernels.pack_linear(w)), expected, product_tolerance(k))


@pytest.mark.parametrize("how", [*STORED, "int8"])
@pytest.mark.parametrize("shape", [(1, 1), (71, 83), (130, 5), (9, 7, 3, 3), (6, 4, 1, 1)], ids=str)
def test_merge(shape, how):
    """The sum that the twin makes, in new memory; the weight that it was made of stays as it is."""
    w = store(normal(1, *shape), how)
    pairs = [pair(3, shape[0], *shape[1:]), (*pair(5, shape[0], *shape[1:], seed=20)[:2], -0.5)]
    adapted, expected = adapt(w, *pairs)
    before = reference.widen(w)
    merged = kernels.merge(adapted)
    assert_close(merged, expected, product_tolerance(8))
    assert merged.flags.c_contiguous
    merged[:] = 0
    assert_same_bits(reference.widen(w), before)
    assert_close(kernels.merge(adapted), expected, product_tolerance(8))


@pytest.mark.parametrize("gated", [False, True])
def test_merged_weights_do_what_adapted_ones_do(gated):
    x, w = normal(0, 13, 50), normal(1, 70, 50)
    adapted = kernels.add_low_rank(w, [pair(7, 70, 50)], gated=gated)
    activation = "geglu" if gated else None
    expected = kernels.linear(x, adapted, activation=activation)
    assert_close(kernels.linear(x, kernels.merge(adapted), activation=activation), expected, 3 * product_tolerance(50))


@BF16
def test_merged_weights_in_bf16():
    x, (w, merged) = normal(0, 13, 50), adapt(normal(1, 70, 50), pair(7, 70, 50))
    found = kernels.linear(x, kernels.merge(w), precision="bf16")
    assert_close(found, reference.linear(x, merged, precision="bf16"), 2.0**-8)  # a last bit of w may round away


@pytest.mark.parametrize("rank", [1, 5, 64])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (13, 37, 65), (100, 769, 20)])
def test_quantized_linear(m, k, n, rank):
    x, w = normal(0, m, k), kernels.quantize(normal(1, n, k))
    adapted, merged = adapt(w, pair(rank, n, k))
    assert adapted.stored is w
    found = kernels.linear(x, adapted)
    assert_close(found, reference.linear(x, merged), product_tolerance(k))
    assert_same_bits(kernels.linear(x, kernels.pack_linear(adapted)), found)


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("how_update", ["f32", "f16", "bf16"])
def test_stored(how, how_update):
    """Any dtypes, from any address; the stored weight is not copied."""
    x, w, factors = normal(0, 9, 83), misaligned(store(normal(1, 71, 83), how), 1), pair(9, 71, 83, how=how_update)
    adapted, merged = adapt(w, (misaligned(factors[0], 2), misaligned(factors[1], 6), factors[2]))
    assert np.may_share_memory(adapted.stored, w)
    assert adapted.nbytes == 83 * 9 * 4 + adapted.up.nbytes
    assert_close(kernels.linear(x, adapted), reference.linear(x, merged), product_tolerance(83))


def test_updates_add_up():
    x, w = normal(0, 10, 90), normal(1, 80, 90)
    pairs = [(*pair(rank, 80, 90, seed=rank)[:2], scale) for rank, scale in ((1, 0.5), (4, -2.0), (33, 0.1), (7, 0.0))]
    adapted, merged = adapt(w, *pairs)
    assert_close(kernels.linear(x, adapted), reference.linear(x, merged), product_tolerance(90))


def test_an_update_of_nothing_changes_nothing():
    x, w = normal(0, 10, 90), normal(1, 80, 90)
    adapted, _ = adapt(w, (*pair(5, 80, 90)[:2], 0.0))
    assert_same_bits(kernels.linear(x, adapted), kernels.linear(x, w))


@pytest.mark.parametrize("rows", [7, 100, 1000])
def test_the_blocking_changes_nothing(rows, monkeypatch):
    x, (w, _) = normal(0, 250, 400), adapt(normal(1, 334, 400), pair(20, 334, 400))
    expected = kernels.linear(x, w)
    monkeypatch.setattr(driver, "_PACK_ROWS", rows)
    monkeypatch.setattr(driver, "_GROUP", 3 * 400 * WIDTH * 4)
    assert_same_bits(kernels.linear(x, w), expected)


# --- convolutions -----------------------------------------------------------------------------------------------------

# x shape, w shape, stride, padding, upsample, algorithm
CONVOLUTIONS = {
    "1x1": ((2, 7, 5, 17), (65, 17, 1, 1), 1, 0, False, "direct"),
    "3x3": ((1, 13, 11, 20), (72, 20, 3, 3), 1, 1, False, "direct"),
    "3x3, stride 2": ((3, 10, 7, 9), (17, 9, 3, 3), 2, 1, False, "direct"),
    "3x3, several chunks": ((1, 4, 4, 770), (8, 770, 3, 3), 2, ((0, 1), (0, 1)), False, "direct"),
    "5x2": ((1, 9, 4, 6), (33, 6, 5, 2), 3, 1, False, "direct"),
    "upsample": ((2, 3, 4, 20), (63, 20, 3, 3), 1, 1, True, "direct"),
    "tiles of 2x2": ((1, 6, 6, LANES), (WIDTH + LANES, LANES, 3, 3), 1, 1, False, "winograd2"),
    "tiles of 4x4": ((2, 9, 10, LANES + 3), (WIDTH + 5, LANES + 3, 3, 3), 1, 1, False, "winograd4"),
    "one channel": ((1, 9, 7, 1), (1, 1, 3, 3), 1, 1, False, "winograd4"),
    "several small chunks": ((1, 7, 6, 3 * SMALL + 1), (WIDTH + 5, 3 * SMALL + 1, 3, 3), 1, 1, False, "winograd4"),
    "several chunks": ((1, 26, 27, 2 * CHUNK + 5), (9, 2 * CHUNK + 5, 3, 3), 1, 1, False, "winograd4"),
    "phases": ((2, 5, 6, LANES), (WIDTH + LANES, LANES, 3, 3), 1, 1, True, "winograd_up"),
    "phases, odd": ((1, 7, 6, SMALL + 3), (WIDTH - 5, SMALL + 3, 3, 3), 1, ((0, 3), (2, 1)), True, "winograd_up"),
    "tiles of an enlarged image": ((1, 5, 4, LANES), (LANES, LANES, 3, 3), 1, 1, True, "winograd4"),
}  # fmt: skip


def tolerance(channels: int, algorithm: str) -> float:
    """Allow what the tests of the algorithms do, for a 3x3 filter."""
    return product_tolerance(9 * channels) if algorithm == "direct" else 5e-7 * (3 + math.sqrt(channels))


@pytest.mark.parametrize("apart", [False, True], ids=["merged", "apart"])
@pytest.mark.parametrize("rank", [1, 5, 64])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d(case, rank, apart, monkeypatch):
    monkeypatch.setattr(low_rank, "_APART", 0.0 if apart else math.inf)
    x_shape, w_shape, stride, padding, upsample, algorithm = CONVOLUTIONS[case]
    x, b = normal(0, *x_shape), normal(2, x_shape[0], w_shape[0])
    w, merged = adapt(normal(1, *w_shape), pair(rank, w_shape[0], *w_shape[1:]))
    options = {"stride": stride, "padding": padding, "upsample": upsample}
    expected, allowed = reference.conv2d(x, merged, b, **options), tolerance(x_shape[3], algorithm)
    found = kernels.conv2d(x, w, b, **options, algorithm=algorithm)
    assert_close(found, expected, allowed)
    with fenced(*expected.shape, fill=2) as out:
        assert kernels.conv2d(x, w, b, **options, algorithm=algorithm, out=out, accumulate=True) is out
        assert_close(out, expected + 2, allowed)
    packed = kernels.conv2d(x, kernels.pack_conv2d(w), b, **options, algorithm=algorithm)
    assert_close(packed, expected, allowed)
    if not apart or algorithm != "direct":
        assert_same_bits(packed, found)


@pytest.mark.parametrize("apart", [False, True], ids=["merged", "apart"])
@pytest.mark.parametrize("case", ["3x3", "tiles of 4x4", "phases"])
def test_quantized_conv2d(case, apart, monkeypatch):
    monkeypatch.setattr(low_rank, "_APART", 0.0 if apart else math.inf)
    x_shape, w_shape, _, _, upsample, algorithm = CONVOLUTIONS[case]
    x, w = normal(0, *x_shape), kernels.quantize(normal(1, *w_shape))
    adapted, merged = adapt(w, pair(5, w_shape[0], *w_shape[1:]))
    expected = reference.conv2d(x, merged, upsample=upsample)
    for weight in (adapted, kernels.pack_conv2d(adapted)):
        found = kernels.conv2d(x, weight, upsample=upsample, algorithm=algorithm)
        assert_close(found, expected, tolerance(x_shape[3], algorithm))


def test_which_convolutions_keep_the_update_apart():
    def is_apart(side: int, channels: int, upsample: bool = False) -> bool:
        w = np.zeros((channels, channels, 3, 3), np.float32)
        w = kernels.add_low_rank(w, [pair(4, channels, channels, 3, 3)])
        out = side << upsample
        geometry = Geometry(1, side, side, out, out, 3, 3, 1, 1, 1, int(upsample))
        return low_rank.is_apart(w, geometry, "winograd_up" if upsample else "winograd4")

    assert not is_apart(64, 320) and not is_apart(32, 640) and not is_apart(32, 640, upsample=True)
    assert is_apart(16, 1280) and is_apart(8, 1280) and is_apart(8, 1280, upsample=True)
    plain = np.zeros((8, 8, 3, 3), np.float32)
    assert not low_rank.is_apart(plain, Geometry(1, 8, 8, 8, 8, 3, 3, 1, 1, 1), "winograd4")


@pytest.mark.parametrize("apart", [False, True], ids=["merged", "apart"])
def test_images_do_not_depend_on_their_neighbours(apart, monkeypatch):
    monkeypatch.setattr(low_rank, "_APART", 0.0 if apart else math.inf)
    x, (w, _) = normal(0, 3, 9, 8, 20), adapt(normal(1, 70, 20, 3, 3), pair(6, 70, 20, 3, 3))
    whole = kernels.conv2d(x, w)
    for i in range(3):
        assert_same_bits(kernels.conv2d(x[i : i + 1], w), whole[i : i + 1])


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True], ids=["merged", "apart"])
def test_threads_change_nothing(apart, monkeypatch):
    monkeypatch.setattr(low_rank, "_APART", 0.0 if apart else math.inf)
    x, (w, _) = normal(0, 97, 385), adapt(normal(1, 130, 385), pair(11, 130, 385))
    assert_same_on_any_threads(lambda: kernels.linear(x, w))
    assert_same_on_any_threads(lambda: kernels.pack_linear(w).panels)
    x, (w, _) = normal(0, 2, 13, 14, 60), adapt(normal(1, 70, 60, 3, 3), pair(11, 70, 60, 3, 3))
    for stride in (1, 2):
        assert_same_on_any_threads(lambda stride=stride: kernels.conv2d(x, w, stride=stride))


def test_empty_batches():
    w, _ = adapt(normal(0, 4, 3), pair(2, 4, 3))
    assert kernels.linear(np.zeros((0, 3), np.float32), w).shape == (0, 4)
    w, _ = adapt(normal(0, 4, 3, 3, 3), pair(2, 4, 3, 3, 3))
    assert kernels.conv2d(np.zeros((0, 5, 6, 3), np.float32), w).shape == (0, 5, 6, 4)


W, FILTERS = normal(1, 4, 8), normal(1, 4, 8, 3, 3)
UP, DOWN = normal(2, 4, 2), normal(3, 2, 8)
BAD = {
    "w is a list": (TypeError, "w", ([[1.0]], [(UP, DOWN, 1.0)])),
    "w is float64": (TypeError, "w", (W.astype(np.float64), [(UP, DOWN, 1.0)])),
    "w is a vector": (ValueError, "w", (W[0], [(UP, DOWN, 1.0)])),
    "w has an update": (TypeError, "w", (kernels.add_low_rank(W, [(UP, DOWN, 1.0)]), [(UP, DOWN, 1.0)])),
    "no pairs": (ValueError, "pairs", (W, [])),
    "up is float64": (TypeError, "up", (W, [(UP.astype(np.float64), DOWN, 1.0)])),
    "up is a filter": (ValueError, "up", (W, [(UP.reshape(4, 2, 1, 1), DOWN, 1.0)])),
    "up has other rows": (ValueError, "up, down", (W, [(normal(2, 5, 2), DOWN, 1.0)])),
    "up has another rank": (ValueError, "up, down", (W, [(normal(2, 4, 3), DOWN, 1.0)])),
    "down is int": (TypeError, "down", (W, [(UP, DOWN.astype(np.int32), 1.0)])),
    "down has other columns": (ValueError, "up, down", (W, [(UP, normal(3, 2, 7), 1.0)])),
    "down is a filter": (ValueError, "down", (W, [(UP, DOWN.reshape(2, 8, 1, 1), 1.0)])),
    "down has other taps": (ValueError, "up, down", (FILTERS, [(UP, normal(3, 2, 8, 3, 1), 1.0)])),
    "the second is wrong": (ValueError, "up, down", (W, [(UP, DOWN, 1.0), (UP.T.copy(), DOWN, 1.0)])),
    "of rank 0": (ValueError, "up", (W, [(UP[:, :0].copy(), DOWN[:0], 1.0)])),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    error, name, args = BAD[case]
    with pytest.raises(error, match=f"^{name}: found .*expected"):
        kernels.add_low_rank(*args)


def test_the_gate_must_fit():
    gated, plain = (kernels.add_low_rank(W, [(UP, DOWN, 1.0)], gated=gate) for gate in (True, False))
    filters = kernels.add_low_rank(FILTERS, [(UP, normal(3, 2, 8, 3, 3), 1.0)])
    x = normal(0, 6, 8)
    for call in (
        lambda: kernels.add_low_rank(W[:3], [(UP[:3], DOWN, 1.0)], gated=True),
        lambda: kernels.add_low_rank(FILTERS, [(UP, normal(3, 2, 8, 3, 3), 1.0)], gated=True),
        lambda: kernels.linear(x, gated),
        lambda: kernels.linear(x, plain, activation="geglu"),
        lambda: kernels.pack_linear(gated),
        lambda: kernels.pack_linear(plain, gated=True),
        lambda: kernels.pack_linear(filters),
        lambda: kernels.pack_conv2d(plain),
        lambda: kernels.linear(x, filters),
        lambda: kernels.conv2d(normal(0, 1, 3, 3, 8), plain),
    ):
        with pytest.raises(ValueError, match=r"^w: found .*expected"):
            call()
    with pytest.raises(ValueError, match="shares memory"):
        kernels.linear(x, plain, out=W.reshape(-1)[:24].reshape(6, 4))
