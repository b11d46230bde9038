"""Noise schedules against their definitions, and the forward and backward processes against each other."""

import dataclasses

import numpy as np
import pytest

from sd_numba.errors import InputError, ModelError
from sd_numba.samplers.schedule import SCHEDULE_KINDS, NoiseSchedule, predict_noise, predict_x0

ARRAYS = (
    "betas",
    "alphas",
    "alphas_cumprod",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "posterior_variance",
)


@pytest.mark.parametrize("kind", SCHEDULE_KINDS)
@pytest.mark.parametrize("n", [10, 1000])
def test_properties(kind, n):
    schedule = NoiseSchedule(kind, n)
    for name in ARRAYS:
        array = getattr(schedule, name)
        assert array.shape == (n,)
        assert array.dtype == np.float64
        assert not array.flags.writeable
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)
    assert np.all(np.diff(schedule.betas) >= 0)
    np.testing.assert_allclose(schedule.alphas, 1 - schedule.betas)
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - schedule.betas))
    squares = schedule.sqrt_alphas_cumprod**2 + schedule.sqrt_one_minus_alphas_cumprod**2
    np.testing.assert_allclose(squares, 1)
    assert schedule.posterior_variance[0] == 0
    assert np.all(schedule.posterior_variance[1:] > 0)
    assert np.all(schedule.posterior_variance <= schedule.betas)


def test_known_values():
    linear = NoiseSchedule("linear")
    np.testing.assert_allclose(linear.betas, np.linspace(1e-4, 0.02, 1000))
    assert linear.alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    scaled = NoiseSchedule("scaled_linear")
    assert scaled.betas[[0, -1]] == pytest.approx([0.00085, 0.012])
    assert scaled.alphas_cumprod[-1] == pytest.approx(0.0046601, rel=1e-4)
    assert np.sqrt(1 / scaled.alphas_cumprod - 1)[[0, -1]] == pytest.approx([0.029167, 14.6146], rel=1e-4)
    cosine = NoiseSchedule("cosine")
    t = np.arange(1, 999)
    expected = np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine.alphas_cumprod[t - 1], expected)
    assert cosine.betas[-1] == 0.999


@pytest.mark.parametrize("kind", SCHEDULE_KINDS)
def test_float32_table(kind):
    schedule = NoiseSchedule(kind)
    assert schedule.alphas_cumprod_float32.dtype == np.float32
    np.testing.assert_allclose(schedule.alphas_cumprod_float32, schedule.alphas_cumprod, rtol=2e-5)


def test_zero_terminal_snr():
    plain, rescaled = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=True)
    assert rescaled.alphas_cumprod[-1] == pytest.approx(0, abs=1e-15)
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0])
    assert rescaled.alphas_cumprod_float32[-1] == 0


def test_from_config():
    assert NoiseSchedule.from_config({}) == NoiseSchedule("linear", 1000, 1e-4, 0.02)
    sd = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "trained_betas": None}
    np.testing.assert_array_equal(NoiseSchedule.from_config(sd).betas, NoiseSchedule().betas)
    assert NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"}).kind == "cosine"
    trained = NoiseSchedule.from_config({"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3})
    np.testing.assert_allclose(trained.alphas_cumprod, [0.9, 0.72, 0.504])
    assert NoiseSchedule.from_config({"rescale_betas_zero_snr": True}).zero_terminal_snr
    assert not NoiseSchedule.from_config({"rescale_betas_zero_snr": True}, zero_terminal_snr=False).zero_terminal_snr


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "sigmoid"},
        {"beta_start": -1.0},
        {"beta_start": -1.0, "beta_schedule": "scaled_linear"},
        {"beta_end": 0},
        {"beta_end": 1.5},
        {"num_train_timesteps": 1},
        {"num_train_timesteps": 10.5},
        {"trained_betas": []},
        {"trained_betas": [0.1, "x"]},
        {"trained_betas": 3},
    ],
)
def test_bad_config(config):
    with pytest.raises(ModelError, match="scheduler config"):
        NoiseSchedule.from_config(config)


def test_bad_arguments():
    with pytest.raises(InputError, match=r"kind: found .*, expected linear or scaled_linear or cosine"):
        NoiseSchedule("square")
    with pytest.raises(InputError, match="betas"):
        NoiseSchedule("linear", beta_end=3.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        NoiseSchedule().kind = "cosine"  # type: ignore[misc]


def test_add_noise():
    schedule, rng = NoiseSchedule(), np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 2, 4, 4, 4)).astype(np.float32)
    one = schedule.add_noise(x0, noise, 500)
    a = schedule.alphas_cumprod[500]
    assert one.dtype == np.float32
    np.testing.assert_allclose(one, np.sqrt(a) * x0 + np.sqrt(1 - a) * noise, rtol=1e-6, atol=1e-6)
    both = schedule.add_noise(x0, noise, np.array([500, 3]))
    np.testing.assert_array_equal(both[0], one[0])
    np.testing.assert_array_equal(both[1], schedule.add_noise(x0, noise, 3)[1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predictions(prediction_type):
    """From what the network should say, its prediction types give back the picture and the noise."""
    x0, noise = np.random.default_rng(0).standard_normal((2, 1, 4, 4, 4))
    alpha, sigma = 0.8, 0.6
    x = alpha * x0 + sigma * noise
    output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}[prediction_type]
    np.testing.assert_allclose(predict_x0(prediction_type, output, x, alpha, sigma), x0)
    np.testing.assert_allclose(predict_noise(prediction_type, output, x, alpha, sigma), noise)


def test_unknown_prediction():
    with pytest.raises(InputError, match=r"prediction_type: found .*, expected epsilon or v_prediction or sample"):
        predict_x0("flow", np.zeros(1), np.zeros(1), 1.0, 0.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_reverse_of_a_known_picture(prediction_type):
    """A network that knows the only picture leads every noise to it."""
    schedule, rng = NoiseSchedule(num_train_timesteps=200), np.random.default_rng(1)
    picture = rng.uniform(-1, 1, (1, 4, 4, 4)).astype(np.float32)

    def network(x: np.ndarray, t: int) -> np.ndarray:
        alpha, sigma = schedule.sqrt_alphas_cumprod[t], schedule.sqrt_one_minus_alphas_cumprod[t]
        noise = (x - alpha * picture) / sigma
        return {"epsilon": noise, "v_prediction": alpha * noise - sigma * picture, "sample": picture}[prediction_type]

    def normal() -> np.ndarray:
        return rng.standard_normal(picture.shape).astype(np.float32)

    states = list(schedule.reverse(network, normal(), normal, prediction_type, clip=1.0))
    assert [t for t, _ in states] == list(range(199, -1, -1))
    assert states[-1][1].dtype == np.float32
    np.testing.assert_allclose(states[-1][1], picture, atol=1e-5)


def test_reverse_of_gaussian_data():
    """All 1000 steps with the exact network recover mean and deviation of normally distributed pictures."""
    schedule, rng = NoiseSchedule("linear"), np.random.default_rng(2)
    mean, deviation, shape = -0.3, 0.5, (1, 4, 64, 64)

    def network(x: np.ndarray, t: int) -> np.ndarray:
        a = schedule.alphas_cumprod[t]
        return np.sqrt(1 - a) * (x - np.sqrt(a) * mean) / (a * deviation**2 + 1 - a)

    def normal() -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    *_, (t, x) = schedule.reverse(network, normal(), normal)
    assert t == 0
    assert x.mean() == pytest.approx(mean, abs=0.02)
    assert x.std() == pytest.approx(deviation, abs=0.02)
