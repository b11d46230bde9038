"""Single-file checkpoints: names as diffusers translates them, and whole models read and run."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bench.make_random_model import write_model
from sd_numba import StableDiffusionPipeline
from sd_numba.checkpoints.opening import Checkpoint, embedded_model_path, expected_shapes, open_model
from sd_numba.checkpoints.weights import ShapeRecorder
from sd_numba.errors import ModelError
from sd_numba.families import sd1, sd2
from sd_numba.families.names import canonical_name
from sd_numba.files.tensors import TensorInfo
from sd_numba.prompts.tokenizer import Tokenizer
from sd_numba.tools.convert import convert, single_tensors
from tests.golden.cases import GOLDEN, SINGLE_FILES
from tests.golden.compare import scratch

SMALL = {
    "text_encoder": {
        "architectures": ["CLIPTextModel"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "vocab_size": 49408,
    },
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
    },
    "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [32, 64], "layers_per_block": 1},
    "scheduler": dict(sd1.FAMILY.scheduler),
}
KINDS = {"1": sd1.FAMILY, "2": sd2.FAMILY}
FAMILIES = {
    "1": SMALL,
    "2": SMALL
    | {
        "text_encoder": SMALL["text_encoder"] | {"hidden_act": "gelu"},
        "unet": SMALL["unet"] | {"attention_head_dim": [1, 1], "use_linear_projection": True},
    },
}


class Nothing(ShapeRecorder):
    """Weights of any size that take no memory."""

    def info(self, name):
        return TensorInfo("F32", self.shapes[name], 0, 0)

    def raw(self, name):
        return np.broadcast_to(np.float32(0), self.shapes[name])


def single_shapes(kind):
    """Names and shapes in a single file of a published model of this kind."""
    configs, family = {**SINGLE_FILES[kind]}, KINDS[kind]
    scheduler = configs.pop("scheduler")
    model = Checkpoint(
        Path("model"), "model", family, configs, scheduler, defaults={},
        openers=dict.fromkeys(family.networks, Nothing),
        tokenizers={"text_encoder": lambda size: Tokenizer.clip("!", size)},
    )  # fmt: skip
    return {name: entry.shape for name, entry in single_tensors(model).items()}


def whole(shapes):
    """A header with these tensors one after the other; a start tells which tensor it is."""
    header, start = {}, 0
    for name, shape in shapes.items():
        nbytes = 4 * int(np.prod(shape))
        header[name] = TensorInfo("F32", shape, start, nbytes)
        start += nbytes
    return header


@pytest.mark.parametrize("family", SINGLE_FILES)
def test_names_are_translated_as_diffusers_does(family):
    configs = SINGLE_FILES[family]
    header = whole(single_shapes(family))
    lines = gzip.decompress((GOLDEN / "single_file.txt.gz").read_bytes()).decode().splitlines()
    seen = 0
    for component, network in KINDS[family].networks.items():
        expected = {}
        for line in lines:
            model, part, old, *new = line.split("\t")
            if (model, part) == (family, component):
                expected |= {name: header[old].start + i * header[old].nbytes // len(new) for i, name in enumerate(new)}
                seen += 1
        found = network.tensors(header)
        assert {name: info.start for name, info in found.items()} == expected
        assert {name: info.shape for name, info in found.items()} == {
            name: shape if len(found[name].shape) == len(shape) else (*shape, 1, 1)
            for name, shape in expected_shapes(component, configs[component], KINDS[family]).items()
        }
    assert seen == len(header)


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("text_model.embeddings.position_ids", None),
        ("embeddings.position_ids", None),
        ("text_projection.weight", None),
        ("encoder.layers.11.self_attn.q_proj.weight", "text_model.encoder.layers.11.self_attn.q_proj.weight"),
        ("embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ("final_layer_norm.bias", "text_model.final_layer_norm.bias"),
        ("text_model.final_layer_norm.bias", "text_model.final_layer_norm.bias"),
        ("decoder.mid_block.attentions.0.query.weight", "decoder.mid_block.attentions.0.to_q.weight"),
        ("encoder.mid_block.attentions.0.key.bias", "encoder.mid_block.attentions.0.to_k.bias"),
        ("encoder.mid_block.attentions.0.value.weight", "encoder.mid_block.attentions.0.to_v.weight"),
        ("decoder.mid_block.attentions.0.proj_attn.bias", "decoder.mid_block.attentions.0.to_out.0.bias"),
        ("decoder.mid_block.attentions.0.group_norm.bias", "decoder.mid_block.attentions.0.group_norm.bias"),
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",) * 2,
    ],
)  # fmt: skip
def test_canonical_names(stored, canonical):
    assert canonical_name(stored) == canonical
    assert canonical is None or canonical_name(canonical) == canonical


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """A small model in both layouts: folder, single file, family."""
    folder, file = scratch() / f"single-{request.param}", scratch() / f"single-{request.param}.safetensors"
    write_model(folder, FAMILIES[request.param], pad_token="!" if request.param == "2" else "<|endoftext|>")
    list(convert(folder, file))
    return folder, file, request.param


def latents(pipe):
    return pipe(
        "a cat on a beach", negative_prompt="rain", seed=1, num_inference_steps=2, width=16, height=16,
        scheduler="euler", output_type="latent",
    ).images  # fmt: skip


def test_a_single_file_makes_the_same_picture_as_its_folder(model):
    folder, file, _ = model
    a, b = (StableDiffusionPipeline.from_pretrained(path, weights="mmap") for path in (folder, file))
    x = latents(a)
    np.testing.assert_array_equal(latents(b), x)
    np.testing.assert_array_equal(b.decode(x), a.decode(x))
    assert b.name == file.stem and b.unet_files == [file]


def edited(file, path, change, metadata=None):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, path, metadata)
    return path


def test_float8_is_read_as_it_is(model, tmp_path):
    """Bits of E5M2 are the upper half of a float16's."""
    halves, eighths = {}, {}
    for name, x in load_file(model[1]).items():
        bits = (x.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8)
        eighths[name] = bits if x.ndim > 1 else x
        halves[name] = (bits.astype(np.uint16) << 8).view(np.float16) if x.ndim > 1 else x
    save_file(halves, tmp_path / "half.safetensors")
    save_file(eighths, tmp_path / "eighth.safetensors")
    data = (tmp_path / "eighth.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].rstrip().replace(b'"U8"', b'"F8_E5M2"')
    (tmp_path / "eighth.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    pipes = (StableDiffusionPipeline.from_pretrained(tmp_path / f"{n}.safetensors") for n in ("half", "eighth"))
    a, b = map(latents, pipes)
    assert np.isfinite(a).all()
    np.testing.assert_array_equal(a, b)


def test_what_training_leaves_in_a_file_is_passed_over(model, tmp_path):
    def add(tensors):
        for name in [n for n in tensors if n.startswith("model.diffusion_model.")][:9]:
            tensors[f"model_ema.{name.removeprefix('model.').replace('.', '')}"] = tensors[name] + 1
        tensors["model_ema.decay"] = np.array(0.99, np.float32)
        tensors["betas"] = np.zeros(1000, np.float64)
        tensors["first_stage_model.loss.discriminator.main.0.weight"] = np.ones((4, 4), np.float32)
        tensors["cond_stage_model.logit_scale"] = np.array(1, np.float32)
        tensors["cond_stage_model.model.text_projection"] = np.ones((64, 64), np.float32)

    path = edited(model[1], tmp_path / "ema.safetensors", add)
    pipes = (StableDiffusionPipeline.from_pretrained(p, weights="mmap") for p in (model[1], path))
    np.testing.assert_array_equal(*map(latents, pipes))


@pytest.mark.parametrize(
    ("bias", "metadata", "mark", "expected"),
    [
        (0, {}, False, "epsilon"),
        (-3, {}, False, "v_prediction"),
        (0, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, False, "v_prediction"),
        (-3, {"modelspec.prediction_type": "epsilon"}, False, "epsilon"),
        (0, {}, True, "v_prediction"),
    ],
)
def test_what_the_unet_predicts(model, tmp_path, bias, metadata, mark, expected):
    def change(tensors):
        tensors["model.diffusion_model.out.2.bias"][:] = bias
        if mark:
            tensors["v_pred"] = np.zeros(0, np.float32)

    path = edited(model[1], tmp_path / "p.safetensors", change, metadata)
    if model[2] == "1" and not mark and "2-768" not in str(metadata):
        expected = "epsilon"  # of the first family, only a mark tells otherwise
    pipe = StableDiffusionPipeline.from_pretrained(path, weights="mmap")
    assert pipe.scheduler_config["prediction_type"] == expected
    assert pipe.unet.config.sample_size == (96 if model[2] == "2" and expected == "v_prediction" else 64)


def fault(path, **options):
    with pytest.raises(ModelError) as caught:
        StableDiffusionPipeline.from_pretrained(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_vae(model, tmp_path):
    folder, file, _ = model

    def bright(tensors):
        tensors["first_stage_model.decoder.conv_out.bias"] += 1

    pipe = StableDiffusionPipeline.from_pretrained(file, weights="mmap")
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 4), np.float32)
    expected = pipe.vae.decode(x)
    other = edited(file, tmp_path / "other.safetensors", bright)
    bare = {n.removeprefix("first_stage_model."): t for n, t in load_file(other).items() if n.startswith("first_stage")}
    save_file(bare, tmp_path / "bare.safetensors")
    for vae, shift in ((folder, 0), (folder / "vae", 0), (file, 0), (other, 1), (tmp_path / "bare.safetensors", 1)):
        pipe = StableDiffusionPipeline.from_pretrained(file, weights="mmap", vae=vae)
        np.testing.assert_allclose(pipe.vae.decode(x), expected + shift, atol=1e-5)
    assert "expected a VAE" in fault(file, vae=folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert "no such file" in fault(file, vae=tmp_path / "none.safetensors")


def test_a_checkpoint_without_vae_needs_another(model, tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith("first_stage_model.")]:
            del tensors[name]

    path = edited(model[1], tmp_path / "half.safetensors", drop)
    message = fault(path)
    assert "without tensors first_stage_model.*; expected a whole" in message and message.endswith("with vae")
    assert StableDiffusionPipeline.from_pretrained(path, vae=model[0]).vae.factor == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conditioner.embedders.0.x", "SDXL"),
        ("model.diffusion_model.double_blocks.0.x", "Flux"),
        ("lora_unet_mid_block.lora_down.weight", "LoRA"),
        ("decoder.conv_in.weight", "VAE"),
        ("emb_params", "textual inversion"),
        ("decoder.layers.1.weight", "TAESD"),
        ("anything", "another kind of model"),
        ("model.diffusion_model.input_blocks.0.0.weight", "without tensors cond_stage_model.* and first_stage_model.*"),
    ],
)
def test_other_files_are_named(tmp_path, name, expected):
    save_file({name: np.ones((2, 2), np.float32)}, tmp_path / "x.safetensors")
    message = fault(tmp_path / "x.safetensors")
    assert expected in message and "expected a whole Stable Diffusion 1.x or 2.x checkpoint" in message


def test_a_damaged_single_file_is_one_clear_line(model, tmp_path):
    def remove(tensors):
        del tensors["model.diffusion_model.input_blocks.0.0.weight"]

    assert "conv_in.weight" in fault(edited(model[1], tmp_path / "a.safetensors", remove))

    def shrink(tensors):
        name = "model.diffusion_model.out.2.weight"
        tensors[name] = tensors[name][:, :1]

    assert "conv_out.weight (found (4, 1, 3, 3), expected (4, 32, 3, 3))" in fault(
        edited(model[1], tmp_path / "b.safetensors", shrink)
    )


def test_wrong_scales_in_a_single_file_are_one_clear_line(model, tmp_path):
    list(convert(model[1], tmp_path / "int8.safetensors", "int8"))
    last = "model.diffusion_model.middle_block.2.out_layers.3.weight_scale"
    text = {"1": "transformer.text_model.encoder.layers.1.self_attn.q_proj.weight_scale"}
    name = f"cond_stage_model.{text.get(model[2], 'model.transformer.resblocks.1.attn.in_proj_weight_scale')}"

    def cut(tensors):
        tensors[name] = tensors[name][:5]

    message = fault(edited(tmp_path / "int8.safetensors", tmp_path / "a.safetensors", cut))
    assert (
        "found scales F32 (5, 1)" if model[2] == "1" else "found a tensor of shape (5, 1), expected 3 eq"
    ) in message

    def remove(tensors):
        del tensors[last]

    message = fault(edited(tmp_path / "int8.safetensors", tmp_path / "b.safetensors", remove))
    assert "1 with wrong scales: mid_block.resnets.1.conv2.weight (found I8 without its scales" in message


@pytest.mark.parametrize("channels", [8, 9])
def test_a_unet_for_inpainting_is_known_by_its_first_convolution(model, tmp_path, channels):
    def widen(tensors):
        name = "model.diffusion_model.input_blocks.0.0.weight"
        tensors[name] = np.concatenate([tensors[name], np.ones((32, channels - 4, 3, 3), np.float32)], axis=1)

    file = edited(model[1], tmp_path / "a.safetensors", widen)
    if channels == 8:
        assert "its UNet takes 8 channels, 4 of them latents: a model for editing by instructions" in fault(file)
        return
    pipe = StableDiffusionPipeline.from_pretrained(file)
    assert pipe.paints_in
    picture, mask = np.full((16, 16, 3), 0.25, np.float32), np.zeros((16, 16))
    for strength in (1.0, 0.5):
        found = pipe(
            "a cat", image=picture, mask_image=mask, strength=strength, seed=1, num_inference_steps=2, output_type="np"
        ).images
        assert found.shape == (1, 16, 16, 3) and np.isfinite(found).all()


def test_models_of_other_shapes_have_no_single_file(tmp_path):
    with pytest.raises(ModelError, match="where a single file stands for"):
        convert(embedded_model_path(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    assert open_model().name == "emoji-world"
