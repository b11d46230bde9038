"""Options shared by the commands: files that one command makes and the next one reads."""

from __future__ import annotations

import argparse
import zipfile
import zlib
from pathlib import Path

import numpy as np

MAKERS = {  # option: its default, and the command that makes the file
    "--art": ("training/data/art.npz", "art"),
    "--tokenizer": ("training/data/tokenizer", "tokenizer"),
    "--dataset": ("training/data/dataset.npz", "dataset"),
}


def add_inputs(parser: argparse.ArgumentParser, *options: str) -> None:
    """Add options for required files; if one is missing, the parser says which command makes it."""
    for option in options:
        default, command = MAKERS[option]

        def existing(text: str, command: str = command) -> Path:
            if not Path(text).exists():
                raise argparse.ArgumentTypeError(f"{text}: no such file; python -m training.{command} makes it")
            return Path(text)

        parser.add_argument(option, type=existing, default=default, help="%(default)s")


def read_arrays(path: Path, command: str, *names: str) -> list[np.ndarray]:
    """Read arrays by name from an ``.npz`` that a command made; exit with one line if it is incomplete."""
    try:
        with np.load(path) as stored:
            return [stored[name] for name in names]
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        raise SystemExit(f"{path}: damaged, or another file; python -m training.{command} makes it") from None
