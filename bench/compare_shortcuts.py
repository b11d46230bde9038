"""Measure what `--cfg-interval`, `--cache` and `--tome` cost in quality and save in time.

    python -m bench.compare_shortcuts [FOLDER] [--count 50] [--write]

The embedded model draws the first 50 prompts of its list with its default settings and the same seed, in full and with
each shortcut; the measures are the PSNR (peak 1) and the structural similarity to the full run's picture.

FOLDER is a full-size model, such as one of `bench/make_random_model.py`. All settings make a picture of it at the same
time, a step each in turn, after a step that is not counted, and then again; the table has the seconds of a whole run,
the lesser of the two for each step, without text and decoding.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.quality import psnr, ssim
from bench.results import RESULTS, circumstances, command, write
from sd_numba import StableDiffusionPipeline, kernels
from sd_numba.checkpoints.opening import embedded_model_path

SHORTCUTS: dict[str, dict[str, Any]] = {
    "--cfg-interval 0,0.8": {"cfg_interval": (0, 0.8)},
    "--cfg-interval 0,0.6": {"cfg_interval": (0, 0.6)},
    "--cfg-interval 0.2,0.8": {"cfg_interval": (0.2, 0.8)},
    "--cache deepcache:2": {"cache": "deepcache:2"},
    "--cache deepcache:3": {"cache": "deepcache:3"},
    "--cache deepcache:5": {"cache": "deepcache:5"},
    "--tome 0.25": {"tome": 0.25},
    "--tome 0.5": {"tome": 0.5},
    "--cache deepcache:2 --cfg-interval 0,0.8": {"cache": "deepcache:2", "cfg_interval": (0, 0.8)},
}
LARGE = {"--tome 0.5": {"tome": 0.5}}  # also timed at the larger size
SEED, BATCH = 0, 10
STEPS, SIZE = 10, 512  # of the runs that are timed
LARGE_STEPS, LARGE_SIZE = 3, 768
TURNS = 2


def draw(pipe: StableDiffusionPipeline, prompts: list[str], name: str, **options: Any) -> np.ndarray:
    """Return pictures (b, h, w, 3) of all prompts."""
    print(name, file=sys.stderr)
    parts = [prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH)]
    seeds = [[SEED] * len(part) for part in parts]
    return np.concatenate(
        [pipe(part, seed=seed, output_type="np", **options).images for part, seed in zip(parts, seeds, strict=True)]
    )


def compare(prompts: list[str]) -> str:
    """Return the table of qualities."""
    pipe = StableDiffusionPipeline.from_pretrained()
    full = draw(pipe, prompts, "full")
    rows = []
    for name, options in SHORTCUTS.items():
        found = draw(pipe, prompts, name, **options)
        noise = [psnr(a, b) for a, b in zip(found, full, strict=True)]
        alike = [ssim(a, b) for a, b in zip(found, full, strict=True)]
        rows.append(
            f"| `{name}` | {statistics.median(noise):.1f} | {min(noise):.1f} | {statistics.median(alike):.3f} "
            f"| {min(alike):.3f} |"
        )
    return "\n".join(
        [
            f"Pictures of {len(prompts)} prompts by the embedded model, in its "
            f"{pipe.defaults['num_inference_steps']} steps, against the full run:",
            "",
            "| | median PSNR, dB | lowest | median SSIM | lowest |",
            "| --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def time_runs(pipe: StableDiffusionPipeline, settings: dict[str, dict[str, Any]], size: int, steps: int) -> str:
    """Return the table of times; the runs take turns, a step at a time."""
    shared = {"width": size, "height": size, "num_inference_steps": steps, "guidance_scale": 7.5, "scheduler": "euler"}
    settings = {"in full": {}, **settings}
    next(pipe.generate("a cat", seed=SEED, **shared))  # reads the weights
    least = {name: [float("inf")] * steps for name in settings}
    for turn in range(TURNS):
        runs = {name: pipe.generate("a cat", seed=SEED, **shared, **options) for name, options in settings.items()}
        for number in range(steps):
            print(f"{size} pixels, turn {turn + 1} of {TURNS}, step {number + 1} of {steps}", file=sys.stderr)
            for name, run in runs.items():
                least[name][number] = min(least[name][number], next(run).seconds)
    seconds = {name: sum(times) for name, times in least.items()}
    full = seconds["in full"]
    return "\n".join(
        [
            f"A run of {steps} steps with guidance at {size}x{size}, full-size Stable Diffusion 1.5:",
            "",
            "| | s/it | relative |",
            "| --- | --- | --- |",
            *(f"| {name if name == 'in full' else f'`{name}`'} | {total / steps:.2f} | {total / full:.2f} |"
              for name, total in seconds.items()),
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="What shortcuts cost in quality, and save in time.")
    parser.add_argument("folder", nargs="?", type=Path, help="a full-size model, whose steps are timed")
    parser.add_argument("--count", type=int, default=50, help="how many of the prompts")
    parser.add_argument("--write", action="store_true", help=f"also into {RESULTS.name}")
    arguments = parser.parse_args()
    prompts = (embedded_model_path() / "prompts.txt").read_text(encoding="utf-8").splitlines()[: arguments.count]
    parts = [compare(prompts)]
    if arguments.folder is not None:
        pipe = StableDiffusionPipeline.from_pretrained(arguments.folder, weights="mmap")
        parts.append(time_runs(pipe, SHORTCUTS, SIZE, STEPS))
        parts.append(time_runs(pipe, LARGE, LARGE_SIZE, LARGE_STEPS))
    paths = [path for path in (arguments.folder,) if path]
    body = "\n\n".join(parts)
    text = f"""## Cheaper by choice

{circumstances(kernels.threads(), ("numpy", "numba"))}

```console
{command("compare_shortcuts", paths)}
```

{body}"""
    print(text)
    if arguments.write:
        write("compare_shortcuts", text)


if __name__ == "__main__":
    main()
