"""The state of a run in a file, so that an interrupted run continues with exactly the same bits.

A state is a tree of plain values and NumPy arrays: latents, a sampler's history, noise sources. Its file is a
safetensors file: the arrays are its tensors, called "0", "1" ...; its metadata holds the tree and its purpose as
JSON, and a digest of everything. In the tree's JSON, an object has one key, which says what the object stands for::

    {"tuple": [...]}   {"dict": {...}}   {"array": "0"}   {"scalar": "1"}

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, ModelError
from ..files.safetensors import read_header, read_metadata
from ..files.tensors import NUMPY_DTYPES, map_file, tensor_view
from ..files.writing import Entry, unfinished, write_safetensors

_VERSION = 1
FORMAT = "sd_numba_state"  # key of the version in the metadata
_STORED = ("F32", "F16", "F64", "BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_NAMES = {np.dtype(NUMPY_DTYPES[name]): name for name in _STORED}
_MAX_DEPTH = 50
_MAX_TEXT = 1 << 24  # characters of JSON: objects take many times the memory of their text


def save_state(path: str | os.PathLike[str], tree: Any, about: Mapping[str, Any]) -> None:
    """Write a state, replacing an existing one.

    If the process is killed at any time, the file holds the old state or the new one, complete.

    Parameters
    ----------
    path : path
        The file.
    tree
        Dicts with str keys, lists, tuples, None, bool, int, float, str, and arrays and scalars of NumPy's booleans,
        integers and floats up to 64 bits, nested up to 50 deep. An array that occurs several times is stored once.
    about : mapping
        What the state is for, as any values that JSON can represent.

    Raises
    ------
    InputError
        The tree holds other values or more than 16 MB of text, or the file cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device or a pipe must not be replaced
        raise InputError(f"{path}: not a regular file; choose another name for the state of the run")
    arrays: dict[str, np.ndarray] = {}
    texts = {"tree": json.dumps(_encode(tree, arrays, {})), "about": json.dumps(dict(about))}
    size = sum(map(len, texts.values()))
    if size > _MAX_TEXT:
        raise InputError(f"{path}: the state has {size:,} characters of text, more than {_MAX_TEXT:,}")
    entries = {name: Entry(_NAMES[array.dtype], array.shape, (array.reshape(-1),)) for name, array in arrays.items()}
    metadata = {FORMAT: str(_VERSION), **texts, "sha256": _digest(texts, arrays)}
    with unfinished(path, Path.unlink, replace=True) as temporary:
        for _ in write_safetensors(temporary, entries, None, metadata):
            pass


def load_state(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """Read a state that `save_state` wrote.

    Returns
    -------
    tree
        Equal to what was saved, bit for bit; tuples are tuples, and arrays are new and C-contiguous.
    about : dict
        What the state is for.

    Raises
    ------
    InputError
        The file is missing, is not a state, is damaged, or is from a newer version of sd-numba.
    """
    path = Path(path)
    try:
        texts = read_metadata(path)
        _check_texts(path, texts)
        header = read_header(path)
        odd = next((info.dtype for info in header.values() if info.dtype not in _STORED or info.scales), None)
        if odd is not None:
            raise InputError(f"{path}: damaged: found a tensor of {odd}, which no state contains; start the run again")
        with map_file(path) as data:
            arrays = {name: tensor_view(info, data).copy() for name, info in header.items()}
    except ModelError as error:
        reason = str(error).removeprefix(f"{path}: ").partition(";")[0]
        raise InputError(f"{path}: not the state of a run: {reason}; start the run again") from None
    texts = {name: texts[name] for name in ("tree", "about", "sha256")}
    if texts.pop("sha256") != _digest(texts, arrays):
        raise InputError(f"{path}: damaged: its contents do not match their digest; start the run again")
    try:
        tree, about = _decode(json.loads(texts["tree"]), arrays), json.loads(texts["about"])
        if not isinstance(about, dict):
            raise ValueError(f"about is {about!r:.80}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: {error}; start the run again") from None
    return tree, about


def _check_texts(path: Path, texts: Mapping[str, str]) -> None:
    version = texts.get(FORMAT)
    if version is None:
        raise InputError(f"{path}: a model or another file of tensors, not the state of a run; start the run again")
    if version != str(_VERSION):
        raise InputError(
            f"{path}: a state of version {version!r:.20}, expected {_VERSION}: "
            "continue with the version of sd-numba that wrote it, or start the run again"
        )
    missing = next((name for name in ("tree", "about", "sha256") if name not in texts), None)
    if missing is not None:
        raise InputError(f"{path}: damaged: it has no {missing!r}; start the run again")
    size = len(texts["tree"]) + len(texts["about"])
    if size > _MAX_TEXT:
        raise InputError(
            f"{path}: damaged: it has {size:,} characters of text, expected at most {_MAX_TEXT:,}; start the run again"
        )


def _encode(value: Any, arrays: dict[str, np.ndarray], known: dict[int, str], depth: int = 0) -> Any:
    """Return a tree as JSON values; its arrays are added to ``arrays``, and their names, by id, to ``known``."""
    if depth > _MAX_DEPTH:
        raise InputError(f"the state is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, np.ndarray | np.generic):
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        dtype = value.dtype.newbyteorder("=")
        if dtype not in _NAMES:
            raise InputError(f"state: found {value.dtype}, expected booleans, integers or floats of up to 64 bits")
        if id(value) not in known:
            known[id(value)] = str(len(arrays))
            arrays[known[id(value)]] = np.asarray(value, dtype, order="C")
        return {kind: known[id(value)]}
    # a subclass would come back as its base class
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        items = [_encode(item, arrays, known, depth + 1) for item in value]
        return items if type(value) is list else {"tuple": items}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _encode(item, arrays, known, depth + 1) for key, item in value.items()}}
    raise InputError(f"state: found {type(value).__name__} {value!r:.80}, expected plain values and arrays")


def _decode(value: Any, arrays: Mapping[str, np.ndarray], depth: int = 0) -> Any:
    """Return the tree that JSON values stand for.

    Raises
    ------
    ValueError
        They do not stand for a tree.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    if isinstance(value, list):
        return [_decode(item, arrays, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"tuple": list(items)} if len(value) == 1:
            return tuple(_decode(item, arrays, depth + 1) for item in items)
        case {"dict": dict(items)} if len(value) == 1:
            return {key: _decode(item, arrays, depth + 1) for key, item in items.items()}
        case {"array": str(name)} if len(value) == 1 and name in arrays:
            return arrays[name]
        case {"scalar": str(name)} if len(value) == 1 and name in arrays and arrays[name].ndim == 0:
            return arrays[name][()]
    raise ValueError(f"found {value!r:.80}, expected a tuple, dict, array or scalar")


def _digest(texts: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps([texts["tree"], texts["about"]]).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {_NAMES[array.dtype]} {array.shape}".encode())
        digest.update(array.reshape(-1).data)
    return digest.hexdigest()
