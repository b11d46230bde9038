"""Commands that try each part by itself."""

from __future__ import annotations

import time

import click
import numpy as np

from .. import kernels
from ..checkpoints.opening import open_model
from ..checks import check_side
from ..errors import InputError
from ..kernels.machine.peak import measure_peak
from ..networks.clip import TextEncoder, TextEncoderConfig
from ..networks.unet import UNet, UNetConfig
from ..samplers.schedule import NoiseSchedule
from ..tools import profile
from .common import Command, model_argument, threads_option, warm_up

CLIP_PROMPTS = ("a cat on a beach", "a red apple on a blue background", "")
NOISE_TIMES = (1, 10, 100, 500, 750, 999)


@click.command(cls=Command)
def warmup() -> None:
    """Compile every kernel for this CPU, once.

    They are kept in the user's cache folder (or in $NUMBA_CACHE_DIR); without this, the first run compiles them.
    """
    warm_up(*kernels.precisions())
    click.echo("all kernels are ready")


@click.command("clip-test", cls=Command)
@model_argument
@threads_option
def clip_test(model: str | None, threads: int) -> None:
    """Encode three prompts with MODEL's text encoder.

    Prints the shape and the range of what comes out. By default with the embedded model.
    """
    kernels.set_threads(threads)
    opened = open_model(model)
    config, weights = TextEncoderConfig.from_dict(opened.configs["text_encoder"]), opened.weights("text_encoder")
    tokenizer, encoder = opened.tokenizer("text_encoder"), TextEncoder(weights, config)
    weights.finish()
    warm_up()
    for prompt in CLIP_PROMPTS:
        start = time.perf_counter()
        states = encoder(tokenizer(prompt))
        seconds = time.perf_counter() - start
        click.echo(f"{prompt!r}: shape {states.shape}, {_range(states)}, {seconds * 1e3:.0f} ms")


@click.command("noise-test", cls=Command)
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


@click.command("diffusion-test", cls=Command)
@model_argument
@threads_option
@click.option("-W", "--width", type=int, help="Pixels.  [default: the model's own]")
@click.option("-H", "--height", type=int, help="Pixels.  [default: the model's own]")
@click.option("-b", "--batch", default=2, show_default=True, help="Latents; 2 is one picture with guidance.")
def diffusion_test(model: str | None, threads: int, width: int | None, height: int | None, batch: int) -> None:
    """Run MODEL's UNet on random latents and time it.

    Prints shapes, range, seconds and GFLOP/s of the second of two passes. By default with the embedded model.
    """
    kernels.set_threads(threads)
    opened = open_model(model)
    config = UNetConfig.from_dict(opened.configs["unet"])
    weights = opened.weights("unet")
    unet = UNet(weights, config)
    weights.finish()
    factor = 2 ** (len(opened.configs["vae"].get("block_out_channels", [0] * 4)) - 1)
    side = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
    for name, value in (("height", height), ("width", width)):
        if value is not None:
            check_side(name, value, factor)
    h = side[0] if height is None else height // factor
    w = side[1] if width is None else width // factor
    if not 0 < batch * h * w <= 1 << 20:
        raise InputError(f"size: found {batch} latents of {w}x{h}, expected between 1 and 2**20 latent pixels")
    warm_up()
    random = np.random.default_rng(0)
    latents = random.standard_normal((batch, config.in_channels, h, w), np.float32)
    context = unet.encode_context(random.standard_normal((batch, 77, config.cross_attention_dim), np.float32))
    unet(latents, 500, context)
    with profile.profile() as rows:
        predicted = unet(latents, 500, context)
    click.echo(f"latents {latents.shape} -> {predicted.shape}, {_range(predicted)}, {kernels.threads()} threads")
    click.echo(profile.table(rows, measure_peak()))


def _range(x: np.ndarray) -> str:
    finite = "" if np.isfinite(x).all() else ", NOT FINITE"
    return f"{x.min():.4g} .. {x.max():.4g}, mean {x.mean():.4g}, std {x.std():.4g}{finite}"
