"""Write a full-size Stable Diffusion 1.5 folder with random weights, for benchmarks and tests of all but quality.

    python bench/make_random_model.py FOLDER [--dtype f32|f16|bf16] [--seed 0]

The folder has the layout, the config files and the tensor names and shapes of the real checkpoint in diffusers
format: 4.3 GB in f32, half of it in f16 or bf16. The weights are scaled so that activations stay near one through
all three networks. Names and shapes come from the networks themselves (built over a ``ShapeRecorder``), and each
tensor depends on its name, its shape and the seed alone, so that a folder can be made again anywhere, and the golden
tests' miniature models need no files. One tensor at a time is in memory.

The full size has CLIP's own vocabulary; for the golden tests' small ones it is made up.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout, without installing

Config = dict[str, Any]
Shape = tuple[int, ...]

WEIGHT_FILES = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}

SD15: dict[str, Config] = {
    "text_encoder": {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0",
        "vocab_size": 49408,
    },
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "scheduler": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
}

# ---- random tensors

TILE = 2_097_143  # entries drawn per tensor; a prime, so that no two rows of a larger, tiled tensor are equal


def random_tensor(name: str, shape: Shape, seed: int = 0) -> np.ndarray:
    """Return the random weight of that name: float32, the same on every machine and with every NumPy.

    Matrices and convolutions are N(0, 1 / fan_in), norm weights 1 + 0.1 N, biases 0.1 N, embeddings 0.5 N.
    """
    size = math.prod(shape)
    tile = np.random.RandomState(zlib.crc32(name.encode()) ^ seed).standard_normal(min(size, TILE))
    if name.endswith("embedding.weight"):
        tile *= 0.5
    elif len(shape) > 1:
        tile *= math.prod(shape[1:]) ** -0.5
    else:
        tile *= 0.1
        if name.endswith(".weight"):
            tile += 1.0
    return np.resize(tile.astype(np.float32), shape)


def random_noise(name: str, shape: Shape) -> np.ndarray:
    """Return unit noise that depends only on the name: the inputs of the golden tests. float32."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


# ---- safetensors, streamed


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Return finite float32 values rounded to the nearest bfloat16 (ties to even), as uint16 bits."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


ENCODERS: dict[str, tuple[str, int, Callable[[np.ndarray], np.ndarray]]] = {
    "f32": ("F32", 4, lambda x: x.astype("<f4", copy=False)),
    "f16": ("F16", 2, lambda x: x.astype("<f2")),
    "bf16": ("BF16", 2, to_bfloat16),
}


def write_safetensors(path: Path, names: dict[str, tuple[str, Shape]], dtype: str, seed: int = 0) -> None:
    """Write random tensors one after the other, after a header that is written first.

    Parameters
    ----------
    path : Path
        The file to write.
    names : dict
        Stored name -> (name that decides the values, shape), in the file's order. ``position_ids`` are 0, 1, ...
    dtype : {"f32", "f16", "bf16"}
        How the values are stored.
    seed : int
        Other seeds give other weights.
    """
    code, itemsize, encode = ENCODERS[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for stored, (_, shape) in names.items():
        integer = stored.endswith("position_ids")
        begin, end = end, end + math.prod(shape) * (8 if integer else itemsize)
        header[stored] = {"dtype": "I64" if integer else code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for stored, (name, shape) in names.items():
            if stored.endswith("position_ids"):
                file.write(np.arange(math.prod(shape), dtype="<i8").data)
            else:
                file.write(encode(random_tensor(name, shape, seed)).data)


# ---- the networks' tensors


def network_shapes(component: str, config: Config) -> dict[str, Shape]:
    """Name -> shape of every tensor that our network of this config takes."""
    # Imported here, since the golden script uses the rest of this module where Numba is not installed.
    from sd_numba.checkpoints.weights import ShapeRecorder  # noqa: PLC0415
    from sd_numba.networks.clip import TextEncoder, TextEncoderConfig  # noqa: PLC0415
    from sd_numba.networks.unet import UNet, UNetConfig  # noqa: PLC0415
    from sd_numba.networks.vae import Vae, VaeConfig  # noqa: PLC0415

    recorder: Any = ShapeRecorder()
    if component == "text_encoder":
        TextEncoder(recorder, TextEncoderConfig.from_dict(config))
    elif component == "unet":
        UNet(recorder, UNetConfig.from_dict(config))
    else:
        Vae(recorder, VaeConfig.from_dict(config))
    return recorder.shapes


OLD_VAE_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def stored_names(component: str, shapes: dict[str, Shape], old_names: bool) -> dict[str, tuple[str, Shape]]:
    """Stored name -> (canonical name, shape), in alphabetical order as safetensors files have it.

    With `old_names` as in the published SD 1.5: the VAE's attention is called query, key, value, proj_attn, and
    the text encoder keeps its ``position_ids``.
    """
    names = {name: (name, shape) for name, shape in shapes.items()}
    if old_names and component == "text_encoder":
        tokens = shapes["text_model.embeddings.position_embedding.weight"][0]
        names["text_model.embeddings.position_ids"] = ("", (1, tokens))
    if old_names and component == "vae":
        for name in shapes:
            for new, old in OLD_VAE_NAMES.items():
                if new in name:
                    names[name.replace(new, old)] = names.pop(name)
    return dict(sorted(names.items()))


# ---- the tokenizer

SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
CLIP_SIZE = 49408
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"  # English letters, the commonest first


def byte_characters() -> list[str]:
    """Return the printable character that stands for each byte in byte-level BPE, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def made_up_merges() -> Iterator[tuple[str, str]]:
    """Yield all pairs of letters, then all triples, then quadruples; each also at the end of a word."""
    pieces: list[str] = list(LETTERS)
    while True:
        for left in pieces:
            for right in LETTERS:
                yield left, right
                yield left, right + "</w>"
        pieces = [left + right for left in pieces for right in LETTERS]


def write_tokenizer(folder: Path, size: int, pad_token: str = SPECIAL_TOKENS[1]) -> None:
    """Write a byte-level BPE tokenizer of `size` entries; that of CLIP if it has as many.

    As in CLIP: 256 bytes, 256 bytes that end a word, the merges, start, end.
    """
    if size == CLIP_SIZE:
        from sd_numba.prompts.tokenizer import Tokenizer  # noqa: PLC0415

        Tokenizer.clip(pad_token).save(folder)
        return
    characters = byte_characters()
    merges = list(islice(made_up_merges(), size - 2 * 256 - 2))
    tokens = characters + [c + "</w>" for c in characters] + [left + right for left, right in merges]
    vocab = {token: i for i, token in enumerate([*tokens, *SPECIAL_TOKENS])}
    if len(vocab) != size:
        raise ValueError(f"the vocabulary has {len(vocab)} different entries, expected {size}")
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    start, end = SPECIAL_TOKENS
    special = {"bos_token": start, "eos_token": end, "pad_token": pad_token, "unk_token": end}
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", settings | special)


# ---- the folder


def write_json(path: Path, value: Config) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def model_index(scheduler_class: str) -> Config:
    """``model_index.json`` of a pipeline without safety checker."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def write_model(
    folder: Path,
    configs: dict[str, Config],
    dtype: str = "f32",
    seed: int = 0,
    *,
    pad_token: str = SPECIAL_TOKENS[1],
    old_names: bool = False,
) -> None:
    """Write a diffusers folder with random weights; it gets its final name only when complete.

    Parameters
    ----------
    folder : Path
        Must not exist yet.
    configs : dict
        The config files of "text_encoder", "unet", "vae" and "scheduler".
    dtype : {"f32", "f16", "bf16"}
        How the weights are stored.
    seed : int
        Other seeds give other weights.
    pad_token : str
        The tokenizer's: "<|endoftext|>" in SD 1.x, "!" (id 0) in SD 2.x.
    old_names : bool
        Tensor names as in the published SD 1.5 instead of those of today.
    """
    folder = folder.absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        write_json(unfinished / "model_index.json", model_index(configs["scheduler"]["_class_name"]))
        (unfinished / "scheduler").mkdir()
        write_json(unfinished / "scheduler" / "scheduler_config.json", configs["scheduler"])
        write_tokenizer(unfinished / "tokenizer", configs["text_encoder"]["vocab_size"], pad_token)
        for component, file in WEIGHT_FILES.items():
            (unfinished / component).mkdir()
            write_json(unfinished / component / "config.json", configs[component])
            names = stored_names(component, network_shapes(component, configs[component]), old_names)
            write_safetensors(unfinished / component / file, names, dtype, seed)
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a full-size Stable Diffusion 1.5 folder with random weights.")
    parser.add_argument("folder", type=Path, help="where to write it; must not exist")
    parser.add_argument("--dtype", choices=sorted(ENCODERS), default="f32", help="how the weights are stored")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other weights")
    arguments = parser.parse_args()
    try:
        write_model(
            arguments.folder,
            SD15,
            arguments.dtype,
            arguments.seed,
            old_names=True,
        )
    except OSError as error:
        sys.exit(f"make_random_model: {error}")
    size = sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file())
    print(f"{arguments.folder}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
