"""Token merging: similar tokens go through self-attention as one token, their mean.

Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (arXiv:2303.17604). One token of every 2 x 2 is a
destination, chosen at random. Each of the others is matched with the destination of the highest cosine similarity, and
the best matches are merged (bipartite soft matching, after Bolya et al., "Token Merging: Your ViT But Faster",
arXiv:2210.09461). Afterwards each token receives the result of its group. Only self-attention at the highest resolution
merges tokens: it has the most of them, and its cost grows with the square of their number.

All images and all blocks of a call share the destinations, and so do both halves of guidance. They change from timestep
to timestep, but depend only on the rounded timestep and the size, so that pictures are reproducible.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .. import kernels
from ..errors import InputError

CELL = 2  # tokens on each side of a cell, which has one destination
MOST = 1 - 1 / CELL**2  # of the tokens can be merged: all but the destinations
SCORES = 1 << 22  # approximate number of similarities in memory at once


def check_ratio(tome: float) -> float:
    """Return the share of tokens to merge; raise InputError unless it is a number from 0 to 0.75."""
    number = isinstance(tome, (int, float, np.integer, np.floating)) and not isinstance(tome, bool)
    if not number or not 0 <= tome <= MOST:
        raise InputError(f"tome: found {tome!r:.80}, expected a share of the tokens from 0 to {MOST}, usually 0.5")
    return float(tome)


@lru_cache(maxsize=8)
def split_tokens(h: int, w: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of a feature map's tokens that may be merged, and of its destinations, both ascending.

    Every 2 x 2 cell has one destination; the last row or column of an odd size has none.
    """
    rows, cols = h // CELL, w // CELL
    # Raw bits, since NumPy guarantees only these to be the same in all its versions.
    bits = np.random.PCG64([h, w, seed]).random_raw(rows * cols)
    chosen = (bits >> np.uint64(62)).astype(np.intp).reshape(rows, cols)
    y = CELL * np.arange(rows)[:, None] + chosen // CELL
    x = CELL * np.arange(cols) + chosen % CELL
    targets = np.sort((y * w + x).ravel())
    return np.setdiff1d(np.arange(h * w), targets), targets


@dataclass(frozen=True)
class TokenMerging:
    """How the tokens of feature maps are merged in a call of the UNet.

    Attributes
    ----------
    ratio : float
        Share of the tokens to save, from 0 to 0.75, limited to the tokens that may be merged.
    seed : int
        Chooses the destinations; at least 0.
    """

    ratio: float
    seed: int = 0

    def group(self, x: np.ndarray, h: int, w: int) -> np.ndarray:
        """Put the tokens of every image into groups.

        Parameters
        ----------
        x : ndarray
            Float32 ``(n, h * w, c)``: features to compare the tokens by.
        h, w : int
            Size of the feature map.

        Returns
        -------
        int array ``(n, h * w)``
            The group of each token: first the groups of destinations, then the groups of tokens that stay alone. Every
            image has the same number of groups.
        """
        sources, targets = split_tokens(h, w, self.seed)
        count = min(len(sources), int(self.ratio * h * w)) if len(targets) else 0
        groups = np.empty(x.shape[:2], np.intp)
        groups[:, targets] = np.arange(len(targets))
        for tokens, group in zip(x, groups, strict=True):
            cosine, nearest = most_alike(tokens, sources, targets)
            order = np.argsort(-cosine, kind="stable")
            alone = sources[np.sort(order[count:])]
            group[sources] = nearest
            group[alone] = len(targets) + np.arange(len(alone))
        return groups


def most_alike(tokens: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the target most similar to each source: returns the cosine and its number (the first if several tie).

    `sources (s,)` and `targets (d,)` are indices of rows of `tokens (t, c)`.
    """
    cosine, nearest = np.zeros(len(sources), np.float32), np.zeros(len(sources), np.intp)
    if not len(targets):
        return cosine, nearest
    length = np.sqrt(np.einsum("tc,tc->t", tokens, tokens))
    unit = tokens / np.maximum(length, np.finfo(np.float32).tiny)[:, None]
    weight = kernels.pack_linear(unit[targets])
    rows = max(1, SCORES // len(targets))
    for first in range(0, len(sources), rows):
        part = slice(first, first + rows)
        scores = kernels.linear(unit[sources[part]], weight)
        nearest[part] = scores.argmax(axis=1)
        cosine[part] = scores.max(axis=1)
    return cosine, nearest


def merge(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the mean of each group ``(n, groups, c)`` of the tokens ``x (n, t, c)``."""
    merged = np.empty((len(x), groups[0].max() + 1, x.shape[2]), np.float32)
    for tokens, group, means in zip(x, groups, merged, strict=True):
        order, sizes = np.argsort(group, kind="stable"), np.bincount(group)
        starts = np.cumsum(sizes) - sizes
        means[:] = tokens[order[starts]]
        several = sizes > 1  # groups of one token are done; summing one takes as long as summing a few
        order, sizes = order[several[group[order]]], sizes[several]
        if len(sizes):
            means[several] = np.add.reduceat(tokens[order], np.cumsum(sizes) - sizes, axis=0)
            means[several] /= sizes[:, None].astype(np.float32)
    return merged


def add_unmerged(merged: np.ndarray, groups: np.ndarray, x: np.ndarray) -> None:
    """Add to each token of ``x (n, t, c)`` its group's values in ``merged (n, groups, c)``."""
    for i, group in enumerate(groups):
        x[i] += merged[i][group]
