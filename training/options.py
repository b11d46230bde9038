"""What the commands have in common: files that one makes and the next one reads."""

from __future__ import annotations

import argparse
import zipfile
import zlib
from pathlib import Path

import numpy as np

MAKERS = {  # option: what it is by default, and the command that makes it
    "--art": ("training/data/art.npz", "art"),
    "--tokenizer": ("training/data/tokenizer", "tokenizer"),
    "--dataset": ("training/data/dataset.npz", "dataset"),
}


def add_inputs(parser: argparse.ArgumentParser, *options: str) -> None:
    """Add options for what must be there; if it is not, the parser says which command makes it."""
    for option in options:
        default, command = MAKERS[option]

        def existing(text: str, command: str = command) -> Path:
            if not Path(text).exists():
                raise argparse.ArgumentTypeError(f"{text}: not there; python -m training.{command} makes it")
            return Path(text)

        parser.add_argument(option, type=existing, default=default, help="%(default)s")


def read_arrays(path: Path, command: str, *names: str) -> list[np.ndarray]:
    """Read arrays by name from an ``.npz`` that a command made; end the process in one line if it is not whole."""
    try:
        with np.load(path) as stored:
            return [stored[name] for name in names]
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        raise SystemExit(f"{path}: damaged, or another file; python -m training.{command} makes it") from None
