"""Model weights: zero-copy views on memory-mapped files."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from .. import kernels
from ..errors import ModelError
from ..families.names import canonical_name
from ..files.folders import find_weights, read_json
from ..files.safetensors import read_header
from ..files.tensors import (
    BLOCK,
    EXPECTED_DTYPES,
    SCALED,
    SCALES,
    WEIGHT_DTYPES,
    TensorInfo,
    map_file,
    read_scales,
    tensor_view,
)


def _dummy(shape: tuple[int, ...]) -> np.ndarray:
    """A read-only array of zeros of any shape that takes no memory (all strides are 0)."""
    return np.broadcast_to(np.float32(0), shape)


def is_layer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer or a convolution, by its canonical name."""
    return len(shape) in {2, 4} and "embeddings." not in name


def _one_line(name: str) -> str:
    return name if name.isprintable() and len(name) < 200 else f"{name!r:.200}"


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of 1x1 filters as the shape of a matrix; other shapes unchanged."""
    return shape[:2] if shape[2:] == (1, 1) else shape


class Weights:
    """The tensors of one network by their canonical diffusers names, as read-only views on the mapped file.

    A network takes what it needs with ``take(name, shape)`` or ``take_array(name, shape)`` and then calls ``finish()``,
    which reports everything that is missing, unexpected or of a wrong shape or dtype in one error. Scales of int8
    weights are no tensors of their own here.

    Attributes
    ----------
    path : pathlib.Path
        The file (or the index of the shards) that was opened.
    files : list of pathlib.Path
        The safetensors files behind it.
    packed : bool
        Whether the layers should keep packed copies of these weights.
    precision : str
        Precision of the layers' products, one of ``layers.PRECISIONS``.
    unused : list of str
        Stored tensors that no network needs, such as ``position_ids``.
    """

    def __init__(self, path: str | os.PathLike[str], files: list[Path]):
        self.path = Path(path)
        self.files = files
        self.packed = False
        self.precision = "f32"
        self.unused: list[str] = []
        self._maps: list[mmap.mmap] = []
        self._tensors: dict[str, tuple[TensorInfo, mmap.mmap]] = {}
        self._scales: dict[str, tuple[TensorInfo, mmap.mmap]] = {}
        self._taken: set[str] = set()
        self._missing: list[str] = []
        self._wrong: list[str] = []
        self._unscaled: list[str] = []
        self._faulty: set[str] = set()
        self._updates: dict[str, list[tuple[np.ndarray, np.ndarray, float]]] = {}
        self._updated: set[str] = set()
        for file in files:
            self._map(file, read_header(file), canonical_name)
        self._join_shards()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Weights:
        """Open a ``.safetensors`` file, a ``.safetensors.index.json`` or a component's folder.

        Raises
        ------
        ModelError
            There are no weights to be found, or they are damaged.
        """
        file = find_weights(path) if os.path.isdir(path) else Path(path)
        return cls._open_sharded(file) if file.suffix == ".json" else cls(file, [file])

    @classmethod
    def _open_sharded(cls, path: Path) -> Weights:
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{path}: has no weight_map, which says what file holds each tensor")
        for shard in weight_map.values():
            if not isinstance(shard, str) or shard in ("", ".", "..") or os.path.basename(shard) != shard:
                raise ModelError(f"{path}: found {shard!r:.80} as a shard, expected the name of a file beside it")
        shards = [path.with_name(shard) for shard in sorted(set(weight_map.values()))]
        for shard in shards:
            if not shard.is_file():
                raise ModelError(f"{path}: its shard {shard.name} is missing ({len(shards)} shards are expected)")
        weights = cls(path, shards)
        for name in map(canonical_name, weight_map):
            if name is not None and name not in weights and name.removesuffix(SCALES) not in weights._scales:
                raise ModelError(f"{path}: names tensor {name!r:.80}, which is in none of its shards")
        return weights

    @classmethod
    def select(cls, file: Path, tensors: Mapping[str, TensorInfo]) -> Weights:
        """Open some of the tensors of a file, under the names that they have here."""
        weights = cls(file, [])
        weights.files = [file]
        weights._map(file, tensors, str)
        return weights

    def _map(self, path: Path, header: Mapping[str, TensorInfo], rename: Callable[[str], str | None]) -> None:
        if not header:
            raise ModelError(f"{path}: holds no tensors")
        mapped = map_file(path)
        self._maps.append(mapped)
        for stored, info in header.items():
            name = rename(stored)
            if name is None:
                self.unused.append(stored)
            elif name in self._tensors:
                raise ModelError(f"{path}: tensor {name!r:.80} is there twice")
            else:
                self._tensors[name] = (info, mapped)
                if info.scales is not None:
                    self._scales[name] = (info.scales, mapped)

    def _join_shards(self) -> None:
        """Put scales to weights that are in another shard."""
        for name in [name for name in self._tensors if name.endswith(f"weight{SCALES}")]:
            weight = name.removesuffix(SCALES)
            if weight in self._tensors and weight not in self._scales and self.info(weight).dtype == SCALED:
                self._scales[weight] = self._tensors.pop(name)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def names(self) -> list[str]:
        """Canonical names of all tensors, in the order of the data."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor."""
        return self._tensors[name][0]

    def dtypes(self) -> dict[str, int]:
        """Safetensors dtype -> number of tensors, the commonest first."""
        return dict(Counter(info.dtype for info, _ in self._tensors.values()).most_common())

    def release(self) -> None:
        """Tell the system that the pages of the files are not needed soon; they come back when they are looked at."""
        for mapped in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):  # POSIX
                mapped.madvise(mmap.MADV_DONTNEED)

    def raw(self, name: str) -> np.ndarray:
        """The tensor as stored: a read-only view, of the dtype that ``NUMPY_DTYPES`` says.

        It may be unaligned, as in some files of 2022 and 2023: the kernels read it all the same.
        """
        return tensor_view(*self._tensors[name])

    def scales(self, name: str) -> np.ndarray:
        """Scales of the rows of an int8 weight, float32 ``(n,)``.

        Raises
        ------
        ModelError
            See `read_scales`.
        """
        return read_scales(*self._tensors[name], self._scales.get(name))

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray | kernels.QuantizedWeight:
        """The tensor as `take_array` gives it, or, if it is a layer's weight, int8 values with their scales."""
        values = self._take(name, shape, (*WEIGHT_DTYPES, SCALED) if is_layer(name, shape) else WEIGHT_DTYPES)
        if name in self._faulty or self.info(name).dtype != SCALED:
            return values
        try:
            return kernels.QuantizedWeight(values, self.scales(name))
        except ModelError as error:
            self._unscaled.append(f"{name} ({error})")
            self._faulty.add(name)
            return _dummy(values.shape)

    def take_array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The view of a tensor that must have this shape and one of ``WEIGHT_DTYPES``, in its NumPy dtype.

        A fault is noted for ``finish()``, and a dummy of that shape returned. A stored ``(c_out, c_in, 1, 1)``
        serves for ``(c_out, c_in)``: old VAE files keep their attention weights so.
        """
        return self._take(name, shape, WEIGHT_DTYPES)

    def _take(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> np.ndarray:
        shape = tuple(int(size) for size in shape)
        self._faulty.add(name)
        if name not in self._tensors:
            self._missing.append(name)
            return _dummy(shape)
        self._taken.add(name)
        info = self.info(name)
        if info.dtype not in dtypes:
            self._wrong.append(f"{name} (found {info.dtype}, {EXPECTED_DTYPES})")
            return _dummy(shape)
        if info.shape not in (shape, (*shape, 1, 1)):
            self._wrong.append(f"{name} (found {info.shape}, expected {shape})")
            return _dummy(shape)
        self._faulty.remove(name)
        return self.raw(name).reshape(shape)

    def add_updates(self, prefix: str, up: np.ndarray, down: np.ndarray, scale: float) -> None:
        """Let ``scale * up @ down`` be added to a layer's weight, in networks that are built afterwards.

        Parameters
        ----------
        prefix : str
            Canonical name of the layer, whose weight is ``<prefix>.weight``, ``(n, k)`` or ``(c_out, c_in, kh, kw)``.
        up, down : ndarray
            ``(n, r)`` and ``(r, k)``, or ``(c_out, r)`` and ``(r, c_in, kh, kw)``, in any dtype of stored weights (see
            `kernels`); 1x1 filters, ``(..., 1, 1)``, serve as matrices, and the other way round. Several updates of a
            weight add up.
        scale : float

        Raises
        ------
        ModelError
            There is no such weight, or it has another shape.
        """
        name = f"{prefix}.weight"
        fault = f"{self.path}: found an update of {name!r:.80}"
        if name not in self._tensors or len(self.info(name).shape) not in {2, 4}:
            raise ModelError(f"{fault}, expected the weight of one of its linear layers and convolutions")
        n, *rest = _as_matrix(self.info(name).shape)
        r, *inner = _as_matrix(down.shape) or (0,)
        if not r or inner != rest or _as_matrix(up.shape) != (n, r):
            expected = f"({n}, r) and (r, {', '.join(map(str, rest))})"
            raise ModelError(f"{fault} of shapes {up.shape} and {down.shape}, expected {expected}")
        self._updates.setdefault(prefix, []).append((up, down, scale))

    def clear_updates(self) -> None:
        """Remove all updates, for networks that are built afterwards."""
        self._updates.clear()

    def updates(self, prefix: str) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Return the updates of a layer's weight; none if `take` found a fault with it, which `finish` will report."""
        self._updated.add(prefix)
        return [] if f"{prefix}.weight" in self._faulty else self._updates.get(prefix, [])

    def finish(self) -> None:
        """Say what did not fit, once the network has taken all that it wants.

        Raises
        ------
        ModelError
            Lists the first few tensors that are missing, of a wrong shape or dtype, or were never taken, and updates
            of what is not the weight of a linear layer or a convolution.
        """
        unexpected = [name for name in self._tensors if name not in self._taken]
        faults = (
            ("missing", self._missing),
            ("of a wrong shape or dtype", self._wrong),
            ("with wrong scales", self._unscaled),
            ("unexpected", unexpected),
            ("with an update that cannot be applied", [name for name in self._updates if name not in self._updated]),
        )
        parts = [
            f"{len(names)} {kind}: {', '.join(map(_one_line, names[:4]))}{', ...' if len(names) > 4 else ''}"
            for kind, names in faults
            if names
        ]
        if parts:
            raise ModelError(f"{self.path}: its tensors do not fit the network of its config: {'; '.join(parts)}")


class ShapeRecorder:
    """Stands in for ``Weights`` to learn what a network takes: every name and shape, and no data.

    Examples
    --------
    >>> recorder = ShapeRecorder()
    >>> recorder.take("conv_in.weight", (8, 4, 3, 3)).shape
    (8, 4, 3, 3)
    >>> recorder.shapes
    {'conv_in.weight': (8, 4, 3, 3)}
    """

    def __init__(self) -> None:
        self.packed = False
        self.precision = "f32"
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __contains__(self, name: object) -> bool:
        return False

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Note the tensor; returns a dummy of zeros that takes no memory."""
        self.shapes[name] = tuple(int(size) for size in shape)
        return _dummy(self.shapes[name])

    take_array = take

    def updates(self, prefix: str) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Give none."""
        return []

    def finish(self) -> None:
        """Do nothing: there is nothing to compare with."""


def take_all(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that weights have exactly these names and shapes.

    Raises
    ------
    ModelError
        As of ``Weights.finish``.
    """
    for name, shape in shapes.items():
        weights.take(name, shape)
    weights.finish()


def find_nonfinite(weights: Weights) -> Iterator[tuple[str, int]]:
    """Yield ``(name, count)`` for every tensor that holds NaN or infinite values.

    Reads every byte of the weights (seconds for gigabytes), a block at a time, so it needs next to no memory.
    """
    # All of these bits set: infinite or not a number.
    masks = {
        "F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80),
        "F8_E4M3": (np.uint8, 0x7F), "F8_E5M2": (np.uint8, 0x7C),
    }  # fmt: skip
    for name in weights.names():
        if weights.info(name).dtype not in masks:
            continue
        unsigned, mask = masks[weights.info(name).dtype]
        bits = weights.raw(name).reshape(-1).view(unsigned)
        count = 0
        for begin in range(0, bits.size, BLOCK):
            count += int(np.count_nonzero((bits[begin : begin + BLOCK] & unsigned(mask)) == mask))
        if count:
            yield name, count
