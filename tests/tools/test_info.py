"""What ``sd-numba test`` and ``sd-numba info`` find out about files."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image, features
from safetensors.numpy import load_file, save_file

from sd_numba.checkpoints.opening import embedded_model_path, expected_shapes
from sd_numba.errors import ModelError, SdNumbaError
from sd_numba.recipes.png import EXIF_IFD, USER_COMMENT, save_png
from sd_numba.tools.check import check_model
from sd_numba.tools.convert import convert
from sd_numba.tools.info import describe

SD15 = {
    "text_encoder": {
        "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77, "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 49408,
    },
    "unet": {
        "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False, "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
        "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae": {
        "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
        "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(embedded_model_path(), tmp_path / "model")


@pytest.mark.parametrize(
    ("component", "tensors", "parameters"),
    [("text_encoder", 196, 123_060_480), ("unet", 686, 859_520_964), ("vae", 248, 83_653_863)],
)
def test_stable_diffusion_15_needs_the_well_known_numbers(component, tensors, parameters):
    shapes = expected_shapes(component, SD15[component])
    assert len(shapes) == tensors
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


def test_the_embedded_model_is_sound():
    reports = list(check_model())
    assert [report.component for report in reports] == ["tokenizer", "text_encoder", "unet", "vae", "scheduler"]
    assert all(report.ok for report in reports)
    assert [str(report) for report in reports][:4] == [
        "tokenizer: 2560 tokens, rows of 77: ok",
        "text_encoder: 68 tensors, 2,286,144 parameters, F16, 4.6 MB: ok",
        "unet: 326 tensors, 8,741,092 parameters, F16, 17.5 MB: ok",
        "vae: 156 tensors, 1,695,271 parameters, F16, 3.4 MB: ok",
    ]


def faults(folder):
    return {report.component: str(report) for report in check_model(folder) if not report.ok}


def test_faults_are_found_and_named(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][3] = np.nan
    tensors["extra"] = tensors.pop("conv_out.bias")
    save_file(tensors, path)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    vocab = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({**vocab, "new": 2560}))
    found = faults(folder)
    assert sorted(found) == ["tokenizer", "unet", "vae"]
    assert "2561 tokens, but the text encoder knows 2560" in found["tokenizer"]
    assert "1 missing: conv_out.bias; 1 unexpected: extra; NaN or infinite values in 1 tensors" in found["unet"]
    assert "conv_in.bias (1)" in found["unet"]
    assert "truncated" in found["vae"]
    assert not any("\n" in line for line in found.values())


def test_unsupported_configs_are_faults(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "addition_embed_type": "text_time"}))
    assert "addition_embed_type" in faults(folder)["unet"]


def test_position_ids_are_counted_apart(folder):
    path = folder / "text_encoder" / "model.safetensors"
    save_file({**load_file(path), "text_model.embeddings.position_ids": np.arange(77)[None]}, path)
    line = next(str(report) for report in check_model(folder) if report.component == "text_encoder")
    assert "68 tensors" in line and "(and text_model.embeddings.position_ids, not needed): ok" in line


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="not a diffusers model"):
        list(check_model(tmp_path))


def test_int8(folder, tmp_path):
    """The same numbers of tensors and parameters: scales are no tensors of their own."""
    list(convert(folder, tmp_path / "int8", "int8"))
    path = tmp_path / "int8" / "unet" / "diffusion_pytorch_model.safetensors"
    size = path.stat().st_size - int.from_bytes(path.read_bytes()[:8], "little") - 8
    tensors = load_file(path)
    count = sum(x.dtype == np.int8 for x in tensors.values())
    line = f"326 tensors, 8,741,092 parameters, F16 ({326 - count}), I8 ({count}), {size / 1e6:.1f} MB"
    assert count > 100 and size < 10e6
    reports = list(check_model(tmp_path / "int8"))
    assert all(report.ok for report in reports) and str(reports[2]) == f"unet: {line}: ok"
    assert describe(tmp_path / "int8").split("\n")[2] == f"unet: UNet: {line}"
    assert describe(path) == f"UNet: {line}"
    first, second, *_ = (name for name, x in tensors.items() if x.dtype == np.int8)
    tensors[f"{first}_scale"][1] = np.nan
    del tensors[f"{second}_scale"]
    save_file(tensors, path)
    found = faults(tmp_path / "int8")
    assert list(found) == ["unet"] and "2 with wrong scales: " in found["unet"]
    assert f"{first} (found 1 scales that are NaN" in found["unet"]
    assert f"{second} (found I8 without its scales" in found["unet"]


def test_describe(folder, tmp_path):
    lines = describe(folder).split("\n")
    assert lines[0].startswith("Stable Diffusion model") and len(lines) == 5
    assert lines[2] == "unet: UNet: 326 tensors, 8,741,092 parameters, F16, 17.5 MB"
    assert lines[4] == "scheduler: DPMSolverMultistepScheduler, v_prediction, scaled_linear"
    assert describe(folder / "unet") == lines[2].removeprefix("unet: ")
    assert describe(folder / "vae" / "diffusion_pytorch_model.safetensors").startswith("VAE: 156 tensors")
    save_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), "a cat\nSteps: 20")
    assert describe(tmp_path / "a.png") == "a cat\nSteps: 20"
    save_png(tmp_path / "b.png", np.zeros((8, 8, 3), np.uint8))
    assert "without" in describe(tmp_path / "b.png")


def test_describe_other_things(tmp_path):
    save_file({"lora_unet.w": np.ones(2, np.float32), "x": np.ones(3, np.float16)}, tmp_path / "l.safetensors")
    assert describe(tmp_path / "l.safetensors").startswith("LoRA: 2 tensors, 5 parameters, F32 (1), F16 (1)")
    (tmp_path / "a.txt").write_text("hello, this is text")
    for path in (tmp_path / "a.txt", tmp_path / "none", tmp_path):
        with pytest.raises(SdNumbaError):
            describe(path)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.webp", "WebP"), ("a.avif", "AVIF")]
)
def test_describe_pictures(tmp_path, name, kind):
    """By what is in the file, whatever it is called."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + "a cat\nSteps: 5, Seed: 1, Size: 8x8".encode("utf-16-be")
    image = Image.new("RGB", (8, 8), "red")
    image.save(tmp_path / name)
    (tmp_path / name).rename(tmp_path / "mute")
    assert describe(tmp_path / "mute") == f"{kind} picture without generation parameters"
    image.save(tmp_path / name, exif=exif.tobytes())
    assert describe(tmp_path / name) == "a cat\nSteps: 5, Seed: 1, Size: 8x8"
    content = (tmp_path / name).read_bytes()
    for size in (20, 60):
        (tmp_path / name).write_bytes(content[:size])
        with pytest.raises(SdNumbaError, match=f"{name}: cannot be read as a picture: ") as caught:
            describe(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_pipe_is_no_file(tmp_path):
    """Reading one would wait for ever."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    for reader in (describe, lambda path: list(check_model(path))):
        with pytest.raises(SdNumbaError, match=r"not a file|expected a"):
            reader(tmp_path / "pipe.safetensors")
