"""The converted networks in int8, for OpenVINO: quantised after training by NNCF, as is usual.

Weights and activations of all convolutions and linear layers, and queries and keys, become int8 (as NNCF does it
for transformers: symmetric weights, a scale for each output channel; activations with a zero point, a scale for each
tensor). Without SmoothQuant, which made the UNet with random weights no faster and its differences twice as large;
without bias correction, as in OpenVINO's own examples of diffusion.
"""

# ruff: noqa: PLC0415 - compare_peers imports this file in all its processes

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.peers import SAMPLER, Job, load_module, report, save

SAMPLES = 6


def quantise(job: Job) -> None:
    """Quantise the converted networks of a job that are not in the cache."""
    import nncf
    import openvino

    nncf.set_log_level("ERROR")
    for part in job.parts:
        path = job.model_path(part, int8=True)
        if path.exists():
            continue
        report(f"quantising {part} for OpenVINO")
        model = nncf.quantize(
            openvino.Core().read_model(job.model_path(part)),
            nncf.Dataset(samples(job, part)),
            subset_size=SAMPLES,
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                disable_bias_correction=True,
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),  # none
            ),
        )
        save(model, path)


def samples(job: Job, part: str) -> list[tuple[np.ndarray, ...]]:
    """Return inputs for the calibration, like those of a run with guidance.

    The samples of the UNet go from pure noise to a picture. The first of its contexts is random, as in the work "unet",
    and the second is what the text encoder says.
    """
    random = np.random.default_rng(1)
    arrays = job.inputs(part)
    vocabulary = job.config("text_encoder")["vocab_size"]
    texts = [random.integers(0, vocabulary, job.inputs("text")[0].shape) for _ in range(SAMPLES)]
    if part == "text":
        return [(ids,) for ids in texts]
    pictures = [smooth_noise(random, arrays[0].shape) for _ in range(SAMPLES)]
    if part == "vae":
        scaling = np.float32(job.config("vae").get("scaling_factor", 0.18215))
        return [(picture / scaling,) for picture in pictures]

    from sd_numba.samplers import make_sampler

    plan = make_sampler(SAMPLER, job.config("scheduler", "scheduler_config.json")).plan(SAMPLES)
    encode = text_encoder(job)
    found = []
    for ids, picture, sigma, timestep in zip(texts, pictures, plan.sigmas, plan.timesteps, strict=False):
        noise = random.standard_normal(picture.shape, np.float32)
        sample = (picture + sigma * noise) / np.sqrt(1 + sigma**2)
        context = encode(ids)
        context[0] = random.standard_normal(context.shape[1:], np.float32)
        found.append((sample.astype(np.float32), np.full(1, timestep, np.float32), context))
    return found


def smooth_noise(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return noise of unit variance that has large areas, as latents of pictures do."""
    coarse = random.standard_normal((*shape[:2], *(-(-side // 8) for side in shape[2:])), np.float32)
    areas = coarse.repeat(8, 2).repeat(8, 3)[:, :, : shape[2], : shape[3]]
    return np.sqrt(np.float32(0.5)) * (areas + random.standard_normal(shape, np.float32))


def text_encoder(job: Job) -> Callable[[np.ndarray], np.ndarray]:
    """Return a call of the float32 text encoder."""
    import torch

    module = load_module(job, "text", torch.float32)

    def encode(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(ids)).numpy()

    return encode
