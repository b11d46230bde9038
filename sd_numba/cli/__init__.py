"""The command line, and the only place that prints."""

import logging
import warnings

import click

from .._version import __version__
from .common import Group
from .diagnose import clip_test, diffusion_test, noise_test, warmup
from .generate import generate
from .models import convert, download, info, test

__all__ = ["main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sd-numba")
def main() -> None:
    """Stable Diffusion text-to-image on ordinary CPUs.

    Try: sd-numba generate "a red apple on a blue background"
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of pictures' odd data, which are read all the same


for command in (generate, download, convert, test, info, warmup, clip_test, noise_test, diffusion_test):
    main.add_command(command)
