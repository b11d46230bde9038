"""``sd-numba generate``: from a prompt to a PNG file."""

from __future__ import annotations

import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np

import kernels
from kernels.peak import measure_peak

from .. import __version__, profiler
from ..arguments import resolve_seeds
from ..errors import InputError
from ..metadata import Parameters, check_output, model_hash, sampler_title, save_png
from ..pipeline import PRECISIONS, PRODUCTS, TILINGS, WEIGHT_POLICIES, StableDiffusionPipeline, to_pil
from ..samplers import SAMPLER_NAMES
from .additions import load_embeddings, load_loras
from .common import ANY_PATH, EXAMPLE, threads_option, warm_up

SPACINGS = ("normal", "karras", "exponential")
NO_PROMPT = f"""found no prompt; say what to draw, for example:

  {EXAMPLE}
  sd-numba generate "a penguin holding an ice cream cone in the snow"
  sd-numba generate "three strawberries, twemoji style" --seed 7 -o strawberries.png

The model that comes with sd-numba draws things that have an emoji, in colours, numbers, places, scenes and styles.
Others draw anything: see "sd-numba download --help". "sd-numba generate --help" lists the options."""
MAX_BATCH = 10_000  # far more than anyone waits for, far fewer than would exhaust memory


@click.command()
@click.argument("prompt", required=False)
@click.option("-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt, instead of the argument.")
@click.option("-n", "--negative-prompt", default="", metavar="TEXT", help="What to steer away from.")
@click.option(
    "-m", "--model", type=ANY_PATH,
    help="Folder in diffusers layout, .safetensors file, or id of a downloaded model.  [default: embedded model]",
)  # fmt: skip
@click.option("--vae", type=ANY_PATH, help="Another VAE than the model's own: a .safetensors file or a folder.")
@click.option("--taesd", type=ANY_PATH, help="File or folder of a tiny autoencoder: decodes in a fraction of the time.")
@click.option(
    "--lora", "loras", multiple=True, metavar="FILE[:WEIGHT]",
    help="A LoRA or LoCon (.safetensors); may be given several times.",
)  # fmt: skip
@click.option(
    "--lora-dir",
    "--lora-model-dir",
    type=ANY_PATH,
    help="Folder of the LoRAs that <lora:NAME:WEIGHT> in prompts means.",
)
@click.option(
    "--embedding-dir", "--embd-dir", type=ANY_PATH,
    help="Folder of textual inversion embeddings; the name of a file in a prompt stands for it.",
)  # fmt: skip
@click.option("-o", "--output", default="output.png", show_default=True, help="File; may hold {seed} or %03d.")
@click.option("--steps", type=int, help="Sampling steps.  [default: the model's own, or 20]")
@click.option(
    "--cfg-scale", "--guidance-scale", "scale", type=float,
    help="Guidance; 1 is none.  [default: the model's own, or 7.5]",
)  # fmt: skip
@click.option("-s", "--seed", default=-1, show_default=True, help="Number of the noise; negative: a random one.")
@click.option("-W", "--width", type=int, help="Pixels.  [default: the model's own]")
@click.option("-H", "--height", type=int, help="Pixels.  [default: the model's own]")
@click.option(
    "--sampler", "--sampling-method", "sampler", metavar="NAME",
    help=f"{', '.join(name for name in SAMPLER_NAMES if not name.endswith(SPACINGS))}.  [default: the model's own]",
)  # fmt: skip
@click.option(
    "--scheduler", "spacing", type=click.Choice(SPACINGS), default="normal", show_default=True,
    help="Spacing of the noise levels; normal: what the sampler's name or the model says.",
)  # fmt: skip
@click.option("--eta", default=0.0, show_default=True, help="Noise that ddim adds: 0 none, 1 as much as ddpm.")
@click.option("-b", "--batch-count", default=1, show_default=True, help="Pictures, with seeds counted on.")
@click.option(
    "--rng", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Noise of a seed as torch makes it on the CPU, or as AUTOMATIC1111 on a GPU.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="f32", show_default=True,
    help="Of products: bf16 and int8 are faster and a little less exact; auto: the fastest for model and CPU.",
)  # fmt: skip
@click.option(
    "--weights", type=click.Choice(WEIGHT_POLICIES), default="auto", show_default=True,
    help="Keep packed copies of the weights in memory (faster), or not; auto packs small networks.",
)  # fmt: skip
@click.option(
    "--vae-tiling", type=click.Choice(TILINGS), default="auto", show_default=True,
    help="Decode large pictures in strips, in a third of the memory; auto: if memory would be short.",
)  # fmt: skip
@threads_option
@click.option("--no-metadata", is_flag=True, help="Do not say in the PNG how it was made.")
@click.option("--profile", is_flag=True, help="Time, GFLOP and share of the peak of each kind of layer.")
@click.option("-v", "--verbose", is_flag=True, help="Seconds of each stage.")
def generate(prompt: str | None, prompt_option: str | None, **options: Any) -> None:
    """Make a picture from PROMPT and write it as PNG.

    Example: sd-numba generate "a red apple on a blue background" --steps 20 --seed 42 -o apple.png
    """
    if prompt is not None and prompt_option is not None:
        raise click.UsageError("found two prompts, as an argument and with -p; expected one")
    prompt = prompt if prompt is not None else prompt_option
    if prompt is None:
        raise click.UsageError(NO_PROMPT)
    kernels.set_threads(options["threads"])
    count = options["batch_count"]
    if not 1 <= count <= MAX_BATCH:
        raise InputError(f"batch-count: found {count}, expected a whole number from 1 to {MAX_BATCH}")
    seeds = resolve_seeds(options["seed"], count)
    paths = output_paths(options["output"], seeds)
    for path in paths:
        check_output(path)
    start = time.perf_counter()
    pipe = StableDiffusionPipeline.open(
        options["model"], precision=options["precision"], vae=options["vae"], taesd=options["taesd"]
    )
    pipe.vae_tiling = options["vae_tiling"]
    text, noted = load_loras(pipe, options["loras"], options["lora_dir"], prompt)
    load_embeddings(pipe, options["embedding_dir"], text, options["negative_prompt"])
    stages = {"load": time.perf_counter() - start}
    options["steps"] = options["steps"] if options["steps"] is not None else pipe.defaults["num_inference_steps"]
    options["scale"] = options["scale"] if options["scale"] is not None else pipe.defaults["guidance_scale"]
    name = _spaced(pipe.scheduler_name(options["sampler"]), options["spacing"])
    _request(pipe, text, seeds[0], name, options)  # for its errors, before kernels compile; it computes nothing
    _say_what_is_cut(pipe, "prompt", text)
    _say_what_is_cut(pipe, "negative prompt", options["negative_prompt"])
    _warn_about_size(options["width"], options["height"])
    warm_up(*PRODUCTS[pipe.precision])
    start = time.perf_counter()
    pipe.prepare(options["weights"])
    stages["load"] += time.perf_counter() - start
    for seed, path in zip(seeds, paths, strict=True):
        counting: Any = profiler.profile() if options["profile"] else nullcontext({})
        with kernels.reuse(), counting as rows:
            images = _draw(pipe, _request(pipe, text, seed, name, options), options["steps"], stages)
        start = time.perf_counter()
        metadata = None if options["no_metadata"] else _metadata(pipe, noted, seed, name, images, options)
        save_png(path, to_pil(images)[0], metadata)
        stages["save"] = stages.get("save", 0.0) + time.perf_counter() - start
        click.echo(f"{path}  (seed {seed})")
        if options["profile"]:
            click.echo(profiler.table(rows, measure_peak()), err=True)
    if options["verbose"]:
        for stage, seconds in stages.items():
            click.echo(f"{stage:<12}{seconds:8.2f} s", err=True)


def _request(pipe: StableDiffusionPipeline, prompt: str, seed: int, sampler: str, options: dict[str, Any]) -> Any:
    return pipe.generate(
        prompt,
        negative_prompt=options["negative_prompt"],
        width=options["width"],
        height=options["height"],
        num_inference_steps=options["steps"],
        guidance_scale=options["scale"],
        seed=seed,
        scheduler=sampler,
        eta=options["eta"],
        rng=options["rng"],
    )


def _spaced(sampler: str, spacing: str) -> str:
    """Name the sampler with this spacing of its noise levels."""
    if spacing == "normal" or sampler.endswith(f"-{spacing}"):
        return sampler
    if f"{sampler}-{spacing}" not in SAMPLER_NAMES:
        able = [name.removesuffix(f"-{spacing}") for name in SAMPLER_NAMES if name.endswith(f"-{spacing}")]
        raise InputError(
            f"scheduler: found {spacing} for sampler {sampler}, expected one of the samplers {', '.join(able)}"
        )
    return f"{sampler}-{spacing}"


def _draw(pipe: StableDiffusionPipeline, steps: Any, expected: int, stages: dict[str, float]) -> np.ndarray:
    """Run the steps under a progress bar and decode the result; adds to the seconds of each stage.

    Some samplers call the network more than once a step, so the `expected` length of the bar is corrected by the first.
    """
    start = time.perf_counter()
    sampling = 0.0
    bar: Any
    with click.progressbar(
        length=expected, label="sampling", file=sys.stderr, show_pos=True, show_eta=False, item_show_func=_pace
    ) as bar:
        for step in steps:
            sampling += step.seconds
            mean = sampling / (step.index + 1)
            bar.length = step.total
            bar.update(1, (mean, mean * (step.total - step.index - 1)))
    if not sys.stderr.isatty():  # where click shows only the label
        click.echo(f"{step.total} steps, {_pace((mean, 0))}", err=True)
    stages["text"] = stages.get("text", 0.0) + time.perf_counter() - start - sampling
    stages["sampling"] = stages.get("sampling", 0.0) + sampling
    click.echo("decoding", err=True)
    start = time.perf_counter()
    images = pipe.decode(step.latents)
    stages["decode"] = stages.get("decode", 0.0) + time.perf_counter() - start
    return images


def _pace(times: tuple[float, float] | None) -> str | None:
    """Say how long a step takes on average and how long the rest will take."""
    if times is None:
        return None
    mean, left = times
    minutes, seconds = divmod(round(left), 60)
    return f"{mean:.2f} s/it{f', {minutes}:{seconds:02} left' if left else ''}"


def output_paths(pattern: str, seeds: list[int]) -> list[Path]:
    """Return a file for each seed: ``{seed}`` and ``%03d`` are replaced, or a number is added for several.

    Raises
    ------
    InputError
        If the pattern is empty.
    """
    if not pattern:
        raise InputError("output: found nothing, expected the name of a file, such as output.png")
    number = r"%\d{0,2}d"
    numbered = re.search(number, pattern)
    if len(seeds) > 1 and not numbered and "{seed}" not in pattern:
        path = Path(pattern)
        pattern = str(path.with_name(f"{path.stem}-%03d{path.suffix}"))
    paths = []
    for index, seed in enumerate(seeds):
        name = pattern.replace("{seed}", str(seed))
        paths.append(Path(re.sub(number, lambda match: match[0] % (index + 1), name)))  # noqa: B023
    return paths


def _say_what_is_cut(pipe: StableDiffusionPipeline, name: str, text: str) -> None:
    cut = pipe.tokenizer.truncated(text)
    if cut:
        room = pipe.tokenizer.max_length - 2
        click.echo(f"The {name} is longer than {room} tokens; this is cut off: {cut!r}", err=True)


def _warn_about_size(*sizes: int | None) -> None:
    for size in sizes:
        if size and size % 64:
            click.echo(f"Note: {size} pixels is not a multiple of 64; pictures may be less good.", err=True)


def _metadata(
    pipe: StableDiffusionPipeline, prompt: str, seed: int, sampler: str, images: np.ndarray, options: dict[str, Any]
) -> Parameters:
    _, height, width, _ = images.shape
    settings = {
        "Steps": options["steps"],
        **sampler_title(sampler),
        "CFG scale": f"{options['scale']:g}",
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model hash": model_hash(pipe.unet_files),
        "Model": pipe.name,
        **({"VAE": Path(options["taesd"] or options["vae"]).name} if options["taesd"] or options["vae"] else {}),
        "RNG": options["rng"].upper(),
        "Version": f"sd-numba {__version__}",
    }
    return Parameters(prompt, options["negative_prompt"], settings)
