"""Recipes: settings from outside by any of their names, and back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_numba.errors import InputError
from sd_numba.generation.settings import RNGS, settings_of
from sd_numba.recipes.recipe import Recipe, read_fields, with_spacing
from sd_numba.samplers import SAMPLER_NAMES

numbers = st.floats(-1e6, 1e6, allow_nan=False)
shares = st.floats(0, 1)
PIECES = [
    "a cat", "(red:1.2)", "<lora:x:0.5>", "\n", "\r", "\n\n", " ", "\t", ",", ", ", ":", '"', "\\", "{", "[1]", "\0",
    "\x85", "\u2028", "Negative prompt:", "\nNegative prompt: ", "\nSteps: 5, Seed: 1, Size: 8x8", "Prompt: x", "你好",
]  # fmt: skip
characters = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
texts = characters | st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
paths = texts.filter(bool)
# The web UI writes names of models and LoRAs without commas and colons.
names = st.text(st.sampled_from("abcXYZ 0-_.é"), min_size=1, max_size=12).map(str.strip).filter(bool)
digests = st.text(st.sampled_from("0123456789abcdef"), min_size=10, max_size=10)
hashes = st.lists(st.tuples(names, digests), max_size=3, unique_by=lambda pair: pair[0]).map(tuple)


def maybe(strategy):
    return st.none() | strategy


@st.composite
def recipes(draw):
    """Recipes as the command line makes them: what belongs together is there together."""
    values = {
        "prompt": draw(texts),
        "negative_prompt": draw(texts),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "num_inference_steps": draw(st.integers(1, 1000)),
        "guidance_scale": draw(numbers),
        "width": draw(st.integers(1, 8192)),
        "height": draw(st.integers(1, 8192)),
        "scheduler": draw(st.sampled_from(SAMPLER_NAMES)),
        "eta": draw(shares),
        "rng": draw(st.sampled_from(RNGS)),
        "prompt_syntax": draw(st.sampled_from(["a1111", "plain"])),
        "clip_skip": draw(st.integers(0, 11)),
        "cfg_interval": draw(st.just((0.0, 1.0)) | st.tuples(shares, shares).map(sorted).map(tuple)),
        "cache": draw(maybe(st.integers(1, 1000).map("deepcache:{}".format))),
        "tome": draw(st.floats(0, 0.75)),
        "precision": draw(st.sampled_from(["f32", "bf16", "int8"])),
        "vae_tiling": draw(st.booleans()),
        "model_name": draw(maybe(paths)),
        "model_hash": draw(maybe(digests)),
        "vae": draw(maybe(paths)),
        "taesd": draw(maybe(paths)),
        "lora_hashes": draw(hashes),
        "ti_hashes": draw(hashes),
    }
    if draw(st.booleans()):
        values |= {"image": draw(paths), "image_hash": draw(digests), "strength": draw(shares)}
        if draw(st.booleans()):
            values |= {"mask_image": draw(paths), "mask_hash": draw(digests)}
        values["expand"] = draw(maybe(st.tuples(*[st.integers(0, 4096)] * 4)))
    if draw(st.booleans()):
        values |= {
            "hires_scale": draw(st.floats(1, 16)),
            "hires_steps": draw(maybe(st.integers(1, 1000))),
            "hires_strength": draw(shares),
        }
    return Recipe(**values)


@settings(max_examples=200, deadline=None)
@given(recipe=recipes())
def test_recipes_as_json(recipe):
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_recipe_needs_a_prompt():
    with pytest.raises(InputError, match="recipe: no prompt"):
        Recipe.from_json({"steps": 5})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"Steps": "20", "CFG scale": 7, "sampler_name": "Euler a"},
         {"num_inference_steps": 20, "guidance_scale": 7.0, "scheduler": "euler-a"}),
        ({"cfg-scale": "7.5", "SEED": 42.0, "size": "512x768"},
         {"guidance_scale": 7.5, "seed": 42, "width": 512, "height": 768}),
        ({"sampling_method": "dpm++2m", "schedule": "karras"}, {"scheduler": "dpm++2m-karras"}),
        ({"sampler": "dpm++2m", "scheduler": "Karras"}, {"scheduler": "dpm++2m-karras"}),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Automatic"}, {"scheduler": "dpm++2m"}),
        ({"scheduler": "unipc"}, {"scheduler": "unipc"}),
        ({"seed": -1, "steps": None}, {}),
        ({"seed": str(2**64 - 1)}, {"seed": 2**64 - 1}),
        ({"expand": "1,2, 3,4", "cfg_interval": [0, "0.8"]}, {"expand": (1, 2, 3, 4), "cfg_interval": (0.0, 0.8)}),
        ({"vae_tiling": "off", "rng": "CUDA", "lora_hashes": "a: 1, b: c: 2"},
         {"vae_tiling": False, "rng": "cuda", "lora_hashes": (("a", "1"), ("b: c", "2"))}),
        ({"image": "a.png", "denoising_strength": 0.5, "mask": "m.png"},
         {"image": "a.png", "strength": 0.5, "mask_image": "m.png"}),
        ({"hr_scale": 2, "hr_second_pass_steps": 0}, {"hires_scale": 2.0}),
        ({"hires_steps": "1"}, {"hires_steps": 1}),
    ],
)  # fmt: skip
def test_other_programs_names(given, wanted):
    found = read_fields(given)
    assert found == wanted
    assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in wanted.items()}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stepps": 5}, "stepps: unknown setting; the settings are prompt, "),
        ({"steps": 5, "Steps": 6}, "Steps: num_inference_steps is given twice; give it once"),
        ({"size": "1x2", "width": 1}, "width: width is given twice"),
        ({"steps": "many"}, "steps: found 'many', expected a whole number"),
        ({"steps": 1.5}, "steps: found 1.5, expected a whole number"),
        (
            {"hires_steps": "-3"},
            "hires_steps: found '-3', expected a whole number of at least 1, or 0 for as many as in",
        ),
        ({"steps": True}, "steps: found True, expected a whole number"),
        ({"seed": 1e300}, r"seed: found 1e\+300, expected a whole number"),
        ({"seed": 2.0**53}, "expected a whole number"),  # the next ones are not in a float
        ({"steps": "1e400"}, "expected a whole number"),
        ({"cfg": 10**400}, "cfg: .* expected a number of fewer digits"),
        ({"cfg": "nan"}, "cfg: found 'nan', expected a number"),
        ({"cfg": [7]}, r"cfg: found \[7\], expected a number"),
        ({"prompt": 5}, "prompt: found 5, expected a text"),
        ({"rng": "gpu"}, "rng: found 'gpu', expected cpu or cuda"),
        ({"size": "big"}, "size: found 'big', expected a size such as 512x768"),
        ({"size": 512}, "size: found 512, expected a size"),
        ({"expand": "1,2,3"}, "expand: found '1,2,3', expected 4 whole numbers"),
        ({"cfg_interval": 0.5}, "cfg_interval: found 0.5, expected 2 numbers: from, to"),
        ({"vae_tiling": "perhaps"}, "vae_tiling: found 'perhaps', expected true or false"),
        ({"sampler": "restart"}, "sampler: found 'restart', expected one of ddpm, ddim"),
        ({"schedule_type": "karras"}, "scheduler: spacing karras needs a sampler as well"),
        (
            {"sampler": "ddim", "schedule_type": "karras"},
            "sampler ddim does not support the spacing karras",
        ),
        ({"sampler": "ddim", "schedule_type": "zigzag"}, "schedule_type: found 'zigzag', expected normal or uniform"),
        ({"lora_hashes": [1]}, r"lora_hashes: found \[1\], expected names with hashes"),
    ],
)
def test_settings_that_are_none(given, words):
    with pytest.raises(InputError, match=words) as caught:
        read_fields(given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@given(values=st.dictionaries(
    st.sampled_from(sorted(settings_of(Recipe))) | st.text(max_size=10),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner), max_leaves=5,
    ),
    max_size=4,
))  # fmt: skip
def test_whatever_comes_is_read_or_refused(values):
    try:
        found = read_fields(values)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert found.keys() <= settings_of(Recipe).keys()


def test_spacings():
    assert with_spacing("euler", "karras") == "euler-karras" == with_spacing("euler-karras", "karras")
    assert with_spacing("euler-karras", "exponential") == "euler-exponential"
    for plain in ("normal", "uniform", "discrete", "automatic"):
        assert with_spacing("ddim", plain) == "ddim"
    with pytest.raises(InputError, match="pndm does not support the spacing exponential; these samplers do: euler"):
        with_spacing("pndm", "exponential")
