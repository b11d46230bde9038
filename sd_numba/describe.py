"""What a file holds, and whether a model's files are sound: what ``sd-numba info`` and ``sd-numba test`` say."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import find_weights, kind_of
from .errors import ModelError, SdNumbaError
from .metadata import read_parameters
from .model import COMPONENTS, NETWORKS, Model, open_model
from .samplers import make_sampler, sampler_name_from_config
from .text_encoder import TextEncoderConfig
from .weights import ShapeRecorder, TensorInfo, Weights, find_nonfinite, read_header

PNG_START = b"\x89PNG\r\n\x1a\n"


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
            sum(info.nbytes for info in tensors),
            dict(Counter(info.dtype for info in tensors).most_common()),
        )

    def __str__(self) -> str:
        mixed = len(self.dtypes) > 1
        dtypes = ", ".join(f"{dtype} ({count})" if mixed else dtype for dtype, count in self.dtypes.items())
        return f"{self.tensors} tensors, {self.parameters:,} parameters, {dtypes}, {self.nbytes / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Report:
    """What a check found out about one component; ``str(report)`` is one line."""

    component: str
    contents: str
    faults: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no fault was found."""
        return not self.faults

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"FAULT: {'; '.join(self.faults)}"
        return f"{self.component}: {self.contents}{': ' if self.contents else ''}{verdict}"


def expected_shapes(component: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a network of this configuration needs.

    Parameters
    ----------
    component
        ``text_encoder``, ``unet`` or ``vae``.
    config
        Its parsed ``config.json``.

    Raises
    ------
    ModelError
        The configuration is not supported.
    """
    network, parse = NETWORKS[component]
    recorder = ShapeRecorder()
    network(recorder, parse(config))
    return recorder.shapes


def check_model(path: str | os.PathLike[str] | None = None) -> Iterator[Report]:
    """Check a model's files in full: names, shapes, dtypes, and every value for NaN and infinity.

    Yields a report for each component, so that a caller can show it at once. None is the embedded model.

    Raises
    ------
    ModelError
        The folder is no model that could be checked (see ``open_model``).
    """
    model = open_model(path)
    yield _check_tokenizer(model)
    for component in NETWORKS:
        yield _check_network(model, component)
    yield _check_scheduler(model)


def _check_tokenizer(model: Model) -> Report:
    try:
        vocab_size = TextEncoderConfig.from_dict(model.text_encoder).vocab_size
        tokenizer = model.open_tokenizer(vocab_size)
    except ModelError as error:
        return Report("tokenizer", "", (str(error),))
    return Report("tokenizer", f"{tokenizer.vocab_size} tokens, rows of {tokenizer.max_length}")


def _check_network(model: Model, component: str) -> Report:
    faults = []
    try:
        weights = model.weights(component)
    except ModelError as error:
        return Report(component, "", (str(error),))
    try:
        for name, shape in expected_shapes(component, getattr(model, component)).items():
            weights.take(name, shape)
        weights.finish()
    except ModelError as error:
        faults.append(str(error))
    bad = [f"{name} ({count})" for name, count in find_nonfinite(weights)]
    if bad:
        faults.append(f"NaN or infinite values in {len(bad)} tensors: {', '.join(bad[:4])}{', ...' * (len(bad) > 4)}")
    contents = str(Contents.of(map(weights.info, weights.names())))
    unused = f" (and {', '.join(weights.unused)}, not needed)" if weights.unused else ""
    return Report(component, contents + unused, tuple(faults))


def _check_scheduler(model: Model) -> Report:
    contents = str(model.scheduler.get("_class_name", "no class named"))
    try:
        name = sampler_name_from_config(model.scheduler)
    except ModelError:  # no fault of the files: the model runs with any other sampler
        name = "euler"
        contents += " (not supported: choose a sampler)"
    try:
        make_sampler(name, model.scheduler).plan(20)
    except SdNumbaError as error:
        return Report("scheduler", contents, (str(error),))
    return Report("scheduler", contents)


def describe(path: str | os.PathLike[str]) -> str:
    """Say what a file or folder is: a picture's parameters, or what a model holds. Reads no weights.

    Raises
    ------
    SdNumbaError
        There is no such file, or it is neither a picture nor a model.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _describe_folder(path)
    try:
        with path.open("rb") as file:
            is_png = file.read(len(PNG_START)) == PNG_START
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    if is_png:
        return read_parameters(path) or "PNG picture without generation parameters"
    if path.suffix == ".json":
        return _describe_weights(Weights.open(path).files)
    return _describe_weights([path])


def _describe_folder(folder: Path) -> str:
    if not any((folder / name).is_dir() for name in COMPONENTS):  # one component's folder
        return _describe_weights(Weights.open(find_weights(folder)).files)
    model = open_model(folder)
    lines = [f"Stable Diffusion model in diffusers layout: {folder}"]
    for name in NETWORKS:
        lines.append(f"{name}: {_describe_weights(model.weights(name).files)}")
    known = ("_class_name", "prediction_type", "beta_schedule", "timestep_spacing")
    lines.append(f"scheduler: {', '.join(str(model.scheduler[key]) for key in known if key in model.scheduler)}")
    return "\n".join(lines)


def _describe_weights(files: list[Path]) -> str:
    tensors = {name: info for file in files for name, info in read_header(file).items()}
    kind = kind_of(tensors).title
    return f"{kind}: {Contents.of(tensors.values())}{f' in {len(files)} shards' if len(files) > 1 else ''}"
