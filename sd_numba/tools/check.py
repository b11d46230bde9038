"""Whether the files of a model are sound: what ``sd-numba test`` says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.embedding import read_embedding
from ..checkpoints.kinds import kind_of
from ..checkpoints.lora import group_names
from ..checkpoints.opening import Checkpoint, expected_shapes, find_path, open_model, open_taesd, open_vae
from ..checkpoints.weights import Weights, find_nonfinite, take_all
from ..errors import ModelError, SdNumbaError
from ..files.safetensors import read_header
from ..files.tensors import TensorInfo
from ..samplers import make_sampler, sampler_name_from_config
from .info import Contents


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


def check_model(path: str | os.PathLike[str] | None = None) -> Iterator[Report]:
    """Check a model's files in full: names, shapes, dtypes, and every value for NaN and infinity.

    Yields a report for each component, so that a caller can show it at once. None is the embedded model. A file that is
    no whole model (a LoRA, a VAE, an embedding) has one report.

    Raises
    ------
    ModelError
        The folder or file is none that could be checked (see ``open_model``).
    """
    found = find_path(path)
    if found.is_file():
        header = read_header(found)
        if not kind_of(header).supported:
            yield _check_file(found, header)
            return
    model = open_model(path)
    for encoder, name in model.family.tokenizers.items():
        yield _check_tokenizer(model, encoder, name)
    for component in model.family.networks:
        yield _check_network(model, component)
    yield _check_scheduler(model)


def _check_tokenizer(model: Checkpoint, encoder: str, name: str) -> Report:
    try:
        tokenizer = model.tokenizer(encoder)
    except ModelError as error:
        return Report(name, "", (str(error),))
    return Report(name, f"{tokenizer.vocab_size} tokens, rows of {tokenizer.max_length}")


def _check_network(model: Checkpoint, component: str) -> Report:
    faults = []
    try:
        weights = model.weights(component)
    except ModelError as error:
        return Report(component, "", (str(error),))
    try:
        take_all(weights, expected_shapes(component, model.configs[component], model.family))
    except ModelError as error:
        faults.append(str(error))
    faults += _nonfinite(weights)
    contents = str(Contents.of(map(weights.info, weights.names())))
    unused = f" (and {', '.join(weights.unused)}, not needed)" if weights.unused else ""
    return Report(component, contents + unused, tuple(faults))


def _nonfinite(weights: Weights) -> list[str]:
    bad = [f"{name} ({count})" for name, count in find_nonfinite(weights)]
    if not bad:
        return []
    return [f"NaN or infinite values in {len(bad)} tensors: {', '.join(bad[:4])}{', ...' * (len(bad) > 4)}"]


def _check_file(path: Path, header: dict[str, TensorInfo]) -> Report:
    """Check a file that is no whole model by itself."""
    kind = kind_of(header)
    faults = []
    try:
        if kind.use == "lora":
            group_names(path, header)
        elif kind.use == "vae":
            config, opener = open_vae(path)
            take_all(opener(), expected_shapes("vae", config))
        elif kind.use == "taesd":
            open_taesd(path)
        elif kind.use == "embedding":
            read_embedding(path)
        else:
            faults.append(f"{kind.title} is not supported")
    except ModelError as error:
        faults.append(str(error))
    faults += _nonfinite(Weights.select(path, header))
    return Report(kind.title, str(Contents.of(header.values())), tuple(faults))


def _check_scheduler(model: Checkpoint) -> Report:
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
