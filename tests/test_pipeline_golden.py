"""Whole pictures against diffusers' StableDiffusionPipeline: every deterministic sampler, 20 steps, guidance."""

import functools

import numpy as np
import pytest

from sd_numba import StableDiffusionPipeline
from tests.golden.cases import CASES, EMBEDDED, Case
from tests.golden.compare import check, golden, scratch

LATENTS_TOLERANCE = 5e-3
IMAGE_TOLERANCE = 2e-3

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_sampler = pytest.mark.parametrize(
    ("case", "sampler"),
    [pytest.param(case, sampler, id=f"{case.name}-{sampler}") for case in CASES for sampler in case.samplers],
)


@functools.cache
def opened(name: str) -> StableDiffusionPipeline:
    (case,) = (case for case in CASES if case.name == name)
    return StableDiffusionPipeline.from_pretrained(case.write(scratch()))


@pytest.fixture(scope="module")
def embedded():
    return StableDiffusionPipeline.from_pretrained()


def generate(case: Case, sampler: str | None, output_type: str) -> np.ndarray:
    return opened(case.name)(
        list(case.prompts),
        negative_prompt=case.negative_prompt,
        latents=case.noise(),
        num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale,
        scheduler=sampler,
        output_type=output_type,
    ).images


def generate_embedded(pipe: StableDiffusionPipeline, sampler: str, output_type: str) -> np.ndarray:
    return pipe(
        EMBEDDED.prompt,
        negative_prompt=EMBEDDED.negative_prompt,
        seed=EMBEDDED.seed,
        num_inference_steps=EMBEDDED.steps,
        guidance_scale=EMBEDDED.guidance_scale,
        scheduler=sampler,
        output_type=output_type,
    ).images


@by_sampler
def test_latents_golden(case, sampler):
    found = generate(case, sampler, "latent")
    check(found, golden(case.path)[f"latents_{sampler}"], LATENTS_TOLERANCE, f"{case.name}, {sampler}")


@by_case
def test_images_golden(case):
    found = generate(case, case.samplers[0], "np")
    check(found, golden(case.path)["images"], IMAGE_TOLERANCE, f"{case.name}, image of {case.samplers[0]}")


@by_case
def test_the_models_own_sampler_is_the_default(case):
    own = {"PNDMScheduler": "pndm", "DDIMScheduler": "ddim"}[case.scheduler["_class_name"]]
    np.testing.assert_array_equal(generate(case, None, "latent"), generate(case, own, "latent"))


@pytest.mark.parametrize("sampler", EMBEDDED.samplers)
def test_embedded_latents_golden(embedded, sampler):
    found = generate_embedded(embedded, sampler, "latent")
    check(found, golden(EMBEDDED.path)[f"latents_{sampler}"], LATENTS_TOLERANCE, f"embedded model, {sampler}")


def test_embedded_image_golden(embedded):
    found = generate_embedded(embedded, EMBEDDED.samplers[0], "np")
    check(found, golden(EMBEDDED.path)["images"], IMAGE_TOLERANCE, "embedded model, image")
