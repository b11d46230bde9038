"""Ask diffusers what the tensors of other programs' files are called in its own layout.

For developers only; the test needs neither diffusers nor torch. From the repository's root, in an environment as for
``make_golden.py``:

    python tests/golden/make_names.py

``single_file.txt.gz``: a line holds the model (1 or 2), the component, the name in a single-file checkpoint, and what
becomes of it: diffusers' name, or three for the joint projections of OpenCLIP's attention.

``lora.txt.gz``: the name of a matrix in a LoRA of kohya's scripts for Stable Diffusion 1.5, and diffusers' name for it.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sd_numba.checkpoints.opening import expected_shapes  # noqa: E402
from tests.families.test_names import single_shapes  # noqa: E402
from tests.golden.cases import GOLDEN, SINGLE_FILES  # noqa: E402


def tagged(number: int, shape: tuple[int, ...], joint: bool) -> torch.Tensor:
    """A tensor of that shape that tells which it is, and which third of its rows."""
    if not joint:
        return torch.tensor(float(number)).expand(shape)
    part = (shape[0] // 3, *shape[1:])
    return torch.cat([torch.tensor(number + i / 4).expand(part) for i in range(3)])


def write(name: str, lines: list[str]) -> None:
    """Write a golden file."""
    with gzip.GzipFile(GOLDEN / name, "wb", mtime=0) as file:
        file.write("\n".join(sorted(lines)).encode())
    print(name, len(lines), "names")


def make_lora() -> None:
    """Write the names of the two matrices of all layers that kohya's scripts train, LoCon's included."""
    lines = []
    for component, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        for name, shape in expected_shapes(component, SINGLE_FILES["1"][component]).items():
            module = name.removesuffix(".weight")
            trained = "attentions" in name or "resnets" in name or "samplers" in name or "encoder.layers" in name
            if module == name or len(shape) < 2 or not trained:
                continue
            keys = [f"{prefix}{module.replace('.', '_')}.lora_{matrix}.weight" for matrix in ("down", "up")]
            matrices = {key: torch.tensor([i]) for i, key in enumerate(keys)}
            converted, _ = _convert_non_diffusers_lora_to_diffusers(dict(matrices))
            lines += [f"{keys[int(tensor)]}\t{new}" for new, tensor in converted.items()]
    write("lora.txt.gz", lines)


def make_single_file() -> None:
    """Write the names of single-file checkpoints."""
    lines = []
    for family, configs in SINGLE_FILES.items():
        shapes = single_shapes(family)
        names = list(shapes)
        tensors = {name: tagged(i, shapes[name], "in_proj" in name) for i, name in enumerate(names)}
        text: Any = SimpleNamespace(config=SimpleNamespace(hidden_size=configs["text_encoder"]["hidden_size"]))
        converted = {
            "unet": convert_ldm_unet_checkpoint(dict(tensors), configs["unet"]),
            "vae": convert_ldm_vae_checkpoint(dict(tensors), configs["vae"]),
            "text_encoder": convert_open_clip_checkpoint(text, dict(tensors))
            if family == "2"
            else convert_ldm_clip_checkpoint(dict(tensors)),
        }
        for component, result in converted.items():
            origins: dict[str, dict[float, str]] = {}
            for new, tensor in result.items():
                tag = float(tensor.flatten()[0])
                origins.setdefault(names[int(tag)], {})[tag] = new
            for old, found in origins.items():
                lines.append("\t".join([family, component, old, *(found[tag] for tag in sorted(found))]))
    write("single_file.txt.gz", lines)


if __name__ == "__main__":
    make_single_file()
    make_lora()
