"""Opening a model: a diffusers folder, a single file, or the embedded model; its configurations, and where the rest is.

Nothing is built and no weight is read here: that is up to `pipeline` and `describe`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ModelError, argument
from ..families import FAMILIES, Family, family_of_file, pipelines, titles
from ..files.folders import find_weights, packaged, read_json
from ..files.safetensors import read_header, read_metadata
from ..files.tensors import BLOCKS, TensorInfo
from ..networks.taesd import TinyVae, TinyVaeConfig
from ..prompts.tokenizer import Tokenizer
from .download import HUB_ID, resolve_model
from .kinds import kind_of
from .weights import ShapeRecorder, Weights


@dataclass(frozen=True)
class Checkpoint:
    """A model's files: where they are and what their configurations say.

    Attributes
    ----------
    path : pathlib.Path
        Its folder or file.
    name : str
        As pictures' metadata says it.
    family : Family
    configs : dict
        Network -> its configuration, as in the ``config.json`` files of a diffusers folder.
    scheduler : dict
        The scheduler's; its ``prediction_type`` is None if it can only be found out by asking the UNet.
    defaults : dict
        Settings that the model's makers advise (``_defaults`` in ``model_index.json``), which may hold
        ``num_inference_steps``, ``guidance_scale`` and ``scheduler``.
    openers : mapping
        Network -> function that opens its weights.
    tokenizers : mapping
        Text encoder -> function that opens its tokenizer, given how many tokens the encoder knows.
    """

    path: Path
    name: str
    family: Family
    configs: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    defaults: dict[str, Any]
    openers: Mapping[str, Callable[[], Weights]]
    tokenizers: Mapping[str, Callable[[int], Tokenizer]]

    def weights(self, component: str) -> Weights:
        """Open the weights of a network, such as ``unet``.

        Raises
        ------
        ModelError
            They are damaged.
        """
        return self.openers[component]()

    def tokenizer(self, encoder: str) -> Tokenizer:
        """Open the tokenizer of a text encoder.

        Raises
        ------
        ModelError
            It is damaged, has more tokens than the text encoder, or the configuration of that is not supported.
        """
        return self.tokenizers[encoder](self.family.networks[encoder].parse(self.configs[encoder]).vocab_size)


def embedded_model_path() -> Path:
    """The folder of the small model that comes with the package."""
    return packaged("models", "emoji-world")


def open_model(
    path: str | os.PathLike[str] | None = None, vae: str | os.PathLike[str] | None = None, needs_vae: bool = True
) -> Checkpoint:
    """Find a model of one of the `FAMILIES`, and its configurations; no weights yet.

    Parameters
    ----------
    path
        A folder in diffusers layout, a ``.safetensors`` or GGUF file with everything in it, or the id of a model that
        ``sd-numba download`` has fetched; None is the embedded model.
    vae
        Another autoencoder instead of the model's own: a ``.safetensors`` file with diffusers' or the original names,
        or a folder.
    needs_vae
        Whether a single file without an autoencoder is refused, if there is no other one.

    Raises
    ------
    ModelError
        There is no such folder or file, a component or its weights are missing, a configuration is not valid JSON, or
        it is another kind of model.
    """
    found = find_path(path)
    model = _open_file(found, needs_vae and vae is None) if os.path.isfile(found) else _open_folder(found)
    if vae is None:
        return model
    config, opener = open_vae(find_path(vae), model.family)
    return replace(model, configs={**model.configs, "vae": config}, openers={**model.openers, "vae": opener})


def find_path(path: str | os.PathLike[str] | None) -> Path:
    """The path that a file, a folder or the id of a downloaded model has; None is the embedded model.

    Raises
    ------
    ModelError
        The name is empty, or an id of something that was not downloaded.
    """
    if path is None:
        return embedded_model_path()
    if not str(path):
        raise ModelError("found an empty name, expected a file, a folder or the id of a downloaded model")
    found = resolve_model(str(path))
    if found is None and HUB_ID.fullmatch(str(path)) and not os.path.exists(path):
        raise ModelError(f"{path}: no such file or folder, and no downloaded model; run: sd-numba download {path}")
    return found or Path(path)


# --- folders ----------------------------------------------------------------------------------------------------------


def _open_folder(folder: Path) -> Checkpoint:
    if not os.path.isdir(folder):  # unlike Path.is_dir, does not raise for a name that no file can have
        found = "cannot be opened" if os.path.exists(folder) else "does not exist"
        raise ModelError(
            f"{folder}: {found}; expected a .safetensors file or a folder with "
            f"{_listed(FAMILIES[0].components, 'and')} in it"
        )
    index = _read_index(folder)
    families = [family for family in FAMILIES if index.get("_class_name") in (None, family.pipeline)]
    components, networks = families[0].components, families[0].networks
    missing = [name for name in components if not (folder / name).is_dir()]
    if len(missing) == len(components):
        raise ModelError(f"{folder}: not a diffusers model: it has no folders {_listed(components, 'and')}")
    if missing:
        raise ModelError(f"{folder}: incomplete: its folder {_listed(missing, 'and')} is missing; download it again")
    configs = {name: read_json(folder / name / "config.json") for name in networks}
    for name, network in networks.items():
        _check_class(folder / name / "config.json", configs[name], network.classes)
        find_weights(folder / name)
    family = next((one for one in families if one.recognises_folder(configs)), families[0])
    defaults = index.get("_defaults")
    return Checkpoint(
        folder,
        _folder_name(folder.resolve()),
        family,
        configs,
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        defaults=defaults if isinstance(defaults, dict) else {},
        openers={name: partial(Weights.open, folder / name) for name in networks},
        tokenizers={
            encoder: partial(Tokenizer.from_folder, folder / name) for encoder, name in family.tokenizers.items()
        },
    )


def _folder_name(folder: Path) -> str:
    """Name a model by its folder: in the hub's cache, that of a commit, by the repository."""
    *_, repository, snapshots, name = ("", "", *folder.parts)
    return repository.rpartition("--")[2] if snapshots == "snapshots" else name


def _read_index(folder: Path) -> dict[str, Any]:
    """Read the index; refuse other pipelines, or if there is no index, text encoders that no family has."""
    path = folder / "model_index.json"
    index = read_json(path) if path.exists() else {}
    found = index.get("_class_name")
    known = {encoder for family in FAMILIES for encoder in family.padding}
    if found is None and any(path.is_dir() and path.name not in known for path in folder.glob("text_encoder*")):
        found = "a model with several text encoders (SDXL)"
    if found not in (None, *pipelines()):
        raise ModelError(f"{folder}: found {found!s:.80}, supported is {_listed(pipelines(), 'or')} ({titles()})")
    return index


def _check_class(path: Path, config: dict[str, Any], classes: tuple[str, ...]) -> None:
    found = config.get("_class_name") or config.get("architectures")
    found = found[0] if isinstance(found, list) and found else found
    if found and found not in classes:
        raise ModelError(f"{path}: found a {found!s:.80}, supported is {_listed(classes, 'or')}")


def _listed(words: Sequence[str], conjunction: str) -> str:
    return f" {conjunction} ".join(filter(None, (", ".join(words[:-1]), words[-1])))


# --- single files -----------------------------------------------------------------------------------------------------


def _open_file(path: Path, needs_vae: bool) -> Checkpoint:
    """Open a single file."""
    header = read_header(path)
    family = family_of_file(header) or FAMILIES[0]
    there = {n for n, one in family.networks.items() if any(name.startswith(one.prefix) for name in header)}
    wanted = {n: one for n, one in family.networks.items() if n != "vae" or needs_vae or n in there}
    missing = [n for n in wanted if n not in there]
    kind = kind_of(header)
    if missing or not kind.supported:
        patterns = [f"{wanted[n].prefix}*" for n in missing]
        lacks = f" without tensors {_listed(patterns, 'and')}" if missing else ""
        advice = f"; give it a VAE with {argument('vae')}" if missing == ["vae"] else kind.advice
        raise ModelError(f"{path}: found {kind.title}{lacks}; expected a whole {titles('or')} checkpoint{advice}")
    quantised = next((info.dtype for info in header.values() if info.dtype in BLOCKS), None)
    if quantised:
        raise ModelError(
            f"{path}: found quantised weights ({quantised}), expected F32, F16 or BF16; convert them once: "
            f"sd-numba convert {path} {path.with_suffix('.safetensors')} --dtype f16"
        )
    try:
        tensors = {name: network.tensors(header) for name, network in wanted.items()}
        configs = {name: wanted[name].infer(shapes_of(infos)) for name, infos in tensors.items()}
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    prediction = family.prediction(header.keys(), read_metadata(path))
    if family.velocity_size is not None and prediction == "v_prediction":
        configs["unet"]["sample_size"] = family.velocity_size
    return Checkpoint(
        path,
        path.stem,
        family,
        {"vae": {}, **configs},
        scheduler={**family.scheduler, "prediction_type": prediction},
        defaults={},
        openers={name: partial(Weights.select, path, infos) for name, infos in tensors.items()},
        tokenizers={encoder: partial(Tokenizer.clip, token) for encoder, token in family.padding.items()},
    )


def open_vae(path: Path, family: Family = FAMILIES[0]) -> tuple[dict[str, Any], Callable[[], Weights]]:
    """Read the configuration of an autoencoder in a file or folder of its own; also give what opens its weights.

    Raises
    ------
    ModelError
        There is none, or it is damaged.
    """
    network = family.networks["vae"]
    if os.path.isdir(path):
        folder = path / "vae" if (path / "vae").is_dir() else path
        if (folder / "config.json").exists():
            config = read_json(folder / "config.json")
            _check_class(folder / "config.json", config, network.classes)
            find_weights(folder)
            return config, partial(Weights.open, folder)
        path = find_weights(folder)
    header = read_header(path)
    prefix = network.prefix
    inside = {name[len(prefix) :]: info for name, info in header.items() if name.startswith(prefix)}
    kind = kind_of(header)
    if not inside and kind.use != "vae":
        raise ModelError(f"{path}: found {kind.title}, expected a VAE{kind.advice}")
    tensors = network.rename(inside or header)
    try:
        config = network.infer(shapes_of(tensors))
        network.parse(config)
    except ModelError as error:
        raise ModelError(f"{path}: no whole VAE: {error}") from None
    return config, partial(Weights.select, path, tensors)


def expected_shapes(
    component: str, config: Mapping[str, Any], family: Family = FAMILIES[0]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a network of this configuration needs.

    Parameters
    ----------
    component
        A network, such as ``unet``.
    config
        Its parsed ``config.json``.
    family
        That of the model.

    Raises
    ------
    ModelError
        The configuration is not supported.
    """
    network = family.networks[component]
    recorder = ShapeRecorder()
    network.network(recorder, network.parse(config))
    return recorder.shapes


def shapes_of(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Give the shape of each tensor."""
    return {name: info.shape for name, info in tensors.items()}


ORIGINAL_DECODER = "taesd_decoder.safetensors"


def open_taesd(path: str | os.PathLike[str]) -> TinyVae:
    """Open a tiny autoencoder.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file with diffusers' names, or the original ``taesd_decoder.safetensors``; or a folder with
        one of them, and perhaps a ``config.json``.

    Returns
    -------
    TinyVae

    Raises
    ------
    ModelError
        Files are missing, damaged, or of another network.
    """
    weights, config = taesd_files(path)
    network = TinyVae(weights, config)
    weights.finish()
    return network


def taesd_files(path: str | os.PathLike[str]) -> tuple[Weights, TinyVaeConfig]:
    """The weights and the configuration of a tiny autoencoder; see `open_taesd`."""
    path, config = Path(path), TinyVaeConfig()
    if os.path.isdir(path):
        if (path / "config.json").is_file():
            config = TinyVaeConfig.from_dict(read_json(path / "config.json"))
        original = path / ORIGINAL_DECODER
        path = original if original.is_file() else find_weights(path)
    header = read_header(path)
    if "0.weight" in header:
        raise ModelError(f"{path}: found the encoder of TAESD alone, expected {ORIGINAL_DECODER} or a file with both")
    kind = kind_of(header)
    if kind.use != "taesd":
        raise ModelError(f"{path}: found {kind.title}, expected a tiny autoencoder (TAESD){kind.advice}")
    return Weights.select(path, {_diffusers_name(name): info for name, info in header.items()}), config


def _diffusers_name(name: str) -> str:
    """The name of a tensor; in the original decoder's file, the clamping of the latents is layer 0."""
    match = re.fullmatch(r"(\d+)\.(.+)", name)
    return f"decoder.layers.{int(match[1]) - 1}.{match[2]}" if match else name
