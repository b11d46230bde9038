"""What the commands have in common: files that one makes and the next one reads."""

from __future__ import annotations

import argparse
from pathlib import Path

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
