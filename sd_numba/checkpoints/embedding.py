"""Textual inversion: files of learned vectors that stand for a word in prompts.

Method: Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
arXiv:2208.01618.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

from .. import kernels
from ..errors import InputError, ModelError
from ..families import widths
from ..files.safetensors import read_header
from ..files.tensors import WEIGHT_DTYPES, map_file, tensor_view
from .kinds import kind_of

WEB_UI = "emb_params"  # the tensor's name in files of the web UI
ENDINGS = (".safetensors", ".pt", ".bin")
MAX_VECTORS = 75  # what fits a prompt


def read_embedding(path: str | os.PathLike[str], width: int | None = None) -> np.ndarray:
    """Read the vectors of a textual inversion embedding.

    Files of AUTOMATIC1111's web UI hold one tensor ``emb_params``, those of diffusers one under the word's name.

    Parameters
    ----------
    path
        The safetensors file.
    width : int, optional
        Channels of the text encoder; by default any.

    Returns
    -------
    ndarray
        Float32 ``(n, width)``.

    Raises
    ------
    ModelError
        The file is damaged, holds something else, or is for a text encoder of another width.
    """
    path = Path(path)
    header = read_header(path)
    if len(header) != 1:
        raise ModelError(f"{path}: found {len(header)} tensors ({kind_of(header).title}), expected one embedding")
    ((name, info),) = header.items()
    if info.dtype not in WEIGHT_DTYPES or len(info.shape) not in (1, 2) or 0 in info.shape:
        raise ModelError(f"{path}: tensor {name!r:.80}: found {info.dtype} {info.shape}, expected vectors")
    vectors = kernels.widen(tensor_view(info, map_file(path))).reshape(-1, info.shape[-1])
    if width is not None and vectors.shape[1] != width:
        raise ModelError(
            f"{path}: found vectors of {vectors.shape[1]} values, the model's text encoder has {width}: "
            f"it was made for another family of models ({widths()})"
        )
    if not 1 <= len(vectors) <= MAX_VECTORS:
        raise ModelError(f"{path}: found {len(vectors)} vectors, expected 1 to {MAX_VECTORS}, as a prompt has room for")
    if not np.isfinite(vectors).all():
        raise ModelError(f"{path}: holds NaN or infinite values; download it again")
    return vectors


def find_embeddings(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Find the embeddings of a folder: word that stands for each in prompts, and file.

    The words are the file's name and, in files of diffusers, that of its tensor, such as ``<cat-toy>``. Pickles are
    found, too: reading one says why it is not read.

    Raises
    ------
    InputError
        There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with textual inversion embeddings (.safetensors)")
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in ENDINGS):
        found.setdefault(path.stem, path)
        if path.suffix == ENDINGS[0]:
            with contextlib.suppress(ModelError):
                names = list(read_header(path))
                if len(names) == 1 and names[0] != WEB_UI:
                    found.setdefault(names[0], path)
    return found
