"""Convolution with 3x3 filters and stride 1 by minimal filtering.

A tile of 6x6 inputs and a 3x3 filter, both transformed, are multiplied element by element and summed over the
channels; transforming back gives 4x4 outputs, with 36 products instead of 144 (Winograd 1980; Lavin and Gray,
arXiv:1509.09308). Tiles of 4x4 inputs give 2x2 outputs with 16 products instead of 36. If the image is enlarged 2x by
nearest neighbour first, 100 products give 8x8 outputs, instead of 576: `winograd.transforms` tells how. The sums over
channels are matrix products, one for each *part* of the transforms, done by the micro-kernel of `products.microkernel`.

1. Inputs: for a batch of tiles, as many as fit the shared cache, all threads write the transformed tiles as
   ``[block][chunk][part][tile][channel]``. Padding and enlargement are addresses, as in the direct convolution.
2. A task is a panel of output channels and a range of blocks of tiles. Its thread transforms filters into a buffer of
   its own, multiplies, transforms the sums back, adds the bias and stores. Large images have tiles enough to pay for
   the filters of all channels; for small ones the filters of one chunk of channels are transformed and used at a time,
   in the L2 cache, while the stored filters of the next chunk are fetched.

Transformed filters are up to eleven times as large as stored ones: making them again for each batch is cheaper than to
keep them. The parts of each buffer lie a little more than a multiple of 4 KB apart: at multiples they would compete for
the same lines of the cache.

Convolutions between few channels have it easier: transformed filters of all of them fit the L2 cache, beside the inputs
and sums of a small block of tiles, so each thread does all the steps for a block at a time.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np

from ..checks import address, write_mode
from ..machine import isa
from ..machine.emit import LANES
from ..machine.jit import threads
from ..machine.memory import scratch
from ..products.driver import Geometry, bias_address, zeros
from ..products.microkernel import SIX, STRIDE, WIDTH
from ..products.packing import GROUPS, StoredWeight, stored_address, update_address
from ..quantize import QuantizedWeight
from .inputs import BLOCK, NARROW_TILES, SMALL_CHUNK, transform_inputs, transform_inputs_bytes, transform_inputs_pairs
from .products import convolve_tiles, measure_filters, multiply_tiles, multiply_tiles_bytes, multiply_tiles_pairs

_CHUNK = 320  # channels of a chunk, at most, if all filters of a panel are transformed at once
_NARROW = 640 << 10  # bytes of them up to which they do, of 1 MB
_FEW = 36  # tiles of an image up to which that is so
_BATCH = min(28 << 20, isa.shared_cache() * 7 // 8)  # bytes of transformed inputs at a time
# Algorithm -> outputs of a tile a side, taps a side, and the cost of transforming a vector of filters.
FORMS = {"winograd2": (2, 3, 90), "winograd4": (4, 3, 170), "winograd_up": (4, 2, 140)}
COARSE = {"winograd2"}  # algorithms for less precise products; the others would lose too many digits


def costs(channels: int, c_out: int, geometry: Geometry, precision: str = "f32") -> dict[str, float]:
    """Estimate the cost of each algorithm that can do a convolution, by its name in `kernels.conv2d`.

    The unit is a multiplication of one vector, for each vector of filters. An image is looked at by itself, so that its
    result does not depend on how many come with it.
    """
    g = geometry
    estimates = {"direct": 1.05 * g.kh * g.kw * g.out_h * g.out_w + 15}
    if (g.kh, g.kw, g.stride) != (3, 3, 1):
        return estimates
    for name, (step, taps, filters) in FORMS.items():
        if taps == 2 and not g.enlarge:
            continue
        parts, spread = (step + taps - 1) ** 2, _spread(taps)
        tiles = math.ceil(g.out_h / spread / step) * math.ceil(g.out_w / spread / step)
        transforms = parts * (3 * LANES / min(c_out, 16 * LANES) + 2.5 * LANES / min(channels, 16 * LANES))
        product = 1.15 * parts
        if name in COARSE and precision != "f32":
            product, transforms = 1.05 * parts / GROUPS[precision], 0.65 * transforms
        estimates[name] = spread**2 * (filters + tiles * (product + transforms))
    return estimates


def _spread(taps: int) -> int:
    """Return how far apart the rows of a phase are: a form with two taps needs phases."""
    return 2 if taps == 2 else 1


def winograd(
    x: np.ndarray, w: StoredWeight, bias: np.ndarray | None, out: np.ndarray, geometry: Geometry,
    accumulate: bool, relu: bool, algorithm: str, precision: str,
) -> None:  # fmt: skip
    """Convolve x with 3x3 filters w as stored; the arguments are those of `kernels.gemm.multiply`, already checked.

    `algorithm` is a key of `FORMS` that can do it, and one of `COARSE` unless the precision is ``f32``.
    """
    spread = _spread(FORMS[algorithm][1])
    for phase in itertools.product(range(min(spread, geometry.out_h)), range(min(spread, geometry.out_w))):
        _convolve(x, w, bias, out, geometry, accumulate, relu, algorithm, precision, phase)


def _convolve(
    x: np.ndarray, w: StoredWeight, bias: np.ndarray | None, out: np.ndarray, geometry: Geometry,
    accumulate: bool, relu: bool, algorithm: str, precision: str, phase: tuple[int, int],
) -> None:  # fmt: skip
    """Compute one phase of the outputs, or all of them if there are no phases."""
    g, channels, c_out, (step, taps, _) = geometry, x.shape[-1], out.shape[-1], FORMS[algorithm]
    parts, spread = (step + taps - 1) ** 2, _spread(taps)
    tiles_h, tiles_w = (
        math.ceil((side - first) / spread / step) for side, first in zip((g.out_h, g.out_w), phase, strict=True)
    )
    top, left, enlarge, merged = g.top, g.left, g.enlarge, (0, 0)
    if taps == 2:  # of the small image
        offsets = phase[0] - top, phase[1] - left  # of the first output's first tap, in the enlarged image
        top, left, enlarge, merged = -(offsets[0] // 2), -(offsets[1] // 2), 0, (offsets[0] % 2, offsets[1] % 2)
    tiles, panels, workers = g.images * tiles_h * tiles_w, math.ceil(c_out / WIDTH), threads()
    spill = address(scratch.take("spill", panels * WIDTH))
    blank, how = zeros(channels), write_mode(out, accumulate, relu)
    source = address(x), address(blank), g.height, g.width, channels, top, left, enlarge, tiles_h, tiles_w
    weight = *stored_address(w), address(_tap_offsets()), *update_address(w), *merged
    target = address(out), g.out_h, g.out_w, c_out, *bias_address(bias), how
    few = tiles_h * tiles_w <= _FEW
    chunk = _chunk_size(channels, SMALL_CHUNK if few else _CHUNK)
    padded = math.ceil(channels / LANES) * LANES
    packed_floats = (SMALL_CHUNK + 3) * 9 * LANES + WIDTH
    if precision == "f32" and chunk >= channels and panels * parts * (channels + 1) * STRIDE <= _NARROW:
        sizes = (
            (panels * parts * (channels + 1) + 1) * WIDTH,
            parts * (NARROW_TILES * padded + LANES),
            (parts * (math.ceil(NARROW_TILES / SIX) * SIX + 1) + SIX) * WIDTH,
        )
        buffer_floats = sum(sizes) + packed_floats
        buffers = address(scratch.take("filters", buffer_floats * workers))
        convolve_tiles(
            *source, tiles, step, taps, *weight, *target, spread, *phase,
            panels, spill, *(4 * size for size in sizes), buffers, buffer_floats * 4, workers,
        )  # fmt: skip
        return
    transform, multiply, group = transform_inputs, multiply_tiles, GROUPS[precision]
    if precision == "bf16":
        transform, multiply = transform_inputs_pairs, multiply_tiles_pairs
    block_tiles = BLOCK // parts
    batch = max(1, _BATCH * group // (parts * 4 * channels * block_tiles)) * block_tiles
    blocks = math.ceil(min(batch, tiles) / block_tiles)
    splits = _splits(panels, blocks, workers)
    block_floats = parts * (block_tiles * padded + math.ceil(channels / chunk) * LANES) // group
    v = address(scratch.take("tiles", blocks * block_floats))
    block_rows = math.ceil(min(block_tiles, tiles) / SIX) * SIX + 1
    filters_floats = (parts * (math.ceil(chunk / group) + 1) + 1) * WIDTH
    sums_floats = (math.ceil(blocks / splits) if chunk < channels else 1) * (parts * block_rows + SIX) * WIDTH
    buffer_floats = filters_floats + sums_floats + packed_floats
    buffers = address(scratch.take("filters", buffer_floats * workers))
    filter_scales, scale_stride = 0, 0
    more: tuple[int, ...] = ()
    if precision == "int8" and isinstance(w, QuantizedWeight):
        transform, multiply = transform_inputs_bytes, multiply_tiles_bytes
        scales_of_filters = w.remembered("winograd2", lambda: _filter_scales(w))
        filter_scales, scale_stride = address(scales_of_filters), scales_of_filters.shape[1] * 4
        more = (address(scratch.take("scales", min(batch, tiles) * parts)),)
    for tile0 in range(0, tiles, batch):
        count = min(batch, tiles - tile0)
        transform(*source, tile0, count, step, taps, v, chunk, workers, *more)
        multiply(
            v, channels, chunk, tile0, count, step, taps,
            *weight, *target, tiles_h, tiles_w, spread, *phase,
            panels, min(splits, math.ceil(count / block_tiles)), spill,
            filters_floats * 4, sums_floats * 4, buffers, buffer_floats * 4,
            filter_scales, scale_stride, *(more or (0,)), workers,
        )  # fmt: skip


def _filter_scales(w: QuantizedWeight) -> np.ndarray:
    """Return the scales of transformed filters of bytes, and their inverses, (32, c_out rounded up to whole panels)."""
    c_out, channels = w.shape[:2]
    scales = np.zeros((32, math.ceil(c_out / WIDTH) * WIDTH), np.float32)
    measure_filters(
        address(w.values), address(w.scales), c_out, channels, address(_tap_offsets()), scales.shape[1] * 4,
        address(scales),
    )  # fmt: skip
    return scales


@lru_cache(maxsize=1)
def _tap_offsets() -> np.ndarray:
    """Where the taps of some filters go for their transform, in bytes: [channel][tap][LANES]."""
    return np.arange(SMALL_CHUNK * 9) * (LANES * 4)


def _chunk_size(channels: int, most: int) -> int:
    """Return how many channels a chunk has: whole vectors, as equal as possible."""
    vectors = math.ceil(channels / LANES)
    return math.ceil(vectors / math.ceil(vectors / (most // LANES))) * LANES


def _splits(panels: int, blocks: int, workers: int) -> int:
    """Return into how many ranges to split the blocks: idle threads cost time, and so do filters transformed again."""

    def cost(splits: int) -> float:
        rounds = math.ceil(panels * splits / workers)
        return rounds / splits * (1 + 0.1 * splits / blocks)

    return min(range(1, min(blocks, 2 * workers) + 1), key=cost)
