"""Compare bf16 and int8 with float32: pictures of the embedded model, and networks of a full-size one.

    python -m bench.compare_precisions [FOLDER] [--model MODEL] [--count 50] [--strips DIR] [--picture FILE] [--write]

MODEL, by default the embedded one, draws the first 50 prompts of the embedded model's list, each with its default
settings and the same seed in every precision; the measure is the PSNR (peak 1) to the picture in float32. A judge looks
for pictures that show something else: each must be nearest (RMS) to the float32 picture of its own prompt among those
of all prompts, and the object, which is what differs from the median colour of the border, must keep its mean colour
and its area. Pictures that fail, or are below 30 dB, are listed, and written into DIR, float32 on the left, for a
person to judge.

FOLDER is a model of any size, such as one of `bench/make_random_model.py`: its UNet makes passes with guidance (one
sample, two contexts) at three timesteps, compared by relative RMS, and both models' autoencoders decode random latents.

A Markdown section goes to stdout; ``--write`` also puts it into ``bench/RESULTS.md``. FILE shows the first four
prompts, a row for each precision. The exit code is 1 if a limit is missed, or a picture is nearest to that of another
prompt.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bench.quality import psnr
from bench.results import RESULTS, circumstances, command, write
from sd_numba import StableDiffusionPipeline, kernels
from sd_numba.checkpoints.opening import embedded_model_path
from sd_numba.pictures.arrays import to_pil

LEAST_PSNR = {"bf16": 35.0, "int8": 28.0}  # dB, of the median over the prompts
MOST_RMS = {"bf16": 1e-2, "int8": 4e-2}  # relative, of a pass of the UNet
SEED = 0
TIMESTEPS = (900, 500, 100)
GUIDANCE = 7.5
STANDS_OUT = 0.1  # of the range, in any channel: pixels that differ more from the border's colour are the object
COLOUR, AREA = 0.02, 0.01  # tolerances of the judge: of the range in each channel, of the picture
LOOK_BELOW = 30.0  # dB: a person should look at these
WORST = 5  # prompts named
SHOWN = 4  # prompts in the picture
ENLARGED = 4


@dataclass(frozen=True)
class Judged:
    """A picture compared with float32: its distance from its own prompt's, and the prompt whose picture is nearest."""

    prompt: str
    psnr: float
    nearest: str
    colour: float
    area: float

    @property
    def faults(self) -> list[str]:
        found = [f"nearest to {self.nearest!r}"] * (self.nearest != self.prompt)
        found += [f"the object's colour is off by {self.colour:.3f}"] * (not self.colour <= COLOUR)
        found += [f"the object's area is off by {self.area:.3f} of the picture"] * (not self.area <= AREA)
        return found

    @property
    def doubtful(self) -> bool:
        return bool(self.faults) or self.psnr < LOOK_BELOW


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def find_object(picture: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the mean colour of what stands out from the border of a picture (h, w, 3), and its share of the area."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    background = np.median(border, axis=0)
    mask = np.abs(picture - background).max(axis=2) > STANDS_OUT
    return picture[mask].mean(axis=0) if mask.any() else background, float(mask.mean())


def judge(prompts: list[str], found: np.ndarray, expected: np.ndarray) -> list[Judged]:
    """Compare pictures (b, h, w, 3) with those in float32."""
    judged = []
    for prompt, picture, own in zip(prompts, found, expected, strict=True):
        nearest = int(np.square(expected - picture).mean(axis=(1, 2, 3)).argmin())
        (colour, area), (own_colour, own_area) = find_object(picture), find_object(own)
        off = float(np.abs(colour - own_colour).max())
        judged.append(Judged(prompt, psnr(picture, own), prompts[nearest], off, abs(area - own_area)))
    return judged


def open_pipeline(model: Path, precision: str) -> StableDiffusionPipeline:
    print(f"{model.name} in {precision}", file=sys.stderr)
    return StableDiffusionPipeline.from_pretrained(model, precision=precision, vae_tiling="off")


def normal_latents(pipe: StableDiffusionPipeline) -> np.ndarray:
    """Return normally distributed latents (1, 4, h, w) of the size that the model was made for."""
    height, width = (side // pipe.vae.factor for side in pipe.default_size)
    shape = (1, pipe.unet.config.in_channels, height, width)
    return np.random.default_rng(SEED).standard_normal(shape, np.float32)


def passes(pipe: StableDiffusionPipeline) -> list[np.ndarray]:
    """Return the UNet's output at each timestep, (2, 4, h, w): without the prompt, and with it."""
    context = pipe.unet.encode_context(pipe.text_encoder(pipe.tokenizer(["", "a cat on a beach"])))
    return [pipe.unet(normal_latents(pipe), timestep, context) for timestep in TIMESTEPS]


def guided(output: np.ndarray) -> np.ndarray:
    away, towards = output
    return away + np.float32(GUIDANCE) * (towards - away)


def save_picture(path: Path, pictures: dict[str, np.ndarray]) -> None:
    """Write the first pictures, a row for each precision."""
    rows = [np.concatenate(list(some[:SHOWN]), axis=1) for some in pictures.values()]
    grid = to_pil(np.concatenate(rows)[None])[0]
    grid.save(path, quality=95, subsampling=0, optimize=True)  # so that JPEG adds no visible differences


def save_strips(folder: Path, precision: str, judged: list[Judged], found: np.ndarray, expected: np.ndarray) -> None:
    """Write the doubtful pictures, those in float32 on the left, enlarged."""
    for j, picture, own in zip(judged, found, expected, strict=True):
        if j.doubtful:
            folder.mkdir(parents=True, exist_ok=True)
            strip = to_pil(np.concatenate([own, picture], axis=1)[None])[0]
            strip = strip.resize((ENLARGED * strip.width, ENLARGED * strip.height), Image.Resampling.NEAREST)
            strip.save(folder / f"{precision}-{re.sub(r'[^a-zA-Z0-9]+', '-', j.prompt)}.png")


# ---- parts of the section, each with its failures


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def report_pictures(name: str, judged: dict[str, list[Judged]]) -> tuple[str, list[str]]:
    rows, notes, wrong = [], [], []
    for precision, pictures in judged.items():
        values, limit = [j.psnr for j in pictures], LEAST_PSNR[precision]
        median, tenth = np.median(values), np.percentile(values, 10)
        passed = f"{sum(not j.faults for j in pictures)} of {len(values)}"
        rows.append((precision, *(f"{x:.1f} dB" for x in (median, tenth, min(values), limit)), passed))
        if not median >= limit:
            wrong.append(f"pictures in {precision}: median {median:.1f} dB, at least {limit:.0f} wanted")
        wrong += [f"{j.prompt!r} in {precision} is nearest to {j.nearest!r}" for j in pictures if j.nearest != j.prompt]
        worst = sorted(pictures, key=lambda j: j.psnr)[:WORST]
        notes.append(f"Lowest in {precision}: {', '.join(f'{j.prompt} ({j.psnr:.1f})' for j in worst)}.\n")
        doubtful = [f"- {j.prompt}: {'; '.join([f'{j.psnr:.1f} dB', *j.faults])}" for j in pictures if j.doubtful]
        notes += [f"Doubtful in {precision}:\n", *doubtful, ""] if doubtful else []
    head = ("precision", "median", "10th percentile", "lowest", "limit of the median", "pass the judge")
    text = f"""### Pictures of {name}

PSNR to the picture in float32; default settings, seed {SEED}. To pass the judge, a picture must be nearest to the
float32 picture of its own prompt, with the object's mean colour within {COLOUR} of the range in each channel, and its
area within {AREA:.0%} of the picture. Those that do not, or are below {LOOK_BELOW:.0f} dB, are listed as doubtful.

{table(head, rows)}
"""
    return "\n".join([text, *notes]).rstrip(), wrong


def report_unet(name: str, outputs: dict[str, list[np.ndarray]]) -> tuple[str, list[str]]:
    expected, rows, wrong = outputs["f32"], [], []
    for precision in list(outputs)[1:]:
        limit, cells = MOST_RMS[precision], []
        for timestep, output, exact in zip(TIMESTEPS, outputs[precision], expected, strict=True):
            error = relative_rms(output, exact)
            cells.append(f"{error:.1e} ({relative_rms(guided(output), guided(exact)):.1e})")
            if not error <= limit:
                wrong.append(f"UNet in {precision} at {timestep}: {error:.1e}, at most {limit:.0e} wanted")
        rows.append((precision, *cells, f"{limit:.0e}"))
    text = f"""### A pass of the UNet of {name}

RMS of the difference to float32, relative to that of the output (one sample, two contexts); in brackets that of both
halves put together with guidance {GUIDANCE}.

{table(("precision", *(f"timestep {t}" for t in TIMESTEPS), "limit"), rows)}"""
    return text, wrong


def report_decoders(values: dict[str, float]) -> tuple[str, list[str]]:
    limit = LEAST_PSNR["bf16"]
    wrong = [
        f"decoder of {name}: {x:.1f} dB, at least {limit:.0f} wanted" for name, x in values.items() if not x >= limit
    ]
    found = ", ".join(f"{x:.1f} dB for {name}" for name, x in values.items())
    return f"### Decoders in bf16\n\nPSNR to float32, random latents: {found}; at least {limit:.0f} dB wanted.", wrong


def measure(arguments: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Run both models in every precision, write the requested pictures, and yield the parts."""
    prompts = (embedded_model_path() / "prompts.txt").read_text(encoding="utf-8").splitlines()[: arguments.count]
    model, folder = arguments.model, arguments.folder
    pictures, outputs, decoded = {}, {}, {}
    for precision in kernels.precisions():
        pipe = open_pipeline(model, precision)
        pictures[precision] = pipe(prompts, seed=[SEED] * len(prompts), output_type="np").images
        decoded[model, precision] = pipe.decode(normal_latents(pipe))
        if folder:
            pipe = open_pipeline(folder, precision)
            outputs[precision] = passes(pipe)
            decoded[folder, precision] = pipe.decode(normal_latents(pipe))
    judged = {p: judge(prompts, found, pictures["f32"]) for p, found in pictures.items() if p != "f32"}
    if arguments.picture:
        save_picture(arguments.picture, pictures)
    if arguments.strips:
        for precision, some in judged.items():
            save_strips(arguments.strips, precision, some, pictures[precision], pictures["f32"])
    yield report_pictures(f"{len(prompts)} prompts by {model.name}", judged)
    if folder:
        yield report_unet(folder.name, outputs)
    if "bf16" in pictures:
        yield report_decoders({m.name: psnr(decoded[m, "bf16"], decoded[m, "f32"]) for m in (model, folder) if m})


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare what bf16 and int8 compute with float32.")
    parser.add_argument("folder", nargs="?", type=Path, help="a full-size model: its UNet and autoencoder")
    parser.add_argument("--model", type=Path, default=embedded_model_path(), help="draws; by default the embedded one")
    parser.add_argument("--count", type=int, default=50, help="how many of the prompts")
    parser.add_argument("--strips", metavar="DIR", type=Path, help="for the doubtful pictures")
    parser.add_argument("--picture", metavar="FILE", type=Path, help=f"for the first {SHOWN} prompts in all precisions")
    parser.add_argument("--write", action="store_true", help=f"also into {RESULTS.name}")
    arguments = parser.parse_args()
    if len(kernels.precisions()) == 1:
        sys.exit("compare_precisions: this CPU computes in float32 only; run it on one with bf16 or int8 products")
    parts, faults = zip(*measure(arguments), strict=True)
    body = "\n\n".join(parts)
    paths = [path for path in (arguments.folder, arguments.model, arguments.strips, arguments.picture) if path]
    text = f"""## Quality of bf16 and int8

{circumstances(kernels.threads(), ("numpy", "numba"))}

```console
{command("compare_precisions", paths)}
```

{body}"""
    print(text)
    if arguments.write:
        write("compare_precisions", text)
    if wrong := [fault for some in faults for fault in some]:
        sys.exit(f"compare_precisions: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
