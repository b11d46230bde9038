"""Captions as token ids, and their compositions: ``python -m training.dataset [--count 800000]``."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sd_numba.prompts.tokenizer import Tokenizer

from .art import Art, Concept
from .compose import to_rows
from .options import add_inputs, read_arrays
from .world import World

CHUNK = 2000


@dataclass(frozen=True)
class Dataset:
    """Token ids int16 ``(n, 77)``, and what `compose.to_rows` returns: items and backgrounds."""

    ids: np.ndarray
    items: np.ndarray
    backgrounds: np.ndarray

    @classmethod
    def load(cls, path: Path) -> Dataset:
        """Read the file that the command wrote."""
        return cls(*read_arrays(path, "dataset", "ids", "items", "backgrounds"))


def generate(concepts: tuple[Concept, ...], tokenizer: Path, count: int, seed: int) -> Dataset:
    """Draw random compositions on all cores; the result for a seed does not depend on the number of cores."""
    make = partial(_chunk, concepts, tokenizer, seed)
    with multiprocessing.Pool(os.cpu_count()) as pool:
        chunks = pool.map(make, range(-(-count // CHUNK)), chunksize=1)
    return Dataset(*(np.concatenate(arrays)[:count] for arrays in zip(*chunks, strict=True)))


def _chunk(concepts: tuple[Concept, ...], tokenizer: Path, seed: int, index: int) -> tuple[np.ndarray, ...]:
    world = World(concepts, random.Random(f"{seed} {index}"))
    compositions = [world.compose() for _ in range(CHUNK)]
    ids = Tokenizer.from_folder(tokenizer)([composition.caption for composition in compositions])
    return ids.astype(np.int16), *to_rows(compositions)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Draw the compositions to train on.")
    add_inputs(parser, "--art", "--tokenizer")
    parser.add_argument("--count", type=int, default=800_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("training/data/dataset.npz"))
    arguments = parser.parse_args()
    start = time.perf_counter()
    concepts = Art.load(arguments.art).concepts
    dataset = generate(concepts, arguments.tokenizer, arguments.count, arguments.seed)
    np.savez(arguments.out, **vars(dataset))
    print(f"{arguments.out}: {len(dataset.ids)} compositions in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
