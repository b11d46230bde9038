"""Token merging against a slow twin, alone and in the UNet."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_numba import StableDiffusionPipeline, kernels
from sd_numba.errors import InputError
from sd_numba.networks.token_merging import CELL, TokenMerging, add_unmerged, check_ratio, merge, split_tokens
from sd_numba.networks.unet_blocks import Transformer
from tests.golden.cases import CASES
from tests.networks.test_unet import unet

SD1 = CASES[0]
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(size=SIZES, seed=st.integers(0, 2**32 - 1))
def test_every_cell_has_one_destination(size, seed):
    h, w = size
    sources, targets = split_tokens(h, w, seed)
    assert sorted([*sources, *targets]) == list(range(h * w))
    assert list(targets) == sorted(targets) and list(sources) == sorted(sources)
    cells = [(t // w // CELL, t % w // CELL) for t in targets]
    assert len(set(cells)) == len(cells) == (h // CELL) * (w // CELL)


def test_destinations_change_with_the_seed_alone():
    a, b, again = (split_tokens(16, 16, seed)[1] for seed in (1, 2, 1))
    np.testing.assert_array_equal(a, again)
    assert 0.1 < len({*a} & {*b}) / len(a) < 0.4  # one of four


def grouped(x, h, w, ratio, seed):
    """The group of each token of ``x (t, c)``, by loops."""
    sources, targets = split_tokens(h, w, seed)

    def cosine(a, b):
        lengths = np.linalg.norm(x[a].astype(np.float64)) * np.linalg.norm(x[b].astype(np.float64))
        return float(x[a].astype(np.float64) @ x[b]) / lengths if lengths else 0.0

    best = {s: max(targets, key=lambda t: cosine(s, t)) for s in sources} if len(targets) else {}
    by_likeness = sorted(best, key=lambda s: -cosine(s, best[s]))
    joined = by_likeness[: int(ratio * h * w)]
    groups = {t: number for number, t in enumerate(targets)}
    alone = [s for s in sources if s not in joined]
    return [
        groups[token]
        if token in groups
        else groups[best[token]]
        if token in joined
        else len(targets) + alone.index(token)
        for token in range(h * w)
    ]


@settings(max_examples=60, deadline=None)
@given(size=SIZES, ratio=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75]), seed=st.integers(0, 99))
def test_groups(size, ratio, seed):
    h, w = size
    x = np.random.default_rng(seed).standard_normal((2, h * w, 5)).astype(np.float32)
    found = TokenMerging(ratio, seed).group(x, h, w)
    for tokens, groups in zip(x, found, strict=True):
        np.testing.assert_array_equal(groups, grouped(tokens, h, w, ratio, seed))
    assert found[0].max() == found[1].max()


@settings(max_examples=60, deadline=None)
@given(size=SIZES, ratio=st.sampled_from([0.1, 0.5, 0.75]), seed=st.integers(0, 99))
def test_means_of_groups_and_back(size, ratio, seed):
    h, w = size
    rng = np.random.default_rng(seed)
    x, stream = (rng.standard_normal((2, h * w, 5)).astype(np.float32) for _ in range(2))
    groups = TokenMerging(ratio, seed).group(x, h, w)
    merged = merge(x, groups)
    kept = h * w - min(int(ratio * h * w), len(split_tokens(h, w, seed)[0]) if h > 1 and w > 1 else 0)
    assert merged.shape == (2, kept, 5) and merged.dtype == np.float32
    for i, g in np.ndindex(merged.shape[:2]):
        np.testing.assert_allclose(merged[i, g], x[i, groups[i] == g].mean(axis=0), rtol=1e-5, atol=1e-6)
    wanted = stream + np.stack([merged[i, groups[i]] for i in range(2)])
    add_unmerged(merged, groups, stream)
    np.testing.assert_allclose(stream, wanted, rtol=1e-6)


def test_equal_and_empty_tokens():
    for x in (np.zeros((1, 16, 4), np.float32), np.ones((1, 16, 4), np.float32)):
        groups = TokenMerging(0.5, 1).group(x, 4, 4)
        assert groups.max() + 1 == 8
        np.testing.assert_array_equal(merge(x, groups), x[:, :8])


@pytest.mark.parametrize("ratio", [-0.1, 0.76, float("nan"), "0.5", None, True])
def test_shares_that_are_none(ratio):
    with pytest.raises(
        InputError, match=r"tome: found .*, expected a share of the tokens from 0 to 0\.75, usually 0\.5"
    ):
        check_ratio(ratio)
    with pytest.raises(InputError, match=r"tome: found .*, expected a share"):
        unet(SD1)(SD1.sample(), 5, SD1.context(), tome=ratio)


# ---- in the UNet


def test_nothing_merged_is_nothing_changed():
    network = unet(SD1)
    expected = network(SD1.sample(), 500, SD1.context())
    np.testing.assert_array_equal(network(SD1.sample(), 500, SD1.context(), tome=0), expected)
    near, far = (network(SD1.sample(), 500, SD1.context(), tome=ratio) for ratio in (0.1, 0.75))
    scale = np.linalg.norm(expected)
    assert 0 < np.linalg.norm(near - expected) < np.linalg.norm(far - expected) < 0.5 * scale


@pytest.mark.parametrize(("h", "w"), [(8, 8), (9, 7), (16, 10)])
def test_any_size_and_number_of_threads(h, w):
    network, rng = unet(SD1), np.random.default_rng(0)
    sample = rng.standard_normal((2, 4, h, w)).astype(np.float32)
    context = np.repeat(SD1.context()[:1], 2, axis=0)
    found = network(sample, 500.5, context, tome=0.5)
    kernels.set_threads(1)
    try:
        np.testing.assert_array_equal(network(sample, 500.5, context, tome=0.5), found)
        for i in range(2):
            alone = network(sample[i : i + 1], 500.5, context[:1], tome=0.5)
            np.testing.assert_array_equal(alone[0], found[i])
    finally:
        kernels.set_threads(0)


def test_destinations_follow_from_the_first_timestep_rounded(monkeypatch):
    network, seeds, group = unet(SD1), [], TokenMerging.group

    def spy(self, x, h, w):
        seeds.append(self.seed)
        return group(self, x, h, w)

    monkeypatch.setattr(TokenMerging, "group", spy)
    sample, context = np.zeros((2, 4, 8, 8), np.float32), np.repeat(SD1.context()[:1], 2, axis=0)
    for timestep, seed in ((500, 500), (499.7, 500), (np.float32(0.3), 0), (np.array([7.0, 900.0]), 7), (-3.0, 3)):
        network(sample, timestep, context, tome=0.5)
        assert set(seeds) == {seed}
        seeds.clear()
    network(sample, 500, context, tome=0)
    assert not seeds


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_only_the_finest_maps_with_attention_are_merged(case, monkeypatch):
    """There are fewer and fewer tokens on the way down; whatever else has attention keeps all of its own."""
    network, met, merged, group = unet(case), [], [], TokenMerging.group
    call = Transformer.__call__

    def see(self, x, context, tome):
        met.append(x.shape[1:3])
        return call(self, x, context, tome)

    def spy(self, x, h, w):
        merged.append((h, w))
        return group(self, x, h, w)

    monkeypatch.setattr(Transformer, "__call__", see)
    monkeypatch.setattr(TokenMerging, "group", spy)
    network(case.sample(), 500, case.context(), tome=0.5)
    blocks = case.unet.get("transformer_layers_per_block", 1)
    assert len(set(met)) > 1 and set(merged) == {max(met)}
    if blocks == 1:
        assert len(merged) == met.count(max(met))


def test_in_a_picture():
    pipe = StableDiffusionPipeline.from_pretrained()
    few = {"seed": 1, "num_inference_steps": 4, "output_type": "np"}
    whole = pipe("a red apple", **few).images
    np.testing.assert_array_equal(pipe("a red apple", tome=0, **few).images, whole)
    merged = pipe("a red apple", tome=0.5, **few).images
    assert 1e-4 < np.mean((merged - whole) ** 2) < 0.01
    np.testing.assert_array_equal(pipe("a red apple", tome=0.5, **few).images, merged)
    with pytest.raises(InputError, match=r"tome: found 0\.8, expected a number from 0 to 0\.75"):
        pipe("a red apple", tome=0.8)
