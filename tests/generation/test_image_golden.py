"""Pictures from pictures against diffusers' image-to-image and inpainting pipelines, and what else holds for them."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from sd_numba import StableDiffusionPipeline, kernels
from sd_numba.errors import InputError, ModelError
from sd_numba.samplers.noise import make_noise
from tests.golden.cases import CASES, IMAGE_CASES, IMAGES, INPAINTING_MODEL
from tests.golden.compare import check, golden, scratch

TOLERANCE = 2e-5  # measured: 2e-7 to 3e-6, with AVX2 and with AVX-512
MODELS = {case.name: case for case in (*CASES, INPAINTING_MODEL)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Kernels this small wait longer for a second thread on a busy machine than they run; it changes no bit."""
    kernels.set_threads(1)
    yield
    kernels.set_threads(0)


@functools.cache
def opened(name: str) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(None if name == "embedded" else MODELS[name].write(scratch()))


@pytest.mark.parametrize("case", IMAGE_CASES, ids=lambda case: case.name)
def test_latents_golden(case):
    found = opened(case.model)(
        list(case.prompts),
        negative_prompt=case.negative_prompt,
        image=case.image(),
        mask_image=case.mask() if case.kind == "inpaint" else None,
        strength=case.strength,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale,
        seed=case.seed,
        scheduler=case.sampler,
        output_type="latent",
    ).images
    check(found, golden(IMAGES)[case.name], TOLERANCE, case.name)


FEW = {"num_inference_steps": 4, "seed": 1, "output_type": "latent", "scheduler": "euler"}


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).random((height, width, 3)).astype(np.float32)


def encoded(pipe: StableDiffusionPipeline, image: np.ndarray) -> np.ndarray:
    """The latents that a run with the seed of `FEW` draws for a picture."""
    return pipe.encode(2 * image[None] - 1, [make_noise("cpu", FEW["seed"])])


@pytest.mark.parametrize("strength", [0.75, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler", "euler-a", "heun", "dpm++2m", "unipc"])
def test_black_keeps_the_latents_of_the_picture(sampler, strength):
    pipe, image = opened("sd1"), picture(64, 96)
    mask = np.zeros((64, 96), np.float32)
    mask[:32] = 1
    options = {**FEW, "scheduler": sampler, "strength": strength}
    found = pipe("a fox", image=image, mask_image=mask, **options).images
    wanted, half = encoded(pipe, image), found.shape[2] // 2
    np.testing.assert_array_equal(found[:, :, half:], wanted[:, :, half:])
    assert np.abs(found[:, :, :half] - wanted[:, :, :half]).max() > 0.1


@pytest.mark.parametrize("options", [{}, {"mask_image": np.ones((64, 64))}])
def test_full_strength_begins_with_pure_noise_only_under_a_mask(options):
    """Without one the latents of the picture still shine through it, as in diffusers."""
    pipe = opened("sd1")
    seen = []
    for image in (picture(64, 64), 1 - picture(64, 64)):
        step = next(pipe.generate("a fox", image=image, strength=1.0, seed=1, scheduler="euler", **options))
        seen.append(step.latents)
    assert np.array_equal(*seen) == bool(options)


def test_at_full_strength_nothing_of_the_painted_part_is_left():
    pipe, image = opened("sd1"), picture(64, 64)
    mask = np.zeros((64, 64), np.float32)
    mask[:, :32] = 1
    other = image.copy()
    other[:, :8] = 0.5
    a, b = (pipe("a fox", image=i, mask_image=mask, strength=1.0, **FEW).images for i in (image, other))
    assert np.abs(a - b)[..., :2].max() < 2e-3 * np.abs(a).max()  # what the encoder lets through to the kept side
    a, b = (pipe("a fox", image=i, mask_image=mask, strength=0.5, **FEW).images for i in (image, other))
    assert np.abs(a - b)[..., :2].max() > 0.05


def test_sizes_are_the_pictures():
    pipe = opened("sd1")
    factor = pipe.vae.factor
    assert pipe("a fox", image=picture(64, 96), **FEW).images.shape[2:] == (64 // factor, 96 // factor)
    assert pipe("a fox", image=picture(70, 100), **FEW).images.shape[2:] == (70 // factor, 100 // factor)
    assert pipe("a fox", image=picture(70, 100), width=64, height=32, **FEW).images.shape[2:] == (
        32 // factor,
        64 // factor,
    )


def test_a_batch_from_one_picture_is_each_of_it():
    pipe, image = opened("sd1"), picture(64, 64)
    both = pipe(["a fox", "a hen"], image=image, **FEW).images
    for i, prompt in enumerate(("a fox", "a hen")):
        alone = pipe(prompt, image=image, **{**FEW, "seed": 1 + i}).images
        np.testing.assert_array_equal(both[i : i + 1], alone)


def test_a_model_for_inpainting_makes_pictures_without_one():
    pipe = opened("inpainting")
    assert pipe.paints_in
    text = pipe("a fox", **FEW).images
    grey = np.full((*pipe.default_size, 3), 0.5, np.float32)
    painted = pipe("a fox", image=grey, mask_image=np.ones(grey.shape[:2]), strength=1.0, **FEW).images
    assert text.shape == painted.shape and np.isfinite(text).all()
    assert np.abs(text - painted).max() < 1e-3 * np.abs(text).max()  # all is to be painted, around nothing


def test_a_model_for_inpainting_makes_pictures_from_one_without_a_mask():
    """The less of the schedule is run, the nearer the result is to the picture."""
    pipe, image = opened("inpainting"), picture(64, 64)
    wanted = encoded(pipe, image)
    distances = [
        np.abs(pipe("a fox", image=image, strength=strength, **FEW).images - wanted).max()
        for strength in (0.25, 0.5, 0.75, 1.0)
    ]
    assert distances[0] < 0.3 * np.abs(wanted).max() and distances == sorted(distances)


def test_models_that_edit_by_instructions_are_refused():
    case = replace(INPAINTING_MODEL, name="pix2pix", unet={**INPAINTING_MODEL.unet, "in_channels": 8})
    with pytest.raises(ModelError, match="takes 8 channels, 4 of them latents: a model for editing by instructions"):
        StableDiffusionPipeline.from_pretrained(case.write(scratch()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask_image": np.zeros((8, 8))}, "mask_image needs image as well"),
        ({"strength": 0.5}, "strength needs image as well"),
        ({"image": 7}, "image: found int, expected a PIL image"),
        ({"image": np.zeros((8, 8, 4))}, r"image: found shape \(8, 8, 4\)"),
        ({"image": picture(64, 64), "strength": 1.5}, "strength: found 1.5, expected a number from 0 to 1"),
        ({"image": picture(64, 64), "strength": 0.01}, "a strength of 0.01 runs less than one of 20 steps"),
        ({"image": picture(64, 64), "mask_image": "none.png"}, "none.png: no such file"),
        ({"image": picture(64, 64), "strength": -0.1}, "strength: found -0.1, expected a number from 0 to 1"),
        ({"image": picture(64, 64), "strength": "half"}, "strength: found 'half'"),
        ({"image": picture(64, 64), "mask_image": np.zeros((3, 64, 64))}, "mask_image: found 3 for 1 pictures"),
        ({"image": picture(64, 64), "mask_image": np.zeros((64, 64, 3))}, r"mask_image: found shape \(64, 64, 3\)"),
        ({"image": np.zeros((3, 64, 64, 3))}, "image: found 3 for 1 pictures, expected as many or one"),
        ({"image": picture(64, 64), "latents": np.zeros((1, 4, 8, 8))}, "latents and image exclude each other"),
        (
            {"image": picture(64, 64), "hires_scale": 2},
            "hires_scale and image exclude each other; width and",
        ),
        ({"image": picture(2, 2)}, "height: found 0"),
    ],
)
def test_what_does_not_fit_together(options, words):
    with pytest.raises(InputError, match=words) as caught:
        opened("sd1").generate("a fox", **options)
    assert "\n" not in str(caught.value)
