"""Noise from generators instead of seeds, as scripts for diffusers pass them."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..checks import check_choice
from ..errors import InputError
from .noise import Noise, make_noise

TORCH_SEED = 67280421310721  # default seed of torch's generators


class Generator:
    """A seeded stream of random numbers, as torch's: each run continues where the last one ended.

    Parameters
    ----------
    device : str
        ``"cpu"``, or ``"cuda"`` for the numbers that a seed stands for on a GPU.

    Raises
    ------
    InputError
        Another device.

    Examples
    --------
    >>> from sd_numba import Generator
    >>> generator = Generator("cpu").manual_seed(0)
    """

    def __init__(self, device: Any = "cpu") -> None:
        self.device = str(device)
        self._rng = check_choice("device", self.device.partition(":")[0], ("cpu", "cuda"))
        self.manual_seed(TORCH_SEED)

    def manual_seed(self, seed: int) -> Generator:
        """Restart the stream from a seed; return the generator itself."""
        self.stream: Noise = make_noise(self._rng, seed)
        self._seed = int(seed) & (2**64 - 1)
        return self

    def seed(self) -> int:
        """Restart the stream from a random seed; return the seed."""
        return self.manual_seed(secrets.randbits(63)).initial_seed()

    def initial_seed(self) -> int:
        """Return the seed that the stream started from."""
        return self._seed


class TorchStream:
    """The stream of one of torch's own generators, drawn by torch, so that it moves on as it does in diffusers."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def normal(self, shape: Iterable[int]) -> np.ndarray:
        """Return the next noise: float32 of ``shape``."""
        generator = self._generator
        drawn = sys.modules["torch"].randn(tuple(shape), generator=generator, device=generator.device)
        return drawn.cpu().numpy()

    def state(self) -> dict[str, Any]:
        """Return a state that `sd_numba.samplers.noise.restore_noise` rejects: torch hides its stream's position."""
        return {"rng": "torch"}


def noise_of(generator: Any, count: int) -> tuple[list[Noise], list[int]]:
    """Return the streams of a generator for all pictures, or of a list of generators, and a seed for each picture.

    Parameters
    ----------
    generator : Generator, torch.Generator, or a list of these
        One stream for all pictures is drawn from as in diffusers: the noise of all of them at once.
    count : int
        Of pictures.

    Raises
    ------
    InputError
        It is something else, or a list of another length.
    """
    listed = isinstance(generator, list | tuple)
    generators = list(generator) if listed else [generator]
    if listed and len(generators) != count:
        raise InputError(f"generator: found {len(generators)} for {count} pictures, expected as many or one")
    streams: list[Noise] = []
    for one in generators:
        if isinstance(one, Generator):
            streams.append(one.stream)
        elif "torch" in sys.modules and isinstance(one, sys.modules["torch"].Generator):
            streams.append(TorchStream(one))
        else:
            raise InputError(f"generator: found {type(one).__name__}, expected an sd_numba.Generator or a list of them")
    seeds = [int(one.initial_seed()) for one in generators]
    return streams, seeds if listed else seeds * count
