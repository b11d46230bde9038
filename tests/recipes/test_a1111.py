"""The text of a picture's settings, as other programs write and read it."""

import random
import time

import pytest

from sd_numba.recipes.a1111 import (
    Parameters,
    format_parameters,
    parse_parameters,
    sampler_title,
)

SETTINGS = {
    "Steps": "20", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "7.5", "Seed": "42",
    "Size": "512x512", "Model hash": "6ce0161689", "Model": "v1-5-pruned-emaonly", "RNG": "CPU",
    "Version": "sd-numba 0.1.0",
}  # fmt: skip
LINE = (
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 512x512, "
    "Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, RNG: CPU, Version: sd-numba 0.1.0"
)


def test_the_text():
    assert format_parameters(Parameters("a cat", "blurry", SETTINGS)) == f"a cat\nNegative prompt: blurry\n{LINE}"
    assert format_parameters(Parameters("a cat", "", SETTINGS)) == f"a cat\n{LINE}"


@pytest.mark.parametrize(
    "prompt", ["", "a cat", "two\nlines", "Steps: 3", "a (red:1.3) cat, 你好 🐱", 'say "hi", \\o/']
)
@pytest.mark.parametrize("negative", ["", "blurry", "two\n\nlines, x: y"])
def test_the_text_is_read_back(prompt, negative):
    settings = {**SETTINGS, "Model": 'my, "odd": model\n2'}
    parameters = Parameters(prompt, negative, settings)
    assert parse_parameters(format_parameters(parameters)) == parameters


@pytest.mark.parametrize("text", ["", "\n", "a cat", "a cat\nSteps: 20", "Negative prompt:", "a: b, c: d"])
def test_texts_without_settings(text):
    assert parse_parameters(text).settings == {}


def test_a_text_of_another_program():
    text = f'a cat\nNegative prompt: bad\n{LINE}, Lora hashes: "a: 1, b: 2", Hires upscale: 2, TI: x, '
    parsed = parse_parameters(text)
    assert (parsed.prompt, parsed.negative_prompt) == ("a cat", "bad")
    assert parsed.settings == {**SETTINGS, "Lora hashes": "a: 1, b: 2", "Hires upscale": "2", "TI": "x"}


def test_parsing_takes_linear_time():
    rng = random.Random(0)
    start = time.perf_counter()
    for text in ("x" * 10**6, " " * 10**6 + "x", "a," * 10**5, 'a:"' * 10**5, ":" * 10**6):
        parse_parameters(text)
    for _ in range(500):
        parse_parameters("".join(rng.choices('ab:, "\\\n-', k=200)))
    assert time.perf_counter() - start < 5


def test_sampler_titles():
    assert sampler_title("dpm++2m-karras") == {"Sampler": "DPM++ 2M", "Schedule type": "Karras"}
    assert sampler_title("dpm++2m-sde-exponential") == {"Sampler": "DPM++ 2M SDE", "Schedule type": "Exponential"}
    assert sampler_title("euler-a") == {"Sampler": "Euler a"}
    # Where the web UI would choose another spacing by itself
    assert sampler_title("dpm++2m") == {"Sampler": "DPM++ 2M", "Schedule type": "Uniform"}
    assert sampler_title("dpm++2m-sde") == {"Sampler": "DPM++ 2M SDE", "Schedule type": "Uniform"}
    assert sampler_title("something-new") == {"Sampler": "something-new"}


def test_a_prompt_that_would_be_read_as_another_is_repeated():
    for prompt, negative in [(" a", ""), ("a\nNegative prompt: b", "")]:
        text = format_parameters(Parameters(prompt, negative, SETTINGS))
        assert ", Prompt: " in text
        assert parse_parameters(text) == Parameters(prompt, negative, SETTINGS)
    for parameters in (Parameters("a cat", "blurry", SETTINGS), Parameters("a cat ", "  blurry ", SETTINGS)):
        text = format_parameters(parameters)
        assert ", Prompt: " not in text and parse_parameters(text) == parameters


def test_values_that_are_json_and_lines_behind_the_settings():
    text = (
        f'a cat\n{LINE}, Hashes: {{"vae": "1, 2", "x": {{"y": [3, 4]}}}}, Broken: {{"a", End: 1\nTemplate: a cat\nmore'
    )
    parsed = parse_parameters(text)
    assert parsed.prompt == "a cat"
    assert parsed.settings["Hashes"] == '{"vae": "1, 2", "x": {"y": [3, 4]}}'
    assert parsed.settings["Broken"] == '{"a"' and parsed.settings["End"] == "1"
