"""Twelve pictures by `sd-numba generate`, which together use all that it can do without files from elsewhere.

`tests/test_recorded_pictures.py` makes them again and compares. Only where pictures are meant to change are they
recorded anew, from the repository's root:

    python -m tests.golden.pictures
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image, features
from safetensors.numpy import save_file

from sd_numba import __version__, cli
from sd_numba.kernels.machine.isa import tile

FOLDER = Path(__file__).parent / "pictures"
RECORD = FOLDER / "environment.json"

TINY = ["-W", "64", "-H", "64"]
SAMPLERS = (
    "ddpm", "ddim", "pndm", "euler", "heun", "lms", "dpm++2m", "dpm++2m-sde", "unipc", "lcm", "euler-exponential",
    "heun-karras",
)  # fmt: skip

# Name of a picture -> arguments of `sd-numba generate`. Of several pictures, the contact sheet is the one to keep.
CASES: dict[str, list[str]] = {
    "plain": ["a red apple on a blue background", "-s", "1"],
    "guided": [
        "a purple elephant in the snow", "-n", "a (blue:1.2) background", "--sampler", "euler", "--scheduler", "karras",
        "--cfg-scale", "6", "--clip-skip", "2", "--steps", "6", "-s", "2",
    ],
    "syntax": [
        r"a ((red)) [car:bus:0.5] [big] \(new\) BREAK on a [beach|meadow] [at night::0.6]", "--sampler", "euler-a",
        "--rng", "cuda", "-W", "160", "-H", "96", "--steps", "6", "-s", "3",
    ],
    "variants": [
        "a {red|{big|small} green} apple on a beach", "-b", "3", "--batch-size", "2", "--grid", "variants.png", *TINY,
        "--steps", "5", "-s", "4",
    ],
    "samplers": ["--prompt-file", "samplers.jsonl", "--grid", "samplers.png", *TINY, "--steps", "4", "-s", "5"],
    "redrawn": [
        "a castle in the desert", "-i", "photo.ppm", "--strength", "0.6", "--sampler", "unipc", "--steps", "8",
        "-s", "6",
    ],
    # Only pictures of more than 655,360 pixels are decoded in strips, which takes too long; the text says it anyway.
    "painted": [
        "a yellow tower", "-i", "photo.ppm", "--mask", "mask.pgm", "--vae-tiling", "on", "--sampler", "heun",
        "--steps", "5", "-s", "7",
    ],
    "expanded": [
        "houses in the snow", "-i", "photo.ppm", "--expand", "32,0,18,8", "--strength", "1", "--weights", "mmap",
        "--steps", "5", "-s", "8",
    ],
    "enlarged": [
        "a penguin on a beach", "--hires", "1.5", "--hires-steps", "6", "--hires-strength", "0.5", "--sampler", "ddim",
        "--eta", "0.5", "-W", "96", "-H", "96", "--steps", "5", "-s", "9",
    ],
    "cheap": [
        "a (green:1.5) {frog|hen}", "--prompt-syntax", "plain", "--cfg-interval", "0,0.6", "--cache", "deepcache:2",
        "--tome", "0.5", "--steps", "8", "-s", "10",
    ],
    "adapted": [
        "a glow fox in the city <lora:style:0.3:0.9>", "--lora", "frame:1.5", "--lora-dir", "loras", "--embedding-dir",
        "embeddings", "--steps", "6", "-s", "11",
    ],
    "remade": ["--from", "guided.png", "--steps", "5"],
}  # fmt: skip

# Layers that the LoRAs change, as kohya's scripts and as PEFT name them -> shape of the weight.
STYLE = {
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (192, 192),
    "lora_te_text_model_encoder_layers_3_mlp_fc2": (192, 768),
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (128, 128),
    "lora_unet_up_blocks_1_attentions_1_transformer_blocks_0_ff_net_0_proj": (1024, 128),
    "lora_unet_mid_block_resnets_0_conv1": (160, 160, 3, 3),
}
FRAME = {
    "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": (160, 192),
    "unet.down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_out.0": (160, 160),
}
RANK, ALPHA = 2, 4


def environment() -> dict[str, Any]:
    """What the files depend on beside the code that makes pictures: their pixels on the arithmetic, their bytes on all.

    The row is that of `sd_numba.kernels.machine.isa`; NumPy's own vector instructions change the last bits as well.
    """
    simd = np.show_config(mode="dicts")["SIMD Extensions"]
    return {
        "version": __version__,
        "arithmetic": {"row": tile().name, "numpy": simd.get("found", [])},
        "compression": {name: features.version(name) for name in ("pil", "zlib", "zlib_ng")},
    }


def make_pictures(folder: Path, *options: str) -> dict[str, Result]:
    """Make all pictures, and the files that they need, in a folder; `options` are added to every command."""
    runner, before = CliRunner(), Path.cwd()
    os.chdir(folder)  # paths that are not absolute, since the texts have them
    try:
        _write_pictures()
        _write_prompts()
        _write_additions()
        return {
            name: runner.invoke(cli.main, ["generate", *arguments, "-o", f"{name}.png", *options])
            for name, arguments in CASES.items()
        }
    finally:
        os.chdir(before)


def _write_pictures() -> None:
    """Write a picture to start from and a mask: their bytes, whose hashes are in the texts, are the same everywhere."""
    y, x = np.mgrid[:96, :144]
    photo = np.stack([255 - x, 2 * y, 64 + x // 2 + y // 2], axis=-1)
    photo[(x - 60) ** 2 + (y - 50) ** 2 < 32**2] = 200, 30, 30
    mask = 255 * ((x > 40) & (y > 16))
    for name, picture in (("photo.ppm", photo), ("mask.pgm", mask)):
        Image.fromarray(picture.astype(np.uint8)).save(name)


def _write_prompts() -> None:
    lines = [json.dumps({"prompt": "a red apple", "sampler": sampler}) for sampler in SAMPLERS]
    Path("samplers.jsonl").write_text("\n".join(lines))


def _write_additions() -> None:
    """Write two LoRAs and an embedding."""
    style, frame = {}, {}
    for seed, (module, (n, *rest)) in enumerate(STYLE.items()):
        style[f"{module}.lora_up.weight"] = _numbers(seed, n, RANK, *(1 for _ in rest[1:]))
        style[f"{module}.lora_down.weight"] = _numbers(seed + 100, RANK, *rest)
        style[f"{module}.alpha"] = np.array(ALPHA, np.float32)
    for seed, (module, (n, *rest)) in enumerate(FRAME.items()):
        frame[f"{module}.lora_B.weight"] = _numbers(seed + 200, n, RANK)
        frame[f"{module}.lora_A.weight"] = _numbers(seed + 300, RANK, *rest)
    for path, tensors in (
        ("loras/style.safetensors", style),
        ("loras/frame.safetensors", frame),
        ("embeddings/glow.safetensors", {"emb_params": _numbers(400, 2, 192)}),
    ):
        Path(path).parent.mkdir(exist_ok=True)
        save_file(tensors, path)


def _numbers(seed: int, *shape: int) -> np.ndarray:
    """Numbers from -1/8 to 1/8, of raw bits, since NumPy keeps those of a seed the same in all its versions."""
    bits = np.random.PCG64(seed).random_raw(math.prod(shape))
    return ((bits >> np.uint64(40)).astype(np.float32) / 2**26 - 0.125).reshape(shape)


def main() -> None:
    """Record the pictures, and what they were made with."""
    with TemporaryDirectory() as folder:
        for name, result in make_pictures(Path(folder), "-t", "2").items():
            assert result.exit_code == 0, f"{name}: {result.output}"
            shutil.copy(Path(folder, f"{name}.png"), FOLDER)
    RECORD.write_text(json.dumps(environment(), indent=2) + "\n")


if __name__ == "__main__":
    main()
