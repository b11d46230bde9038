"""LoRA files: low-rank updates of weights, as kohya's scripts, diffusers and PEFT write them.

An update of a weight W is ``scale * up @ down`` with a small number of rows in between, the rank (Hu et al., "LoRA:
Low-Rank Adaptation of Large Language Models", arXiv:2106.09685); that of a convolution (LoCon) is a convolution of that
many outputs, then a 1x1 convolution. The weights stay as they are: kernels add updates as they pack.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..errors import ModelError
from ..families.names import Names
from ..files.folders import read_json
from ..files.safetensors import read_header, read_metadata
from ..files.tensors import WEIGHT_DTYPES, TensorInfo, map_file, tensor_view
from .kinds import kind_of
from .weights import is_layer

log = logging.getLogger(__name__)

# How the two matrices of a module are called: (pattern, group of the module, of the matrix).
PATTERNS = tuple(
    map(
        re.compile,
        (
            # diffusers before it used PEFT, in two generations
            r"(?P<module>.+?)(\.processor)?\.(?P<part>to_\w+)_lora\.(?P<matrix>down|up)\.weight",
            r"(?P<module>.+)\.lora(_linear_layer)?\.(?P<matrix>down|up)\.weight",
            r"(?P<module>.+)\.lora_(?P<matrix>[AB])(\.[\w-]+)?\.weight",  # PEFT; with or without an adapter's name
            r"(?P<module>.+)\.lora_(?P<matrix>down|up|mid)\.weight",  # kohya
            r"(?P<module>.+)\.(?P<matrix>alpha)",
        ),
    )
)
MATRICES = {"A": "down", "B": "up"}
PREFIXES = {  # of modules -> the network that they belong to
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
}
ALPHA_DTYPES = ("I8", "U8", "I16", "I32", "I64")  # some programs write whole numbers
METADATA = "lora_adapter_metadata"  # PEFT's configuration, as diffusers stores it


@dataclass(frozen=True)
class Update:
    """What a LoRA adds to one weight: ``scale * up @ down``.

    Attributes
    ----------
    network, module : str
        ``unet`` or ``text_encoder``, and the layer's name in it.
    up, down : ndarray
        ``(n, r)`` and ``(r, k)`` or ``(r, c_in, kh, kw)``, as stored or float32.
    scale : float
        Alpha by rank.
    """

    network: str
    module: str
    up: np.ndarray
    down: np.ndarray
    scale: float


class Modules:
    """The layers of a model, found by any of the names that LoRA files have for them.

    Parameters
    ----------
    shapes : mapping of str to mapping
        Network -> (tensor's name -> shape).
    unet_names : Names
        The names of a single file, which some LoRAs use.
    """

    def __init__(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], unet_names: Names) -> None:
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        self._networks = tuple(shapes)
        self._flat: dict[tuple[str, str], str] = {}
        for network, tensors in shapes.items():
            for name, shape in tensors.items():
                module, _, kind = name.rpartition(".")
                if kind != "weight" or not is_layer(name, shape):
                    continue
                self.shapes[network, module] = shape
                self._flat[network, _flat(module)] = module
                if network == "unet":
                    self._flat[network, _flat(unet_names.to_single(name).removesuffix(".weight"))] = module
                else:  # diffusers' old names for the projections of attention
                    self._flat[network, re.sub(r"_([qkv]|out)_proj$", r"_to_\1", _flat(module))] = module

    def find(self, name: str) -> tuple[str, str] | None:
        """Give the network and the layer that a LoRA's module is for."""
        name = name.removeprefix("base_model.model.")
        for prefix, network in PREFIXES.items():
            if name.startswith(prefix):
                module = self._flat.get((network, _flat(name[len(prefix) :])))
                return (network, module) if module else None
        found = [(network, self._flat.get((network, _flat(name)))) for network in self._networks]
        return next(((network, module) for network, module in found if module), None)


def network_of(name: str) -> str:
    """Tell by its name which network a LoRA's module is for."""
    name = name.removeprefix("base_model.model.")
    return next((network for prefix, network in PREFIXES.items() if name.startswith(prefix)), "unet")


def _flat(module: str) -> str:
    """A name as kohya's scripts write it; without the list around ``to_out``, which some leave out."""
    return re.sub(r"_to_out_0$", "_to_out", module.replace(".", "_"))


def read_lora(path: str | os.PathLike[str], modules: Modules) -> list[Update]:
    """Read what a LoRA adds to the layers of a model.

    Raises
    ------
    ModelError
        The file is damaged, no LoRA, of another kind than LoRA and LoCon, holds NaN, or is for another model.
    """
    path = Path(path)
    groups, settings = _read_groups(path), _peft_settings(path)
    updates, unknown = [], []
    for name, matrices in groups.items():
        found = modules.find(name)
        if found is None:
            unknown.append(name)
        else:
            updates.append(_update(path, name, found, modules.shapes[found], matrices, settings))
    if not updates:
        raise ModelError(
            f"{path}: made for another model: none of its modules is in this one, such as {unknown[0]!r:.80}"
        )
    if unknown:
        log.warning("%s: %d of its %d modules are not in this model: %r", path, len(unknown), len(groups), unknown[0])
    return updates


def group_names(path: Path, header: Mapping[str, TensorInfo]) -> dict[str, dict[str, str]]:
    """Sort the tensors of a LoRA: module -> matrix (``down``, ``up``, ``mid`` or ``alpha``) -> tensor's name.

    Raises
    ------
    ModelError
        There is something else in the file, or shapes do not fit together.
    """
    kind = kind_of(header)
    if kind.title != "LoRA":
        raise ModelError(f"{path}: found {kind.title}, expected LoRA{kind.advice}")
    groups: dict[str, dict[str, str]] = {}
    for name, info in header.items():
        match = next((match for pattern in PATTERNS if (match := pattern.fullmatch(name))), None)
        if match is None:
            raise ModelError(f"{path}: found tensor {name!r:.80}, expected the matrices of LoRA or LoCon")
        if info.dtype not in (WEIGHT_DTYPES if match["matrix"] != "alpha" else (*WEIGHT_DTYPES, *ALPHA_DTYPES)):
            raise ModelError(f"{path}: tensor {name!r:.80}: found {info.dtype}, expected a floating point number")
        module = ".".join(filter(None, (match["module"], match.groupdict().get("part"))))
        groups.setdefault(module, {})[MATRICES.get(match["matrix"], match["matrix"])] = name
    for module, matrices in groups.items():
        if not {"up", "down"} <= matrices.keys():
            raise ModelError(f"{path}: module {module!r:.80} has only {', '.join(matrices)}, expected up and down")
        shapes = {matrix: header[name].shape for matrix, name in matrices.items()}
        if not _fit(**shapes):
            raise ModelError(f"{path}: module {module!r:.80}: found matrices of shape {shapes}, which do not fit")
    return groups


def _fit(
    up: tuple[int, ...], down: tuple[int, ...], mid: tuple[int, ...] | None = None, alpha: tuple[int, ...] = ()
) -> bool:
    """Whether matrices of these shapes can be multiplied: up (n, r), mid (r, s, kh, kw), down (s, ...) or (r, ...)."""
    if len(up) < 2 or len(down) < 2 or 0 in (*up, *down, *(mid or ())) or math.prod(up[2:] + alpha) != 1:
        return False
    if mid is None:
        return up[1] == down[0]
    return len(mid) == 4 and mid[:2] == (up[1], down[0]) and math.prod(down[2:]) == 1


def _read_groups(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Open the matrices of each module."""
    header = read_header(path)
    groups, mapped = group_names(path, header), map_file(path)
    views = {name: tensor_view(info, mapped) for name, info in header.items()}
    for name, values in views.items():
        finite = np.isfinite(kernels.widen(values) if header[name].dtype in WEIGHT_DTYPES else values)
        if not finite.all():
            raise ModelError(f"{path}: tensor {name!r:.80} holds NaN or infinite values; download the file again")
    return {module: {m: views[name] for m, name in matrices.items()} for module, matrices in groups.items()}


def _update(
    path: Path,
    name: str,
    found: tuple[str, str],
    shape: tuple[int, ...],
    matrices: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
) -> Update:
    """Put together what is added to one weight of that shape."""
    network, module = found
    up, down, middle = matrices["up"], matrices["down"], matrices.get("mid")
    inner = down.shape[1:2] + (down.shape[2:] if middle is None else middle.shape[2:])
    # A 1x1 convolution may be stored as a linear layer, and the other way round.
    if up.shape[0] != shape[0] or inner[0] != shape[1] or math.prod(inner) != math.prod(shape[1:]):
        shapes = {matrix: values.shape for matrix, values in matrices.items()}
        raise ModelError(
            f"{path}: made for another model: {name!r:.80} has matrices {shapes}, the model's weight there is {shape}"
        )
    if middle is not None:  # a 3x3 convolution between two 1x1 ones (LyCORIS's Tucker form)
        first = kernels.widen(down).reshape(len(down), -1)
        down = np.ascontiguousarray(np.einsum("rshw,sc->rchw", kernels.widen(middle), first))
    rank = len(down)
    alpha = _alpha(matrices, settings, network, module, rank)
    # "Rank-stabilised" LoRA: Kalajdzievski, arXiv:2312.03732.
    scale = alpha / (math.sqrt(rank) if settings.get(f"{network}.use_rslora") is True else rank)
    return Update(network, module, up.reshape(shape[0], rank), down.reshape(rank, *shape[1:]), scale)


def _alpha(
    matrices: Mapping[str, np.ndarray], settings: Mapping[str, Any], network: str, module: str, rank: int
) -> float:
    """Give a module's alpha: its own, or that of PEFT's settings, or else the rank."""
    if "alpha" in matrices:
        alpha = matrices["alpha"].reshape(-1)
        return float(alpha[0] if alpha.dtype.kind in "iu" and alpha.dtype != np.uint16 else kernels.widen(alpha)[0])
    alpha = settings.get(f"{network}.lora_alpha", rank)
    patterns = settings.get(f"{network}.alpha_pattern")
    if isinstance(patterns, dict):
        alpha = next((value for key, value in patterns.items() if module.endswith(key)), alpha)
    return float(alpha) if isinstance(alpha, int | float) and math.isfinite(alpha) else rank


def _peft_settings(path: Path) -> dict[str, Any]:
    """Read PEFT's settings: in the file, as diffusers writes them, or in ``adapter_config.json`` beside an adapter."""
    try:
        settings = json.loads(read_metadata(path).get(METADATA, "{}"))
    except (ValueError, RecursionError):
        settings = {}
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and beside.is_file():
        own = read_json(beside)
        settings = {f"{network}.{key}": value for network in set(PREFIXES.values()) for key, value in own.items()}
    return settings if isinstance(settings, dict) else {}
