"""The command line, and the only place that prints."""

from __future__ import annotations

import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

import kernels

from . import __version__, profiler
from .checkpoint import open_model
from .describe import check_model, describe
from .errors import InputError, SdNumbaError
from .metadata import Parameters, check_output, model_hash, sampler_title, save_png
from .pipeline import PRECISIONS, WEIGHT_POLICIES, StableDiffusionPipeline, resolve_seeds, to_pil
from .samplers import canonical_sampler_name
from .schedule import NoiseSchedule
from .text_encoder import TextEncoder, TextEncoderConfig
from .tokenizer import Tokenizer
from .unet import UNet, UNetConfig
from .weights import Weights

EXAMPLE = 'sd-numba generate "a red apple on a blue background"'
CLIP_PROMPTS = ("a cat on a beach", "a red apple on a blue background", "")
NOISE_TIMES = (1, 10, 100, 500, 750, 999)


class _Group(click.Group):
    """Turns the errors that are meant for users into one line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SdNumbaError as error:
            raise click.ClickException(str(error)) from None
        except MemoryError:
            raise click.ClickException("out of memory; choose a smaller size, or --weights mmap") from None
        except KeyboardInterrupt:
            click.echo("\nstopped by Ctrl-C; the picture in progress was not written", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sd-numba")
def main() -> None:
    """Stable Diffusion text-to-image on ordinary CPUs.

    Try: sd-numba generate "a red apple on a blue background"
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)


def _warm_up() -> None:
    """Compile what this CPU still lacks, saying so."""
    start = time.perf_counter()
    compiled = 0
    for index, total, name in kernels.warmup():
        if not index:
            click.echo(f"First run on this machine: compiling {total} kernels, once.", err=True)
        click.echo(f"  kernel {index + 1} of {total}: {name}", err=True)
        compiled = total
    if compiled:
        click.echo(f"  done in {time.perf_counter() - start:.1f} s", err=True)


def _model_argument(command: Any) -> Any:
    return click.argument("model", required=False, type=click.Path())(command)


def _threads_option(command: Any) -> Any:
    return click.option(
        "-t", "--threads", type=int, default=0, show_default="physical cores", help="Threads; 0 or less: all cores."
    )(command)


# --- generate ---------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("prompt", required=False)
@click.option("-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt, instead of the argument.")
@click.option("-n", "--negative-prompt", default="", metavar="TEXT", help="What to steer away from.")
@click.option("-m", "--model", type=click.Path(), help="Model folder (diffusers layout).  [default: embedded model]")
@click.option("-o", "--output", default="output.png", show_default=True, help="File; may hold {seed} or %03d.")
@click.option("--steps", type=int, help="Sampling steps.  [default: the model's own, or 20]")
@click.option(
    "--cfg-scale", "--guidance-scale", "scale", type=float,
    help="Guidance; 1 is none.  [default: the model's own, or 7.5]",
)  # fmt: skip
@click.option("-s", "--seed", default=-1, show_default=True, help="Seed; negative: a random one.")
@click.option("-W", "--width", type=int, help="Pixels.  [default: the model's own]")
@click.option("-H", "--height", type=int, help="Pixels.  [default: the model's own]")
@click.option("--sampler", "--sampling-method", "sampler", metavar="NAME", help="[default: the model's own]")
@click.option("--scheduler", "spacing", type=click.Choice(["normal", "karras", "exponential"]), default="normal")
@click.option("--eta", default=0.0, show_default=True, help="Noise that ddim adds.")
@click.option("-b", "--batch-count", default=1, show_default=True, help="Pictures, with seeds counted on.")
@click.option(
    "--rng", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Noise as torch's on."
)
@click.option("--precision", type=click.Choice(PRECISIONS), default="f32", show_default=True)
@click.option("--weights", type=click.Choice(WEIGHT_POLICIES), default="auto", show_default=True)
@_threads_option
@click.option("--no-metadata", is_flag=True, help="Do not say in the PNG how it was made.")
@click.option("--profile", is_flag=True, help="Time and GFLOP of each kind of layer.")
@click.option("-v", "--verbose", is_flag=True, help="Seconds of each stage.")
def generate(prompt: str | None, prompt_option: str | None, **options: Any) -> None:
    """Make a picture from PROMPT."""
    if prompt is not None and prompt_option is not None:
        raise click.UsageError("found two prompts, as an argument and with -p; expected one")
    prompt = prompt if prompt is not None else prompt_option
    if prompt is None:
        raise click.UsageError(f"no prompt; try: {EXAMPLE}")
    kernels.set_threads(options["threads"])
    count = options["batch_count"]
    if count < 1:
        raise InputError(f"batch-count: found {count}, expected a whole number from 1 on")
    seeds = resolve_seeds(options["seed"], count)
    paths = output_paths(options["output"], seeds)
    for path in paths:
        check_output(path)
    start = time.perf_counter()
    pipe = StableDiffusionPipeline.from_pretrained(
        options["model"], precision=options["precision"], weights=options["weights"]
    )
    stages = {"load": time.perf_counter() - start}
    _say_what_is_cut(pipe, prompt, options["negative_prompt"])
    _warn_about_size(pipe, options["width"], options["height"])
    options["steps"] = options["steps"] if options["steps"] is not None else pipe.defaults["num_inference_steps"]
    options["scale"] = options["scale"] if options["scale"] is not None else pipe.defaults["guidance_scale"]
    name = canonical_sampler_name(options["sampler"] or pipe.defaults["scheduler"])
    if options["spacing"] != "normal":
        name = canonical_sampler_name(f"{name}-{options['spacing']}")
    # For its errors, before kernels compile; generate() itself computes nothing.
    requests = [_request(pipe, prompt, seed, name, options) for seed in seeds]
    _warm_up()
    for seed, path, request in zip(seeds, paths, requests, strict=True):
        with profiler.profile() as rows:
            images = _draw(pipe, request, stages)
        start = time.perf_counter()
        metadata = None if options["no_metadata"] else _metadata(pipe, prompt, seed, name, images, options)
        save_png(path, to_pil(images)[0], metadata)
        stages["save"] = stages.get("save", 0.0) + time.perf_counter() - start
        click.echo(f"{path}  (seed {seed})")
        if options["profile"]:
            click.echo(profiler.table(rows), err=True)
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


def _draw(pipe: StableDiffusionPipeline, steps: Any, stages: dict[str, float]) -> np.ndarray:
    """Run the steps under a progress bar and decode the result; adds to the seconds of each stage."""
    start = time.perf_counter()
    step = next(steps)
    stages["text"] = stages.get("text", 0.0) + time.perf_counter() - start - step.seconds
    sampling = step.seconds
    bar: Any
    with click.progressbar(
        length=step.total, label="sampling", file=sys.stderr, show_pos=True, item_show_func=_pace
    ) as bar:
        bar.update(1, step.seconds)
        for step in steps:
            sampling += step.seconds
            bar.update(1, step.seconds)
    stages["sampling"] = stages.get("sampling", 0.0) + sampling
    start = time.perf_counter()
    images = pipe.decode(step.latents)
    stages["decode"] = stages.get("decode", 0.0) + time.perf_counter() - start
    return images


def _pace(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.2f} s/it"


def output_paths(pattern: str, seeds: list[int]) -> list[Path]:
    """Return a file for each seed: ``{seed}`` and ``%03d`` are replaced, or a number is added for several.

    Raises
    ------
    InputError
        If the pattern is empty.
    """
    if not pattern:
        raise InputError("output: found nothing, expected the name of a file, such as output.png")
    numbered = re.search(r"%(0\d+)?d", pattern)
    if len(seeds) > 1 and not numbered and "{seed}" not in pattern:
        path = Path(pattern)
        pattern = str(path.with_name(f"{path.stem}-%03d{path.suffix}"))
    paths = []
    for index, seed in enumerate(seeds):
        name = pattern.replace("{seed}", str(seed))
        paths.append(Path(re.sub(r"%(0\d+)?d", lambda match: match[0] % (index + 1), name)))  # noqa: B023
    return paths


def _say_what_is_cut(pipe: StableDiffusionPipeline, *texts: str) -> None:
    for text in texts:
        cut = pipe.tokenizer.truncated(text)
        if cut:
            room = pipe.tokenizer.max_length - 2
            click.echo(f"The prompt is longer than {room} tokens; this is cut off: {cut!r}", err=True)


def _warn_about_size(pipe: StableDiffusionPipeline, *sizes: int | None) -> None:
    for size in sizes:
        if size and size % 64 and not size % pipe.vae.factor:
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
        "RNG": options["rng"].upper(),
        "Version": f"sd-numba {__version__}",
    }
    return Parameters(prompt, options["negative_prompt"], settings)


# --- checks and tests -------------------------------------------------------------------------------------------------


@main.command()
@_model_argument
def test(model: str | None) -> None:
    """Check the files of MODEL: names, shapes, dtypes, counts, and every value for NaN."""
    sound = True
    for report in check_model(model):
        click.echo(str(report))
        sound &= report.ok
    if not sound:
        raise click.ClickException("the model is damaged or incomplete; download it again")


@main.command()
@click.argument("file", type=click.Path())
def info(file: str) -> None:
    """Say how a picture was made, or what a model file or folder holds."""
    click.echo(describe(file))


@main.command()
def warmup() -> None:
    """Compile every kernel for this CPU and keep it in the cache."""
    _warm_up()
    click.echo("all kernels are ready")


@main.command("clip-test")
@_model_argument
@_threads_option
def clip_test(model: str | None, threads: int) -> None:
    """Encode three prompts and print the shape and the range of what comes out."""
    kernels.set_threads(threads)
    folder = open_model(model)
    config = TextEncoderConfig.from_dict(folder.text_encoder)
    tokenizer = Tokenizer.from_folder(folder.folder("tokenizer"), config.vocab_size)
    weights = Weights.open(folder.folder("text_encoder"))
    encoder = TextEncoder(weights, config)
    weights.finish()
    _warm_up()
    for prompt in CLIP_PROMPTS:
        start = time.perf_counter()
        states = encoder(tokenizer(prompt))
        seconds = time.perf_counter() - start
        click.echo(f"{prompt!r}: shape {states.shape}, {_range(states)}, {seconds * 1e3:.0f} ms")


@main.command("noise-test")
def noise_test() -> None:
    """Print beta, alpha and alpha-bar of every noise schedule at a few timesteps."""
    for kind in ("linear", "cosine", "scaled_linear"):
        schedule = NoiseSchedule(kind)
        click.echo(f"{kind}\n{'t':>6}{'beta':>12}{'alpha':>12}{'alpha-bar':>12}")
        for t in NOISE_TIMES:
            values = schedule.betas[t], schedule.alphas[t], schedule.alphas_cumprod[t]
            click.echo(f"{t:>6}" + "".join(f"{value:12.6g}" for value in values))


@main.command("diffusion-test")
@_model_argument
@_threads_option
@click.option("-W", "--width", type=int, help="Pixels.  [default: the model's own]")
@click.option("-H", "--height", type=int, help="Pixels.  [default: the model's own]")
@click.option("-b", "--batch", default=2, show_default=True, help="Latents; 2 is one picture with guidance.")
def diffusion_test(model: str | None, threads: int, width: int | None, height: int | None, batch: int) -> None:
    """Run the UNet once on random latents: shapes, range, time, GFLOP/s."""
    kernels.set_threads(threads)
    folder = open_model(model)
    config = UNetConfig.from_dict(folder.unet)
    weights = Weights.open(folder.folder("unet"))
    unet = UNet(weights, config)
    weights.finish()
    factor = 2 ** (len(folder.vae.get("block_out_channels", [0] * 4)) - 1)
    side = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
    h, w = (height or side[0] * factor) // factor, (width or side[1] * factor) // factor
    if not 0 < batch * h * w <= 1 << 20:
        raise InputError(f"size: found {batch} latents of {w}x{h}, expected between 1 and 2**20 latent pixels")
    _warm_up()
    random = np.random.default_rng(0)
    latents = random.standard_normal((batch, config.in_channels, h, w), np.float32)
    context = unet.encode_context(random.standard_normal((batch, 77, config.cross_attention_dim), np.float32))
    unet(latents, 500, context)
    with profiler.profile() as rows:
        predicted = unet(latents, 500, context)
    click.echo(f"latents {latents.shape} -> {predicted.shape}, {_range(predicted)}, {kernels.threads()} threads")
    click.echo(profiler.table(rows))


def _range(x: np.ndarray) -> str:
    finite = "" if np.isfinite(x).all() else ", NOT FINITE"
    return f"{x.min():.4g} .. {x.max():.4g}, mean {x.mean():.4g}, std {x.std():.4g}{finite}"


if __name__ == "__main__":
    main()
