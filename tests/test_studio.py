"""What the command line does, Python does: the same bytes from the studio, and from the pipeline."""

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

from sd_numba import InputError, StableDiffusionPipeline
from sd_numba.checkpoints.opening import embedded_model_path
from sd_numba.cli import main
from sd_numba.files.safetensors import read_header
from sd_numba.recipes.png import read_parameters, save_png
from sd_numba.recipes.recipe import Recipe
from sd_numba.studio import Opening, Studio, Task, batches

SMALL = {"width": 64, "height": 64, "num_inference_steps": 4}
ARGUMENTS = ["-W", "64", "-H", "64", "--steps", "4"]


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusionPipeline.from_pretrained()


@pytest.fixture(scope="module")
def studio():
    return Studio()


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A folder with a picture, a mask, LoRAs and an embedding."""
    monkeypatch.chdir(tmp_path)
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(colours).save("photo.png")
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((20, 20, 50, 40), fill=255)
    mask.save("mask.png")
    shapes = {name: info.shape for name, info in read_header(embedded_model_path() / "unet" / UNET).items()}
    random = np.random.default_rng(1)
    (tmp_path / "loras").mkdir()
    for name in ("style", "other"):
        tensors = {}
        for layer, shape in shapes.items():
            if layer.endswith("attn2.to_q.weight"):
                base = f"lora_unet_{layer.removesuffix('.weight').replace('.', '_')}"
                tensors[f"{base}.lora_up.weight"] = random.standard_normal((shape[0], 2), np.float32)
                tensors[f"{base}.lora_down.weight"] = random.standard_normal((2, shape[1]), np.float32)
        save_file(tensors, tmp_path / "loras" / f"{name}.safetensors")
    (tmp_path / "words").mkdir()
    save_file({"emb_params": random.standard_normal((2, 192), np.float32)}, tmp_path / "words" / "zorp.safetensors")
    return tmp_path


UNET = "diffusion_pytorch_model.safetensors"


def command_line(*arguments):
    result = CliRunner().invoke(main, ["generate", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr


def pixels(path):
    return np.asarray(Image.open(path))


def test_the_studio_makes_the_files_of_the_command_line(studio, inputs):
    command_line("a fox", *ARGUMENTS, "-s", "7", "-i", "photo.png", "--mask", "mask.png", "--expand", "0,0,32,0")
    recipe = Recipe(
        "a fox", seed=7, num_inference_steps=4, width=64, height=64,
        image="photo.png", mask_image="mask.png", expand=(0, 0, 32, 0),
    )  # fmt: skip
    making = studio.make([studio.complete(Task(recipe))])
    steps = list(making.run)
    assert steps[-1].index == steps[-1].total - 1
    (picture,) = making.pictures()
    assert picture.text == read_parameters("output.png")
    save_png("ours.png", picture.image, picture.text)
    assert (inputs / "ours.png").read_bytes() == (inputs / "output.png").read_bytes()


def test_the_studio_makes_batches_and_switches_loras(studio, inputs):
    opening = Opening(lora_dir=str(inputs / "loras"), embedding_dir=str(inputs / "words"))
    prompts = ["a fox", "a <lora:style:0.8> zorp", "a zorp cat <lora:style:0.8>", "a <lora:other> dog"]
    for number, prompt in enumerate(prompts):
        command_line(prompt, *ARGUMENTS, "-s", number, "-o", f"{number}.png", "--lora-dir", "loras",
                     "--embedding-dir", "words")  # fmt: skip
    own = Studio(opening)
    tasks = [own.complete(Task(Recipe(prompt, seed=n, **SMALL))) for n, prompt in enumerate(prompts)]
    own.check(tasks)
    found = list(batches(tasks, 4))
    assert [len(batch) for batch in found] == [1, 2, 1]
    pictures = []
    for batch in found:
        making = own.make(batch)
        for _ in making.run:
            pass
        pictures += making.pictures()
    for number, picture in enumerate(pictures):
        np.testing.assert_array_equal(np.asarray(picture.image), pixels(f"{number}.png"))
        assert picture.text == read_parameters(f"{number}.png")


def test_the_studio_opens_another_model_only_if_it_is_another(inputs):
    own = Studio()
    pipe = own.pipe
    own.open(Opening())
    assert own.pipe is pipe
    own.open(Opening(embedding_dir=str(inputs / "words")))
    assert own.pipe is not pipe


def test_a_mask_pastes_back_in_python_too(pipe, inputs):
    command_line("a fox", *ARGUMENTS, "-s", "7", "-i", "photo.png", "--mask", "mask.png")
    options = {"image": "photo.png", "mask_image": "mask.png", "strength": 0.75, "seed": 7, "prompt_syntax": "a1111"}
    found = pipe("a fox", **options, **SMALL).images[0]
    np.testing.assert_array_equal(np.asarray(found), pixels("output.png"))
    photo = pixels("photo.png")
    np.testing.assert_array_equal(np.asarray(found)[:16], photo[:16])
    floats = pipe("a fox", output_type="np", **options, **SMALL).images[0]
    np.testing.assert_array_equal(floats[:16], photo[:16].astype(np.float32) / 255)
    assert np.abs(255 * floats - np.asarray(found, np.float32)).max() <= 1
    plain = pipe("a fox", paste_back=False, **options, **SMALL).images[0]
    assert np.abs(np.asarray(plain)[:16].astype(int) - photo[:16]).max() > 3


@pytest.mark.parametrize("masked", [False, True])
def test_python_expands(pipe, inputs, masked):
    mask = ["--mask", "mask.png"] if masked else []
    command_line("a fox", "--steps", "4", "-s", "7", "-i", "photo.png", *mask, "--expand", "32,0,0,16")
    found = pipe(
        "a fox", image=Image.open("photo.png"), mask_image="mask.png" if masked else None, expand=[32, 0, 0, 16],
        strength=0.75, seed=7, num_inference_steps=4, prompt_syntax="a1111",
    ).images[0]  # fmt: skip
    assert found.size == (96, 80)
    np.testing.assert_array_equal(np.asarray(found), pixels("output.png"))


def test_python_reads_variants(pipe, inputs):
    command_line("a {red|big} fox", *ARGUMENTS, "-s", "7", "-o", "{n}.png")
    out = pipe("a {red|big} fox", prompt_syntax="a1111", seed=7, **SMALL)
    assert out.seeds == [7, 7]
    for number, image in enumerate(out.images, 1):
        np.testing.assert_array_equal(np.asarray(image), pixels(f"{number}.png"))
    assert len(pipe("a {red|big} fox", seed=7, **SMALL).images) == 1  # literal
    two = pipe(["a {red|big} fox", "a cat"], negative_prompt=["x", "y"], prompt_syntax="a1111", seed=7, **SMALL)
    assert two.seeds == [7, 7, 8]


def test_python_reads_tags_and_embeddings(inputs):
    command_line("a zorp <lora:style:0.8>", *ARGUMENTS, "-s", "7", "--lora-dir", "loras", "--embedding-dir", "words")
    command_line("a zorp", *ARGUMENTS, "-s", "7", "-o", "plain.png", "--embedding-dir", "words")
    pipe = StableDiffusionPipeline.from_pretrained(lora_dir="loras", embedding_dir="words")
    options = {"seed": 7, "prompt_syntax": "a1111", **SMALL}
    tagged, other = (pipe.generate(f"a zorp <lora:{name}:0.8>", **options) for name in ("style", "other"))
    next(tagged)
    for _ in other:  # another run between its steps
        pass
    for _ in tagged:
        pass
    np.testing.assert_array_equal(np.asarray(tagged.images()[0]), pixels("output.png"))
    assert (np.asarray(other.images()[0]) != pixels("output.png")).any()
    np.testing.assert_array_equal(np.asarray(pipe("a zorp", **options).images[0]), pixels("plain.png"))


def test_loras_of_the_caller_and_of_tags_add_up(inputs):
    options = {"seed": 7, "prompt_syntax": "a1111", **SMALL}
    pipe = StableDiffusionPipeline.from_pretrained(lora_dir="loras")
    expected = pipe("a fox <lora:other:0.3><lora:style:0.8>", **options).images[0]
    pipe.load_lora_weights("loras/other.safetensors", 0.3)
    found = pipe("a fox <lora:style:0.8>", **options).images[0]
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert [path for path, *_ in pipe.loras] == ["loras/other.safetensors"]


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("<lora:nothing:1> car", {}, "LoRA 'nothing': no such file; give the folder with lora_dir"),
        (["<lora:a> car", "car"], {}, "pictures made together must have the same LoRAs"),
        ("<lora:a:much> car", {}, "found weight 'much', expected a number"),
        ("car", {"expand": (8, 0, 0, 0)}, "expand needs image as well"),
        ("car", {"expand": (8, 0, 0), "image": Image.new("RGB", (64, 64))}, "expand: found .*, expected 4 whole"),
    ],
)
def test_what_the_command_line_refuses_python_refuses(pipe, prompt, options, words):
    with pytest.raises(InputError, match=words) as caught:
        pipe(prompt, prompt_syntax="a1111", **options, **SMALL)
    assert "\n" not in str(caught.value)
