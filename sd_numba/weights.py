"""Model weights: zero-copy views on memory-mapped safetensors files.

A safetensors file is an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``
and the tensors' bytes. The header is checked in full before anything is mapped, so that a damaged or hostile file
ends in one clear error. The ``safetensors`` package is not used for reading: in NumPy it copies every tensor and
knows no bfloat16.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import PICKLE_ADVICE, canonical_name, find_weights, read_json
from .errors import ModelError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_DIMS = 32
SCAN_BLOCK = 1 << 20  # values looked at in one go by find_nonfinite

# NumPy has no bfloat16 and no float8: their bits are handed out as unsigned integers.
NUMPY_DTYPES: dict[str, type[np.generic]] = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64,
    "F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "F8_E8M0": np.uint8, "BOOL": np.bool_,
    "I8": np.int8, "U8": np.uint8, "I16": np.int16, "U16": np.uint16,
    "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64,
}  # fmt: skip
WEIGHT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """One header entry: where a tensor lies in its file, in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def rows(self, part: int, parts: int) -> TensorInfo:
        """One of several equal parts of its rows, as a tensor of its own."""
        size, rest = divmod(self.shape[0] if self.shape else 0, parts)
        if rest or not size:
            raise ModelError(f"found a tensor of shape {self.shape}, expected {parts} equal parts of its rows")
        nbytes = self.nbytes // parts
        return TensorInfo(self.dtype, (size, *self.shape[1:]), self.start + part * nbytes, nbytes)


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file; the tensors themselves are not touched.

    Returns
    -------
    dict
        Name -> ``TensorInfo``, in the order of the data.

    Raises
    ------
    ModelError
        The file cannot be read, is no safetensors file, is truncated, or its header contradicts itself.
    """
    path = Path(path)
    header, base = _load_header(path)
    header.pop("__metadata__", None)
    return _check_layout(path, header, base, path.stat().st_size)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the free texts in the header of a safetensors file: what its makers say of it.

    Raises
    ------
    ModelError
        The file cannot be read, or its header is damaged.
    """
    texts = _load_header(Path(path))[0].get("__metadata__")
    return {k: v for k, v in texts.items() if isinstance(v, str)} if isinstance(texts, dict) else {}


def _load_header(path: Path) -> tuple[dict[str, Any], int]:
    """Read the JSON of a header; also tells where the tensors start."""
    try:
        if not os.path.isfile(path):
            raise ModelError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            _reject_other_formats(path, start, size)
            length = int.from_bytes(start[:8], "little")
            if length > min(size - 8, MAX_HEADER):
                raise ModelError(
                    f"{path}: damaged or truncated: its header should be {length:,} bytes long, the file has {size:,}; "
                    "download it again"
                )
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    return _parse_header(path, text), 8 + length


def _reject_other_formats(path: Path, start: bytes, size: int) -> None:
    """Name the things that people really have under this name instead of a safetensors file."""
    if size == 0:
        raise ModelError(f"{path}: the file is empty; download it again")
    if size >= 10 and start[8:9] == b"{":
        return
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: a Git LFS pointer, not the weights themselves; run 'git lfs pull' in its folder")
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        raise ModelError(f"{path}: a PyTorch pickle: {PICKLE_ADVICE}")
    if start.lstrip().startswith(b"<"):
        raise ModelError(f"{path}: a web page, not a safetensors file; download it again")
    if start.startswith(b"GGUF"):
        raise ModelError(f"{path}: a GGUF file; only safetensors files are read")
    raise ModelError(f"{path}: not a safetensors file, or a truncated one ({size:,} bytes)")


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = Counter(name for name, _ in pairs)
        if len(names) < len(pairs):
            raise ModelError(f"{path}: its header names {names.most_common(1)[0][0]!r:.80} twice")
        return dict(pairs)

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: damaged: its header is not JSON ({error}); download it again") from None
    return header


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 56


def _fits(shape: list[int]) -> bool:
    return _is_size(math.prod(filter(None, shape)))  # NumPy multiplies the sizes even where one of them is 0


def _check_entry(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    fault = f"{path}: damaged: tensor {name!r:.80}"
    if not isinstance(entry, dict):
        raise ModelError(f"{fault} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise ModelError(f"{path}: tensor {name!r:.80}: found dtype {dtype!r:.80}, expected F32, F16 or BF16")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_size, shape)) or not _fits(shape):
        raise ModelError(f"{fault}: found shape {shape!r:.80}, expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ModelError(f"{fault}: found data_offsets {offsets!r:.80}, expected [begin, end]")
    expected = math.prod(shape) * np.dtype(NUMPY_DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != expected:
        raise ModelError(
            f"{fault}: its data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes, "
            f"but {dtype} {tuple(shape)} needs {expected}"
        )
    return TensorInfo(dtype, tuple(shape), base + offsets[0], expected)


def _check_layout(path: Path, header: dict[str, Any], base: int, size: int) -> dict[str, TensorInfo]:
    """Check every entry, and that the tensors fill the file without gap or overlap, as the format demands."""
    entries = {name: _check_entry(path, name, entry, base) for name, entry in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    end = base
    for name, info in entries.items():
        if info.start != end:
            kind = "overlaps the one before it" if info.start < end else "does not follow the one before it"
            raise ModelError(f"{path}: damaged: tensor {name!r:.80} {kind}")
        end += info.nbytes
    if end != size:
        kind = "truncated" if end > size else "damaged"
        raise ModelError(f"{path}: {kind}: its tensors end at byte {end:,}, the file has {size:,}; download it again")
    return entries


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory, to be read.

    Raises
    ------
    ModelError
        It cannot be.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be memory-mapped: {error}") from None


def tensor_view(info: TensorInfo, mapped: mmap.mmap) -> np.ndarray:
    """The tensor in a mapped file, as stored."""
    return np.ndarray(info.shape, NUMPY_DTYPES[info.dtype], buffer=mapped, offset=info.start)


def _dummy(shape: tuple[int, ...]) -> np.ndarray:
    """A read-only array of zeros of any shape that takes no memory (all strides are 0)."""
    return np.broadcast_to(np.float32(0), shape)


def _one_line(name: str) -> str:
    return name if name.isprintable() and len(name) < 200 else f"{name!r:.200}"


class Weights:
    """The tensors of one network by their canonical diffusers names, as read-only views on the mapped file.

    A network takes what it needs with ``take(name, shape)`` and then calls ``finish()``, which reports everything
    that is missing, unexpected or of a wrong shape or dtype in one error.

    Attributes
    ----------
    path : pathlib.Path
        The file (or the index of the shards) that was opened.
    files : list of pathlib.Path
        The safetensors files behind it.
    packed : bool
        Whether the layers should keep packed copies of these weights.
    unused : list of str
        Stored tensors that no network needs, such as ``position_ids``.
    """

    def __init__(self, path: str | os.PathLike[str], files: list[Path]):
        self.path = Path(path)
        self.files = files
        self.packed = False
        self.unused: list[str] = []
        self._maps: list[mmap.mmap] = []
        self._tensors: dict[str, tuple[TensorInfo, mmap.mmap]] = {}
        self._taken: set[str] = set()
        self._missing: list[str] = []
        self._wrong: list[str] = []
        for file in files:
            self._map(file, read_header(file))

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
            if name is not None and name not in weights:
                raise ModelError(f"{path}: names tensor {name!r:.80}, which is in none of its shards")
        return weights

    @classmethod
    def select(cls, file: Path, tensors: Mapping[str, TensorInfo]) -> Weights:
        """Open some of the tensors of a file, under the names that they have here."""
        weights = cls(file, [])
        weights.files = [file]
        weights._map(file, tensors)
        return weights

    def _map(self, path: Path, header: Mapping[str, TensorInfo]) -> None:
        if not header:
            raise ModelError(f"{path}: holds no tensors")
        mapped = map_file(path)
        self._maps.append(mapped)
        for stored, info in header.items():
            name = canonical_name(stored)
            if name is None:
                self.unused.append(stored)
            elif name in self._tensors:
                raise ModelError(f"{path}: tensor {name!r:.80} is there twice")
            else:
                self._tensors[name] = (info, mapped)

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

    def raw(self, name: str) -> np.ndarray:
        """The tensor as stored: a read-only view, bfloat16 as uint16 bits.

        It may be unaligned, as in some files of 2022 and 2023: the kernels read it all the same.
        """
        return tensor_view(*self._tensors[name])

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The view of a tensor that must have this shape and be F32, F16 or BF16 (as uint16).

        A fault is noted for ``finish()``, and a dummy of that shape returned. A stored ``(c_out, c_in, 1, 1)``
        serves for ``(c_out, c_in)``: old VAE files keep their attention weights so.
        """
        shape = tuple(int(size) for size in shape)
        if name not in self._tensors:
            self._missing.append(name)
            return _dummy(shape)
        self._taken.add(name)
        info = self.info(name)
        if info.dtype not in WEIGHT_DTYPES:
            self._wrong.append(f"{name} (found {info.dtype}, expected F32, F16 or BF16)")
            return _dummy(shape)
        if info.shape not in (shape, (*shape, 1, 1)):
            self._wrong.append(f"{name} (found {info.shape}, expected {shape})")
            return _dummy(shape)
        return self.raw(name).reshape(shape)

    def finish(self) -> None:
        """Say what did not fit, once the network has taken all that it wants.

        Raises
        ------
        ModelError
            Lists the first few tensors that are missing, of a wrong shape or dtype, or were never taken.
        """
        unexpected = [name for name in self._tensors if name not in self._taken]
        faults = (("missing", self._missing), ("of a wrong shape or dtype", self._wrong), ("unexpected", unexpected))
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
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __contains__(self, name: object) -> bool:
        return False

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Note the tensor; returns a dummy of zeros that takes no memory."""
        self.shapes[name] = tuple(int(size) for size in shape)
        return _dummy(self.shapes[name])

    def finish(self) -> None:
        """Do nothing: there is nothing to compare with."""


def find_nonfinite(weights: Weights) -> Iterator[tuple[str, int]]:
    """Yield ``(name, count)`` for every tensor that holds NaN or infinite values.

    Reads every byte of the weights (seconds for gigabytes), a block at a time, so it needs next to no memory.
    """
    exponents = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
    for name in weights.names():
        if weights.info(name).dtype not in exponents:
            continue
        unsigned, mask = exponents[weights.info(name).dtype]
        bits = weights.raw(name).reshape(-1).view(unsigned)
        count = 0
        for begin in range(0, bits.size, SCAN_BLOCK):
            # All exponent bits set: infinite or not a number.
            count += int(np.count_nonzero((bits[begin : begin + SCAN_BLOCK] & unsigned(mask)) == mask))
        if count:
            yield name, count
