"""Writing models: another dtype, another layout, tensor by tensor, so that memory holds next to nothing.

A file or folder appears under its name only when it is complete. Values are rounded to the nearest, ties to even.

With int8, linear layers and convolutions of the UNet and the text encoder become int8, with a scale for each output
channel (see `join_scales`). The rest becomes float16: the whole autoencoder, and weights that are small or affect every
pixel, namely the first and the last convolution, embeddings, and weights with few values a row.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Generator, Mapping
from pathlib import Path

from ..checkpoints.kinds import kind_of
from ..checkpoints.opening import Checkpoint, expected_shapes, open_model
from ..checkpoints.weights import Weights, take_all
from ..errors import InputError, ModelError
from ..families import FAMILIES, family_of_file, titles
from ..families.names import EMA
from ..files.safetensors import read_header, read_metadata
from ..files.tensors import SCALED, map_file, read_scales, tensor_view
from ..files.writing import DTYPES, Entry, check_space, unfinished, write_safetensors
from ..generation.model import with_prediction_type

# Weights that stay float16 in an int8 model.
FLOATS = re.compile(r"(conv_in|conv_out|input_blocks\.0\.0|out\.2)\.weight|.*embed(ding)?s?\..*")
ROUNDED_ROW = 64  # values of a row that can be int8, at least
Progress = Generator[tuple[int, int], None, None]  # bytes written so far, and in all


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], dtype: str | None = None) -> Progress:
    """Write a model, or any safetensors file, in another dtype or layout.

    Parameters
    ----------
    source
        A model's folder or single file; or another safetensors file (a VAE, a LoRA), which keeps its names.
    target
        Where to write: a file if the name ends in ``.safetensors``, else a folder in diffusers layout. Must not exist.
    dtype : {"f32", "f16", "bf16", "int8"}, optional
        Dtype of all weights; None keeps theirs. ``int8`` is for whole models: weights of linear layers and
        convolutions of the UNet and the text encoder, with a scale for each output channel; all others become float16.

    Returns
    -------
    generator of (int, int)
        Bytes written so far, and in all.

    Raises
    ------
    ModelError
        The source is damaged, has no such layout, or has values that float16 or int8 cannot hold.
    InputError
        The target exists, or cannot be written; or the dtype is int8 and the source is not a whole model.
    """
    source, target = Path(source), Path(target)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype: found {dtype!r:.80}, expected {', '.join(DTYPES)}")
    if os.path.lexists(target):
        raise InputError(f"{target}: exists already; choose another name or remove it")
    if not target.parent.is_dir():
        raise InputError(f"{target}: its folder {target.parent} does not exist; make it first")
    to_file = target.suffix == ".safetensors"
    if not to_file and target.suffix in (".ckpt", ".pt", ".bin", ".gguf"):
        raise InputError(f"{target}: models are written as .safetensors files or as folders; choose such a name")
    if source.is_file() and not (kind := kind_of(read_header(source))).supported:
        if not to_file:
            raise InputError(
                f"{source}: found {kind.title}, which has no folder; choose a target that ends in .safetensors"
            )
        if dtype == "int8":
            raise InputError(f"{source}: found {kind.title}, expected a whole model for int8; choose f32, f16 or bf16")
    if to_file and source.is_file():
        tensors, metadata = _same_names(source)
        return _write_file(target, tensors, dtype, metadata)
    model = with_prediction_type(open_model(source))
    if to_file:
        return _write_file(target, single_tensors(model), dtype, _single_metadata(model))
    return _write_folder(target, model, dtype)


# --- what to write ----------------------------------------------------------------------------------------------------


def _same_names(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    header, mapped = read_header(path), map_file(path)
    family = family_of_file(header) or FAMILIES[0]
    rounded_prefixes = [network.prefix for part, network in family.networks.items() if part != "vae"]
    entries = {}
    for name, info in header.items():
        if name.startswith(EMA):
            continue
        try:
            scales = read_scales(info, mapped, (info.scales, mapped)) if info.scales else None
        except ModelError as error:
            raise ModelError(f"{path}: tensor {name!r:.80}: {error}") from None
        values = tensor_view(info, mapped).reshape(-1)
        prefix = next((prefix for prefix in rounded_prefixes if name.startswith(prefix)), None)
        rounded = prefix is not None and _is_rounded(name.removeprefix(prefix), info.shape)
        entries[name] = Entry(info.dtype, info.shape, (values,), scales, rounded)
    return entries, read_metadata(path)


def _is_rounded(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the UNet or the text encoder is int8 in an int8 model, by its name in either layout."""
    if len(shape) not in {2, 4} or not name.endswith("weight") or FLOATS.fullmatch(name):
        return False
    return shape[0] > 0 and math.prod(shape[1:]) >= ROUNDED_ROW


def _entry(weights: Weights, component: str, name: str, shape: tuple[int, ...]) -> Entry:
    dtype, values = weights.info(name).dtype, weights.raw(name).reshape(-1)
    scales = weights.scales(name) if dtype == SCALED else None
    return Entry(dtype, shape, (values,), scales, component != "vae" and _is_rounded(name, shape))


def _component(model: Checkpoint, component: str) -> dict[str, Entry]:
    """Give the tensors that a network needs, under diffusers' names."""
    weights = model.weights(component)
    shapes = expected_shapes(component, model.configs[component], model.family)
    take_all(weights, shapes)
    return {name: _entry(weights, component, name, shape) for name, shape in shapes.items()}


def single_tensors(model: Checkpoint) -> dict[str, Entry]:
    """Give a model's tensors under their names in a single file, if such a file can hold this model."""
    _check_fits_single(model)
    result: dict[str, Entry] = {}
    for component, network in model.family.networks.items():
        config = network.parse(model.configs[component])
        entries = network.unrename(_component(model, component), config, model.path)
        result |= {network.prefix + name: entry for name, entry in entries.items()}
    return result


def _check_fits_single(model: Checkpoint) -> None:
    """Raise ModelError if a single file would lose what the configurations say."""
    for component, network in model.family.networks.items():
        shapes = expected_shapes(component, model.configs[component], model.family)
        own, other = network.parse(model.configs[component]), network.parse(network.infer(shapes))
        for key, value in vars(own).items():
            if key not in {"sample_size", "latent_rgb_factors"} and value != vars(other)[key]:
                raise ModelError(
                    f"{model.path}: its {key} is {value}, where a single file stands for {vars(other)[key]}; "
                    f"only models of the shapes of {titles()} have that layout; write a folder"
                )
    if not all(model.tokenizer(encoder).is_clip for encoder in model.family.tokenizers):
        raise ModelError(f"{model.path}: its tokenizer is not CLIP's, which a single file stands for; write a folder")


def _single_metadata(model: Checkpoint) -> dict[str, str]:
    """Say in ModelSpec's terms what a single file's tensors do not."""
    prediction = model.scheduler.get("prediction_type")
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": model.family.architecture(prediction),
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
    }


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_file(target: Path, tensors: Mapping[str, Entry], dtype: str | None, metadata: Mapping[str, str]) -> Progress:
    total = sum(entry.nbytes(dtype) for entry in tensors.values())
    check_space(target, total)

    def run() -> Progress:
        with unfinished(target, Path.unlink) as path:
            for done in write_safetensors(path, tensors, dtype, metadata):
                yield done, total

    return run()


def _write_folder(target: Path, model: Checkpoint, dtype: str | None) -> Progress:
    networks = model.family.networks
    components = {name: _component(model, name) for name in networks}
    total = sum(entry.nbytes(dtype) for tensors in components.values() for entry in tensors.values())
    check_space(target, total)

    def run() -> Progress:
        with unfinished(target, shutil.rmtree) as folder:
            folder.mkdir()
            _write_settings(folder, model)
            before = 0
            for name, tensors in components.items():
                done = 0
                for done in write_safetensors(folder / name / networks[name].file, tensors, dtype, {"format": "pt"}):
                    yield before + done, total
                before += done

    return run()


def _write_settings(folder: Path, model: Checkpoint) -> None:
    """Write everything of a diffusers folder but the weights."""
    classes = {
        **{name: ["transformers", "CLIPTokenizer"] for name in model.family.tokenizers.values()},
        **{name: [network.library, network.classes[0]] for name, network in model.family.networks.items()},
        "scheduler": ["diffusers", model.scheduler.get("_class_name", "PNDMScheduler")],
    }
    index = {
        "_class_name": model.family.pipeline,
        **classes,
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    _write_json(folder / "model_index.json", index | ({"_defaults": model.defaults} if model.defaults else {}))
    for name, network in model.family.networks.items():
        kind = {**network.described} or {"_class_name": network.classes[0]}
        _write_json(folder / name / "config.json", kind | model.configs[name])
    known = {key: value for key, value in model.scheduler.items() if value is not None}
    _write_json(folder / "scheduler" / "scheduler_config.json", known)
    for encoder, name in model.family.tokenizers.items():
        if (model.path / name).is_dir():
            shutil.copytree(model.path / name, folder / name)
        else:
            model.tokenizer(encoder).save(folder / name)


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
