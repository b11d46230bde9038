"""The training recipe runs: a few steps of everything on a handful of things, and the result draws a picture."""

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra train")
pytest.importorskip("diffusers", reason="needs the extra train")

import torch

from sd_numba import StableDiffusionPipeline
from sd_numba.samplers.schedule import NoiseSchedule
from tests.training.training_data import tiny_art
from training.autoencoder import encode, normalise_latents
from training.captions import COLOURS, TINTS
from training.compose import Composer, tint, to_rows
from training.dataset import Dataset
from training.denoiser import Diffusion
from training.held_out import Thing
from training.loop import Average, Plan, train
from training.networks import SCALING_FACTOR, SCHEDULE, make_autoencoder
from training.optimizer import Optimizer, orthogonalise
from training.references import Placed, References
from training.world import Background, Composition, Item, World

ART = tiny_art()


def paint(*compositions: Composition) -> np.ndarray:
    rows = map(torch.from_numpy, to_rows(compositions))
    return (Composer(ART)(*rows) / 2 + 0.5).numpy().transpose(0, 2, 3, 1)


def test_compositions_are_painted_as_the_judge_expects():
    things = [Placed(Thing("cat"), 0.44, 0.26, 0.5), Placed(Thing("star", "blue"), 0.7, 0.6, 0.55)]
    blue = COLOURS["blue"]
    items = Item(3, 0.44, 0.26, 0.5), Item(9, 0.7, 0.6, 0.55, "tint", blue)
    (found,) = paint(Composition("", Background((255, 0, 0), (255, 0, 0)), items))
    expected = References(ART).paint(things, np.array((1.0, 0, 0)))
    assert np.abs(found - expected).mean() < 2e-3 and np.abs(found - expected).max() < 0.3  # edges may differ


def test_gradients_scenes_and_shapes():
    gradient, scene, shape = paint(
        Composition("", Background((0, 0, 0), (255, 255, 255))),
        Composition("", Background(scene=30)),
        Composition("", Background(), (Item(len(ART.concepts) * 3, 0.5, 0.5, 0.5, "fill", (0, 255, 0)),)),
    )
    assert np.allclose(gradient[:, 0, 0], (np.arange(128) + 0.5) / 128, atol=1e-6)
    np.testing.assert_allclose(scene, References(ART).scenes["beach"][30 - 24].transpose(1, 2, 0) / 255, atol=1e-6)
    np.testing.assert_allclose(shape[64, 64], (0, 1, 0), atol=1e-2)
    np.testing.assert_allclose(shape[5, 5], (1, 1, 1), atol=1e-6)


@pytest.mark.parametrize("colour", TINTS)
def test_tint_keeps_the_outline_and_takes_the_colour(colour):
    pictures = torch.from_numpy(ART.pictures[:, 0]).float() / 255
    rgb = torch.tensor(COLOURS[colour]).expand(len(pictures), 3) / 255
    found = tint(pictures, rgb)
    assert torch.equal(found[:, 3], pictures[:, 3])
    np.testing.assert_allclose(found[:, :3, 64, 64], rgb.clamp(min=0.09), atol=0.01)


def test_a_picture_alone_is_tinted_as_in_a_batch():
    pictures, rgb = torch.from_numpy(ART.pictures[:, 0]).float() / 255, torch.rand(len(ART.concepts), 3)
    np.testing.assert_allclose(tint(pictures, rgb)[2:3], tint(pictures[2:3], rgb[2:3]), atol=1e-6)


def test_the_schedule_is_that_of_the_pipeline():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, 0)
    diffusion = Diffusion(None, None, torch.zeros(1, 77))
    np.testing.assert_allclose(diffusion._signal**2, expected, rtol=1e-6)
    np.testing.assert_allclose(diffusion._noise**2, 1 - expected, rtol=1e-4)
    np.testing.assert_allclose(NoiseSchedule.from_config(SCHEDULE).alphas_cumprod, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 20), (2, 20, 4)])
def test_orthogonalise(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("muon", [False, True])
def test_a_small_network_learns(muon):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    inputs = {"x": torch.zeros(64, 4)}
    plan = Plan(steps=200, minutes=1, rate=2e-2, warmup=10, average=0.9, muon=muon)

    def loss(x):
        return torch.nn.functional.mse_loss(network(x), x.flip(1))

    def feed():
        inputs["x"].normal_()

    before = loss(torch.randn(256, 4)).item()
    reports = list(train(loss, inputs, feed, {"n": network}, plan, report_every=50))
    assert reports == [50, 100, 150, 200] and loss(torch.randn(256, 4)).item() < 0.1 * before


def test_the_learning_rate_rises_and_falls():
    plan = Plan(steps=1000, minutes=1, rate=1.0, floor=0.1, warmup=10)
    rates = [plan.rate_at(step, step / 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.1) and max(rates) > 0.99 and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_the_average_follows_and_can_be_swapped():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = Average([parameter], keep=0.5)
    parameter.data += 8
    average.update(step=1000)
    average.swap()
    assert parameter.tolist() == [4.0] * 3
    average.swap()
    assert parameter.tolist() == [8.0] * 3


def test_ends_and_vectors_are_left_to_adamw():
    shapes = {"conv_in.weight": (4, 4, 3, 3), "a.weight": (4, 4), "a.bias": (4,), "embeddings.token.weight": (9, 4)}
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = Optimizer(parameters.items(), muon=True)
    hidden = {id(p) for alike in optimizer._muon for p in alike.parameters}
    assert [name for name, p in parameters.items() if id(p) in hidden] == ["a.weight"]


def test_normalising_latents_changes_no_picture():
    torch.manual_seed(0)
    autoencoder = make_autoencoder()
    pictures = [torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2)]

    def reconstruct():
        return autoencoder.decoder(autoencoder.post_quant_conv(encode(autoencoder, pictures[0])))

    with torch.no_grad():
        before = reconstruct()
        normalise_latents(autoencoder, pictures)
        latents = SCALING_FACTOR * torch.cat([encode(autoencoder, batch) for batch in pictures])
        np.testing.assert_allclose(latents.mean((0, 2, 3)), 0, atol=1e-4)
        np.testing.assert_allclose(latents.std((0, 2, 3)), 1, atol=1e-4)
        np.testing.assert_allclose(reconstruct(), before, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the commands of the recipe make of a few steps, as the README runs them."""
    folder = tmp_path_factory.mktemp("training")
    ART.save(folder / "art.npz")

    def run(module, *arguments):
        command = [sys.executable, "-m", f"training.{module}", "--art", str(folder / "art.npz"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    tokenizer, dataset = ("--tokenizer", folder / "tokenizer"), ("--dataset", folder / "dataset.npz")
    small = ("--steps", 2, "--batch", 2, "--device", "cpu", "--out", folder / "model")
    printed = [
        run("tokenizer", "--count", 300, "--out", folder / "tokenizer"),
        run("dataset", "--count", 6, *tokenizer, "--out", folder / "dataset.npz"),
        run("autoencoder", *dataset, *small),
        run("denoiser", *dataset, *tokenizer, *small),
    ]
    return folder, "".join(printed)


def test_the_recipe_makes_a_model_that_draws(trained):
    folder, printed = trained
    assert printed.count("step 2: loss ") == 2 and "PSNR" in printed and "nan" not in printed
    pipe = StableDiffusionPipeline.from_pretrained(folder / "model")
    assert pipe.default_size == (128, 128) and pipe.defaults["guidance_scale"] > 1
    picture = pipe("a red apple", num_inference_steps=2, seed=1, output_type="np").images
    assert picture.shape == (1, 128, 128, 3) and np.isfinite(picture).all()


def test_the_dataset_depends_on_the_seed_alone(trained):
    folder, _ = trained
    found = Dataset.load(folder / "dataset.npz")
    world = World(ART.concepts, random.Random("1 0"))
    items, backgrounds = to_rows([world.compose() for _ in range(6)])
    np.testing.assert_array_equal(found.items, items)
    np.testing.assert_array_equal(found.backgrounds, backgrounds)
    assert found.ids.shape == (6, 77) and found.ids.dtype == np.int16
