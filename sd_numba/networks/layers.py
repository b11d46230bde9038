"""Layers: a kernel bound to its weight.

Every layer takes the source of the weights and the prefix of its tensors' names, so that building a network is a walk
over prefixes. A weight stays the view that ``weights.take`` gives, in the dtype stored in the file, unless
``weights.packed`` asks for packed copies; kernels add the low-rank updates (LoRA) that ``weights.updates`` gives.
Biases and norm weights are widened to float32 once: they are small.

Matrix products use ``weights.precision``, or a finer one where a layer needs it or the CPU lacks the instructions. int8
products need int8 weights, which are made here unless the file has them.

Activations are float32, C-contiguous, channels last: ``(n, h, w, c)`` or ``(n, t, c)``.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from .. import kernels
from ..errors import InputError

Parts = np.ndarray | tuple[np.ndarray, ...]  # one array, or several as if concatenated along their last axis
Padding = int | tuple[tuple[int, int], tuple[int, int]]
PRECISIONS = ("f32", "bf16", "int8")  # from the finest to the coarsest
Update = tuple[np.ndarray, np.ndarray, float]  # up (n, r), down (r, k) or (r, c_in, kh, kw), and scale


class WeightSource(Protocol):
    """Where layers take their weights from: ``Weights``, or ``ShapeRecorder``, which has none."""

    packed: bool
    precision: str

    def __contains__(self, name: object) -> bool:
        """Whether it holds a tensor of this name."""
        ...

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray | kernels.QuantizedWeight:
        """Return the weight of a layer, which must have this shape."""
        ...

    def take_array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return another tensor, which must have this shape."""
        ...

    def updates(self, prefix: str) -> list[Update]:
        """Return the low-rank updates for the weight of the layer of this name; their sizes fit it."""
        ...


def take_vector(weights: WeightSource, name: str, c: int) -> np.ndarray:
    """Return a float32 copy of a bias or norm weight of shape ``(c,)``."""
    return kernels.widen(weights.take_array(name, (c,)))


def products(weights: WeightSource, coarsest: str = "int8") -> str:
    """Return the precision of a layer's products: the requested one, but no coarser than the layer tolerates."""
    wanted = min(weights.precision, coarsest, key=PRECISIONS.index)
    return wanted if wanted in kernels.precisions() else "f32"


def adapt(
    weights: WeightSource, prefix: str, w: np.ndarray | kernels.QuantizedWeight, gated: bool = False
) -> kernels.StoredWeight:
    """Return the weight w of the layer of this name, with its low-rank updates if it has any."""
    n, *rest = w.shape
    pairs = [(up.reshape(n, -1), down.reshape(-1, *rest), scale) for up, down, scale in weights.updates(prefix)]
    return kernels.add_low_rank(w, pairs, gated=gated) if pairs else w


def fit(w: kernels.StoredWeight, precision: str) -> kernels.StoredWeight:
    """Return a weight as linear layers need it: below float32, updates are merged; int8 needs int8 weights."""
    if precision == "f32":
        return w
    if isinstance(w, kernels.AdaptedWeight):
        return kernels.quantize(kernels.merge(w)) if precision == "int8" else kernels.narrow(kernels.merge(w))
    return kernels.quantize(w) if precision == "int8" and isinstance(w, np.ndarray) else w


class Linear:
    """``x (..., k) -> x @ weight.T + bias (..., n)``, and an activation.

    Parameters
    ----------
    weights : WeightSource
        Holds ``<prefix>.weight (n, k)`` and, if ``bias``, ``<prefix>.bias (n,)``.
    prefix : str
    k, n : int
        Widths of the input and of the output.
    bias : bool
    as_conv : bool
        The weight is stored as that of a 1x1 convolution, ``(n, k, 1, 1)``.
    activation : str, optional
        One that `kernels.linear` takes.
    coarsest : str
        The coarsest precision of products that the layer tolerates.
    """

    def __init__(
        self,
        weights: WeightSource,
        prefix: str,
        k: int,
        n: int,
        bias: bool = True,
        as_conv: bool = False,
        activation: str | None = None,
        coarsest: str = "int8",
    ) -> None:
        w = weights.take(f"{prefix}.weight", (n, k, 1, 1) if as_conv else (n, k)).reshape(n, k)
        gated = activation == "geglu"
        self.precision, self.activation = products(weights, coarsest), activation
        self.weight: Any = fit(adapt(weights, prefix, w, gated), self.precision)
        if weights.packed:
            self.weight = kernels.pack_linear(self.weight, gated=gated, precision=self.precision)
        self.bias = take_vector(weights, f"{prefix}.bias", n) if bias else None

    def __call__(self, x: Parts, *, out: np.ndarray | None = None, accumulate: bool = False) -> np.ndarray:
        """Apply the layer; ``accumulate`` adds the result to ``out``."""
        return kernels.linear(
            x, self.weight, self.bias,
            activation=self.activation, out=out, accumulate=accumulate, precision=self.precision,
        )  # fmt: skip


class Conv2d:
    """``x (n, h, w, c_in) -> (n, h', w', c_out)``.

    Parameters
    ----------
    weights : WeightSource
        Holds ``<prefix>.weight (c_out, c_in, kernel, kernel)`` and, if ``bias``, ``<prefix>.bias (c_out,)``.
    prefix : str
    c_in, c_out : int
    kernel, stride : int
    padding : int or ((top, bottom), (left, right)), optional
        By default the padding that keeps the size at stride 1.
    bias : bool
    activation : str, optional
        One that `kernels.conv2d` takes.
    coarsest : str
        The coarsest precision of products that the layer tolerates.
    """

    def __init__(
        self,
        weights: WeightSource,
        prefix: str,
        c_in: int,
        c_out: int,
        kernel: int = 3,
        stride: int = 1,
        padding: Padding | None = None,
        bias: bool = True,
        activation: str | None = None,
        coarsest: str = "int8",
    ) -> None:
        w = weights.take(f"{prefix}.weight", (c_out, c_in, kernel, kernel))
        by_winograd = (kernel, stride) == (3, 1)  # the algorithm for these has no use for packed weights
        self.precision = products(weights, coarsest if by_winograd else "f32")
        self.weight: Any = adapt(weights, prefix, w)
        if self.precision == "int8":
            self.weight = fit(self.weight, self.precision)
        if weights.packed and not by_winograd:
            self.weight = kernels.pack_conv2d(self.weight)
        self.bias = take_vector(weights, f"{prefix}.bias", c_out) if bias else None
        self.stride, self.activation = stride, activation
        self.padding = (kernel - 1) // 2 if padding is None else padding

    def __call__(
        self,
        x: np.ndarray,
        *,
        bias: np.ndarray | None = None,
        upsample: bool = False,
        out: np.ndarray | None = None,
        accumulate: bool = False,
        algorithm: str = "auto",
    ) -> np.ndarray:
        """Apply the layer.

        ``bias (n, c_out)`` replaces the layer's own, one row an image; ``upsample`` reads ``x`` as if enlarged 2x by
        nearest neighbour; ``accumulate`` adds the result to ``out``, before the activation;
        ``algorithm`` is one that `kernels.conv2d` takes.
        """
        b = self.bias if bias is None else bias
        return kernels.conv2d(
            x, self.weight, b, self.stride, self.padding,
            upsample=upsample, out=out, accumulate=accumulate, activation=self.activation, algorithm=algorithm,
            precision=self.precision,
        )  # fmt: skip


class GroupNorm:
    """Group normalisation over ``x (n, h, w, c)`` or ``(n, t, c)``, or a pair of them, then SiLU if ``silu``."""

    def __init__(
        self, weights: WeightSource, prefix: str, groups: int, c: int, eps: float = 1e-5, silu: bool = False
    ) -> None:
        self.weight = take_vector(weights, f"{prefix}.weight", c)
        self.bias = take_vector(weights, f"{prefix}.bias", c)
        self.groups, self.eps, self.silu = groups, eps, silu

    def __call__(self, x: Parts, *, statistics: np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Apply the layer, with `statistics` in place of the ones of ``x`` if given; ``out`` may be ``x`` itself."""
        return kernels.group_norm(
            x, self.groups, self.weight, self.bias, self.eps, self.silu, statistics=statistics, out=out
        )


class LayerNorm:
    """Layer normalisation over the last axis of ``x (..., c)``."""

    def __init__(self, weights: WeightSource, prefix: str, c: int, eps: float = 1e-5) -> None:
        self.weight = take_vector(weights, f"{prefix}.weight", c)
        self.bias = take_vector(weights, f"{prefix}.bias", c)
        self.eps = eps

    def __call__(self, x: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
        """Apply the layer."""
        return kernels.layer_norm(x, self.weight, self.bias, self.eps, out=out)


class Embedding:
    """Rows of ``<prefix>.weight (count, c)``, widened to float32 as they are looked up, and more rows behind them."""

    def __init__(self, weights: WeightSource, prefix: str, count: int, c: int) -> None:
        self.weight = weights.take_array(f"{prefix}.weight", (count, c))
        self.more = np.empty((0, c), np.float32)

    def __len__(self) -> int:
        return len(self.weight) + len(self.more)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Look up ``ids (...)``, integers below the number of rows, giving ``(..., c)``."""
        count = len(self.weight)
        rows = kernels.widen(self.weight[np.minimum(ids, count - 1)])
        rows[ids >= count] = self.more[ids[ids >= count] - count]
        return rows


def to_nhwc(x: np.ndarray, c: int, what: str) -> np.ndarray:
    """Take ``x (b, c, h, w)`` from the public boundary inside, as a float32 copy ``(b, h, w, c)``.

    Raises
    ------
    InputError
        ``x`` is not a real array of that shape; ``what`` names it.
    """
    x = np.asarray(x)
    if x.ndim != 4 or x.shape[1] != c or 0 in x.shape:
        raise InputError(f"{what}: found shape {x.shape}, expected (batch, {c}, height, width)")
    if x.dtype.kind not in "fiu":
        raise InputError(f"{what}: found dtype {x.dtype}, expected float32")
    return np.array(x.transpose(0, 2, 3, 1), dtype=np.float32, order="C")


def to_nchw(x: np.ndarray) -> np.ndarray:
    """Take ``x (b, h, w, c)`` outside, as ``(b, c, h, w)``."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
