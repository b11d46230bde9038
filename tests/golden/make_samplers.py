"""Make the golden file of the samplers and the noise, with diffusers' schedulers and torch's generator.

For developers only; the tests need neither. From the repository's root, in an environment of its own:

    pip install torch==2.13.0 diffusers==0.42.1 scipy numpy
    python tests/golden/make_samplers.py

Each scheduler runs a toy network on tiny latents; stochastic ones draw from the generator that drew the first noise.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "samplers.npz"
SHAPE = (1, 4, 2, 3)
SEED = 1234
NOISE_CALLS = (3, 16, 5, 17, 1, 31, 2, 64, 15, 1, 100)  # sizes of the draws from one generator
ETA = 0.5  # of the sampler called ddim-eta here

_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_SD15 = {**_SD, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"_class_name": "PNDMScheduler", **_SD15, "trained_betas": None},
    "embedded": {"_class_name": "PNDMScheduler", **_SD15, "trained_betas": None, "prediction_type": "v_prediction"},
    "leading": {**_SD15, "timestep_spacing": "leading"},
    "linspace": {**_SD15, "timestep_spacing": "linspace", "prediction_type": "v_prediction"},
    "trailing": {**_SD15, "timestep_spacing": "trailing", "skip_prk_steps": False},
    "unwritten": {},
    "sample": {**_SD, "prediction_type": "sample", "thresholding": True, "sample_max_value": 1.5, "solver_order": 3},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "final_sigmas_type": "sigma_min"},
    "zero_snr": {
        **_SD15,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    },
    "solvers": {**_SD15, "solver_type": "heun", "euler_at_final": True, "solver_order": 3, "variance_type": None},
    "bh1": {
        **_SD15,
        "solver_type": "bh1",
        "solver_order": 3,
        "lower_order_final": False,
        "final_sigmas_type": "sigma_min",
        "disable_corrector": [0, 3],
    },
}
FEW_STEPS = (1, 2, 4, 10)
MANY_STEPS = (3, 20, 50)
MANY_STEPS_CONFIGS = ("sd15", "embedded", "trailing", "solvers", "bh1")

CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "ddim-eta": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "dpm++2m-sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
RESPACED = ("euler", "heun", "lms", "dpm++2m", "dpm++2m-sde", "unipc")


def toy_network(x: np.ndarray, t: float) -> np.ndarray:
    """A smooth function of latents and timestep that stands in for a network; float32."""
    phase = np.arange(x.size, dtype=np.float64).reshape(x.shape)
    wave = 0.5 * np.sin(1.3 * x.astype(np.float64) + phase + float(t) / 200)
    return (wave + 0.6 * x * np.cos(float(t) / 700)).astype(np.float32)


def runs() -> Iterator[tuple[str, str, int]]:
    """Every sampler's name, config's name and number of steps."""
    respaced = [f"{name}-{spacing}" for name in RESPACED for spacing in ("karras", "exponential")]
    for sampler in [*CLASSES, *respaced]:
        for config in CONFIGS:
            for steps in (*FEW_STEPS, *(MANY_STEPS if config in MANY_STEPS_CONFIGS else ())):
                yield sampler, config, steps


def make_scheduler(sampler: str, config: dict[str, Any], steps: int) -> Any:
    """diffusers' scheduler, ready for a run."""
    import diffusers  # noqa: PLC0415

    base, _, spacing = sampler.rpartition("-")
    base, spacing = (base, spacing) if spacing in ("karras", "exponential") else (sampler, "")
    options: dict[str, Any] = {f"use_{spacing}_sigmas": True} if spacing else {}
    if base.startswith("dpm++"):
        options["algorithm_type"] = "sde-dpmsolver++" if base.endswith("sde") else "dpmsolver++"
    scheduler = getattr(diffusers, CLASSES[base]).from_config(config, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def run_scheduler(sampler: str, config: dict[str, Any], steps: int) -> dict[str, np.ndarray]:
    """What diffusers makes of a run: timesteps, first factor of the noise, latents half way and at the end."""
    import torch  # noqa: PLC0415

    scheduler = make_scheduler(sampler, config, steps)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    start = float(scheduler.init_noise_sigma)
    extra: dict[str, Any] = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    if sampler == "ddim-eta":
        extra["eta"] = ETA
    latents = []
    for t in scheduler.timesteps:
        output = torch.from_numpy(toy_network(scheduler.scale_model_input(x, t).numpy(), float(t)))
        x = scheduler.step(output, t, x, **extra).prev_sample
        latents.append(x.numpy())
    return {
        "timesteps": scheduler.timesteps.numpy().astype(np.float32),
        "start": np.array([start], np.float32),
        "latents": np.stack([latents[(len(latents) - 1) // 2], latents[-1]]).astype(np.float32),
    }


def noise_streams() -> dict[str, np.ndarray]:
    """torch's noise for several seeds: a sequence of calls, short and long, one after the other."""
    import torch  # noqa: PLC0415

    streams = {}
    for seed in (0, 42, 2**32 + 5, -1, 2**64 - 1):
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randn(n, generator=generator).numpy() for n in NOISE_CALLS]
        streams[f"noise/{seed}"] = np.concatenate(parts)
    return streams


def main() -> None:
    """Write the golden file."""
    warnings.simplefilter("ignore")
    logging.disable()
    keys, arrays = [], {"timesteps": [], "start": [], "latents": []}
    left_out = []
    for sampler, config, steps in runs():
        try:
            result = run_scheduler(sampler, CONFIGS[config], steps)
        except Exception as error:
            left_out.append((sampler, config, steps, f"{type(error).__name__}: {error}"[:80]))
            continue
        if not np.isfinite(result["latents"]).all():
            left_out.append((sampler, config, steps, "not finite"))
            continue
        keys.append([sampler, config, steps, len(result["timesteps"])])
        for name, values in arrays.items():
            values.append(result[name])
    stacked = {
        "timesteps": np.concatenate(arrays["timesteps"]),
        "start": np.concatenate(arrays["start"]),
        "latents": np.stack(arrays["latents"]),
    }
    index = np.frombuffer(json.dumps(keys, separators=(",", ":")).encode(), np.uint8)
    np.savez_compressed(GOLDEN, index=index, **stacked, **noise_streams())
    print(f"{len(keys)} runs, {GOLDEN.stat().st_size} bytes; left out, since diffusers fails:")
    for entry in left_out:
        print("  ", *entry)


if __name__ == "__main__":
    main()
