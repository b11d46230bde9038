"""The loop: steps that are watched, changed, stopped and gone on with; second passes."""

import numpy as np
import pytest

from sd_numba import InputError, StableDiffusionPipeline
from sd_numba.generation.loop import enlarge
from sd_numba.samplers import SAMPLER_NAMES, make_sampler
from sd_numba.samplers.noise import TorchNoise

FEW = {"seed": 1, "num_inference_steps": 5, "width": 64, "height": 64, "scheduler": "euler"}


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusionPipeline.from_pretrained()


@pytest.fixture(scope="module")
def steps(pipe):
    return list(pipe.generate("a red apple", **FEW))


# ---- steps


def test_what_the_network_sees_comes_ever_nearer_to_the_picture(steps):
    last = steps[-1].latents
    far = [np.abs(step.denoised - last).mean() for step in steps]
    assert far == sorted(far, reverse=True)
    assert [step.index for step in steps] == list(range(5)) and {step.total for step in steps} == {5}


def test_a_callback_sees_every_step(pipe, steps):
    seen = []

    def look(pipeline, index, timestep, values):
        assert pipeline is pipe and list(values) == ["latents"]
        seen.append((index, timestep, values["latents"].copy()))

    found = pipe("a red apple", output_type="latent", callback_on_step_end=look, **FEW).images
    np.testing.assert_array_equal(found, steps[-1].latents)
    for (index, timestep, latents), step in zip(seen, steps, strict=True):
        assert (index, timestep) == (step.index, step.timestep)
        np.testing.assert_array_equal(latents, step.latents)


def test_a_callback_changes_the_latents(pipe, steps):
    def halve(pipeline, index, timestep, values):
        return {"latents": values["latents"] / 2} if index == 2 else values

    found = pipe("a red apple", output_type="latent", callback_on_step_end=halve, **FEW).images
    run = pipe.generate("a red apple", **FEW)
    for _ in range(3):
        step = next(run)
    run.send(step.latents / 2)
    np.testing.assert_array_equal(found, next(run).latents)
    assert np.abs(found - steps[-1].latents).max() > 0.1
    last = pipe(
        "a red apple", output_type="latent", **FEW,
        callback_on_step_end=lambda p, i, t, values: {"latents": np.zeros_like(values["latents"])} if i == 4 else None,
    ).images  # fmt: skip
    assert not last.any()


def test_a_callback_ends_the_run(pipe, steps):
    seen = []

    def stop(pipeline, index, timestep, values):
        seen.append(index)
        pipeline._interrupt = index == 2

    found = pipe("a red apple", output_type="latent", callback_on_step_end=stop, **FEW).images
    assert seen == [0, 1, 2]
    np.testing.assert_array_equal(found, steps[2].latents)
    again = pipe("a red apple", output_type="latent", **FEW).images  # the next run is not stopped
    np.testing.assert_array_equal(again, steps[-1].latents)


# ---- going on


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_sampler_goes_on_from_its_state(pipe, sampler):
    options = {**FEW, "scheduler": sampler, "num_inference_steps": 8, "eta": 0.5 if sampler == "ddim" else 0.0}
    whole = list(pipe.generate("a red apple", **options))
    for stop in (0, len(whole) // 2, len(whole) - 2):
        rest = list(pipe.generate("a red apple", **options, state=whole[stop].state))
        assert [step.index for step in rest] == list(range(stop + 1, len(whole)))
        np.testing.assert_array_equal(rest[-1].latents, whole[-1].latents)
    assert list(pipe.generate("a red apple", **options, state=whole[-1].state)) == []


def test_there_is_nothing_to_go_on_with_after_the_last_step(pipe, steps):
    with pytest.raises(InputError, match="state: the run is already complete; decode its latents"):
        pipe("a red apple", **FEW, state=steps[-1].state)
    found = pipe("a red apple", output_type="latent", **FEW, state=steps[2].state).images
    np.testing.assert_array_equal(found, steps[-1].latents)


def test_a_state_is_no_view_of_the_run(pipe, steps):
    """What later steps do leaves it as it was."""
    run = pipe.generate("a red apple", **{**FEW, "scheduler": "dpm++2m-sde"})
    first = next(run).state
    kept = first["x"].copy()
    rest = [step.latents for step in run]
    np.testing.assert_array_equal(first["x"], kept)
    again = [s.latents for s in pipe.generate("a red apple", **{**FEW, "scheduler": "dpm++2m-sde"}, state=first)]
    np.testing.assert_array_equal(again[-1], rest[-1])


@pytest.mark.parametrize("change", [{"x": np.zeros((1, 4, 8, 8), np.float32)}, {"call": 6}, {"call": -1}])
def test_a_state_of_another_run_is_refused(pipe, steps, change):
    with pytest.raises(InputError, match=r"state: found latents .* it belongs to another run"):
        next(pipe.generate("a red apple", **FEW, state={**steps[1].state, **change}))


# ---- second passes


@pytest.mark.parametrize(("old", "new"), [((4, 4), (8, 8)), ((5, 3), (7, 9)), ((4, 6), (4, 6)), ((1, 1), (3, 2))])
def test_latents_are_enlarged_linearly(old, new):
    """As by torch's interpolate, bilinear, between the centres of pixels, and so by AUTOMATIC1111's "Latent"."""
    x = np.random.default_rng(0).standard_normal((2, 4, *old)).astype(np.float32)
    wanted = np.zeros((2, 4, *new))
    for i, j in np.ndindex(*new):
        corners = []
        for place, before, after in zip((i, j), old, new, strict=True):
            exact = min(max((place + 0.5) * before / after - 0.5, 0), before - 1)
            lower = int(exact)
            corners.append(((lower, 1 - (exact - lower)), (min(lower + 1, before - 1), exact - lower)))
        for (a, share_a), (b, share_b) in [(p, q) for p in corners[0] for q in corners[1]]:
            wanted[:, :, i, j] += share_a * share_b * x[:, :, a, b]
    np.testing.assert_allclose(enlarge(x, *new), wanted, atol=1e-5)


def test_a_second_pass_is_a_run_from_the_enlarged_latents(pipe, steps):
    """With the noise of the same seed."""
    options = {"hires_scale": 1.5, "hires_steps": 10, "hires_strength": 0.4}
    found = list(pipe.generate("a red apple", **FEW, **options))
    assert len(found) == 5 + 4 and {step.total for step in found} == {9}
    for step, expected in zip(found, steps, strict=False):
        np.testing.assert_array_equal(step.latents, expected.latents)
    assert found[5].latents.shape == (1, 4, 24, 24)
    euler = make_sampler("euler", pipe.scheduler_config)
    plan = euler.plan(10)
    noise = TorchNoise(1).normal((1, 4, 24, 24))
    x = euler.noised(enlarge(steps[-1].latents, 24, 24), noise, plan, 6)
    context = pipe.unet.encode_context(pipe.text_encoder(pipe.tokenizer(["", "a red apple"])))
    for call in range(6, 10):
        away, towards = np.split(
            pipe.unet(euler.scale_model_input(x, plan, call), float(plan.timesteps[call]), context), 2
        )
        x, _ = euler.step(away + np.float32(3) * (towards - away), x, plan, call, None, None)
    np.testing.assert_allclose(found[-1].latents, x, rtol=0, atol=1e-4 * np.abs(x).max())


def test_a_second_pass_has_defaults_and_pictures_of_its_size(pipe):
    image = pipe("a red apple", hires_scale=2, **{**FEW, "num_inference_steps": 3}).images[0]
    assert image.size == (128, 128)
    assert len(list(pipe.generate("a red apple", hires_scale=1, **FEW))) == 5 + 3  # 0.7 of as many steps


def test_a_batch_with_a_second_pass_is_each_of_it(pipe):
    options = {**FEW, "hires_scale": 1.5, "scheduler": "euler-a", "output_type": "latent"}
    both = pipe(["a red apple", "a blue car"], **options).images
    for number, prompt in enumerate(("a red apple", "a blue car")):
        alone = pipe(prompt, **{**options, "seed": 1 + number}).images
        np.testing.assert_array_equal(alone, both[number : number + 1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hires_scale": 0.5}, "hires_scale: found 0.5, expected a number from 1 to 16"),
        ({"hires_scale": "2"}, "hires_scale: found '2'"),
        ({"hires_scale": 16, "width": 4096}, "width: found 65536|memory"),
        ({"hires_scale": 2, "hires_steps": 2000}, "hires_steps: found 2000, expected a whole number from 0 to 1000"),
        ({"hires_scale": 2, "hires_strength": 0}, "strength"),
        ({"hires_scale": 2, "hires_strength": 0.01}, "a strength of 0.01 runs less than one of 5 steps"),
    ],
)
def test_second_passes_that_are_none(pipe, options, words):
    with pytest.raises(InputError, match=words):
        pipe.generate("a red apple", **{**FEW, **options})
