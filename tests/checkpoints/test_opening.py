"""Model folders: what is accepted, and what is said about the others."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sd_numba.checkpoints.opening import embedded_model_path, open_model
from sd_numba.checkpoints.weights import Weights
from sd_numba.errors import ModelError


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model that a test may break."""
    return shutil.copytree(embedded_model_path(), tmp_path / "model")


def fault(*args):
    with pytest.raises(ModelError) as caught:
        open_model(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_embedded_model_opens():
    model = open_model()
    assert model.path == embedded_model_path() and model.name == "emoji-world"
    assert model.scheduler["prediction_type"] == "v_prediction"
    assert model.configs["unet"]["cross_attention_dim"] == model.configs["text_encoder"]["hidden_size"] == 192
    assert model.configs["vae"]["scaling_factor"] == 0.18215
    for name in ("NOTICE.md", "README.md", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        assert (model.path / name).is_file()


def test_a_folder_without_index_is_accepted(folder):
    (folder / "model_index.json").unlink()
    assert open_model(str(folder)).configs["unet"]["sample_size"] == 32


@pytest.mark.parametrize("component", ["tokenizer", "text_encoder", "unet", "vae", "scheduler"])
def test_a_missing_component_is_named(folder, component):
    shutil.rmtree(folder / component)
    assert f"its folder {component} is missing" in fault(folder)


def test_missing_files_are_named(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "vae: no weights" in fault(folder)
    (folder / "unet" / "config.json").unlink()
    assert "unet/config.json: no such file" in fault(folder)


def test_no_model_at_all(tmp_path):
    for name in ("nothing", "x" * 5000, "null\0"):
        assert "does not exist" in fault(tmp_path / name)
    assert "not a diffusers model" in fault(tmp_path)
    (tmp_path / "file.safetensors").write_bytes(b"")
    assert "the file is empty" in fault(tmp_path / "file.safetensors")


def test_other_kinds_of_models_are_named(folder):
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    message = fault(folder)
    assert "found StableDiffusionXLPipeline" in message and "Stable Diffusion 1.x and 2.x" in message
    (folder / "model_index.json").unlink()
    (folder / "text_encoder_2").mkdir()
    assert "several text encoders (SDXL)" in fault(folder)


def test_other_classes_of_networks_are_named(folder):
    edit(folder / "vae" / "config.json", _class_name="AutoencoderTiny")
    assert "vae/config.json: found a AutoencoderTiny, supported is AutoencoderKL" in fault(folder)
    edit(folder / "text_encoder" / "config.json", architectures=["T5EncoderModel"])
    assert "supported is CLIPTextModel or CLIPTextModelWithProjection" in fault(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "not valid"),
        (b"{", "not valid"),
        (b"[1]", "found list"),
        (b"\xff", "not valid"),
        (b"[" * 99999, "not valid"),
    ],
)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_broken_json(folder, name, text, expected):
    (folder / name).write_bytes(text)
    message = fault(folder)
    assert name in message and expected in message


def test_a_text_encoder_saved_without_prefix_and_with_position_ids(tmp_path):
    source = embedded_model_path() / "text_encoder" / "model.safetensors"
    tensors = {name.removeprefix("text_model."): value for name, value in load_file(source).items()}
    save_file({**tensors, "embeddings.position_ids": np.arange(77)[None]}, tmp_path / "model.safetensors")
    expected, weights = Weights.open(source), Weights.open(tmp_path)
    assert sorted(weights.names()) == sorted(expected.names())
    assert weights.unused == ["embeddings.position_ids"]
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    np.testing.assert_array_equal(weights.raw(name), expected.raw(name))


def test_a_vae_with_the_old_attention_names(tmp_path):
    source = embedded_model_path() / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for stored, value in load_file(source).items():
        name = stored
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        tensors[name] = value[..., None, None] if name != stored and value.ndim == 2 else value
    assert "decoder.mid_block.attentions.0.query.weight" in tensors
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    expected, weights = Weights.open(source), Weights.open(tmp_path)
    for name in expected.names():
        value = expected.raw(name)
        np.testing.assert_array_equal(weights.take(name, value.shape), value)
    weights.finish()
