"""DeepCache and guidance in an interval: which calls compute what, and what comes of it."""

import numpy as np
import pytest

from sd_numba import StableDiffusionPipeline
from sd_numba.errors import InputError
from sd_numba.generation.state import load_state, save_state
from sd_numba.networks.deepcache import FeatureCache
from sd_numba.networks.unet import LAST
from tests.golden.cases import CASES
from tests.networks.test_unet import unet

SD1 = CASES[0]
TIMESTEPS = (900, 700, 500, 300, 100)


def samples(count=5, shape=(1, 4, 8, 8)):
    rng = np.random.default_rng(0)
    start, drift = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    return [start + np.float32(0.1 * i) * drift for i in range(count)]


@pytest.fixture(scope="module")
def network():
    return unet(SD1)


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusionPipeline.from_pretrained()


def context():
    return SD1.context()[:1]


@pytest.mark.parametrize("interval", [1, 2, 3, 1000])
def test_every_nth_call_is_whole_and_the_others_use_its_features(network, interval):
    """The twin computes whole calls apart, and takes the last residual block's input from the one before."""
    cache, features = FeatureCache(interval), None
    for call, (sample, timestep) in enumerate(zip(samples(), TIMESTEPS, strict=True)):
        found = network(sample, timestep, context(), cache=cache)
        if call % interval == 0:
            np.testing.assert_array_equal(found, network(sample, timestep, context()))
            features = cache.features.copy()
        else:
            np.testing.assert_array_equal(cache.features, features)
            expected = shallow(network, sample, timestep, features)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
            assert np.abs(found - network(sample, timestep, context())).max() > 1e-4
    assert cache.calls == len(TIMESTEPS)


def shallow(network, sample, timestep, features):
    """The first convolution and the last residual block with its transformer."""
    encoded = network.encode_context(context())
    x = network.conv_in(np.ascontiguousarray(sample.transpose(0, 2, 3, 1)))
    x = network.up_blocks[-1](features.copy(), network._embed(timestep, 1), encoded, [x], None, LAST)
    return network.conv_out(network.conv_norm_out(x)).transpose(0, 3, 1, 2)


def test_another_shape_is_computed_as_a_whole(network):
    cache = FeatureCache(3)
    network(samples()[0], 900, context(), cache=cache)
    larger = np.zeros((1, 4, 8, 16), np.float32)
    np.testing.assert_array_equal(network(larger, 700, context(), cache=cache), network(larger, 700, context()))


def test_what_is_kept_goes_on(network):
    cache = FeatureCache(3)
    for sample, timestep in zip(samples(2), TIMESTEPS[:2], strict=True):
        network(sample, timestep, context(), cache=cache)
    other = FeatureCache(3, cache.features.copy(), cache.calls)
    for sample, timestep in zip(samples()[2:], TIMESTEPS[2:], strict=True):
        expected = network(sample, timestep, context(), cache=cache)
        np.testing.assert_array_equal(network(sample, timestep, context(), cache=other), expected)


@pytest.mark.parametrize("interval", [0, -1, 1001, 1.5, "2", True])
def test_intervals_that_are_none(interval):
    with pytest.raises(InputError, match="cache interval: found"):
        FeatureCache(interval)


# ---- in pictures

FEW = {"seed": 1, "num_inference_steps": 10, "scheduler": "euler", "width": 64, "height": 64}


def latents(pipe, **options):
    return pipe("a red apple", output_type="latent", **{**FEW, **options}).images


def test_a_cache_of_one_call_and_guidance_all_the_time_change_nothing(pipe):
    expected = latents(pipe)
    for options in ({"cache": "deepcache:1"}, {"cache": None}, {"cfg_interval": (0, 1)}):
        np.testing.assert_array_equal(latents(pipe, **options), expected)
    np.testing.assert_array_equal(latents(pipe, cfg_interval=(0, 0)), latents(pipe, guidance_scale=1))
    np.testing.assert_array_equal(latents(pipe, cfg_interval=(0.5, 0.5)), latents(pipe, guidance_scale=1))


def test_pictures_with_a_cache_are_near_and_the_farther_the_longer_it_lasts(pipe):
    expected = latents(pipe)
    near, far = (np.abs(latents(pipe, cache=f"deepcache:{n}") - expected).mean() for n in (2, 5))
    assert 0 < near < far


def asked(pipe, monkeypatch, **options):
    """For how many contexts the UNet was asked in each call."""
    calls, network = [], pipe.unet

    def spy(sample, timestep, context, **how):
        calls.append(context.batch)
        return network(sample, timestep, context, **how)

    spy.config, spy.encode_context = network.config, network.encode_context
    with monkeypatch.context() as patched:
        patched.setattr(pipe, "unet", spy)
        latents(pipe, **options)
    return calls


def test_outside_the_interval_half_is_computed(pipe, monkeypatch):
    assert asked(pipe, monkeypatch) == [2] * 10
    assert asked(pipe, monkeypatch, cfg_interval=(0, 0.8)) == [2] * 8 + [1] * 2
    assert asked(pipe, monkeypatch, cfg_interval=(0.2, 0.8)) == [1] * 2 + [2] * 6 + [1] * 2
    assert asked(pipe, monkeypatch, cfg_interval=(0, 0.8), guidance_scale=1) == [1] * 10


def test_both_halves_of_guidance_and_prompts_of_other_lengths_have_their_own_features(pipe):
    """As with a single prompt each: a batch changes nothing."""
    options = {
        **FEW,
        "prompt_syntax": "a1111",
        "cache": "deepcache:3",
        "cfg_interval": (0.0, 0.7),
        "output_type": "latent",
    }
    prompts = ["a red apple", "a blue car BREAK in the snow"]
    together = pipe(prompts, negative_prompt="dark BREAK grey", **options).images
    for number, prompt in enumerate(prompts):
        alone = {**options, "seed": 1 + number}
        found = pipe(prompt, negative_prompt="dark BREAK grey", **alone).images
        np.testing.assert_array_equal(found, together[number : number + 1])


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 8])
def test_a_run_goes_on_from_a_state(pipe, tmp_path, stop):
    options = {**FEW, "cache": "deepcache:3", "cfg_interval": (0.0, 0.6), "tome": 0.25}
    steps = list(pipe.generate("a red apple", **options))
    save_state(tmp_path / "a", steps[stop].state, {})
    rest = list(pipe.generate("a red apple", **options, state=load_state(tmp_path / "a")[0]))
    assert [step.index for step in rest] == list(range(stop + 1, 10))
    for found, expected in zip(rest, steps[stop + 1 :], strict=True):
        np.testing.assert_array_equal(found.latents, expected.latents)
        np.testing.assert_array_equal(found.denoised, expected.denoised)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache": "deepcache:0"}, "cache: found 'deepcache:0', expected deepcache:N, such as deepcache:3"),
        ({"cache": "deepcache:"}, "cache: found 'deepcache:'"),
        ({"cache": "teacache:3"}, "cache: found 'teacache:3'"),
        ({"cache": 3}, "cache: found 3"),
        ({"cache": "deepcache:99999999999"}, "cache: found"),
        ({"cfg_interval": (0.5, 0.2)}, "cfg_interval: found \\(0.5, 0.2\\), expected the smaller number first"),
        ({"cfg_interval": (0, 2)}, "cfg_interval: found 2, expected a number from 0 to 1"),
        ({"cfg_interval": 0.5}, "cfg_interval: found 0.5, expected 2 numbers: from, to"),
        ({"cfg_interval": "01"}, "cfg_interval: found '01'"),
        ({"cfg_interval": (0, float("nan"))}, "cfg_interval: found nan"),
    ],
)
def test_settings_that_are_none(pipe, options, words):
    with pytest.raises(InputError, match=words) as caught:
        pipe.generate("a red apple", **options)
    assert "\n" not in str(caught.value)
