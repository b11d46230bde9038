"""What a file holds: what ``sd-numba info`` says, without reading weights."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.kinds import kind_of
from ..checkpoints.lora import group_names, network_of
from ..checkpoints.opening import Checkpoint, find_path, open_model
from ..checkpoints.weights import Weights
from ..errors import ModelError
from ..families import FAMILIES, family_of_file
from ..families.names import EMA
from ..families.stable_diffusion import OTHER_WIDTHS
from ..files.folders import find_weights
from ..files.safetensors import read_header, read_metadata
from ..files.tensors import TensorInfo, join_scales
from ..generation.state import FORMAT, load_state
from ..recipes.png import read_parameters

# How files of pictures begin
PICTURES = {
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "WebP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "AVIF": re.compile(rb"....ftypavif", re.DOTALL),
}
# What the makers of LoRAs write into their files -> what it is called here.
LORA_NOTES = {
    "ss_output_name": "name",
    "modelspec.title": "title",
    "ss_sd_model_name": "trained on",
    "ss_base_model_version": "base",
    "modelspec.trigger_phrase": "trigger words",
}


@dataclass(frozen=True)
class Contents:
    """Tensors of one or several safetensors files, counted."""

    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]

    @classmethod
    def of(cls, tensors: Iterable[TensorInfo]) -> Contents:
        """Count tensors; ``dtypes`` says how many have each dtype, the commonest first."""
        tensors = list(tensors)
        return cls(
            len(tensors),
            sum(math.prod(info.shape) for info in tensors),
            sum(info.nbytes + (info.scales.nbytes if info.scales else 0) for info in tensors),
            dict(Counter(info.dtype for info in tensors).most_common()),
        )

    def __str__(self) -> str:
        mixed = len(self.dtypes) > 1
        dtypes = ", ".join(f"{dtype} ({count})" if mixed else dtype for dtype, count in self.dtypes.items())
        return f"{self.tensors} tensors, {self.parameters:,} parameters, {dtypes}, {self.nbytes / 1e6:,.1f} MB"


def describe(path: str | os.PathLike[str]) -> str:
    """Say what a file or folder is: a picture's parameters, or what a model holds. Reads no weights.

    Raises
    ------
    SdNumbaError
        There is no such file, or it is neither a picture nor a model.
    """
    path = find_path(path)
    if os.path.isdir(path):
        return _describe_folder(path)
    try:
        if not os.path.isfile(path):
            raise ModelError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    picture = next((name for name, pattern in PICTURES.items() if pattern.match(start)), None)
    if picture:
        return read_parameters(path) or f"{picture} picture without generation parameters"
    if path.suffix == ".json":
        return _describe_weights(Weights.open(path).files)
    header = read_header(path)
    if FORMAT in read_metadata(path):
        return _describe_state(path)
    lines = [_describe_weights([path])]
    kind = kind_of(header)
    if kind.supported:
        lines += _describe_checkpoint(path, header)
    elif kind.title == "LoRA":
        lines += _describe_lora(path, header)
    elif kind.title == "textual inversion embedding" and len(header) == 1:
        (info,) = header.values()
        vectors = math.prod(info.shape[:-1])
        lines.append(f"{vectors} vectors of {info.shape[-1] if info.shape else 1} values{_family(info.shape[-1:])}")
    return "\n".join(lines)


def _describe_state(path: Path) -> str:
    _, about = load_state(path)
    jobs, done = about.get("jobs"), about.get("done")
    if not isinstance(jobs, list) or not isinstance(done, int):
        return "state of a run"
    return (
        f"state of a run that was stopped: {done} of {len(jobs)} pictures made; continue it with: "
        f"sd-numba generate --resume {path}"
    )


def _describe_folder(folder: Path) -> str:
    if not any((folder / name).is_dir() for family in FAMILIES for name in family.components):  # one component's folder
        return _describe_weights(Weights.open(find_weights(folder)).files)
    model = open_model(folder)
    lines = [f"{model.family.line} model in diffusers layout: {folder}"]
    for name in model.family.networks:
        lines.append(f"{name}: {_describe_weights(model.weights(name).files)}")
    return "\n".join([*lines, _describe_scheduler(model)])


def _describe_scheduler(model: Checkpoint) -> str:
    known = ("_class_name", "prediction_type", "beta_schedule", "timestep_spacing")
    found = [str(model.scheduler[key]) for key in known if model.scheduler.get(key) is not None]
    return f"scheduler: {', '.join(found)}"


def _describe_weights(files: list[Path]) -> str:
    tensors = join_scales({name: info for file in files for name, info in read_header(file).items()})
    kind = kind_of(tensors).title
    return f"{kind}: {Contents.of(tensors.values())}{f' in {len(files)} shards' if len(files) > 1 else ''}"


def _describe_checkpoint(path: Path, header: dict[str, TensorInfo]) -> list[str]:
    """Say what the parts of a single file are, as far as it can be told."""
    lines = []
    family = family_of_file(header) or FAMILIES[0]
    for component, network in family.networks.items():
        tensors = [info for name, info in header.items() if name.startswith(network.prefix)]
        lines.append(f"{component}: {Contents.of(tensors) if tensors else 'missing'}")
    averages = sum(name.startswith(EMA) for name in header)
    if averages:
        lines.append(f"{averages} averages of the training (EMA), not used; sd-numba convert leaves them out")
    try:
        model = open_model(path)
    except ModelError as error:
        return [*lines, str(error).removeprefix(f"{path}: ")]
    width, unsure = model.configs["unet"]["cross_attention_dim"], model.scheduler["prediction_type"] is None
    guess = "; what it predicts is found out when it runs" if unsure else ""
    return [*lines, f"{_describe_scheduler(model)}{guess}", f"text of {width} values{_family((width,))}"]


def _describe_lora(path: Path, header: dict[str, TensorInfo]) -> list[str]:
    """Say what a LoRA changes and what it was made for."""
    try:
        groups = group_names(path, header)
    except ModelError as error:
        return [str(error).removeprefix(f"{path}: ")]
    downs = {name: header[matrices["down"]].shape for name, matrices in groups.items()}
    ranks = sorted({shape[0] for shape in downs.values() if shape})
    texts = [name for name in groups if network_of(name) == "text_encoder"]
    convolutions = sum(shape[2:] not in ((), (1, 1)) for shape in downs.values())
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "unknown"
    lines = [
        f"unet: {len(groups) - len(texts)} modules, text_encoder: {len(texts)}, of rank {shown}"
        f"{f'; {convolutions} convolutions (LoCon)' if convolutions else ''}"
    ]
    widths = {shape[1:2] for name, shape in downs.items() if re.search(r"attn2.to_k$", name)}
    if len(widths) == 1:
        lines[0] += _family(widths.pop())
    metadata = read_metadata(path)
    lines += [
        f"{label}: {' '.join(metadata[key].split()):.200}" for key, label in LORA_NOTES.items() if metadata.get(key)
    ]
    return lines


def _family(width: tuple[int, ...]) -> str:
    """Name the family of models whose text has this many values a token."""
    titles = {**OTHER_WIDTHS, **{family.text_width: family.title for family in reversed(FAMILIES)}}
    title = titles.get(*width) if len(width) == 1 else None
    return f" ({title})" if title else ""
