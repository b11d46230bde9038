"""The widest levels of decoder and encoder in strips of rows: large pictures in a third of the memory, without seams.

In this module a feature map is an object that returns some of its rows on request. A *stored* map has them in memory.
The others compute them from rows of the map before, so a chain of layers is computed one strip at a time, with the few
extra rows on either side that its convolutions read. Only the results of residual blocks are stored, and a strip of a
block's input is freed as soon as the strips that need it are done.

A group norm needs statistics of the whole map before it can normalise the first row. Those of a stored map are exact.
For other maps they are estimated from at most a quarter of the rows, evenly spread, since these rows are computed for
the statistics alone. All strips share the statistics, so no seam shows: this estimate is the only difference from
decoding the whole map at once (embedded model, 512 x 512 pixels: 56 to 69 dB below the peak; with all rows, 140 dB).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from .. import kernels
from .layers import Conv2d, GroupNorm
from .vae_blocks import Decoder, Encoder, ResnetBlock

WHOLE = 160 << 20  # bytes of the largest feature map that is computed as a whole
STRIP = 32 << 20  # bytes of a strip of the widest map of a level
SAMPLE, PERIOD = 4, 16  # statistics use 4 of every 16 rows
SAMPLES = 32  # spans of rows at most: the period is longer in large pictures


class _FeatureMap(Protocol):
    """Rows of one image, ``(1, height, w, c)``. A caller may overwrite the rows of a `fresh` map."""

    height: int
    fresh: bool

    def rows(self, first: int, last: int) -> np.ndarray:
        """Return the rows first .. last, ``(1, last - first, w, c)``."""
        ...

    def forget(self, first: int) -> None:
        """Free what only the rows before ``first`` need; they will not be requested again."""
        ...


class _Stored:
    """A map in memory, as strips of equal height."""

    fresh = False

    def __init__(self, strips: list[np.ndarray]) -> None:
        self.strips, self.step = strips, strips[0].shape[1]
        self.height = sum(strip.shape[1] for strip in strips)
        self.row_bytes = strips[0].nbytes // self.step

    def rows(self, first: int, last: int) -> np.ndarray:
        pieces = []
        for i in range(first // self.step, (last - 1) // self.step + 1):
            strip, start = self.strips[i], i * self.step
            pieces.append(strip[:, max(first - start, 0) : last - start])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)

    def forget(self, first: int) -> None:
        for i in range(max(first, 0) // self.step):
            self.strips[i] = self.strips[i][:, :0].copy()


class _Convolved:
    """A 3x3 convolution of a map, which is first enlarged 2x if `upsample`."""

    fresh = True

    def __init__(self, conv: Any, source: _FeatureMap, upsample: bool = False) -> None:
        self.conv, self.source, self.scale = conv, source, 2 if upsample else 1
        self.height = self.scale * source.height

    def rows(self, first: int, last: int) -> np.ndarray:
        low = max(first - 1, 0) // self.scale
        high = min(-(-(last + 1) // self.scale), self.source.height)
        top, bottom = int(low == 0), int(high == self.source.height)
        y = kernels.conv2d(
            self.source.rows(low, high), self.conv.weight, self.conv.bias,
            padding=((top, bottom), (1, 1)), upsample=self.scale == 2,
        )  # fmt: skip
        start = low * self.scale + 1 - top
        return y[:, first - start : last - start]

    def forget(self, first: int) -> None:
        self.source.forget((first - 1) // self.scale)


class _Halved:
    """A 3x3 convolution with stride 2 of a map that is padded on the right and at the bottom."""

    fresh = True

    def __init__(self, conv: Any, source: _FeatureMap) -> None:
        self.conv, self.source, self.height = conv, source, source.height // 2

    def rows(self, first: int, last: int) -> np.ndarray:
        high = min(2 * last + 1, self.source.height)
        return kernels.conv2d(
            self.source.rows(2 * first, high), self.conv.weight, self.conv.bias, 2, ((0, 2 * last + 1 - high), (0, 1))
        )

    def forget(self, first: int) -> None:
        self.source.forget(2 * first)


class _Kept:
    """A map that keeps the last computed rows: a block's shortcut reads them too, and the next strip some of them.

    Requests for an enlarged map are extended to an odd row: then none but the first computes a row that is not used.
    """

    fresh = False

    def __init__(self, source: _FeatureMap) -> None:
        self.source, self.height = source, source.height
        self._first, self._rows = 0, np.empty((1, 0, 0, 0), np.float32)

    def rows(self, first: int, last: int) -> np.ndarray:
        end = self._first + self._rows.shape[1]
        if not self._first <= first <= end:
            end = first
        if end < last:
            kept = self._rows[:, first - self._first :].copy() if first < end else self._rows[:, :0]
            self._first, self._rows = first, kept  # frees the others before more memory is allocated
            more = self.source.rows(end, min(last | 1, self.height))
            self._rows = np.concatenate([kept, more], axis=1) if kept.size else more
        return self._rows[:, first - self._first : last - self._first]

    def forget(self, first: int) -> None:
        self.source.forget(first)


class _Normed:
    """Group normalisation and SiLU of a map, with statistics of the whole map."""

    fresh = True

    def __init__(self, norm: GroupNorm, source: _FeatureMap, step: int) -> None:
        self.norm, self.source, self.height = norm, source, source.height
        self.statistics = _statistics(source, norm.groups, step)

    def rows(self, first: int, last: int) -> np.ndarray:
        x = self.source.rows(first, last)
        return self.norm(x, statistics=self.statistics, out=x if self.source.fresh else None)

    def forget(self, first: int) -> None:
        self.source.forget(first)


class _Residual:
    """The result of a residual block for a map."""

    fresh = True

    def __init__(self, block: ResnetBlock, source: _FeatureMap, step: int) -> None:
        self.source, self.height, self.shortcut = source, source.height, block.conv_shortcut
        hidden = _Convolved(block.conv1, _Normed(block.norm1, source, step))
        self.sum = _Convolved(block.conv2, _Normed(block.norm2, hidden, step))

    def rows(self, first: int, last: int) -> np.ndarray:
        x = self.sum.rows(first, last)
        source = self.source.rows(first, last)
        if self.shortcut is None:
            x += source
            return x
        return self.shortcut(source, out=x, accumulate=True)

    def forget(self, first: int) -> None:
        self.sum.forget(first)


def decode_in_strips(decoder: Decoder, x: np.ndarray) -> np.ndarray:
    """Decode one image's latents as `decoder` does, in strips from the first level whose maps exceed `WHOLE`.

    Parameters
    ----------
    decoder : Decoder
    x : ndarray
        Float32 ``(1, h, w, latent_channels)``.

    Returns
    -------
    ndarray
        Float32 ``(1, f * h, f * w, out_channels)``.
    """
    x = decoder.conv_in(x)
    blocks: list[Any] = list(decoder.blocks)
    while blocks and not (isinstance(blocks[0], partial) and 4 * x.nbytes > WHOLE):
        x = blocks.pop(0)(x)
    stored, step = _Stored([x]), x.shape[1]
    del x  # so that `stored` can free it
    enlarged: _Kept | None = None
    for block in blocks:
        kernels.trim()
        if isinstance(block, partial):
            step = max(8, STRIP // (2 * stored.row_bytes) // 8 * 8)
            enlarged = _Kept(_Convolved(block.func, stored, upsample=True))
        else:
            stored, enlarged = _store(_Residual(block, enlarged or stored, step), step), None
    last = _Convolved(decoder.conv_out, _Normed(decoder.conv_norm_out, stored, step))
    return np.concatenate(_store(last, step).strips, axis=1)


def encode_in_strips(encoder: Encoder, x: np.ndarray) -> np.ndarray:
    """Encode one image as `encoder` does, in strips until the maps are no larger than `WHOLE`.

    Parameters
    ----------
    encoder : Encoder
    x : ndarray
        Float32 ``(1, h, w, in_channels)``.

    Returns
    -------
    ndarray
        Float32 ``(1, h / f, w / f, 2 * latent_channels)``.
    """
    blocks: list[Any] = list(encoder.blocks)
    row_bytes = x.strides[1] // x.shape[3] * encoder.conv_in.weight.shape[0]
    step = max(8, STRIP // row_bytes // 8 * 8)
    stored = _store(_Convolved(encoder.conv_in, _Stored([x])), step)
    halvings = sum(isinstance(block, Conv2d) for block in blocks)
    while halvings and stored.height * stored.row_bytes > WHOLE:
        kernels.trim()
        block = blocks.pop(0)
        if isinstance(block, Conv2d):
            halvings -= 1
            stored = _store(_Halved(block, stored), step)
        else:
            stored = _store(_Residual(block, stored, step), step)
    x = np.concatenate(stored.strips, axis=1)
    del stored
    for block in blocks:
        x = block(x)
    return encoder.conv_out(encoder.conv_norm_out(x, out=x))


def _statistics(source: _FeatureMap, groups: int, step: int) -> np.ndarray:
    """Return the mean and variance of each group of channels over a map, ``(1, groups, 2)``."""
    spans = [(first, last, last - first) for first, last in _ranges(0, source.height, step)]
    if not isinstance(source, _Stored):
        spans = _samples(source.height)
    found = [kernels.group_statistics(source.rows(first, last), groups)[0] for first, last, _ in spans]
    means, variances = np.moveaxis(np.array(found), 2, 0)
    shares = np.array([[share] for *_, share in spans]) / source.height
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean) ** 2)).sum(0)
    return np.ascontiguousarray(np.stack([mean, variance], axis=-1)[None])


def _samples(height: int) -> list[tuple[int, int, int]]:
    """Return the spans of rows to take statistics from, ``(first, last, number of rows they represent)``.

    Rows at the edges differ from all others, because of the zero padding, and represent only themselves.
    """
    if height <= PERIOD:
        return [(0, height, height)]
    inner = height - 2 * SAMPLE
    count = min(-(-inner // PERIOD), SAMPLES)
    borders = [SAMPLE + inner * i // count for i in range(count + 1)]
    spans = [(0, SAMPLE, SAMPLE), (height - SAMPLE, height, SAMPLE)]
    for first, last in pairwise(borders):
        middle = max(first, (first + last - SAMPLE) // 2 | 1)
        spans.append((middle, min(middle + SAMPLE, last), last - first))
    return spans


def _ranges(first: int, last: int, step: int) -> Iterable[tuple[int, int]]:
    return ((start, min(start + step, last)) for start in range(first, last, step))


def _store(rows: _FeatureMap, step: int) -> _Stored:
    """Compute a map and free its source along the way."""
    strips = []
    for first, last in _ranges(0, rows.height, step):
        strips.append(rows.rows(first, last))
        rows.forget(last)
    return _Stored(strips)
