"""Ask diffusers what the tensors of a single-file checkpoint are called in its own layout: ``single_file.txt.gz``.

For developers only; the test needs neither diffusers nor torch. From the repository's root, in an environment as for
``make_golden.py``:

    python tests/golden/make_names.py

A line holds the model (1 or 2), the component, the name in the single file, and what becomes of it: diffusers' name, or
three for the joint projections of OpenCLIP's attention.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.golden.cases import GOLDEN, SINGLE_FILES  # noqa: E402
from tests.test_single_file import single_shapes  # noqa: E402


def tagged(number: int, shape: tuple[int, ...], joint: bool) -> torch.Tensor:
    """A tensor of that shape that tells which it is, and which third of its rows."""
    if not joint:
        return torch.tensor(float(number)).expand(shape)
    part = (shape[0] // 3, *shape[1:])
    return torch.cat([torch.tensor(number + i / 4).expand(part) for i in range(3)])


def main() -> None:
    """Write the golden file."""
    lines = []
    for family, configs in SINGLE_FILES.items():
        shapes = single_shapes(configs)
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
    with gzip.GzipFile(GOLDEN / "single_file.txt.gz", "wb", mtime=0) as file:
        file.write("\n".join(sorted(lines)).encode())
    print(len(lines), "names")


if __name__ == "__main__":
    main()
