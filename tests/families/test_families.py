"""A family that only this test knows works from end to end: folder, single file, texts, scaling, previews, tools."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file

from bench.make_random_model import write_model
from sd_numba import ModelError, StableDiffusionPipeline
from sd_numba.checkpoints.opening import open_model
from sd_numba.cli import main
from sd_numba.families import FAMILIES, Conditioning, Family, base, sd1
from sd_numba.families.shapes import infer_unet, infer_vae
from sd_numba.networks.vae import VaeConfig
from sd_numba.tools.check import check_model
from sd_numba.tools.convert import convert
from sd_numba.tools.info import describe
from tests.families.test_names import SMALL, latents

SCALING = 0.5
CONFIGS = SMALL | {"unet": SMALL["unet"] | {"attention_head_dim": 2}}


def same_names(tensors, *_):
    return dict(tensors)


def renamed(part, prefix, **facts):
    """Describe a network of 1.x whose tensors have diffusers' names in a single file, after a prefix."""
    return replace(sd1.FAMILY.networks[part], prefix=prefix, rename=same_names, unrename=same_names, **facts)


def turned_round(encoders, texts, syntax, clip_skip):
    found = base.condition(encoders, texts, syntax, clip_skip)
    return {text: Conditioning(-one.context, pooled=one.context.mean(0)) for text, one in found.items()}


def with_pooled(unet, conditionings):
    return unet.encode_context(np.stack([one.context + one.pooled for one in conditionings]))


TOY = Family(
    name="toy",
    title="Toy Painter 7",
    pipeline="ToyPipeline",
    networks={
        "text_encoder": renamed("text_encoder", "toy.words."),
        "unet": renamed("unet", "toy.denoiser.", infer=partial(infer_unet, heads=lambda channels, linear: 2)),
        "vae": renamed(
            "vae",
            "toy.pictures.",
            parse=lambda values: VaeConfig.from_dict({"scaling_factor": SCALING, **values}),
            infer=partial(infer_vae, scaling_factor=SCALING),
        ),
    },
    padding={"text_encoder": "!"},
    text_width=64,
    scheduler=sd1.FAMILY.scheduler | {"_class_name": "EulerDiscreteScheduler"},
    preview_factors=((0, 0, 0),) * 4 + ((1, 0, 0),),  # all is red
    recognises_file=lambda names: any(name.startswith("toy.") for name in names),
    recognises_folder=lambda configs: True,
    prediction=lambda names, metadata: "epsilon",
    architecture=lambda prediction: "toy-painter",
    condition=turned_round,
    encode_context=with_pooled,
)


@pytest.fixture(scope="module")
def toy():
    FAMILIES.append(TOY)
    yield TOY
    FAMILIES.remove(TOY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of the family, with weights that 1.x could have."""
    folder = tmp_path_factory.mktemp("toy") / "painter"
    write_model(folder, CONFIGS, pad_token="!")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "ToyPipeline"}))
    return folder


@pytest.fixture(scope="module")
def file(toy, folder, tmp_path_factory):
    """The same model as a single file."""
    path = tmp_path_factory.mktemp("toy") / "painter.safetensors"
    list(convert(folder, path))
    return path


def test_without_the_family_its_folder_is_refused(folder):
    with pytest.raises(ModelError, match="found ToyPipeline, supported is StableDiffusionPipeline"):
        open_model(folder)


def test_folder_and_single_file_are_recognised_and_make_one_picture(toy, folder, file):
    names = set(load_file(file))
    assert all(name.startswith("toy.") for name in names) and "toy.denoiser.conv_in.weight" in names
    pipes = [StableDiffusionPipeline.from_pretrained(path, weights="mmap") for path in (folder, file)]
    assert [pipe.family for pipe in pipes] == [toy, toy]
    first, second = map(latents, pipes)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)
    assert pipes[1].scheduler_config == {**toy.scheduler, "prediction_type": "epsilon"}
    assert pipes[1].unet.config == replace(pipes[0].unet.config, sample_size=64)


def test_its_conditioning_reaches_the_unet(toy, folder, tmp_path):
    """Of the same weights, 1.x makes the family's picture if its contexts are changed in the same way."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, weights="mmap")
    plain = tmp_path / "plain"
    write_model(plain, CONFIGS, pad_token="!")
    other = StableDiffusionPipeline.from_pretrained(plain, weights="mmap")
    assert other.family is sd1.FAMILY
    assert not np.array_equal(latents(other), latents(pipe))
    encode = other.unet.encode_context
    other.unet.encode_context = lambda vectors: encode(-vectors + vectors.mean(1, keepdims=True))
    np.testing.assert_array_equal(latents(other), latents(pipe))


def test_its_scaling_of_latents_decodes(toy, folder, file):
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 4), np.float32)
    for path in (folder, file):
        pipe = StableDiffusionPipeline.from_pretrained(path, weights="mmap")
        expected = np.clip(pipe.vae.decode(x / np.float32(SCALING)) / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
        np.testing.assert_allclose(pipe.decode(x), expected, atol=1e-6)


def test_the_command_line_shows_its_previews(toy, file, tmp_path):
    preview, out = tmp_path / "preview.png", tmp_path / "out.png"
    options = ["-W", "16", "-H", "16", "--steps", "2", "--preview", "proj", "--preview-path", str(preview)]
    result = CliRunner().invoke(main, ["generate", "a cat", "-m", str(file), "-o", str(out), *options])
    assert result.exit_code == 0, result.output
    assert Image.open(out).size == (16, 16)
    assert np.unique(np.asarray(Image.open(preview)).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def test_tools_know_it(toy, folder, file, tmp_path):
    assert "single-file Toy Painter checkpoint" in describe(file) and "text of 64 values (Toy Painter 7)" in describe(
        file
    )
    assert f"Toy Painter model in diffusers layout: {folder}" in describe(folder)
    assert all(report.ok for report in check_model(file))
    list(convert(file, tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == "ToyPipeline"
    assert open_model(tmp_path / "again").family is toy


def test_a_message_lists_it(toy, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ModelError, match=r"StableDiffusionPipeline or ToyPipeline .*1\.x and 2\.x, Toy Painter 7"):
        open_model(tmp_path)
