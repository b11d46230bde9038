"""The chain of guides: what each does to a call of the network, and a guide of one's own."""

from functools import partial

import numpy as np
import pytest

from sd_numba import InputError, StableDiffusionPipeline
from sd_numba.generation.guides import (
    Call,
    ClassifierFreeGuidance,
    DeepCache,
    GuidanceInterval,
    Guide,
    InpaintingChannels,
    MaskBlend,
    MergedTokens,
    guides_of,
)
from sd_numba.generation.loop import sample
from sd_numba.generation.state import load_state, save_state

FEW = {"seed": 1, "num_inference_steps": 5, "width": 64, "height": 64, "scheduler": "euler"}


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusionPipeline.from_pretrained()


@pytest.fixture
def run(pipe, monkeypatch):
    """Makes the steps of a run with more guides."""

    def run(*guides, prompt="a red apple", **options):
        with monkeypatch.context() as patched:
            patched.setattr("sd_numba.generation.run.sample", partial(sample, guides=guides))
            return list(pipe.generate(prompt, **{**FEW, **options}))

    return run


class Push(Guide):
    """Adds a growing number to the raw answers; its state is how often it did."""

    key = "push"

    def __init__(self, size=0.1):
        self.size, self.calls, self.starts = np.float32(size), [], []

    def prepare(self, start):
        self.starts.append(start)
        self.count = 0

    def before_unet(self, call):
        self.calls.append(call)

    def after_unet(self, call, output):
        self.count += 1
        return output + self.size * self.count

    def state(self):
        return {"count": self.count}

    def restore(self, state):
        self.count = state["count"]


# ---- a guide of one's own


def test_a_guide_sees_every_call_and_changes_the_answers(run):
    plain, push = run(), Push()
    pushed = run(push)
    assert [call.index for call in push.calls] == list(range(5))
    assert [call.step for call in push.calls] == list(range(1, 6))
    for call, step in zip(push.calls, pushed, strict=True):
        assert call.timestep == step.timestep and call.texts == ["", "a red apple"]
        assert call.sample.shape == (1, 4, 16, 16) and call.pictures == slice(0, 1)
    assert np.abs(pushed[-1].latents - plain[-1].latents).max() > 0.1
    (start,) = push.starts
    assert start.noise.shape == (1, 4, 16, 16) and start.clean is None and start.masks is None and start.number == 0


def test_a_guide_that_changes_nothing_changes_nothing(run):
    np.testing.assert_array_equal(run(Guide())[-1].latents, run()[-1].latents)
    assert set(run(Guide())[0].state) == {"pass", "call", "x", "history", "noise", "caches"}


def test_a_guide_changes_the_raw_answers_or_the_latents(run):
    """A residual on both halves of guidance is the same residual on what becomes of them."""

    class Residual(Guide):
        def after_unet(self, call, output):
            assert output.shape == (2, 4, 16, 16)
            return output + np.float32(0.25)

    class Shift(Guide):
        def after_step(self, x, done):
            return x + np.float32(done)

    push = Push()
    run(push)
    plan, sampler = push.starts[0].plan, push.starts[0].request.sampler
    zeros = np.zeros((1, 4, 16, 16), np.float32)
    step, _ = sampler.step(zeros + np.float32(0.25), zeros, plan, 0, None, None)
    plain = run()[0].latents
    np.testing.assert_allclose(run(Residual())[0].latents - plain, step, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(run(Shift())[0].latents, plain + np.float32(1))


def test_its_state_survives_a_file(run, tmp_path):
    options = {"cache": "deepcache:2", "cfg_interval": (0.0, 0.6)}
    whole = run(Push(), **options)
    for stop in range(4):
        save_state(tmp_path / "a", whole[stop].state, {})
        state, _ = load_state(tmp_path / "a")
        assert state["push"] == {"count": stop + 1}
        rest = run(Push(), **options, state=state)
        for found, expected in zip(rest, whole[stop + 1 :], strict=True):
            np.testing.assert_array_equal(found.latents, expected.latents)


def test_a_state_without_it_is_that_of_another_run(run):
    state = run()[1].state
    with pytest.raises(InputError, match="state: it has no push; it belongs to another run"):
        run(Push(), state=state)
    with pytest.raises(InputError, match="state: it has no caches"):
        run(state={key: value for key, value in state.items() if key != "caches"})


def test_it_is_prepared_for_each_pass(run):
    push = Push()
    run(push, hires_scale=1.5, hires_steps=4, hires_strength=0.5)
    assert [start.number for start in push.starts] == [0, 1]
    assert [start.shape for start in push.starts] == [(4, 16, 16), (4, 24, 24)]
    assert push.starts[1].clean.shape == (1, 4, 24, 24)
    assert {call.sample.shape for call in push.calls} == {(1, 4, 16, 16), (1, 4, 24, 24)}


def test_large_batches_are_asked_about_group_by_group(run, monkeypatch):
    monkeypatch.setattr("sd_numba.generation.loop.PASS_PIXELS", 2 * 16 * 16)
    push = Push()
    run(push, prompt=["a red apple", "a blue car", "a fox"], num_inference_steps=2)
    assert push.starts[0].groups == [slice(0, 2), slice(2, 3)]
    assert [(call.index, call.group, len(call.sample)) for call in push.calls] == [
        (0, 0, 2), (0, 1, 1), (1, 0, 2), (1, 1, 1),
    ]  # fmt: skip


def test_it_gives_arguments_to_the_network(run, pipe):
    """One by its name, for the rows that are asked together; here as `tome=` does."""

    class Merge(Guide):
        def before_unet(self, call):
            call.arguments["tome"] = lambda rows: rows_seen.append(rows) or 0.5

    rows_seen = []
    found = run(Merge(), prompt_syntax="a1111", negative_prompt="dark BREAK grey")
    assert rows_seen == [(1,), (0,)] * 5  # the shorter text first
    expected = run(tome=0.5, prompt_syntax="a1111", negative_prompt="dark BREAK grey")
    np.testing.assert_array_equal(found[-1].latents, expected[-1].latents)


# ---- those of a request


def kinds(pipe, monkeypatch, **options):
    """The classes of a request's chain, in order."""
    found = []

    def look(model, request, *rest, **more):
        found.extend(type(guide) for guide in guides_of(model, request))
        return iter(())

    with monkeypatch.context() as patched:
        patched.setattr("sd_numba.generation.run.sample", look)
        pipe.generate("a red apple", **{**FEW, **options})
    return found


def test_which_guides_a_request_has(pipe, monkeypatch):
    always = [GuidanceInterval, ClassifierFreeGuidance, DeepCache]
    grey, half = np.full((64, 64, 3), 0.5, np.float32), np.eye(64, dtype=np.float32)
    assert kinds(pipe, monkeypatch) == always
    assert kinds(pipe, monkeypatch, tome=0.5) == [*always, MergedTokens]
    assert kinds(pipe, monkeypatch, image=grey) == always
    assert kinds(pipe, monkeypatch, image=grey, mask_image=half) == [*always, MaskBlend]
    monkeypatch.setattr(type(pipe), "paints_in", True)
    assert kinds(pipe, monkeypatch, image=grey, mask_image=half) == [*always, InpaintingChannels]


def call_of(share=0.0, scale=3.0):
    sample = np.zeros((1, 4, 2, 2), np.float32)
    return Call(0, share, 1, 999.0, 0, slice(0, 1), sample, ["a fox"], scale)


@pytest.mark.parametrize(("share", "scale"), [(0.0, 1.0), (0.2, 3.0), (0.79, 3.0), (0.8, 1.0)])
def test_the_interval_includes_its_beginning_alone(share, scale):
    call = call_of(share)
    GuidanceInterval(0.2, 0.8).before_unet(call)
    assert call.scale == scale


def test_guidance_goes_beyond_the_prompt(run):
    push, guidance, call = Push(), ClassifierFreeGuidance(), call_of()
    run(push, negative_prompt="dark")
    guidance.prepare(push.starts[0])
    guidance.before_unet(call)
    assert call.texts == ["dark", "a fox"]
    answers = np.stack([np.full((4, 2, 2), value, np.float32) for value in (1, 2)])
    np.testing.assert_array_equal(guidance.after_unet(call, answers), np.full((1, 4, 2, 2), 4, np.float32))
    call = call_of(scale=1.0)
    guidance.before_unet(call)
    assert call.texts == ["a fox"]
    np.testing.assert_array_equal(guidance.after_unet(call, answers[1:]), answers[1:])
