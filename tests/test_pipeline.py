"""The pipeline on the embedded model: arguments, seeds, batches, steps, output types, faults."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sd_numba import InputError, ModelError, StableDiffusionPipeline, kernels
from sd_numba.checkpoints.opening import embedded_model_path
from sd_numba.checks import resolve_seeds

PROMPT = "a red apple on a blue background"
FEW = {"num_inference_steps": 3, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusionPipeline.from_pretrained()


@pytest.fixture
def copied(tmp_path):
    """A copy of the embedded model to damage."""
    return shutil.copytree(embedded_model_path(), tmp_path / "model")


def test_the_apple_is_red_and_the_background_blue(pipe):
    picture = np.asarray(pipe(PROMPT, seed=42).images[0]).astype(int)
    assert picture.shape == (128, 128, 3)
    assert picture[70, 64, 0] > picture[70, 64, 1:].max() + 80
    assert all(picture[y, x, 2] > picture[y, x, 0] + 80 for y in (8, 120) for x in (8, 120))


def test_output_types(pipe):
    pictures = pipe(PROMPT, seed=1, output_type="np", **FEW).images
    assert pictures.dtype == np.float32
    assert pictures.shape == (1, 64, 64, 3)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    latents = pipe(PROMPT, seed=1, output_type="latent", **FEW).images
    assert latents.shape == (1, 4, 16, 16)
    np.testing.assert_array_equal(pipe.decode(latents), pictures)
    image = pipe(PROMPT, seed=1, **FEW).images[0]
    assert isinstance(image, Image.Image)
    np.testing.assert_array_equal(np.asarray(image), (pictures[0] * 255).round().astype(np.uint8))


def test_pictures_do_not_depend_on_threads_or_batches(pipe):
    out = pipe([PROMPT, "a fox"], seed=5, output_type="latent", **FEW)
    assert out.seeds == [5, 6]
    kernels.set_threads(1)
    try:
        alone = pipe("a fox", seed=6, output_type="latent", **FEW).images
    finally:
        kernels.set_threads(0)
    np.testing.assert_array_equal(alone[0], out.images[1])


def test_packed_and_mapped_weights_give_the_same(pipe):
    mapped = StableDiffusionPipeline.from_pretrained(weights="mmap")
    a = pipe(PROMPT, seed=3, output_type="np", **FEW).images
    np.testing.assert_array_equal(mapped(PROMPT, seed=3, output_type="np", **FEW).images, a)


def test_several_pictures_of_a_prompt_have_seeds_in_a_row(pipe):
    out = pipe("a fox", seed=7, num_images_per_prompt=2, output_type="latent", **FEW)
    assert out.seeds == [7, 8]
    assert not np.array_equal(out.images[0], out.images[1])
    again = pipe("a fox", seed=[8], output_type="latent", **FEW).images
    np.testing.assert_array_equal(again[0], out.images[1])


def test_negative_prompts_repeat_with_their_prompts(pipe):
    out = pipe(
        ["a fox", "a dog"],
        negative_prompt=["red", "blue"],
        num_images_per_prompt=2,
        seed=7,
        output_type="latent",
        **FEW,
    )
    second = pipe("a fox", negative_prompt="red", seed=8, output_type="latent", **FEW)
    third = pipe("a dog", negative_prompt="blue", seed=9, output_type="latent", **FEW)
    np.testing.assert_array_equal(out.images[1:3], np.concatenate([second.images, third.images]))


def test_latents_take_the_place_of_the_seed(pipe):
    noise = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    a = pipe("a fox", latents=noise, seed=1, output_type="latent", **FEW).images
    b = pipe("a fox", latents=noise, seed=2, output_type="latent", **FEW).images
    np.testing.assert_array_equal(a, b)


def test_guidance_up_to_one_runs_no_unconditional_pass(pipe, monkeypatch):
    batches = []
    unet = pipe.unet

    def spy(sample, timestep, context, **how):
        batches.append(context.batch)
        return unet(sample, timestep, context, **how)

    spy.config, spy.encode_context = unet.config, unet.encode_context
    monkeypatch.setattr(pipe, "unet", spy)
    pipe("a fox", seed=0, guidance_scale=1, output_type="latent", **FEW)
    pipe("a fox", seed=0, guidance_scale=2, output_type="latent", **FEW)
    assert batches == [1, 1, 1, 2, 2, 2]


def test_the_negative_prompt_matters(pipe):
    a = pipe("a fox", seed=0, output_type="latent", **FEW).images
    b = pipe("a fox", negative_prompt="orange", seed=0, output_type="latent", **FEW).images
    assert not np.array_equal(a, b)


def test_generate_yields_steps_and_can_be_left(pipe):
    steps = pipe.generate("a fox", seed=0, num_inference_steps=4, width=64, height=64)
    first = next(steps)
    assert (first.index, first.total) == (0, 4)
    assert first.latents.shape == (1, 4, 16, 16)
    assert first.seconds > 0
    steps.close()


def test_the_size_that_a_model_was_made_for_need_not_be_square(copied):
    config = copied / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": [8, 12]}))
    pipe = StableDiffusionPipeline.from_pretrained(copied)
    assert pipe("a fox", seed=0, num_inference_steps=1).images[0].size == (48, 32)


def test_wide_pictures(pipe):
    assert pipe("a fox", seed=0, num_inference_steps=1, width=96, height=36).images[0].size == (96, 36)


@pytest.mark.parametrize("prompt", ["", "🦊 狐狸 naïve", "a fox " * 500])
def test_any_text_is_a_prompt(pipe, prompt):
    assert np.isfinite(pipe(prompt, seed=0, output_type="latent", **FEW).images).all()


@pytest.mark.parametrize("name", StableDiffusionPipeline.from_pretrained().scheduler_names)
def test_every_sampler_runs(pipe, name):
    latents = pipe("a fox", seed=0, scheduler=name, output_type="latent", **FEW).images
    assert np.isfinite(latents).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 66}, "multiple of 4, such as 64 or 68"),
        ({"width": 0}, "width: found 0"),
        ({"width": 1_000_000}, "from 4 to 8192"),
        ({"height": -4}, "height: found -4"),
        ({"height": 64.0}, "height: found 64.0"),
        ({"num_inference_steps": 0}, "found 0"),
        ({"num_inference_steps": 100_000}, "100000"),
        ({"num_inference_steps": "20"}, "'20'"),
        ({"scheduler": "eulr"}, "euler"),
        ({"scheduler": ""}, "scheduler: found '', expected one of ddpm, ddim"),
        ({"guidance_scale": float("nan")}, "guidance_scale: found nan"),
        ({"guidance_scale": "high"}, "guidance_scale: found 'high'"),
        ({"rng": "gpu"}, "gpu"),
        ({"seed": [1, 2]}, "found 2 seeds for 1 pictures"),
        ({"latents": np.zeros((2, 4, 8, 8))}, "latents"),
        ({"latents": np.zeros((1, 4, 8, 8)), "width": 64}, "latents"),
        ({"output_type": "jpeg"}, "output_type: found 'jpeg', expected pil or np or latent"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: found 2 for 1 prompts"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: found 0"),
    ],
)
def test_wrong_arguments(pipe, options, words):
    with pytest.raises(InputError, match=words) as caught:
        pipe("a fox", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [[], [1], None, 3])
def test_wrong_prompts(pipe, prompt):
    with pytest.raises(InputError, match="prompt: found"):
        pipe(prompt)


def test_a_size_beyond_memory_is_refused(pipe, monkeypatch):
    monkeypatch.setattr("sd_numba.checks.available_memory", lambda: 10_000_000)
    with pytest.raises(InputError, match="choose a smaller one"):
        pipe("a fox")


def test_random_seeds_are_told():
    assert resolve_seeds(None, 2) != resolve_seeds(None, 2)
    seeds = resolve_seeds(-1, 3)
    assert seeds == list(range(seeds[0], seeds[0] + 3))
    with pytest.raises(InputError):
        resolve_seeds(2**64, 1)


def test_wrong_options_of_from_pretrained():
    for options in ({"precision": "f8"}, {"weights": "all"}, {"vae_tiling": "yes"}):
        with pytest.raises(InputError):
            StableDiffusionPipeline.from_pretrained(**options)


def test_nan_in_a_weight_is_blamed_on_the_tensor(copied):
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = "mid_block.resnets.0.conv1.weight"
    start = 8 + length + header[name]["data_offsets"][0]
    data[start : start + 2] = np.array([np.nan], np.float16).tobytes()
    file.write_bytes(data)
    pipe = StableDiffusionPipeline.from_pretrained(copied)
    with pytest.raises(ModelError, match=rf"tensor {name} holds NaN or infinite values \(1\)"):
        pipe("a fox", **FEW)


def test_a_model_whose_own_sampler_is_not_supported_runs_with_another(copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    config = copied / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("DPMSolverMultistepScheduler", "DEISMultistepScheduler"))
    pipe = StableDiffusionPipeline.from_pretrained(copied)
    with pytest.raises(ModelError, match=r"DEISMultistepScheduler.*choose a sampler"):
        pipe("a fox", **FEW)
    assert pipe("a fox", scheduler="euler", seed=0, **FEW).images[0].size == (64, 64)


def test_weights_can_be_packed_later(pipe):
    late = StableDiffusionPipeline.from_pretrained(weights="mmap")
    before = late.unet
    late.prepare("mmap")
    assert late.unet is before
    late.prepare("packed")
    assert late.unet is not before
    images = [p("a fox", seed=1, output_type="latent", **FEW).images for p in (pipe, late)]
    np.testing.assert_array_equal(*images)
    with pytest.raises(InputError, match="weights"):
        late.prepare("all")


def test_a_model_of_two_models_is_refused(copied):
    config = copied / "unet" / "config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 192', '"cross_attention_dim": 256'))
    with pytest.raises(ModelError):
        StableDiffusionPipeline.from_pretrained(copied)
