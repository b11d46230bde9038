"""What scripts for diffusers call: scheduler classes, generators, the pipeline's methods and arguments, helpers."""

import inspect
import logging

import numpy as np
import pytest
from PIL import Image

import sd_numba
from sd_numba import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    Generator,
    InputError,
    ModelError,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from sd_numba.checkpoints.opening import embedded_model_path
from sd_numba.diffusers_api.schedulers import SCHEDULERS
from sd_numba.samplers import SAMPLER_NAMES, config_with_sampler, sampler_name_from_config
from sd_numba.samplers.noise import TorchNoise, make_noise
from sd_numba.utils import load_image, make_image_grid

MODEL = embedded_model_path()
FEW = {"num_inference_steps": 2, "width": 40, "height": 36, "guidance_scale": 3, "output_type": "latent"}
GREY = Image.new("RGB", (40, 36), "grey")
HALF = Image.new("L", (40, 36))
HALF.paste(255, (20, 0, 40, 36))


@pytest.fixture
def pipe():
    return StableDiffusionPipeline.from_pretrained(weights="mmap")


# --- schedulers -------------------------------------------------------------------------------------------------------


def test_every_scheduler_is_exported_and_is_a_sampler():
    for name, kind in SCHEDULERS.items():
        assert getattr(sd_numba, name) is kind
        assert kind().sampler in SAMPLER_NAMES
    assert {config_with_sampler(name, {})["_class_name"] for name in SAMPLER_NAMES} == set(SCHEDULERS)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_a_config_can_be_made_to_ask_for_any_sampler(name):
    for config in ({}, {"algorithm_type": "sde-dpmsolver++", "beta_start": 0.001}):
        found = config_with_sampler(name, config)
        assert sampler_name_from_config(found) == name
        assert found.get("beta_start") == config.get("beta_start")


def test_a_scheduler_is_swapped(pipe):
    own = pipe.scheduler
    assert isinstance(own, DPMSolverMultistepScheduler)
    pipe.scheduler = EulerDiscreteScheduler.from_config(own.config, use_karras_sigmas=True)
    assert pipe.scheduler_name() == "euler-karras"
    assert pipe.scheduler_config == {
        **own.config, "_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True
    }  # fmt: skip
    swapped = pipe("a fox", seed=1, **FEW).images
    named = StableDiffusionPipeline.from_pretrained(scheduler=pipe.scheduler)("a fox", seed=1, **FEW).images
    np.testing.assert_array_equal(swapped, named)
    pipe.scheduler = own
    np.testing.assert_array_equal(pipe("a fox", seed=1, scheduler="euler-karras", **FEW).images, swapped)
    assert not np.array_equal(pipe("a fox", seed=1, **FEW).images, swapped)


def test_settings_outlive_a_scheduler_that_has_none_such(pipe):
    noisy = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    ddim = DDIMScheduler.from_config(noisy.config)
    assert ddim.sampler == "ddim"
    assert ddim.config.clip_sample is False  # as the file says, where the class says True
    assert DPMSolverMultistepScheduler.from_config(ddim.config).sampler == "dpm++2m-sde"


def test_a_change_without_meaning_for_a_class_is_left_out_and_said(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        made = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    assert "EulerAncestralDiscreteScheduler: use_karras_sigmas" in caplog.text
    assert "use_karras_sigmas" not in made.config


def test_schedulers_of_a_models_folder(pipe):
    found = EulerDiscreteScheduler.from_pretrained(MODEL, subfolder="scheduler", revision="main", steps_offset=0)
    assert found.config == {**pipe.scheduler.config, "_class_name": "EulerDiscreteScheduler", "steps_offset": 0}
    assert EulerDiscreteScheduler.from_pretrained(MODEL / "scheduler").config.steps_offset == 1
    with pytest.raises(ModelError, match="no such file"):
        EulerDiscreteScheduler.from_pretrained(MODEL, subfolder="sched")


def test_a_config_is_read_as_mapping_and_by_attributes_and_not_changed(pipe):
    config = pipe.scheduler.config
    assert config.beta_start == config["beta_start"] == dict(config)["beta_start"]
    with pytest.raises(AttributeError, match="use_karras_sigmas"):
        _ = config.use_karras_sigmas
    with pytest.raises(AttributeError):
        config.use_karras_sigmas = True
    with pytest.raises(TypeError):
        config["use_karras_sigmas"] = True


def test_a_config_whose_own_sampler_is_not_supported_makes_others(pipe):
    pipe.scheduler_config = {**pipe.scheduler_config, "_class_name": "DEISMultistepScheduler"}
    pipe.defaults["scheduler"] = None
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler_name() == "euler"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EulerDiscreteScheduler(use_karras_sigma=1), r"'use_karras_sigma'.*did you mean use_karras_sigmas\?"),
        (lambda: DDIMScheduler.from_config({}, eta=1), "DDIMScheduler: found the setting 'eta'"),
        (lambda: DDIMScheduler.from_config("model"), "config: found str"),
    ],
)
def test_wrong_settings(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(
    "settings", [{"algorithm_type": "dpmsolver"}, {"use_lu_lambdas": True}, {"beta_schedule": "sigmoid"}]
)
def test_values_of_settings_that_are_not_supported(settings):
    with pytest.raises(ModelError, match=next(iter(settings))):
        DPMSolverMultistepScheduler(**settings)


def test_schedulers_of_another_library_are_refused(pipe):
    with pytest.raises(InputError, match="scheduler: found str"):
        pipe.scheduler = "euler"


def test_diffusers_has_all_of_the_settings():
    pytest.importorskip("scipy")  # without it diffusers has an empty class for LMS
    diffusers = pytest.importorskip("diffusers")
    for name, kind in SCHEDULERS.items():
        theirs = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
        assert kind.settings <= theirs
        flows = {"flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"}  # not for these models
        assert theirs - kind.settings <= flows | {"variance_type", "solver_p"}


# --- generators -------------------------------------------------------------------------------------------------------


def test_a_generator_is_the_stream_of_its_seed():
    generator = Generator().manual_seed(3)
    assert (generator.device, generator.initial_seed()) == ("cpu", 3)
    np.testing.assert_array_equal(generator.stream.normal((20,)), TorchNoise(3).normal((20,)))
    cuda = Generator("cuda:0").manual_seed(3)
    np.testing.assert_array_equal(cuda.stream.normal((20,)), make_noise("cuda", 3).normal((20,)))
    assert generator.seed() == generator.initial_seed() != 3
    assert Generator().manual_seed(-1).initial_seed() == 2**64 - 1


@pytest.mark.parametrize(
    ("arguments", "seed", "words"),
    [
        (("mps",), 0, "^device: found 'mps', expected cpu or cuda$"),
        ((), "0", "^seed: found '0', expected a whole number"),
        ((), 2**64, "^seed: found 18446744073709551616, expected a whole number"),
    ],
)
def test_wrong_generators(arguments, seed, words):
    with pytest.raises(InputError, match=words):
        Generator(*arguments).manual_seed(seed)


def test_generators_are_as_good_as_seeds(pipe):
    for sampler in ("euler", "euler-a"):
        out = pipe(["a fox"] * 2, seed=[5, 9], scheduler=sampler, **FEW)
        generators = [Generator().manual_seed(seed) for seed in (5, 9)]
        again = pipe("a fox", num_images_per_prompt=2, generator=generators, scheduler=sampler, **FEW)
        np.testing.assert_array_equal(again.images, out.images)
        assert again.seeds == out.seeds == [5, 9]


def test_several_pictures_are_drawn_from_one_generator_at_once_and_runs_go_on_with_it(pipe):
    # 360 values a picture, not a multiple of 16: torch draws two of them at once otherwise than one after the other
    stream, generator = TorchNoise(7), Generator().manual_seed(7)
    for _ in range(2):
        expected = pipe("a fox", num_images_per_prompt=2, latents=stream.normal((2, 4, 9, 10)), seed=0, **FEW)
        out = pipe("a fox", num_images_per_prompt=2, generator=generator, **FEW)
        np.testing.assert_array_equal(out.images, expected.images)
        assert out.seeds == [7, 7]


def test_noise_within_a_run_comes_from_the_generator_too(pipe):
    stream = TorchNoise(7)
    latents = stream.normal((2, 4, 9, 10))
    generator = Generator().manual_seed(7)
    out = pipe("a fox", num_images_per_prompt=2, generator=generator, scheduler="euler-a", **FEW)
    rest = Generator()
    rest.stream = stream
    again = pipe("a fox", num_images_per_prompt=2, generator=rest, latents=latents, scheduler="euler-a", **FEW)
    np.testing.assert_array_equal(out.images, again.images)


@pytest.mark.parametrize("mask", [None, HALF])
def test_one_generator_for_one_picture_that_starts_from_another(pipe, mask):
    settings = {"image": GREY, "mask_image": mask, "strength": 0.9, **FEW}
    out = pipe("a fox", generator=Generator().manual_seed(4), **settings)
    np.testing.assert_array_equal(out.images, pipe("a fox", seed=4, **settings).images)


@pytest.mark.parametrize(("mask", "draws"), [(None, [1, 2]), (HALF, [1, 2, 1])])
def test_one_generator_draws_for_a_picture_once_and_then_for_all_that_are_made_of_it(pipe, mask, draws):
    generator, shapes = Generator().manual_seed(4), []
    normal = generator.stream.normal
    generator.stream.normal = lambda shape: (shapes.append(tuple(shape)), normal(shape))[1]
    settings = {"image": GREY, "mask_image": mask, "strength": 1.0, "num_images_per_prompt": 2, **FEW}
    assert pipe("a fox", generator=generator, **settings).images.shape == (2, 4, 9, 10)
    assert [(1, *shape)[-4] for shape in shapes] == draws


def test_generators_of_torch_are_drawn_from(pipe):
    torch = pytest.importorskip("torch")
    ours, theirs = Generator().manual_seed(6), torch.Generator().manual_seed(6)
    for _ in range(2):
        a, b = (pipe("a fox", generator=one, scheduler="euler-a", **FEW).images for one in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generator": Generator(), "seed": 1}, "generator excludes seed and rng"),
        ({"generator": Generator(), "rng": "cuda"}, "generator excludes seed and rng"),
        ({"generator": [Generator()] * 3}, "generator: found 3 for 1 pictures"),
        ({"generator": []}, "generator: found 0 for 1 pictures"),
        ({"generator": 42}, "generator: found int"),
        ({"prompt_embeds": np.zeros((1, 77, 192))}, "prompt_embeds: found array"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs: found {'scale': 0.5}, expected None"),
        ({"guidance_rescale": 0.7}, "guidance_rescale: found 0.7, expected 0 or None"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}, r"expected \['latents'\] or None"),
        ({"output_type": "pt"}, "output_type: found 'pt'"),
    ],
)
def test_wrong_arguments_of_a_call(pipe, options, words):
    with pytest.raises(InputError, match=words) as caught:
        pipe("a fox", **options)
    assert "\n" not in str(caught.value)


# --- the pipeline -----------------------------------------------------------------------------------------------------


def test_what_a_gpu_would_need_changes_nothing(pipe):
    before = pipe("a fox", seed=1, **FEW).images
    assert pipe.to("cuda") is pipe.to("cpu") is pipe.to(device="cuda", dtype="float16") is pipe
    pipe.enable_attention_slicing("max")
    pipe.disable_attention_slicing()
    pipe.enable_vae_slicing()
    pipe.enable_model_cpu_offload(gpu_id=0)
    pipe.enable_sequential_cpu_offload()
    pipe.enable_xformers_memory_efficient_attention()
    pipe.set_progress_bar_config(disable=True)
    pipe.fuse_lora()
    pipe.safety_checker = None
    assert (pipe.device, pipe.dtype, pipe.safety_checker) == ("cpu", np.float32, None)
    np.testing.assert_array_equal(pipe("a fox", seed=1, **FEW).images, before)


def test_tiling_is_switched(pipe):
    pipe.enable_vae_tiling()
    assert pipe.vae_tiling == "on"
    pipe.disable_vae_tiling()
    assert pipe.vae_tiling == "auto"


def test_the_scale_of_a_lora_is_not_ignored(pipe):
    with pytest.raises(InputError, match=r"lora_scale: found 0\.5"):
        pipe.fuse_lora(lora_scale=0.5)


def test_the_file_of_a_lora_is_named_beside_its_folder(pipe, tmp_path):
    (tmp_path / "style.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"style\.safetensors: (?!no such file)"):
        pipe.load_lora_weights(tmp_path, weight_name="style.safetensors")


def test_arguments_of_diffusers_open_a_model():
    pipe = StableDiffusionPipeline.from_pretrained(
        str(MODEL), torch_dtype="float16", use_safetensors=True, variant="fp16", safety_checker=None,
        requires_safety_checker=False, local_files_only=True, low_cpu_mem_usage=True, revision="main", cache_dir="x",
        scheduler=DDIMScheduler.from_pretrained(MODEL, subfolder="scheduler"),
    )  # fmt: skip
    assert pipe.scheduler_name() == "ddim"
    with pytest.raises(InputError, match=r"no argument use_safetensor \(did you mean use_safetensors\?\)"):
        StableDiffusionPipeline.from_pretrained(use_safetensor=True)


def test_arguments_and_results_of_diffusers(pipe):
    idle = {"guidance_rescale": 0.0, "cross_attention_kwargs": None, "callback_on_step_end_tensor_inputs": ["latents"]}
    out = pipe("a fox", 36, 40, 2, seed=1, guidance_scale=3, eta=0.0, **idle)
    assert out.nsfw_content_detected is None
    assert out.images[0].size == (40, 36)
    images, flagged = pipe("a fox", 36, 40, 2, seed=1, guidance_scale=3, return_dict=False)
    assert flagged is None
    np.testing.assert_array_equal(np.asarray(images[0]), np.asarray(out.images[0]))


@pytest.mark.parametrize(("arguments", "options"), [((36, 40, 2, 7.5), {}), ((36,), {"height": 36})])
def test_arguments_that_need_a_name(pipe, arguments, options):
    with pytest.raises(InputError, match="without names, expected at most height and width and num_inference_steps"):
        pipe("a fox", *arguments, **options)


def test_the_names_of_the_tasks_take_their_pictures_without_names(pipe):
    settings = {"seed": 1, "num_inference_steps": 2, "guidance_scale": 3, "output_type": "latent"}
    changing = StableDiffusionImg2ImgPipeline.from_pretrained(weights="mmap")
    assert isinstance(changing, sd_numba.AutoPipelineForImage2Image)
    expected = pipe("a fox", image=GREY, strength=0.6, **settings).images
    np.testing.assert_array_equal(changing("a fox", GREY, 0.6, **settings).images, expected)
    painting = StableDiffusionInpaintPipeline.from_pretrained(weights="mmap")
    assert isinstance(painting, sd_numba.AutoPipelineForInpainting)
    size = {"height": 36, "width": 40}
    expected = pipe("a fox", image=GREY, mask_image=HALF, **settings).images
    np.testing.assert_array_equal(painting("a fox", GREY, HALF, **size, **settings).images, expected)
    assert painting("a fox", GREY, HALF, **settings).images.shape == (1, 4, 32, 32)  # the model's size, as in diffusers
    assert sd_numba.DiffusionPipeline is sd_numba.AutoPipelineForText2Image is StableDiffusionPipeline


# --- helpers ----------------------------------------------------------------------------------------------------------


def test_pictures_are_loaded_from_files_alone(tmp_path):
    GREY.save(tmp_path / "grey.png")
    for image in (str(tmp_path / "grey.png"), tmp_path / "grey.png", GREY.convert("L")):
        found = load_image(image)
        assert (found.mode, found.size, found.getpixel((0, 0))) == ("RGB", (40, 36), (128, 128, 128))
    with pytest.raises(InputError, match=r"found a URL.*nothing is downloaded"):
        load_image("https://example.org/fox.png")
    with pytest.raises(InputError, match="no such file"):
        load_image("fox.png")


def test_grids():
    colours = ["red", "lime", "blue", "white", "black", "grey"]
    grid = make_image_grid([Image.new("RGB", (4, 2), colour) for colour in colours], rows=2, cols=3)
    assert grid.size == (12, 4)
    assert [grid.getpixel((x, y)) for y in (0, 3) for x in (3, 4, 11)] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128)
    ]  # fmt: skip
    assert make_image_grid([GREY, GREY], 1, 2, resize=8).size == (16, 8)
    with pytest.raises(InputError, match="images: found 1, expected 2 x 2"):
        make_image_grid([GREY], 2, 2)
