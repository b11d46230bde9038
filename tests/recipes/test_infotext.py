"""Recipes as the text in pictures: ours come back exactly, those of other programs as far as can be."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sd_numba.recipes.a1111 import Parameters, format_parameters, parse_parameters, sampler_title
from sd_numba.recipes.infotext import recipe_from_parameters, recipe_to_parameters
from sd_numba.recipes.recipe import Recipe
from sd_numba.samplers import SAMPLER_NAMES, canonical_sampler_name
from tests.recipes.test_recipe import recipes


def written(recipe):
    return format_parameters(recipe_to_parameters(recipe, "0.1.0"))


def read(text):
    return recipe_from_parameters(parse_parameters(text))


@settings(max_examples=400, deadline=None)
@given(recipe=recipes())
@example(recipe=Recipe("Negative prompt: x\ny", "z\nNegative prompt: a", seed=1, num_inference_steps=1, rng="cuda"))
@example(
    recipe=Recipe(' "a", b: c\n\n', "Steps: 20, Seed: 5, Size: 1x1", seed=1, num_inference_steps=1, width=8, height=8)
)
def test_our_own_text_gives_the_same_recipe(recipe):
    found, notes = read(written(recipe))
    assert found == recipe
    assert notes == []


def test_the_text_of_a_picture():
    recipe = Recipe(
        "a cat", "blurry", seed=42, num_inference_steps=20, guidance_scale=7.5, width=512, height=768,
        scheduler="dpm++2m-karras", model_hash="6ce0161689", model_name="v1-5-pruned-emaonly",
    )  # fmt: skip
    assert written(recipe) == (
        "a cat\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, "
        "Seed: 42, Size: 512x768, Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, RNG: CPU, Version: sd-numba 0.1.0"
    )


def test_the_text_of_a_picture_with_everything():
    recipe = Recipe(
        "a cat", seed=1, num_inference_steps=20, guidance_scale=7.0, width=512, height=512, scheduler="euler-a",
        rng="cuda", clip_skip=1, strength=0.75, image="a, b.png", image_hash="0123456789", expand=(0, 64, 0, 0),
        cfg_interval=(0.0, 0.8), cache="deepcache:3", tome=0.5, precision="bf16", vae_tiling=True, vae="v.safetensors",
        lora_hashes=(("style", "0123456789"), ("two", "abcdef0123")), prompt_syntax="plain",
    )  # fmt: skip
    assert written(recipe) == (
        "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, VAE: v.safetensors, "
        'Denoising strength: 0.75, Clip skip: 2, Token merging ratio: 0.5, Init image: "a, b.png", '
        'Init image hash: 0123456789, Expand: "0,64,0,0", RNG: NV, CFG interval: 0-0.8, Cache: "deepcache:3", '
        "Precision: bf16, VAE tiling: on, Prompt syntax: plain, "
        'Lora hashes: "style: 0123456789, two: abcdef0123", Version: sd-numba 0.1.0'
    )
    hires = Recipe("a cat", hires_scale=2.0, hires_steps=10, hires_strength=0.55, strength=0.9)
    assert written(hires) == (
        "a cat\nInit image strength: 0.9, RNG: CPU, Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent, "
        "Denoising strength: 0.55, Version: sd-numba 0.1.0"
    )


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_titles_of_samplers_lead_back(name):
    title = sampler_title(name)
    found, notes = recipe_from_parameters(Parameters("", "", {**title, "Version": "sd-numba 0.1.0"}))
    assert (found.scheduler, notes) == (name, [])
    assert canonical_sampler_name(title["Sampler"])


LINE = "Steps: 20, Sampler: {}, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: cc6cb27103, Model: v1-5"


@pytest.mark.parametrize(
    ("sampler", "rest", "wanted"),
    [
        ("Euler a", "", "euler-a"),
        ("DPM++ 2M Karras", "", "dpm++2m-karras"),  # up to version 1.8
        ("DPM++ 2M", ", Version: v1.7.0", "dpm++2m"),
        ("DPM++ 2M", ", Schedule type: Karras, Version: v1.10.1", "dpm++2m-karras"),
        ("DPM++ 2M", ", Version: v1.10.1", "dpm++2m-karras"),  # the automatic choice of that version
        ("DPM++ 2M SDE", ", Version: v1.9.0", "dpm++2m-sde-exponential"),
        ("DPM++ 2M", ", Schedule type: Uniform, Version: v1.10.1", "dpm++2m"),
        ("Euler", ", Schedule type: Automatic, Version: v1.10.1", "euler"),
        ("Euler", ", Schedule type: Exponential, Version: f2.0.1v1.10.1-previous-305", "euler-exponential"),  # Forge
        ("UniPC", "", "unipc"),
        ("PLMS", "", "pndm"),
        ("LCM", "", "lcm"),
        ("DDIM", "", "ddim"),
        ("euler karras", ", Version: stable-diffusion.cpp", "euler-karras"),
        ("euler_a discrete", ", Version: stable-diffusion.cpp", "euler-a"),
        ("dpm++2m", ", Version: ComfyUI", "dpm++2m"),
    ],
)
def test_samplers_of_other_programs(sampler, rest, wanted):
    found, notes = read(f"a cat\n{LINE.format(sampler)}{rest}")
    assert (found.scheduler, notes) == (wanted, [])
    assert (found.seed, found.width, found.model_hash) == (965400086, 512, "cc6cb27103")


def test_samplers_that_are_not_known():
    found, notes = read(f"a cat\n{LINE.format('Restart')}")
    assert found.scheduler is None
    (note,) = notes
    assert note.startswith("Sampler 'Restart': not supported, left out; choose one of ddpm, ddim")
    found, notes = read(f"a cat\n{LINE.format('Euler')}, Schedule type: Beta")
    assert found.scheduler == "euler" and notes == ["Schedule type 'beta': not supported with euler, left out"]


@pytest.mark.parametrize(
    ("rest", "wanted"),
    [
        ("", "cuda"),  # AUTOMATIC1111's default, which it does not write
        (", RNG: CPU", "cpu"),
        (", RNG: GPU", "cuda"),
        (", RNG: NV", "cuda"),
        (", Version: ComfyUI", "cpu"),
        (", Version: v0.3.76-comfyui", "cpu"),
        (", Version: sd-numba 0.1.0", "cpu"),
        (", RNG: std_default", "cpu"),
    ],
)
def test_whose_noise(rest, wanted):
    found, notes = read(f"a cat\n{LINE.format('Euler')}{rest}")
    assert found.rng == wanted
    words = "RNG 'std_default': not supported, left out; choose one of cpu, cuda"
    assert notes == ([words] if "std_default" in rest else [])


def test_two_kinds_of_noise():
    line = f"a cat\n{LINE.format('Euler')}, RNG: cuda, Sampler RNG"
    assert read(f"{line}: cuda")[1] == []
    found, notes = read(f"{line}: cpu")
    assert found.rng == "cuda" and notes == ["Sampler RNG 'cpu': not supported, left out"]


def test_a_picture_of_automatic1111_with_a_second_pass():
    text = (
        "a (cat:1.2), <lora:style:0.8>\nNegative prompt: bad, [worse]\n"
        "Steps: 25, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 7, Size: 512x768, Model hash: cc6cb27103, "
        "Model: v1-5, VAE hash: 735e4c3a44, VAE: vae-ft-mse.safetensors, Denoising strength: 0.4, Clip skip: 2, "
        "ENSD: 31337, Token merging ratio: 0.5, Hires upscale: 2, Hires steps: 0, Hires upscaler: Latent, "
        'Lora hashes: "style: aabbccddeeff", TI hashes: "easynegative: c74b4e810b03", Version: v1.6.0'
    )
    found, notes = read(text)
    assert found.prompt == "a (cat:1.2), <lora:style:0.8>" and found.negative_prompt == "bad, [worse]"
    assert (found.hires_scale, found.hires_steps, found.hires_strength, found.strength) == (2.0, None, 0.4, None)
    assert (found.clip_skip, found.tome, found.vae) == (1, 0.5, "vae-ft-mse.safetensors")
    assert found.lora_hashes == (("style", "aabbccddeeff"),) and found.prompt_syntax == "a1111"
    assert notes == ["ENSD: not supported, left out"]


def test_second_passes_by_size_and_other_upscalers():
    found, notes = read(
        f"a\n{LINE.format('Euler')}, Denoising strength: 0.5, Hires resize: 1024x1024, Hires upscaler: 4x"
    )
    assert found.hires_scale == 2 and found.hires_strength == 0.5
    assert notes == ["Hires upscaler '4x': not supported, replaced by Latent"]
    found, notes = read(f"a\n{LINE.format('Euler')}, Hires resize: 1024x768")
    assert found.hires_scale is None and notes == ["Hires resize: a change of aspect ratio is not supported, left out"]


def test_a_picture_from_a_picture_of_another_program():
    found, notes = read(
        f"a\n{LINE.format('Euler')}, Denoising strength: 0.6, Init image hash: 0123456789, Mask blur: 4"
    )
    assert found.strength == 0.6 and found.image_hash is None and found.image is None
    assert notes[0].startswith("Init image: not named; give the picture")
    assert "Mask blur: not supported, left out" in notes


def test_a_picture_of_stable_diffusion_cpp():
    tail = json.dumps({
        "loras": [{"name": "C:\\loras\\style.safetensors", "multiplier": 0.7}],
        "hires": {"enabled": True, "scale": 1.5, "steps": 8, "upscaler": "Latent", "denoising_strength": 0.3},
    })  # fmt: skip
    found, notes = read(
        "a cat\nSteps: 20, CFG scale: 7.000000, Guidance: 3.5, Eta: 0.0, Seed: 42, Size: 512x512, Model: sd.gguf, "
        f"RNG: cuda, Sampler: euler_a karras, Version: stable-diffusion.cpp master-1, SDCPP: {tail}"
    )
    assert found.prompt == "a cat <lora:style:0.7>"
    assert (found.hires_scale, found.hires_steps, found.hires_strength) == (1.5, 8, 0.3)
    assert (found.rng, found.guidance_scale, found.seed) == ("cuda", 7.0, 42)
    assert found.scheduler == "euler-a" and found.hires_scale == 1.5
    assert notes == ["Schedule type 'karras': not supported with euler-a, left out"]


SDCPP = f"a <lora:x:1>\n{LINE.format('euler')}, RNG: cpu, Version: stable-diffusion.cpp, SDCPP: "


@pytest.mark.parametrize(
    ("record", "prompt", "scale", "notes"),
    [
        ({"loras": [{"name": "y.safetensors"}]}, "a <lora:x:1>", None, []),  # the prompt says it already
        ({"loras": {"name": "y"}, "hires": []}, "a <lora:x:1>", None, []),
        ({"hires": {"enabled": False, "scale": 2}}, "a <lora:x:1>", None, []),
        ({"hires": {"enabled": True, "scale": 2, "target_width": 768, "target_height": 768}}, "a <lora:x:1>", 1.5, []),
        ({"hires": {"enabled": True, "scale": "x"}}, "a <lora:x:1>", None,
         ["Hires upscale: found 'x', expected a number; left out"]),
        ([1], "a <lora:x:1>", None, []),
    ],
)  # fmt: skip
def test_what_the_json_of_stable_diffusion_cpp_says(record, prompt, scale, notes):
    found, found_notes = read(SDCPP + json.dumps(record))
    assert (found.prompt, found.hires_scale, found_notes) == (prompt, scale, notes)


def test_a_picture_of_civitai():
    found, notes = read(
        "a cat, sitting\nNegative prompt: (worst quality:1.4)\nSteps: 25, Sampler: Euler a, CFG scale: 4, "
        "Seed: 2345, Size: 832x1216, Clip skip: 2, Created Date: 2024-10-09T19:24:45.5466183Z, "
        'Civitai resources: [{"type":"checkpoint","modelVersionId":914390,"modelName":"X, Y: Seed: 9"},'
        '{"type":"lora","weight":0.7,"modelVersionId":1}], Civitai metadata: {"remixOfId":5}'
    )
    assert notes == []
    assert found == Recipe(
        "a cat, sitting", "(worst quality:1.4)", seed=2345, num_inference_steps=25, guidance_scale=4.0, width=832,
        height=1216, scheduler="euler-a", rng="cuda", clip_skip=1,
    )  # fmt: skip


@pytest.mark.parametrize("version", ["ComfyUI", "ComfyUi", "v0.3.76-comfyui"])
@pytest.mark.parametrize(
    "sampler",
    ["DPM++ 2M Karras", "dpmpp_2m_karras", "DPM++ 2M Karras, Schedule type: karras", "DPM++ 2M, Schedule type: Karras"],
)
def test_pictures_of_comfyui(version, sampler):
    """Nodes that write AUTOMATIC1111's text."""
    found, notes = read(
        f"a cat\nNegative prompt: bad\nSteps: 20, Sampler: {sampler}, CFG scale: 7.0, Seed: 1, Size: 512x768, "
        "Clip skip: 2, Model hash: 879db523c3, Model: dreamshaper_8, "
        f'Hashes: {{"model":"879db523c3", "LORA:x, y":"aa"}}, Version: {version}'
    )
    assert notes == []
    assert found == Recipe(
        "a cat", "bad", seed=1, num_inference_steps=20, guidance_scale=7.0, width=512, height=768,
        scheduler="dpm++2m-karras", rng="cpu", clip_skip=1, model_hash="879db523c3", model_name="dreamshaper_8",
    )  # fmt: skip


def test_settings_of_an_extension_are_noted_in_one_line():
    found, notes = read(
        f'a cat\n{LINE.format("Euler")}, ControlNet 0: "Module: canny, Weight: 1", ADetailer model: face.pt, '
        'ADetailer prompt: "a: b", Version: v1.9.4'
    )
    assert notes == [
        "ControlNet 0: not supported, left out",
        "ADetailer model, ADetailer prompt: not supported, left out",
    ]
    assert found.scheduler == "euler"


@pytest.mark.parametrize(
    ("sampler", "rest", "eta", "noted"),
    [
        ("DDIM", ", Eta: 0.5", 0.5, False),
        ("DDIM", ", Eta: inf", 1.0, False),
        ("Euler a", ", Eta: 1", 0.0, False),
        ("Euler a", ", Eta: 0.67", 0.0, True),
        ("Euler", ", Eta: 0.67", 0.0, False),
    ],
)
def test_noise_that_samplers_add(sampler, rest, eta, noted):
    found, notes = read(f"a cat\n{LINE.format(sampler)}{rest}")
    assert found.eta == eta and bool(notes) == noted


def test_settings_that_cannot_be_read_are_noted():
    found, notes = read("a cat\nSteps: many, Sampler: Euler, CFG scale: 7, Seed: 5, Size: big, ControlNet 0: x")
    assert found.num_inference_steps is None and found.width is None
    assert "Steps: found 'many', expected a whole number; left out" in notes
    assert any(note.startswith("Size: found 'big'") for note in notes)
    assert "ControlNet 0: not supported, left out" in notes


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(max_size=60)
    | st.lists(
        st.sampled_from(["Steps", "Sampler", "Size", "Seed", "RNG", "Eta", "SDCPP", "Hires resize", "x"])
        .flatmap(lambda key: st.text(max_size=8).map(lambda value: f"{key}: {value}")),
        max_size=8,
    ).map(lambda pairs: "a cat\n" + ", ".join(pairs))
)  # fmt: skip
def test_any_text_is_read(text):
    recipe, notes = read(text)
    assert isinstance(recipe, Recipe) and all(isinstance(note, str) for note in notes)


@given(values=st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text(max_size=8), max_size=5))
def test_any_settings_are_read(values):
    recipe_from_parameters(Parameters("a", "b", values))
    recipe_from_parameters(Parameters("a", "b", {"SDCPP": json.dumps(values)}))
