"""Make the golden file of runs that start in the middle, as image-to-image does, with diffusers' schedulers.

For developers only; the tests need neither. From the repository's root, in the environment of `make_samplers.py`:

    python -m tests.golden.make_starts

Left out are the runs in which diffusers contradicts itself: LMS (which gives its one slope the weight of the newest of
four) and PNDM with Runge-Kutta steps (which it starts amid one).
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.make_samplers import CLASSES, CONFIGS, RESPACED, SEED, SHAPE, make_scheduler, toy_network

GOLDEN = Path(__file__).parent / "starts.npz"
PICTURE = np.cos(np.arange(24, dtype=np.float32)).reshape(SHAPE)
RUN_CONFIGS = ("sd15", "embedded", "leading", "trailing", "zero_snr")
RUNS = ((2, 0.5), (4, 0.9), (10, 0.3), (20, 0.75), (5, 1.0))  # steps and strengths


def run_from(sampler: str, config: dict[str, Any], steps: int, strength: float) -> tuple[int, np.ndarray]:
    """The first call; the latents there, after each of two calls and at the end, and the first predicted picture."""
    import torch  # noqa: PLC0415

    scheduler = make_scheduler(sampler, config, steps)
    # as `get_timesteps` of StableDiffusionImg2ImgPipeline
    start = max(steps - min(int(steps * strength), steps), 0) * scheduler.order
    timesteps = scheduler.timesteps[start:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    generator = torch.Generator().manual_seed(SEED)
    x = scheduler.add_noise(torch.from_numpy(PICTURE), torch.randn(SHAPE, generator=generator), timesteps[:1])
    extra: dict[str, Any] = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    latents, pictures = [x], []
    for t in timesteps:
        output = torch.from_numpy(toy_network(scheduler.scale_model_input(x, t).numpy(), float(t)))
        result = scheduler.step(output, t, x, **extra)
        x = result.prev_sample
        latents.append(x)
        pictures.append(getattr(result, "pred_original_sample", None))
    picture = torch.full(SHAPE, np.nan) if pictures[0] is None else pictures[0]  # which some do not tell
    kept = [latents[0], latents[1], latents[min(2, len(latents) - 1)], latents[-1], picture]
    return start, np.stack([values.numpy() for values in kept]).astype(np.float32)


def contradicts_itself(sampler: str, config: dict[str, Any]) -> bool:
    """Whether diffusers does not do there what it means to."""
    return sampler.startswith("lms") or (sampler == "pndm" and not config.get("skip_prk_steps", False))


def main() -> None:
    """Write the golden file."""
    warnings.simplefilter("ignore")
    logging.disable()
    samplers = [name for name in CLASSES if name != "ddim-eta"]
    samplers += [f"{name}-{spacing}" for name in RESPACED for spacing in ("karras", "exponential")]
    keys, values = [], []
    for sampler in samplers:
        for config in RUN_CONFIGS:
            if not contradicts_itself(sampler, CONFIGS[config]):
                for steps, strength in RUNS:
                    start, arrays = run_from(sampler, CONFIGS[config], steps, strength)
                    keys.append([sampler, config, steps, strength, start])
                    values.append(arrays)
    index = np.frombuffer(json.dumps(keys, separators=(",", ":")).encode(), np.uint8)
    np.savez_compressed(GOLDEN, index=index, values=np.stack(values))
    print(f"{len(keys)} runs, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
