"""Normal noise that is reproducible across programs: the streams of torch's CPU generator and of a CUDA device.

The same seed gives the same latents as in programs that draw them with torch: :class:`TorchNoise` follows
``torch.randn`` on a CPU (MT19937 and the Box-Muller transform), :class:`CudaNoise` the first normals that a CUDA
generator hands to each element (Philox4x32-10, as AUTOMATIC1111 and stable-diffusion.cpp reproduce it).

References: Matsumoto and Nishimura, "Mersenne Twister" (1998); Box and Muller (1958); Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (2011).
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import InputError

_MT19937_WORDS = 624
_BLOCK = 16  # torch fills 16 values at a time: 8 radii, then 8 angles
_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# curand scales its 32-bit integers with these float32 constants
_CURAND_2POW32_INV = float(np.float32(2.3283064e-10))
_CURAND_2POW32_INV_2PI = float(np.float32(2.3283064e-10 * 6.2831855))


class Noise(Protocol):
    """A seeded stream of unit normal noise."""

    def normal(self, shape: Iterable[int]) -> np.ndarray:
        """Return the next float32 noise of ``shape`` and advance the stream."""

    def state(self) -> dict[str, Any]:
        """Return the state of the stream as plain values and arrays, for :func:`restore_noise`."""


class TorchNoise:
    """Unit normal noise of a torch CPU generator (``torch.Generator("cpu").manual_seed(seed)``).

    Successive calls continue the stream as successive ``torch.randn(shape, generator=...)`` would.
    Values agree with torch's to 1e-6; they cannot be its very bits, since its logarithm, sine and cosine round
    differently from machine to machine.

    Parameters
    ----------
    seed : int
        -2**63 .. 2**64 - 1, as torch accepts it; its generator looks at the low 32 bits only.
    """

    def __init__(self, seed: int) -> None:
        # RandomState seeds MT19937 in the generator's original way, which torch uses too; numpy's newer ones do not.
        self._bits = np.random.RandomState(_seed64(seed) & 0xFFFFFFFF)
        self._spare: float | None = None

    def normal(self, shape: Iterable[int]) -> np.ndarray:
        """Return the next noise: float32 of ``shape``."""
        shape = tuple(shape)
        n = math.prod(shape)
        flat = self._short(n) if n < _BLOCK else self._long(n)
        return flat.reshape(shape)

    def state(self) -> dict[str, Any]:
        """Return the state of the stream: the generator's words, the index of the next one, and the unused value."""
        bits = self._bits.get_state(legacy=False)["state"]
        return {"rng": "cpu", "key": bits["key"], "position": int(bits["pos"]), "spare": self._spare}

    def _uint32(self, n: int) -> np.ndarray:
        return self._bits.randint(0, 2**32, size=n, dtype=np.uint32)

    def _long(self, n: int) -> np.ndarray:
        whole = n - n % _BLOCK
        out = np.empty(n, np.float32)
        out[:whole] = _box_muller_blocks(self._uint32(n)[:whole])
        if whole < n:
            # The last 16 values are redrawn, overwriting the end of the last whole block.
            out[-_BLOCK:] = _box_muller_blocks(self._uint32(_BLOCK))
        return out

    def _short(self, n: int) -> np.ndarray:
        # Below 16 values torch draws doubles in pairs, and keeps an unused second one for the next short call.
        out = np.empty(n, np.float32)
        for i in range(n):
            if self._spare is not None:
                out[i], self._spare = self._spare, None
                continue
            high1, low1, high2, low2 = self._uint32(4).tolist()
            angle = 2 * math.pi * (((high1 << 32 | low1) & (2**53 - 1)) * 2.0**-53)
            radius = math.sqrt(-2 * math.log1p(-(((high2 << 32 | low2) & (2**53 - 1)) * 2.0**-53)))
            out[i], self._spare = radius * math.cos(angle), radius * math.sin(angle)
        return out


class CudaNoise:
    """Unit normal noise of a CUDA generator, as AUTOMATIC1111's ``randn_source`` NV reproduces it on any machine.

    Element ``i`` of call ``c`` is drawn from Philox4x32-10 with the seed as key and the counter (c, 0, i, 0).

    Parameters
    ----------
    seed : int
        -2**63 .. 2**64 - 1; all 64 bits count.
    """

    def __init__(self, seed: int) -> None:
        self._key = _seed64(seed)
        self._calls = 0

    def normal(self, shape: Iterable[int]) -> np.ndarray:
        """Return the next noise: float32 of ``shape``."""
        shape = tuple(shape)
        first, second = _philox_pair(self._key, self._calls, math.prod(shape))
        self._calls = (self._calls + 1) & 0xFFFFFFFF
        u = first * _CURAND_2POW32_INV + _CURAND_2POW32_INV / 2
        v = second * _CURAND_2POW32_INV_2PI + _CURAND_2POW32_INV_2PI / 2
        return (np.sqrt(-2 * np.log(u)) * np.sin(v)).astype(np.float32).reshape(shape)

    def state(self) -> dict[str, Any]:
        """Return the state of the stream: the seed, and the number of calls so far."""
        return {"rng": "cuda", "seed": self._key, "calls": self._calls}


def make_noise(rng: str, seed: int) -> TorchNoise | CudaNoise:
    """Return the noise source called ``rng``.

    Parameters
    ----------
    rng : str
        ``"cpu"`` for :class:`TorchNoise`, ``"cuda"`` for :class:`CudaNoise`.
    seed : int
        Seed of the stream, -2**63 .. 2**64 - 1.

    Raises
    ------
    InputError
        Another ``rng``, or a seed that is not a whole number in that range.
    """
    if rng == "cpu":
        return TorchNoise(seed)
    if rng == "cuda":
        return CudaNoise(seed)
    raise InputError(name="rng", found=rng, expected="cpu or cuda")


def draw(sources: Sequence[Noise], count: int, shape: Iterable[int]) -> np.ndarray:
    """Return noise of ``shape`` for ``count`` pictures: from the source of each, or all at once from the only one."""
    if len(sources) < count:
        return sources[0].normal((count, *shape))
    return np.stack([source.normal(shape) for source in sources[:count]])


def restore_noise(state: Mapping[str, Any]) -> TorchNoise | CudaNoise:
    """Return a noise source that continues the stream of another one.

    Parameters
    ----------
    state : mapping
        What its ``state()`` returned.

    Raises
    ------
    InputError
        It is no such state.
    """
    match state:
        case {"rng": "cpu", "key": np.ndarray() as key, "position": int(position), "spare": None | float() as spare}:
            # NumPy would read out of bounds past the last word
            if (key.shape, key.dtype) == ((_MT19937_WORDS,), np.uint32) and 0 <= position <= _MT19937_WORDS:
                stream = TorchNoise(0)
                stream._bits.set_state(("MT19937", key, position, 0, 0.0))
                stream._spare = spare
                return stream
        case {"rng": "cuda", "seed": int(seed), "calls": int(calls)}:
            if 0 <= seed < 2**64 and 0 <= calls < 2**32:
                draws = CudaNoise(seed)
                draws._calls = calls
                return draws
    raise InputError("the state of the random generator is damaged; start the run again")


def _seed64(seed: int) -> int:
    """Return ``seed`` as an unsigned 64-bit number; negative ones wrap around, as in torch."""
    try:
        value = operator.index(seed)
    except TypeError:
        value = None
    if value is None or not -(2**63) <= value < 2**64:
        raise InputError(name="seed", found=seed, expected="a whole number from -2**63 to 2**64 - 1")
    return value & (2**64 - 1)


def _box_muller_blocks(bits: np.ndarray) -> np.ndarray:
    """Turn uint32 (a multiple of 16) into float32 normals: of 16, 8 give radii and 8 angles; 8 cosines, then 8 sines.

    Single precision throughout, as in torch: an angle rounded differently moves the result by more than 1e-6.
    """
    uniform = (bits & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(1 - blocks[:, 0]))
    angle = np.float32(2 * np.pi) * blocks[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def _philox_pair(key: int, call: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two of the four words of Philox4x32-10 for the counters (call, 0, 0 .. n - 1, 0): uint32 ``(n,)`` each."""
    # Words live in uint64, so that a product of two needs no special care.
    c0, c1, c2, c3 = (np.zeros(n, np.uint64) for _ in range(4))
    c0 += np.uint64(call)
    c2 += np.arange(n, dtype=np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    key0, key1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(_PHILOX_ROUNDS):
        product0, product1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c2 = (product1 >> half) ^ c1 ^ np.uint64(key0), (product0 >> half) ^ c3 ^ np.uint64(key1)
        c1, c3 = product1 & low, product0 & low
        key0 = (key0 + _PHILOX_KEY_STEPS[0]) & 0xFFFFFFFF
        key1 = (key1 + _PHILOX_KEY_STEPS[1]) & 0xFFFFFFFF
    return c0.astype(np.uint32), c1.astype(np.uint32)
