"""LoRA and LoCon files: names, scales, and pictures that are those of a model with the update in its weights."""

import gzip
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bench.make_random_model import write_model
from sd_numba import StableDiffusionPipeline
from sd_numba.checkpoints.lora import Modules, read_lora
from sd_numba.checkpoints.opening import expected_shapes
from sd_numba.errors import InputError, ModelError
from sd_numba.families.names import unet_names
from sd_numba.tools.convert import convert
from sd_numba.tools.info import describe
from tests.families.test_names import FAMILIES, latents
from tests.golden.cases import GOLDEN, SINGLE_FILES
from tests.golden.compare import relative_error, scratch

PARTS = ("text_encoder", "unet")
FILES = {"text_encoder": "model.safetensors", "unet": "diffusion_pytorch_model.safetensors"}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request):
    folder = scratch() / f"lora-{request.param}"
    write_model(folder, FAMILIES[request.param], pad_token="!" if request.param == "2" else "<|endoftext|>")
    return folder


def modules_of(folder):
    """Layers of a model: (network, module) -> shape of the weight."""
    found = {}
    for part in PARTS:
        for name, x in load_file(folder / part / FILES[part]).items():
            if x.ndim > 1 and name.endswith(".weight") and "embedding." not in name:
                found[part, name.removesuffix(".weight")] = x.shape
    return found


def random_updates(folder, rank=3, seed=0, scale=0.05):
    """Matrices (up, down, alpha) for every layer."""
    random = np.random.default_rng(seed)

    def matrix(*shape):
        return (scale * random.standard_normal(shape)).astype(np.float32)

    return {
        key: (matrix(n, rank), matrix(rank, *rest), float(random.integers(1, 5)))
        for key, (n, *rest) in modules_of(folder).items()
    }


def merged(folder, path, updates, weight=1.0):
    """A copy of the model with updates in its weights."""
    list(convert(folder, path))
    for part in PARTS:
        tensors = load_file(path / part / FILES[part])
        for (network, module), (up, down, alpha) in updates.items():
            if network == part:
                delta = up.astype(np.float64) @ down.reshape(len(down), -1) * (weight * alpha / len(down))
                w = tensors[f"{module}.weight"]
                tensors[f"{module}.weight"] = (w + delta.reshape(w.shape)).astype(np.float32)
        save_file(tensors, path / part / FILES[part])
    return path


def kohya(updates):
    """As kohya's scripts write them."""
    tensors = {}
    for (network, module), (up, down, alpha) in updates.items():
        key = f"{'lora_unet' if network == 'unet' else 'lora_te'}_{module.replace('.', '_')}"
        tensors[f"{key}.lora_up.weight"] = up.reshape(*up.shape, *(1,) * (down.ndim - 2))
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.alpha"] = np.array(alpha, np.float32)
    return tensors


def run(folder, *loras, weights="mmap"):
    pipe = StableDiffusionPipeline.from_pretrained(folder, weights=weights)
    for lora, weight in loras:
        pipe.load_lora_weights(lora, weight)
    return latents(pipe)


@pytest.mark.parametrize("weights", ["mmap", "packed"])
def test_it_is_as_if_the_update_were_in_the_weights(folder, tmp_path, weights):
    updates = random_updates(folder)
    save_file(kohya(updates), tmp_path / "a.safetensors")
    plain, expected = run(folder), run(merged(folder, tmp_path / "m", updates, 0.7))
    found = run(folder, (tmp_path / "a.safetensors", 0.7), weights=weights)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(found, plain) > 1e-2


@pytest.mark.parametrize("weights", ["mmap", "packed"])
def test_over_int8(folder, tmp_path, weights):
    list(convert(folder, tmp_path / "int8", "int8"))
    list(convert(tmp_path / "int8", tmp_path / "wide", "f32"))
    updates = random_updates(folder)
    save_file(kohya(updates), tmp_path / "a.safetensors")
    expected = run(merged(tmp_path / "wide", tmp_path / "m", updates, 0.7))
    assert relative_error(run(tmp_path / "int8", (tmp_path / "a.safetensors", 0.7), weights=weights), expected) < 1e-4


def test_several_add_up_and_can_be_taken_away(folder, tmp_path):
    a, b = random_updates(folder, 2, 1), random_updates(folder, 4, 2)
    for name, updates in (("a", a), ("b", b)):
        save_file(kohya(updates), tmp_path / f"{name}.safetensors")
    both = merged(merged(folder, tmp_path / "x", a, 1.5), tmp_path / "y", b, -0.5)
    pipe = StableDiffusionPipeline.from_pretrained(folder, weights="mmap")
    before = latents(pipe)
    pipe.load_lora_weights(tmp_path / "a.safetensors", 1.5)
    pipe.load_lora_weights(tmp_path / "b.safetensors", -0.5)
    assert relative_error(latents(pipe), run(both)) < 1e-4
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(latents(pipe), before)


def test_zero_changes_nothing(folder, tmp_path):
    save_file(kohya(random_updates(folder)), tmp_path / "a.safetensors")
    np.testing.assert_array_equal(run(folder, (tmp_path / "a.safetensors", 0.0)), run(folder))


def peft(updates, prefix=""):
    tensors = {}
    for (network, module), (up, down, _) in updates.items():
        tensors[f"{prefix}{network}.{module}.lora_A.weight"] = down
        tensors[f"{prefix}{network}.{module}.lora_B.weight"] = up.reshape(*up.shape, *(1,) * (down.ndim - 2))
    return tensors


def test_peft_with_its_settings(folder, tmp_path):
    updates = {key: (up, down, 6.0) for key, (up, down, _) in random_updates(folder).items()}
    settings = {"unet.r": 3, "unet.lora_alpha": 6, "text_encoder.r": 3, "text_encoder.lora_alpha": 6}
    save_file(peft(updates), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    expected = run(merged(folder, tmp_path / "m", updates))
    assert relative_error(run(folder, (tmp_path / "a.safetensors", 1.0)), expected) < 1e-4
    save_file(peft(updates), tmp_path / "b.safetensors")  # without: alpha is the rank
    half = run(folder, (tmp_path / "b.safetensors", 2.0))
    assert relative_error(half, expected) < 1e-4


def test_an_adapter_of_peft_with_its_configuration(folder, tmp_path):
    updates = {key: (up, down, 6.0) for key, (up, down, _) in random_updates(folder).items() if key[0] == "unet"}
    (tmp_path / "adapter").mkdir()
    tensors = {name.replace("unet.", "base_model.model."): x for name, x in peft(updates).items()}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    expected = run(merged(folder, tmp_path / "m", updates))
    found = run(folder, (tmp_path / "adapter" / "adapter_model.safetensors", 1.0))
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float16])
def test_alphas_of_other_dtypes(folder, tmp_path, dtype):
    tensors = kohya(random_updates(folder))
    save_file(tensors, tmp_path / "a.safetensors")
    changed = {name: x.astype(dtype) if name.endswith(".alpha") else x for name, x in tensors.items()}
    save_file(changed, tmp_path / "b.safetensors")
    np.testing.assert_array_equal(*(run(folder, (tmp_path / f"{name}.safetensors", 1.0)) for name in "ab"))


def test_weights_that_are_none(folder, tmp_path):
    save_file(kohya(random_updates(folder)), tmp_path / "a.safetensors")
    for weight in (float("nan"), 1e40, "0.5"):
        with pytest.raises(InputError, match="expected -1000 to 1000"):
            run(folder, (tmp_path / "a.safetensors", weight))


def test_another_weight_in_the_text_encoder(folder, tmp_path):
    updates = random_updates(folder)
    save_file(kohya(updates), tmp_path / "a.safetensors")
    only = {key: value for key, value in updates.items() if key[0] == "text_encoder"}
    pipe = StableDiffusionPipeline.from_pretrained(folder, weights="mmap")
    pipe.load_lora_weights(tmp_path / "a.safetensors", 0, text_encoder_weight=0.5)
    assert relative_error(latents(pipe), run(merged(folder, tmp_path / "m", only, 0.5))) < 1e-4


def test_rank_stabilised(folder, tmp_path):
    updates = {key: (up, down, 6.0) for key, (up, down, _) in random_updates(folder).items()}
    settings = {f"{part}.{key}": value for part in PARTS for key, value in (("lora_alpha", 6), ("use_rslora", True))}
    save_file(peft(updates), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    expected = run(merged(folder, tmp_path / "m", updates, 3**0.5))
    assert relative_error(run(folder, (tmp_path / "a.safetensors", 1.0)), expected) < 1e-4


def test_half_precision_files(folder, tmp_path):
    updates = random_updates(folder)
    rounded = {
        key: (up.astype(np.float16).astype(np.float32), down.astype(np.float16).astype(np.float32), alpha)
        for key, (up, down, alpha) in updates.items()
    }
    save_file({name: x.astype(np.float16) for name, x in kohya(updates).items()}, tmp_path / "a.safetensors")
    list(convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "f32"))
    found = [run(folder, (tmp_path / f"{name}.safetensors", 1.0)) for name in "ab"]
    np.testing.assert_array_equal(*found)
    assert relative_error(found[0], run(merged(folder, tmp_path / "m", rounded))) < 1e-4


def test_the_convolution_in_the_middle_of_locon(folder, tmp_path):
    random, key = np.random.default_rng(3), ("unet", "mid_block.resnets.0.conv1")
    up, middle, first = (
        0.1 * random.standard_normal(shape).astype(np.float32) for shape in ((64, 5), (5, 4, 3, 3), (4, 64))
    )
    down = np.einsum("rshw,sc->rchw", middle, first)
    name = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {"lora_up": up[..., None, None], "lora_mid": middle, "lora_down": first[..., None, None]}
    save_file({f"{name}.{part}.weight": x for part, x in tensors.items()}, tmp_path / "a.safetensors")
    expected = run(merged(folder, tmp_path / "m", {key: (up, down, 5.0)}))
    assert relative_error(run(folder, (tmp_path / "a.safetensors", 1.0)), expected) < 1e-4


def sd15_modules():
    shapes = {part: expected_shapes(part, SINGLE_FILES["1"][part]) for part in PARTS}
    return Modules(shapes, unet_names([2] * 4, [True, True, True, False]))


def test_names_of_kohya_and_diffusers():
    modules = sd15_modules()
    lines = gzip.decompress((GOLDEN / "lora.txt.gz").read_bytes()).decode().splitlines()
    assert len(lines) == 700
    found = set()
    for line in lines:
        old, new = line.split("\t")
        module = modules.find(old.split(".")[0])
        assert module is not None, old
        found.add(module)
        shorter = new.replace(".processor", "")
        for ending in ("_lora.down.weight", "_lora.up.weight", ".lora.down.weight", ".lora.up.weight",
                       ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"):  # fmt: skip
            shorter = shorter.removesuffix(ending)
        assert modules.find(shorter) == module, new
        assert modules.find(f"{module[0]}.{module[1]}") == module  # PEFT
    assert len(found) == 350


def test_names_of_other_programs():
    modules = sd15_modules()
    for name, module in {
        "lora_unet_input_blocks_1_1_proj_in": "down_blocks.0.attentions.0.proj_in",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0": (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
        ),
        "lora_unet_output_blocks_11_0_in_layers_2": "up_blocks.3.resnets.2.conv1",
        "lora_unet_middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "lora_unet_time_embed_0": "time_embedding.linear_1",
        "base_model.model.unet.conv_in": "conv_in",
        "conv_in": "conv_in",
    }.items():
        assert modules.find(name) == ("unet", module)
    layer = "text_model.encoder.layers.3.mlp.fc1"
    assert modules.find("lora_te1_text_model_encoder_layers_3_mlp_fc1") == ("text_encoder", layer)
    assert modules.find("lora_te2_text_model_encoder_layers_3_mlp_fc1") is None


DOWN, UP = "lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.lora_up.weight"


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({DOWN: (2, 4, 3, 3)}, "has only down, expected up and down"),
        ({DOWN: (2, 9), UP: (32, 2)}, "made for another model"),
        ({DOWN: (2, 4, 3, 3), UP: (9, 2)}, "made for another model"),
        ({DOWN: (2, 4, 3, 3), UP: (32, 3)}, "which do not fit"),
        ({DOWN: (0, 4, 3, 3), UP: (32, 0)}, "which do not fit"),
        ({DOWN: (2, 4, 3, 3), UP: (32, 2), "lora_unet_conv_in.alpha": (7,)}, "which do not fit"),
        ({DOWN: (2, 4), UP: (32, 2), "lora_unet_conv_in.lora_mid.weight": (3, 2, 3, 3)}, "which do not fit"),
        ({DOWN: (2, 4), UP: (32, 3), "lora_unet_conv_in.lora_mid.weight": (3, 2, 9, 9)}, "made for another model"),
        ({DOWN: (), UP: ()}, "which do not fit"),
        (
            {f"lora_te_text_model_embeddings_token_embedding.lora_{part}.weight": (64, 64) for part in ("up", "down")},
            "none of its modules is in this",
        ),
        (
            {"lora_te2_x.lora_down.weight": (2, 9), "lora_te2_x.lora_up.weight": (9, 2)},
            "none of its modules is in this",
        ),
        ({"lora_unet_conv_in.hada_w1_a": (2, 2)}, "LoHa"),
        ({DOWN: (2, 4), "lora_unet_conv_in.diff": (2,)}, "found tensor 'lora_unet_conv_in.diff'"),
        ({"conv_in.weight": (2, 2)}, "expected LoRA"),
    ],
)
def test_files_that_do_not_fit(folder, tmp_path, shapes, expected):
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError) as caught:
        run(folder, (tmp_path / "a.safetensors", 1.0))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_nan_is_told(folder, tmp_path):
    tensors = kohya(random_updates(folder))
    next(iter(tensors.values())).reshape(-1)[0] = np.nan
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="holds NaN"):
        run(folder, (tmp_path / "a.safetensors", 1.0))


def test_modules_that_are_not_there_are_told(folder, tmp_path, caplog):
    tensors = kohya(random_updates(folder))
    for part in ("down", "up"):
        tensors[f"lora_unet_x.lora_{part}.weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    run(folder, (tmp_path / "a.safetensors", 1.0))
    assert "1 of its" in caplog.text and "lora_unet_x" in caplog.text


def test_info(folder, tmp_path):
    save_file(kohya(random_updates(folder, 3)), tmp_path / "a.safetensors", {"ss_output_name": "style"})
    text = describe(tmp_path / "a.safetensors")
    assert "LoRA: " in text and "text_encoder: 12, of rank 3" in text and "name: style" in text
    assert "convolutions (LoCon)" in text


def test_read_lora_keeps_what_is_stored(tmp_path):
    up, down = np.ones((32, 2), np.float16), np.ones((2, 4, 3, 3), np.float16)
    tensors = {UP: up[..., None, None], DOWN: down}
    save_file(tensors | {"lora_unet_conv_in.alpha": np.array(1, np.float16)}, tmp_path / "a.safetensors")
    modules = Modules({"unet": {"conv_in.weight": (32, 4, 3, 3)}}, unet_names([1], [True]))
    (update,) = read_lora(tmp_path / "a.safetensors", modules)
    assert (update.network, update.module, update.scale) == ("unet", "conv_in", 0.5)
    assert update.up.dtype == update.down.dtype == np.float16 and update.up.shape == (32, 2)
