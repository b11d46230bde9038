"""Low-rank updates of weights (LoRA): ``w + scale * up @ down``, never made as a whole.

The stored weight stays where it is, in a memory-mapped file for one. Kernels pack panels of it as they need them and
add the update to the packed panel (`products.packing`): for a rank of 64 and a panel that meets 2048 rows, 3% more
work. To the convolution of a small image that would be much: it convolves the image with `down`, multiplies that by
`up` and adds it to the result. A weight that is packed beforehand holds the update and costs a linear layer nothing
more.

After Hu et al., "LoRA: Low-rank adaptation of large language models" (2021), arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import numpy as np

from . import winograd
from .checks import check_weight
from .dtypes import widen
from .gemm import linear
from .products.driver import Geometry
from .products.packing import AdaptedWeight, StoredWeight, array_of, check_stored, pack
from .quantize import QuantizedWeight

# Cost of multiplying by an update that is kept apart, relative to merging it: 1.7, as measured, for each of the two
# images of a guided step.
_APART = 3.4


def add_low_rank(
    w: np.ndarray | QuantizedWeight, pairs: Sequence[tuple[np.ndarray, np.ndarray, float]], *, gated: bool = False
) -> AdaptedWeight:
    """Return a weight with low-rank updates, to be used in its place.

    Parameters
    ----------
    w : ndarray or QuantizedWeight
        ``(n, k)`` for `linear` or ``(c_out, c_in, kh, kw)`` for `conv2d`, in any dtype of stored weights; not copied.
    pairs : sequence of (up, down, scale)
        Each adds ``scale * up @ down``: up is ``(n, r)``, down ``(r, k)`` or ``(r, c_in, kh, kw)``, in any dtype of
        stored weights, r any rank from 1 on. They are copied.
    gated : bool
        For ``activation="geglu"``, which needs its weight made so, and for nothing else; n must be even.

    Returns
    -------
    AdaptedWeight
        Holds about ``4 * (n + k) * r`` bytes, for the sum of the ranks.

    Raises
    ------
    TypeError, ValueError
        If w or a pair is not as above.
    """
    if isinstance(w, AdaptedWeight):
        raise TypeError("w: found a weight with an update, expected one without; give all its pairs at once")
    check_stored(w, 4 if len(getattr(w, "shape", ())) == 4 else 2)
    if gated and (len(w.shape) != 2 or w.shape[0] % 2):
        raise ValueError(f"w: found shape {w.shape}, expected (n, k) with an even n for a gated activation")
    if not pairs:
        raise ValueError("pairs: found none, expected one or more")
    ups, downs = [], []
    for up, down, scale in pairs:
        _check_pair(w, up, down)
        ups.append(widen(up) * np.float32(scale))
        downs.append(widen(down).reshape(len(down), -1))
    up = np.concatenate(ups, axis=1)
    down = np.ascontiguousarray(np.concatenate(downs).T)
    return AdaptedWeight(w, down, pack(up, gated))


def merge(w: AdaptedWeight) -> np.ndarray:
    """Return a weight with its updates in it: for less precise products, which cannot add them on the way.

    Parameters
    ----------
    w : AdaptedWeight

    Returns
    -------
    ndarray
        Float32, of the shape of w.
    """
    stored = w.stored.widen() if isinstance(w.stored, QuantizedWeight) else widen(w.stored)
    up = widen(array_of(w.up.stored))
    linear(up, w.down, out=stored.reshape(len(stored), -1), accumulate=True)
    return stored


def _check_pair(w: np.ndarray | QuantizedWeight, up: np.ndarray, down: np.ndarray) -> None:
    check_weight("up", up, 2)
    check_weight("down", down, len(w.shape))
    expected = f"({w.shape[0]}, r) and (r, {', '.join(map(str, w.shape[1:]))})"
    if up.shape[0] != w.shape[0] or down.shape != (up.shape[1], *w.shape[1:]):
        raise ValueError(f"up, down: found shapes {up.shape} and {down.shape} for w {w.shape}, expected {expected}")


def is_apart(w: StoredWeight, geometry: Geometry, algorithm: str) -> TypeGuard[AdaptedWeight]:
    """Tell whether w has an update that is better kept apart in a convolution than merged with the filters.

    Merged, it is computed once for each filter, or for each phase; apart, it is for each pixel. As for the choice of an
    algorithm, an image is looked at by itself.
    """
    if not isinstance(w, AdaptedWeight):
        return False
    g, c_out, channels, rank = geometry, *w.shape[:2], w.down.shape[1]
    inner = min(winograd.costs(channels, rank, g).values())
    phases = 4 if algorithm == "winograd_up" else 1
    return _APART * (inner / c_out + g.out_h * g.out_w / channels) < g.kh * g.kw * phases
