"""The command line, and the only place that prints."""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np

import kernels
from kernels.peak import measure_peak

from . import __version__, profiler
from .arguments import check_side, resolve_seeds
from .check import check_model
from .convert import convert
from .describe import describe
from .download import DEFAULT_MODEL, SYNONYMS, VARIANTS, download_model, shortest_name
from .embedding import find_embeddings
from .errors import InputError, SdNumbaError
from .lora import find_lora, split_tags, split_weight
from .metadata import Parameters, check_output, model_hash, sampler_title, save_png
from .model import open_model
from .pipeline import PRECISIONS, TILINGS, WEIGHT_POLICIES, StableDiffusionPipeline, to_pil
from .samplers import SAMPLER_NAMES
from .schedule import NoiseSchedule
from .storage import DTYPES
from .text_encoder import TextEncoder, TextEncoderConfig
from .unet import UNet, UNetConfig

EXAMPLE = 'sd-numba generate "a red apple on a blue background"'
SPACINGS = ("normal", "karras", "exponential")
MAX_BATCH = 10_000  # far more than anyone waits for, far fewer than would exhaust memory
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
            click.echo("\nstopped by Ctrl-C; nothing unfinished was written", err=True)
            ctx.exit(130)
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head`: click ends quietly
                raise
            what = f"{error.filename}: " if error.filename else "output cannot be written: "
            raise click.ClickException(f"{what}{error.strerror or error}") from None


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
    with _ctrl_c_kept() as raise_kept:
        for index, total, name in kernels.warmup():
            raise_kept()
            if not index:
                click.echo(f"First run on this machine: compiling {total} kernels, once.", err=True)
            click.echo(f"  kernel {index + 1} of {total}: {name}", err=True)
            compiled = total
        raise_kept()
    if compiled:
        click.echo(f"  done in {time.perf_counter() - start:.1f} s", err=True)


@contextmanager
def _ctrl_c_kept() -> Iterator[Callable[[], None]]:
    """Keep a Ctrl-C until the function that this yields is called; a second one ends the process at once.

    LLVM calls back into Python, and a KeyboardInterrupt that arises there is printed as a traceback and then lost.
    """
    kept = False

    def keep(*_: Any) -> None:
        nonlocal kept
        kept = True
        os.write(2, b"\nstopping after this kernel; Ctrl-C again stops at once\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def raise_kept() -> None:
        if kept:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield raise_kept
        return
    previous = signal.signal(signal.SIGINT, keep)
    try:
        yield raise_kept
    finally:
        signal.signal(signal.SIGINT, previous)


def _model_argument(command: Any) -> Any:
    return click.argument("model", required=False, type=click.Path())(command)


def _threads_option(command: Any) -> Any:
    return click.option(
        "-t", "--threads", type=int, default=0, show_default=True, help="Threads; 0 or less: all physical cores."
    )(command)


# --- generate ---------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("prompt", required=False)
@click.option("-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt, instead of the argument.")
@click.option("-n", "--negative-prompt", default="", metavar="TEXT", help="What to steer away from.")
@click.option(
    "-m", "--model", type=click.Path(),
    help="Folder in diffusers layout, .safetensors file, or id of a downloaded model.  [default: embedded model]",
)  # fmt: skip
@click.option("--vae", type=click.Path(), help="Another VAE than the model's own: a .safetensors file or a folder.")
@click.option(
    "--taesd", type=click.Path(), help="File or folder of a tiny autoencoder: decodes in a fraction of the time."
)
@click.option(
    "--lora", "loras", multiple=True, metavar="FILE[:WEIGHT]",
    help="A LoRA or LoCon (.safetensors); may be given several times.",
)  # fmt: skip
@click.option(
    "--lora-dir",
    "--lora-model-dir",
    type=click.Path(),
    help="Folder of the LoRAs that <lora:NAME:WEIGHT> in prompts means.",
)
@click.option(
    "--embedding-dir", "--embd-dir", type=click.Path(),
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
@click.option("--precision", type=click.Choice(PRECISIONS), default="f32", show_default=True, help="Of the arithmetic.")
@click.option(
    "--weights", type=click.Choice(WEIGHT_POLICIES), default="auto", show_default=True,
    help="Keep packed copies of the weights in memory (faster), or not; auto packs small networks.",
)  # fmt: skip
@click.option(
    "--vae-tiling", type=click.Choice(TILINGS), default="auto", show_default=True,
    help="Decode large pictures in strips, in a third of the memory; auto: if memory would be short.",
)  # fmt: skip
@_threads_option
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
        raise click.UsageError(f"no prompt; try: {EXAMPLE}")
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
    text, tagged = split_tags(prompt)
    loras = [*map(split_weight, options["loras"]), *tagged]
    for lora, weight in loras:
        pipe.load_lora_weights(find_lora(lora, options["lora_dir"]), weight)
    if options["embedding_dir"] is not None:
        _load_embeddings(pipe, options["embedding_dir"], text, options["negative_prompt"])
    stages = {"load": time.perf_counter() - start}
    options["steps"] = options["steps"] if options["steps"] is not None else pipe.defaults["num_inference_steps"]
    options["scale"] = options["scale"] if options["scale"] is not None else pipe.defaults["guidance_scale"]
    name = _spaced(pipe.scheduler_name(options["sampler"]), options["spacing"])
    _request(pipe, text, seeds[0], name, options)  # for its errors, before kernels compile; it computes nothing
    _say_what_is_cut(pipe, "prompt", text)
    _say_what_is_cut(pipe, "negative prompt", options["negative_prompt"])
    _warn_about_size(options["width"], options["height"])
    _warm_up()
    start = time.perf_counter()
    pipe.prepare(options["weights"])
    stages["load"] += time.perf_counter() - start
    noted = prompt + "".join(f" <lora:{Path(lora).stem}:{weight:g}>" for lora, weight in loras[: len(options["loras"])])
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


def _load_embeddings(pipe: StableDiffusionPipeline, folder: str, *prompts: str) -> None:
    """Load those embeddings of a folder whose names are in a prompt."""
    for word, path in find_embeddings(folder).items():
        if any(word.lower() in prompt.lower() for prompt in prompts):
            pipe.load_textual_inversion(path)


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
        "RNG": options["rng"].upper(),
        "Version": f"sd-numba {__version__}",
    }
    return Parameters(prompt, options["negative_prompt"], settings)


# --- files ------------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("model", default=DEFAULT_MODEL)
@click.option(
    "--variant", type=click.Choice([*VARIANTS, *SYNONYMS]), default="fp16", show_default=True,
    help="Of the weights; fp16 is half the download, for pictures that hardly differ.",
)  # fmt: skip
@click.option("--file", metavar="NAME", help="One safetensors file at the repository's root, instead of the folders.")
@click.option(
    "--to", type=click.Path(file_okay=False), metavar="FOLDER", help="A plain folder.  [default: hub's cache]"
)
@click.option("--revision", metavar="NAME", help="Branch, tag or commit.  [default: main]")
def download(model: str, to: str | None, **options: Any) -> None:
    """Fetch MODEL, an id on the Hugging Face hub, by default Stable Diffusion 1.5.

    Only the files that are needed, with checksums; started again, it goes on where it stopped. HF_TOKEN, HF_ENDPOINT
    and HF_HOME hold as elsewhere. No other command uses the network.
    """
    logging.getLogger("sd_numba").setLevel(logging.INFO)
    # Without this huggingface_hub asks its server for a list of programs that may have started us, and tells it ours.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        path = download_model(model, to=to, **options)
    except KeyboardInterrupt:
        click.echo("\nstopped by Ctrl-C; run the same command again, it goes on where it stopped", err=True)
        sys.exit(130)
    click.echo(f"{model} is in {path}")
    click.echo(f"Use it: {EXAMPLE} --model {shlex.quote(shortest_name(model, path))}")


@main.command("convert")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of all weights.  [default: as they are stored]")
def convert_command(source: str, target: str, dtype: str | None) -> None:
    """Write the model SOURCE as TARGET, in another dtype or layout.

    TARGET is a single file if its name ends in .safetensors, else a folder in diffusers layout. Other safetensors files
    (a VAE, a LoRA) keep their tensors' names.

    Example: sd-numba convert stable-diffusion-v1-5 sd15-f16.safetensors --dtype f16
    """
    with closing(convert(source, target, dtype)) as progress:
        bar: Any
        with click.progressbar(length=0, label="writing", file=sys.stderr, item_show_func=_gigabytes) as bar:
            for done, total in progress:
                bar.length = total
                bar.update(done - bar.pos, (done, total))
    click.echo(target)


def _gigabytes(bytes_of: tuple[int, int] | None) -> str | None:
    return None if bytes_of is None else f"{bytes_of[0] / 1e9:.2f} of {bytes_of[1] / 1e9:.2f} GB"


# --- checks and tests -------------------------------------------------------------------------------------------------


@main.command()
@_model_argument
def test(model: str | None) -> None:
    """Check the files of MODEL (by default the embedded model).

    Names, shapes, dtypes and counts of its tensors, and every value for NaN; the exit status says whether it is sound.
    """
    sound = True
    for report in check_model(model):
        click.echo(str(report))
        sound &= report.ok
    if not sound:
        raise click.ClickException("the model is damaged or incomplete; download it again")


@main.command()
@click.argument("file", type=click.Path())
def info(file: str) -> None:
    """Say what a picture or a model is.

    How a picture was made (from the text in its PNG file), or what a safetensors file or a model's folder holds.
    """
    click.echo(describe(file))


@main.command()
def warmup() -> None:
    """Compile every kernel for this CPU, once.

    They are kept in the user's cache folder (or in $NUMBA_CACHE_DIR); without this, the first run compiles them.
    """
    _warm_up()
    click.echo("all kernels are ready")


@main.command("clip-test")
@_model_argument
@_threads_option
def clip_test(model: str | None, threads: int) -> None:
    """Encode three prompts with MODEL's text encoder.

    Prints the shape and the range of what comes out. By default with the embedded model.
    """
    kernels.set_threads(threads)
    opened = open_model(model)
    config, weights = TextEncoderConfig.from_dict(opened.text_encoder), opened.weights("text_encoder")
    tokenizer, encoder = opened.open_tokenizer(config.vocab_size), TextEncoder(weights, config)
    weights.finish()
    _warm_up()
    for prompt in CLIP_PROMPTS:
        start = time.perf_counter()
        states = encoder(tokenizer(prompt))
        seconds = time.perf_counter() - start
        click.echo(f"{prompt!r}: shape {states.shape}, {_range(states)}, {seconds * 1e3:.0f} ms")


@main.command("noise-test")
def noise_test() -> None:
    """Print the noise schedules at a few timesteps.

    Beta, alpha and alpha-bar of the linear, cosine and scaled-linear (Stable Diffusion's) schedules of 1000 steps.
    """
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
    """Run MODEL's UNet on random latents and time it.

    Prints shapes, range, seconds and GFLOP/s of the second of two passes. By default with the embedded model.
    """
    kernels.set_threads(threads)
    opened = open_model(model)
    config = UNetConfig.from_dict(opened.unet)
    weights = opened.weights("unet")
    unet = UNet(weights, config)
    weights.finish()
    factor = 2 ** (len(opened.vae.get("block_out_channels", [0] * 4)) - 1)
    side = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
    for name, value in (("height", height), ("width", width)):
        if value is not None:
            check_side(name, value, factor)
    h = side[0] if height is None else height // factor
    w = side[1] if width is None else width // factor
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
    click.echo(profiler.table(rows, measure_peak()))


def _range(x: np.ndarray) -> str:
    finite = "" if np.isfinite(x).all() else ", NOT FINITE"
    return f"{x.min():.4g} .. {x.max():.4g}, mean {x.mean():.4g}, std {x.std():.4g}{finite}"
