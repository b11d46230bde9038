"""Samplers against diffusers' schedulers (golden file), and against what must hold of any sampler."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sd_numba
from sd_numba.errors import InputError, ModelError
from sd_numba.samplers import (
    DISPLAY_NAMES,
    SAMPLER_NAMES,
    canonical_sampler_name,
    make_sampler,
    sampler_name_from_config,
)
from sd_numba.samplers.base import Sampler, space_timesteps
from sd_numba.samplers.noise import TorchNoise
from tests.golden import make_starts
from tests.golden.make_samplers import CLASSES, CONFIGS, ETA, GOLDEN, SEED, SHAPE, toy_network

# diffusers computes in float32; sigmas of 4096 (zero terminal SNR) cancel there to four digits.
TOLERANCE, ZERO_SNR_TOLERANCE = 3e-5, 1e-3


def golden_runs():
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    starts = 0
    runs: dict[tuple[str, str], list] = {}
    for k, (sampler, config, steps, calls) in enumerate(json.loads(arrays["index"].tobytes())):
        timesteps = arrays["timesteps"][starts : starts + calls]
        starts += calls
        runs.setdefault((sampler, config), []).append((steps, timesteps, arrays["start"][k], arrays["latents"][k]))
    return runs


GOLDEN_RUNS = golden_runs()


def run(sampler: Sampler, steps: int, network=toy_network, shape=SHAPE, seed=SEED) -> list[np.ndarray]:
    noise = TorchNoise(seed)

    def normal() -> np.ndarray:
        return noise.normal(shape)

    plan = sampler.plan(steps)
    x, history, latents = plan.init_noise_sigma * normal(), None, []
    for i in range(len(plan)):
        output = network(sampler.scale_model_input(x, plan, i), plan.timesteps[i])
        x, history = sampler.step(output, x, plan, i, history, normal)
        latents.append(x)
    return latents


@pytest.mark.parametrize(("name", "config"), GOLDEN_RUNS, ids="-".join)
def test_golden(name, config):
    eta = ETA if name == "ddim-eta" else 0.0
    sampler = make_sampler(name.removesuffix("-eta"), CONFIGS[config], eta)
    tolerance = ZERO_SNR_TOLERANCE if config == "zero_snr" else TOLERANCE
    for steps, timesteps, start, expected in GOLDEN_RUNS[name, config]:
        plan = sampler.plan(steps)
        np.testing.assert_allclose(plan.timesteps, timesteps, rtol=0, atol=1e-3)
        assert plan.init_noise_sigma == pytest.approx(start, rel=1e-6)
        latents = run(sampler, steps)
        for found, wanted in zip((latents[(len(plan) - 1) // 2], latents[-1]), expected, strict=True):
            assert found.dtype == np.float32
            assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max(), steps


def golden_starts():
    with np.load(make_starts.GOLDEN) as file:
        index, values = json.loads(file["index"].tobytes()), file["values"]
    starts: dict[tuple[str, str], list] = {}
    for (sampler, config, *asked), expected in zip(index, values, strict=True):
        starts.setdefault((sampler, config), []).append((*asked, expected))
    return starts


GOLDEN_STARTS = golden_starts()


@pytest.mark.parametrize(("name", "config"), GOLDEN_STARTS, ids="-".join)
def test_golden_from_the_middle(name, config):
    """Of image-to-image: the call that a run starts at, its latents, and the picture predicted there."""
    sampler = make_sampler(name, CONFIGS[config])
    tolerance = ZERO_SNR_TOLERANCE if config == "zero_snr" else TOLERANCE
    for steps, strength, start, expected in GOLDEN_STARTS[name, config]:
        plan, noise, history = sampler.plan(steps), TorchNoise(SEED), None
        assert sampler.start_call(steps, strength) == start
        x = sampler.noised(make_starts.PICTURE, noise.normal(SHAPE), plan, start)
        latents, pictures = [x], []
        for i in range(start, len(plan)):
            output = toy_network(sampler.scale_model_input(x, plan, i), plan.timesteps[i])
            pictures.append(sampler.denoised(output, x, plan, i))
            x, history = sampler.step(output, x, plan, i, history, lambda noise=noise: noise.normal(SHAPE))
            latents.append(x)
        kept = [*latents[:2], latents[min(2, len(latents) - 1)], latents[-1], pictures[0]]
        for found, wanted in zip(kept, expected, strict=True):
            assert found.dtype == np.float32
            if np.isfinite(wanted).all():
                assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max(), (steps, strength)


def test_golden_covers_every_sampler_in_the_middle():
    """But those that diffusers starts wrongly; `test_gaussian_data_from_the_middle` has them."""
    assert {name for name, _ in GOLDEN_STARTS} == {name for name in SAMPLER_NAMES if not name.startswith("lms")}


@pytest.mark.parametrize("name", SAMPLER_NAMES)
@pytest.mark.parametrize("runge_kutta", [False, True])
def test_starts(name, runge_kutta):
    """The weaker the later, from a call that begins a step; the earlier the noisier, and clean at the end."""
    sampler = make_sampler(name, {**CONFIGS["sd15"], "skip_prk_steps": not runge_kutta})
    plan = sampler.plan(10)
    starts = [sampler.start_call(10, tenths / 10) for tenths in range(1, 11)]
    assert starts == sorted(set(starts), reverse=True)
    assert starts[-1] == 0
    assert starts[0] == {"pndm": 18 if runge_kutta else 9}.get(name, len(plan) - 1)
    x0, noise = np.full((1, 1, 1, 2), 0.5, np.float32), np.array([1, -1], np.float32).reshape(1, 1, 1, 2)
    latents = [sampler.noised(x0, noise, plan, i) for i in range(len(plan) + 1)]
    np.testing.assert_array_equal(latents[-1], x0)
    ratios = [(x.max() - x.min()) / (x.max() + x.min()) * 0.5 for x in latents]
    np.testing.assert_allclose(ratios[:-1], plan.sigmas[:-1], rtol=2e-3)


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan"), float("inf"), "0.5", None, True])
def test_bad_strength(strength):
    with pytest.raises(InputError, match=r"^strength: found .*, expected a number above 0, up to 1$"):
        make_sampler("euler", CONFIGS["sd15"]).start_call(20, strength)


def test_strength_of_no_step():
    sampler = make_sampler("heun", CONFIGS["sd15"])
    assert sampler.start_call(20, np.float32(0.0501)) == 38
    with pytest.raises(InputError, match=r"a strength of 0\.04 runs less than one of 20 steps"):
        sampler.start_call(20, 0.04)
    with pytest.raises(InputError, match=r"^num_inference_steps: found .*, expected a whole number from 1 to 1000$"):
        sampler.start_call(0, 0.5)


def test_golden_covers_every_sampler():
    assert {name for name, _ in GOLDEN_RUNS} == {*SAMPLER_NAMES, "ddim-eta"}


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_any_number_of_steps(name, spacing):
    """From 1 to all 1000, also where diffusers fails or gives NaN: 61 trailing, 999 and 1000 leading and linspace."""
    sampler = make_sampler(name, {**CONFIGS["sd15"], "timestep_spacing": spacing, "skip_prk_steps": False})
    for steps in (1, 2, 3, 61, 999, 1000):
        plan = sampler.plan(steps)
        assert len(plan.sigmas) == len(plan) + 1
        assert plan.timesteps.min() >= 0
        assert plan.timesteps.max() <= 1000
        assert np.isfinite(run(sampler, steps)[-1]).all()


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20", None, True])
@pytest.mark.parametrize("name", ["pndm", "euler", "dpm++2m", "lcm"])
def test_bad_number_of_steps(name, steps):
    with pytest.raises(InputError, match=r"^num_inference_steps: found .*, expected a whole number from 1 to 1000$"):
        make_sampler(name, CONFIGS["sd15"]).plan(steps)


def sample_gaussian(sampler: Sampler, mean: float, deviation: float, steps: int, strength: float | None = None):
    """Sample, or start from such a picture, with the exact network for pictures of that mean and deviation."""
    shape, noise, plan, history = (1, 4, 64, 64), TorchNoise(3), sampler.plan(steps), None
    x, start = plan.init_noise_sigma * noise.normal(shape), 0
    if strength is not None:
        start = sampler.start_call(steps, strength)
        x = sampler.noised(mean + np.float32(deviation) * noise.normal(shape), noise.normal(shape), plan, start)
    for i in range(start, len(plan)):
        alpha = 1 / np.sqrt(1 + float(plan.sigmas[i]) ** 2)
        sigma = float(plan.sigmas[i]) * alpha
        scaled = sampler.scale_model_input(x, plan, i)
        output = sigma * (scaled - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)
        x, history = sampler.step(output.astype(np.float32), x, plan, i, history, lambda: noise.normal(shape))
    return x


@pytest.mark.parametrize("name", [name for name in SAMPLER_NAMES if name != "lcm"])
def test_gaussian_data(name):
    """With the exact network for pictures of mean 0.7 and deviation 0.4, samples have that mean and deviation."""
    x = sample_gaussian(make_sampler(name, CONFIGS["sd15"]), 0.7, 0.4, 100)
    assert x.mean() == pytest.approx(0.7, abs=0.03)
    assert x.std() == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize(
    ("name", "config"), [*((name, "sd15") for name in SAMPLER_NAMES if name != "lcm"), ("pndm", "trailing")]
)
def test_gaussian_data_from_the_middle(name, config):
    """Started from such pictures too; pndm with Runge-Kutta steps (the last case) from amid and after them."""
    for strength in (0.985, 0.5):
        x = sample_gaussian(make_sampler(name, CONFIGS[config]), 0.7, 0.4, 100, strength)
        assert x.mean() == pytest.approx(0.7, abs=0.03)
        assert x.std() == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_denoised_of_the_exact_network(name):
    """A network that knows the noise in the latents predicts the picture, at every call, whatever it predicts."""
    x0 = make_starts.PICTURE
    noise = TorchNoise(0).normal(SHAPE)
    for kind in ("epsilon", "v_prediction", "sample"):
        sampler = make_sampler(name, {**CONFIGS["sd15"], "prediction_type": kind})
        plan = sampler.plan(4)
        for i in range(len(plan)):
            alpha = 1 / np.sqrt(1 + float(plan.sigmas[i]) ** 2)
            sigma = float(plan.sigmas[i]) * alpha
            output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}[kind]
            found = sampler.denoised(output.astype(np.float32), sampler.noised(x0, noise, plan, i), plan, i)
            np.testing.assert_allclose(found, x0, atol=2e-5)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_stateless(name):
    sampler = make_sampler(name, CONFIGS["sd15"])
    first, second = run(sampler, 5), run(sampler, 5)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_batch_is_independent(name):
    """Each entry of a batch comes out as it would alone."""
    sampler = make_sampler(name, {**CONFIGS["sd15"], "thresholding": True, "sample_max_value": 2.0})
    noise = TorchNoise(0).normal((2, *SHAPE[1:]))
    plan = sampler.plan(4)

    def last(start: np.ndarray) -> np.ndarray:
        x, history = plan.init_noise_sigma * start, None
        for i in range(len(plan)):
            output = np.sin(sampler.scale_model_input(x, plan, i) + plan.timesteps[i] / 300).astype(np.float32)
            x, history = sampler.step(output, x, plan, i, history, lambda: start)
        return x

    np.testing.assert_allclose(last(noise)[1:], last(noise[1:]), rtol=1e-6, atol=1e-7)


def test_plans_are_quick():
    start = time.perf_counter()
    for name in SAMPLER_NAMES:
        make_sampler(name, CONFIGS["sd15"]).plan(1000)
    assert time.perf_counter() - start < 2


def test_calls_of_the_network():
    def calls(name: str, steps: int, **config) -> int:
        return len(make_sampler(name, {**CONFIGS["sd15"], **config}).plan(steps))

    assert [calls("ddim", n) for n in (1, 20)] == [1, 20]
    assert [calls("pndm", n) for n in (1, 2, 20)] == [1, 3, 21]
    assert [calls("pndm", n, skip_prk_steps=False) for n in (3, 4, 20)] == [4, 13, 29]
    assert [calls("heun", n) for n in (1, 2, 20)] == [1, 3, 39]


def test_sd15_timesteps():
    """Facts of Stable Diffusion 1.5 at 20 steps."""

    def plan(name: str):
        return make_sampler(name, CONFIGS["sd15"]).plan(20)

    assert plan("ddim").timesteps[[0, 1, -1]].tolist() == [951, 901, 1]
    assert plan("pndm").timesteps[[0, 1, 2, -1]].tolist() == [951, 901, 901, 1]
    assert plan("euler").timesteps[[0, -1]].tolist() == [999, 0]
    assert plan("euler").sigmas[0] == pytest.approx(14.6146, abs=1e-4)
    assert plan("euler").init_noise_sigma == pytest.approx(14.6146, abs=1e-4)
    assert plan("dpm++2m").timesteps[[0, 1, -1]].tolist() == [999, 949, 50]
    assert plan("dpm++2m-karras").sigmas[[0, -2]] == pytest.approx([14.6146, 0.0292], abs=1e-4)
    assert plan("lcm").timesteps[[0, -1]].tolist() == [999, 59]


def test_spacings():
    assert space_timesteps("leading", 4, 1000, 1).tolist() == [751, 501, 251, 1]
    assert space_timesteps("trailing", 4, 1000, 1).tolist() == [999, 749, 499, 249]
    assert space_timesteps("linspace", 4, 1000).tolist() == [999, 666, 333, 0]
    assert space_timesteps("linspace", 3, 1000, skip_end=True).tolist() == [999, 666, 333]
    assert space_timesteps("linspace", 3, 1000, skip_end=True, last=901).tolist() == [900, 600, 300]


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("euler_a", "euler-a"),
        ("Euler a", "euler-a"),
        ("k_euler_ancestral", "euler-a"),
        ("PLMS", "pndm"),
        ("DPM++ 2M Karras", "dpm++2m-karras"),
        ("dpmpp_2m_sde_exponential", "dpm++2m-sde-exponential"),
        ("k_lms", "lms"),
        ("UniPC", "unipc"),
        ("DPM++ 2M SDE", "dpm++2m-sde"),
        *((name, name) for name in SAMPLER_NAMES),
    ],
)
def test_spellings(spelling, name):
    assert canonical_sampler_name(spelling) == name


def test_unknown_names():
    with pytest.raises(
        InputError, match=r"^scheduler: found 'eulr a', expected one of ddpm, ddim, pndm.*; did you mean 'euler-a'\?$"
    ):
        make_sampler("eulr a", CONFIGS["sd15"])
    for name in ("", "euler-a-karras", "ddim-karras", "dpm3"):
        with pytest.raises(InputError, match=f"^scheduler: found {name!r}, expected one of ddpm, ddim"):
            make_sampler(name, CONFIGS["sd15"])


def test_display_names():
    assert DISPLAY_NAMES["dpm++2m-karras"] == ("DPM++ 2M", "Karras")
    assert DISPLAY_NAMES["euler-a"] == ("Euler a", "Automatic")
    assert set(DISPLAY_NAMES) == set(SAMPLER_NAMES)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("ddim-eta", "dpm++2m-sde")])
def test_name_from_config(name):
    assert sampler_name_from_config({"_class_name": CLASSES[name]}) == name


def test_name_from_config_with_options():
    dpm = {"_class_name": "DPMSolverMultistepScheduler"}
    assert sampler_name_from_config({**dpm, "use_karras_sigmas": True}) == "dpm++2m-karras"
    assert sampler_name_from_config({**dpm, "algorithm_type": "sde-dpmsolver++"}) == "dpm++2m-sde"
    unipc = {"_class_name": "UniPCMultistepScheduler", "use_exponential_sigmas": True}
    assert sampler_name_from_config(unipc) == "unipc-exponential"
    assert sampler_name_from_config({"_class_name": "DDIMScheduler", "use_karras_sigmas": True}) == "ddim"


@pytest.mark.parametrize("config", [{}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}])
def test_unsupported_class(config):
    with pytest.raises(ModelError, match=r"_class_name.*DDIMScheduler.*PNDMScheduler"):
        sampler_name_from_config(config)


@pytest.mark.parametrize("name", ["lms", "euler"])
def test_lms_has_no_limits_of_sigma(name):
    config = {**CONFIGS["sd15"], "use_karras_sigmas": True}
    plan, limited = (make_sampler(name, c).plan(10) for c in (config, {**config, "sigma_min": 0.1, "sigma_max": 10.0}))
    assert np.array_equal(plan.sigmas, limited.sigmas) == (name == "lms")


def test_config_decides_without_suffix():
    karras = {**CONFIGS["sd15"], "use_karras_sigmas": True}
    plain, spaced = make_sampler("euler", karras).plan(9), make_sampler("euler-karras", CONFIGS["sd15"]).plan(9)
    np.testing.assert_array_equal(plain.sigmas, spaced.sigmas)
    exponential = make_sampler("euler-exponential", karras).plan(9)
    expected = make_sampler("euler-exponential", CONFIGS["sd15"]).plan(9)
    np.testing.assert_array_equal(exponential.sigmas, expected.sigmas)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ddim", {"prediction_type": "flow_prediction"}),
        ("ddim", {"beta_schedule": "sigmoid"}),
        ("ddim", {"beta_end": 2.0}),
        ("ddim", {"num_train_timesteps": "many"}),
        ("ddim", {"trained_betas": [0.1, 0.2, "x"]}),
        ("ddim", {"timestep_spacing": "sideways"}),
        ("ddim", {"steps_offset": -1}),
        ("ddpm", {"variance_type": "learned_range"}),
        ("euler", {"use_beta_sigmas": True}),
        ("euler", {"timestep_type": "continuous"}),
        ("dpm++2m", {"use_flow_sigmas": True}),
        ("dpm++2m", {"solver_order": 7}),
        ("unipc", {"predict_x0": False}),
        ("unipc", {"disable_corrector": 3}),
    ],
)
def test_unsupported_values(name, config):
    with pytest.raises(ModelError, match=next(iter(config))):
        make_sampler(name, {**CONFIGS["sd15"], **config})


@pytest.mark.parametrize("eta", [-0.1, float("nan"), float("inf")])
def test_bad_eta(eta):
    with pytest.raises(InputError, match=r"^eta: found .*, expected a number of at least 0"):
        make_sampler("ddim", CONFIGS["sd15"], eta)


TOY_SAMPLER = """
from .euler import Euler

class Toy(Euler):
    '''Toy sampler of the tests.'''
    name = "toy"
    title = "Toy 2B"
    aliases = ("plaything",)
    diffusers_class = "ToyDiscreteScheduler"
    settings = Euler.settings | {"toy_setting"}
"""
USE_OF_TOY_SAMPLER = """
import pickle
import sd_numba
from sd_numba import samplers
from sd_numba.recipes.a1111 import Parameters, sampler_title
from sd_numba.recipes.infotext import recipe_from_parameters

assert samplers.SAMPLER_NAMES[:2] == ("ddpm", "ddim")
assert {"toy", "toy-karras", "toy-exponential"} <= set(samplers.SAMPLER_NAMES)
assert samplers.canonical_sampler_name("k_plaything Karras") == "toy-karras"
assert samplers.DISPLAY_NAMES["toy-karras"] == ("Toy 2B", "Karras")
assert type(samplers.make_sampler("toy-karras", {})).__name__ == "Toy"
config = samplers.config_with_sampler("toy-karras", {})
assert config["_class_name"] == "ToyDiscreteScheduler"
assert samplers.sampler_name_from_config(config) == "toy-karras"

title = sampler_title("toy-karras")
assert title["Sampler"] == "Toy 2B"
recipe, notes = recipe_from_parameters(Parameters("", "", {**title, "Version": "sd-numba 0.1.0"}))
assert (recipe.scheduler, notes) == ("toy-karras", [])

kind = sd_numba.ToyDiscreteScheduler
assert (kind.__name__, kind.__doc__) == ("ToyDiscreteScheduler", "Toy sampler of the tests.")
made = kind(toy_setting=1, use_karras_sigmas=True)
assert made.sampler == "toy-karras"
copy = pickle.loads(pickle.dumps(made))
assert type(copy) is kind and copy.config == made.config
"""


def test_a_new_sampler_is_one_file(tmp_path):
    """A module beside the others is all it takes: names, aliases, configs, scheduler class, text of pictures."""
    package = Path(sd_numba.__file__).parent
    copy = tmp_path / "sd_numba"
    (copy / "samplers").mkdir(parents=True)
    for path in (*package.iterdir(), *(package / "samplers").iterdir()):
        target = copy / path.relative_to(package)
        if not target.exists():
            target.symlink_to(path)
    (copy / "samplers" / "toy.py").write_text(TOY_SAMPLER)
    command = [sys.executable, "-c", USE_OF_TOY_SAMPLER]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
