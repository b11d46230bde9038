"""The folders that benchmarks and golden tests are made of."""

import json
import math

import numpy as np
import pytest
from safetensors import safe_open

from bench.make_random_model import (
    SD15,
    TILE,
    network_shapes,
    random_tensor,
    stored_names,
    to_bfloat16,
    write_model,
    write_safetensors,
)
from sd_numba.checkpoints.weights import Weights
from tests.golden.cases import CASES

SD1 = CASES[0]


@pytest.mark.parametrize(
    ("component", "tensors", "parameters"),
    [("text_encoder", 196, 123_060_480), ("unet", 686, 859_520_964), ("vae", 248, 83_653_863)],
)
def test_full_size_networks_have_the_published_size(component, tensors, parameters):
    shapes = network_shapes(component, SD15[component])
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (tensors, parameters)


def test_names_as_in_the_published_files():
    text = stored_names("text_encoder", network_shapes("text_encoder", SD15["text_encoder"]), old_names=True)
    vae = stored_names("vae", network_shapes("vae", SD15["vae"]), old_names=True)
    assert (len(text), len(vae)) == (197, 248)
    assert text["text_model.embeddings.position_ids"][1] == (1, 77)
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in vae
    assert not any(".to_" in name for name in vae)


def test_tensors_depend_on_name_and_seed_alone():
    first = random_tensor("a.weight", (20, 30))
    np.testing.assert_array_equal(first, random_tensor("a.weight", (20, 30)))
    assert not np.array_equal(first, random_tensor("b.weight", (20, 30)))
    assert not np.array_equal(first, random_tensor("a.weight", (20, 30), seed=1))
    # Pinned, since the golden files were made with these.
    np.testing.assert_allclose(first[0, :3], [-0.0105157, -0.00348204, -0.08699022], rtol=1e-5)


def test_scales():
    assert random_tensor("conv.weight", (64, 32, 3, 3)).std() == pytest.approx((32 * 9) ** -0.5, rel=0.02)
    assert random_tensor("norm.weight", (5000,)).mean() == pytest.approx(1, abs=0.01)
    assert random_tensor("norm.bias", (5000,)).std() == pytest.approx(0.1, rel=0.05)


def test_rows_of_large_tensors_differ():
    x = random_tensor("large.weight", (4096, 1024))
    assert x.size > TILE
    assert len(np.unique(x[:, :4], axis=0)) == len(x)


def test_bfloat16_rounds_to_nearest_even():
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -2.5, 0.0], np.float32)
    expected = np.array([1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -2.5, 0.0], np.float32)
    np.testing.assert_array_equal(to_bfloat16(x), (expected.view(np.uint32) >> 16).astype(np.uint16))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_files_are_valid_safetensors(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    names = {"b.position_ids": ("", (1, 7)), "c.weight": ("c.weight", (3, 5)), "d.bias": ("d.bias", (3,))}
    write_safetensors(path, names, dtype)
    if dtype != "bf16":  # which NumPy cannot hold
        with safe_open(path, "numpy") as file:
            np.testing.assert_array_equal(file.get_tensor("b.position_ids"), [range(7)])
            expected = random_tensor("c.weight", (3, 5)).astype(file.get_tensor("c.weight").dtype)
            np.testing.assert_array_equal(file.get_tensor("c.weight"), expected)
    assert Weights.open(path).raw("d.bias").shape == (3,)


def test_folder(tmp_path):
    write_model(tmp_path / "model", SD1.configs, "f16", old_names=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt"):
        assert (tmp_path / "model" / name).is_file()
    vocabulary = json.loads((tmp_path / "model" / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(1000))
    assert Weights.open(tmp_path / "model" / "vae").dtypes() == {"F16": 248}
    with pytest.raises(FileExistsError):
        write_model(tmp_path / "model", SD1.configs)


def test_nothing_is_left_behind_when_it_fails(tmp_path):
    with pytest.raises(KeyError):
        write_model(tmp_path / "model", SD1.configs, "f8")
    assert not list(tmp_path.iterdir())
