"""Commands for files: fetch, rewrite, check and describe models."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from contextlib import closing, suppress
from typing import Any

import click

from ..checkpoints.download import SYNONYMS, VARIANTS, download_model, shortest_name
from ..checkpoints.kinds import kind_of
from ..errors import ModelError
from ..files.hub import AGAIN, DEFAULT_MODEL
from ..files.safetensors import read_header
from ..files.writing import DTYPES
from ..tools.check import check_model
from ..tools.convert import convert as convert_model
from ..tools.info import describe
from .common import ANY_PATH, EXAMPLE, Command, model_argument, printable

# What a file is used as -> the option of `generate` that takes it.
OPTIONS = {"lora": "--lora", "taesd": "--taesd", "vae": "--vae", "embedding": "--embedding-dir"}


@click.command(cls=Command)
@click.argument("model", default=DEFAULT_MODEL)
@click.option(
    "--variant", type=click.Choice([*VARIANTS, *SYNONYMS]), default="fp16", show_default=True,
    help="Precision of the weights; fp16 halves the download, and the pictures hardly differ.",
)  # fmt: skip
@click.option("--file", metavar="NAME", help="One safetensors file at the repository's root, instead of the folders.")
@click.option(
    "--to", type=click.Path(file_okay=False), metavar="FOLDER", help="A plain folder.  [default: hub's cache]"
)
@click.option("--revision", metavar="NAME", help="Branch, tag or commit.  [default: main]")
def download(model: str, to: str | None, **options: Any) -> None:
    """Download MODEL, an id on the Hugging Face hub; by default Stable Diffusion 1.5.

    Fetches only the files that are needed and verifies their checksums. Run it again to continue a download that
    stopped. HF_TOKEN, HF_ENDPOINT and HF_HOME mean what they mean elsewhere. No other command uses the network.
    """
    logging.getLogger("sd_numba").setLevel(logging.INFO)
    # Without this huggingface_hub asks its server for a list of programs that may have started us, and tells it ours.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        path = download_model(model, to=to, **options)
    except KeyboardInterrupt:
        click.echo(f"\nstopped by Ctrl-C; {AGAIN}", err=True)
        sys.exit(130)
    click.echo(f"{model} is in {path}")
    option = "--model"
    if path.is_file():
        with suppress(ModelError):
            option = OPTIONS.get(kind_of(read_header(path)).use, option)
    click.echo(f"Use it: {EXAMPLE} {option} {shlex.quote(shortest_name(model, path))}")


@click.command("convert", cls=Command)
@click.argument("source", type=ANY_PATH)
@click.argument("target", type=ANY_PATH)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Dtype of all weights.  [default: as stored]")
def convert(source: str, target: str, dtype: str | None) -> None:
    """Write the model SOURCE as TARGET, in another dtype or layout.

    TARGET is a single file if its name ends in .safetensors, else a folder in diffusers layout. Other safetensors files
    (a VAE, a LoRA) keep their tensors' names.

    int8, for whole models, takes little more than a quarter of the space of f32: the linear layers and convolutions of
    the UNet and the text encoder have a byte a weight and a scale for each output channel, as compressed-tensors and
    vLLM store them, and everything else is f16.

    Example: sd-numba convert stable-diffusion-v1-5 sd15-f16.safetensors --dtype f16
    """
    with closing(convert_model(source, target, dtype)) as progress:
        bar: Any
        with click.progressbar(length=0, label="writing", file=sys.stderr, item_show_func=_gigabytes) as bar:
            for done, total in progress:
                bar.length = total
                bar.update(done - bar.pos, (done, total))
    click.echo(target)


def _gigabytes(bytes_of: tuple[int, int] | None) -> str | None:
    return None if bytes_of is None else f"{bytes_of[0] / 1e9:.2f} of {bytes_of[1] / 1e9:.2f} GB"


@click.command(cls=Command)
@model_argument
def test(model: str | None) -> None:
    """Check the files of MODEL (by default the embedded model), or of a LoRA, a VAE, an embedding.

    Checks the names, shapes, dtypes and number of its tensors, and every value for NaN. The exit status is 0 if all is
    well.
    """
    sound = True
    for report in check_model(model):
        click.echo(printable(str(report)))
        sound &= report.ok
    if not sound:
        raise click.ClickException("not sound, see above; download it again if it should be")


@click.command(cls=Command)
@click.argument("file", type=ANY_PATH)
def info(file: str) -> None:
    """Say what a picture or a model is.

    How a picture was made (from the text in its PNG file), or what a model's file or folder holds.
    """
    click.echo(printable(describe(file)))
