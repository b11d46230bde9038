"""The text encoder against transformers' CLIPTextModel, and what it refuses."""

import numpy as np
import pytest

from sd_numba.checkpoints.weights import Weights
from sd_numba.errors import InputError, ModelError
from sd_numba.networks.clip import TextEncoder, TextEncoderConfig
from sd_numba.prompts.tokenizer import Tokenizer
from tests.golden.cases import CASES, EMBEDDED, Case
from tests.golden.compare import check, golden, weights_of

TOLERANCE = 1e-4
SD1 = CASES[0]


def text_encoder(case: Case, dtype: str = "f32", packed: bool = False) -> TextEncoder:
    weights = weights_of(case, "text_encoder", dtype)
    weights.packed = packed
    network = TextEncoder(weights, TextEncoderConfig.from_dict(case.text_encoder))
    weights.finish()
    return network


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case):
    check(text_encoder(case)(case.ids()), golden(case.path)["text_encoder"], TOLERANCE, case.name)


def test_embedded_golden():
    config = TextEncoderConfig(2560, 192, 768, 4, 4)
    network = TextEncoder(Weights.open(EMBEDDED.folder / "text_encoder"), config)
    ids = Tokenizer.from_folder(EMBEDDED.folder / "tokenizer")(EMBEDDED.prompt)
    check(network(ids), golden(EMBEDDED.path)["text_encoder"], TOLERANCE, "embedded")
    check(network(ids, skip=1), golden(EMBEDDED.path)["text_encoder_skip"], TOLERANCE, "embedded, a layer left out")
    for skip in (-1, config.num_hidden_layers):
        with pytest.raises(InputError, match=f"clip skip: found {skip}"):
            network(ids, skip=skip)


def test_layers_are_left_out_from_the_end():
    layers = SD1.text_encoder["num_hidden_layers"]
    for skip in range(layers):
        shorter = TextEncoderConfig.from_dict(SD1.text_encoder | {"num_hidden_layers": layers - skip})
        expected = TextEncoder(weights_of(SD1, "text_encoder"), shorter)(SD1.ids())
        np.testing.assert_array_equal(text_encoder(SD1)(SD1.ids(), skip=skip), expected)


def test_packed_weights_change_nothing():
    expected = text_encoder(SD1)(SD1.ids())
    check(text_encoder(SD1, packed=True)(SD1.ids()), expected, 1e-6, "packed")


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 5e-3), ("bf16", 5e-2)])
def test_half_precision_weights(dtype, tolerance):
    check(text_encoder(SD1, dtype)(SD1.ids()), golden(SD1.path)["text_encoder"], tolerance, dtype)


def test_tokens_see_only_those_before_them():
    network, ids = text_encoder(SD1), SD1.ids()[:1]
    changed = ids.copy()
    changed[0, 40:] = 7
    before, after = network(ids), network(changed)
    np.testing.assert_array_equal(before[:, :40], after[:, :40])
    assert not np.array_equal(before[:, 40:], after[:, 40:])


def test_rows_of_a_batch_are_independent():
    network, ids = text_encoder(SD1), SD1.ids()
    for row, expected in zip(ids, network(ids), strict=True):
        check(network(row[None])[0], expected, 1e-5, "one row")


def test_shorter_rows():
    network, ids = text_encoder(SD1), SD1.ids()
    check(network(ids[:, :9]), golden(SD1.path)["text_encoder"][:, :9], TOLERANCE, "nine tokens")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((1, 78), np.int64), "78"),
        (np.zeros(77, np.int64), "77"),
        (np.zeros((0, 77), np.int64), "0, 77"),
        (np.zeros((1, 77), np.float32), "float32"),
        (np.full((1, 77), 1000, np.int64), "1000"),
        (np.full((1, 77), -1, np.int64), "-1"),
    ],
)
def test_bad_ids(ids, message):
    with pytest.raises(InputError, match=message):
        text_encoder(SD1)(ids)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("hidden_size", "768"),
        ("hidden_size", 0),
        ("num_attention_heads", 3),
        ("num_hidden_layers", -1),
        ("model_type", "t5"),
        ("layer_norm_eps", None),
    ],
)
def test_config(key, value):
    config = SD1.text_encoder | {key: value}
    if value is None:  # null stands for the default
        assert TextEncoderConfig.from_dict(config).layer_norm_eps == 1e-5
    else:
        with pytest.raises(ModelError, match=key):
            TextEncoderConfig.from_dict(config)
