"""Noise against torch's CPU generator (golden file) and against published values of the CUDA stream."""

import numpy as np
import pytest

from sd_numba.errors import InputError
from sd_numba.samplers.noise import CudaNoise, TorchNoise, draw, make_noise, restore_noise
from tests.golden.make_samplers import GOLDEN, NOISE_CALLS

with np.load(GOLDEN) as _file:
    STREAMS = {int(key.removeprefix("noise/")): _file[key] for key in _file.files if key.startswith("noise/")}


@pytest.mark.parametrize("seed", STREAMS)
def test_torch_stream(seed):
    """Short and long calls in turn, whole blocks of 16 and rests, continue one stream."""
    noise = TorchNoise(seed)
    found = np.concatenate([noise.normal((n,)) for n in NOISE_CALLS])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, STREAMS[seed], rtol=0, atol=1e-6)


def test_torch_known_values():
    np.testing.assert_allclose(
        TorchNoise(42).normal((1, 4, 8, 8)).reshape(-1)[:3], [1.9269153, 1.4872841, 0.9007172], atol=1e-6
    )
    np.testing.assert_allclose(
        TorchNoise(0).normal((1, 4, 8, 8)).reshape(-1)[:3], [-1.1258398, -1.1523602, -0.2505786], atol=1e-6
    )


def test_cuda_known_values():
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    np.testing.assert_allclose(CudaNoise(0).normal((3, 4)), expected, rtol=0, atol=1e-6)


def philox_4x32_10(counter: list[int], key: list[int]) -> list[int]:
    """The generator of Salmon et al., word by word."""
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (product1 >> 32) ^ counter[1] ^ key[0],
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ counter[3] ^ key[1],
            product0 & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_philox_known_answer():
    """The twin above gives the published answers, so it may judge the vectorised one."""
    assert philox_4x32_10([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox_4x32_10([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, -1])
def test_cuda_stream(seed):
    noise = CudaNoise(seed)
    for call in range(3):
        found = noise.normal((2, 5)).reshape(-1)
        for i in range(10):
            x, y, *_ = philox_4x32_10([call, 0, i, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
            expected = np.sqrt(-2 * np.log((x + 0.5) / 2**32)) * np.sin((y + 0.5) / 2**32 * 2 * np.pi)
            assert found[i] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("rng", ["cpu", "cuda"])
def test_statistics(rng):
    values = make_noise(rng, 5).normal((4, 100, 100)).astype(np.float64)
    assert values.shape == (4, 100, 100)
    assert abs(values.mean()) < 0.02
    assert values.std() == pytest.approx(1, abs=0.02)
    assert (values**3).mean() == pytest.approx(0, abs=0.08)
    assert (values**4).mean() == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize("rng", ["cpu", "cuda"])
def test_shapes_and_seeds(rng):
    assert make_noise(rng, 1).normal(()).shape == ()
    assert make_noise(rng, 1).normal((0, 3)).shape == (0, 3)
    np.testing.assert_array_equal(make_noise(rng, np.int64(9)).normal((20,)), make_noise(rng, 9).normal((20,)))
    np.testing.assert_array_equal(make_noise(rng, -1).normal((20,)), make_noise(rng, 2**64 - 1).normal((20,)))


def test_only_cuda_sees_all_bits_of_the_seed():
    np.testing.assert_array_equal(TorchNoise(5).normal((20,)), TorchNoise(2**32 + 5).normal((20,)))
    assert not np.array_equal(CudaNoise(5).normal((20,)), CudaNoise(2**32 + 5).normal((20,)))


@pytest.mark.parametrize("rng", ["cpu", "cuda"])
@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, "1", None])
def test_bad_seeds(rng, seed):
    with pytest.raises(InputError, match=r"^seed: found .*, expected a whole number from -2\*\*63 to 2\*\*64 - 1$"):
        make_noise(rng, seed)


def test_bad_rng():
    with pytest.raises(InputError, match=r"^rng: found 'gpu', expected cpu or cuda$"):
        make_noise("gpu", 1)


@pytest.mark.parametrize("rng", ["cpu", "cuda"])
@pytest.mark.parametrize("before", [(), (3,), (16,), (17,), (1, 1, 5), (4, 7), (40, 40)])
@pytest.mark.parametrize("after", [(1,), (4,), (16,), (700,)])
def test_a_stream_goes_on_from_its_state(rng, before, after):
    """Also in the middle of a pair, and of the generator's block of words."""
    noise = make_noise(rng, 2**40 + 7)
    for _ in range(3):
        noise.normal(before)
    copy = restore_noise(noise.state())
    for _ in range(3):
        np.testing.assert_array_equal(copy.normal(after), noise.normal(after))


def test_a_state_is_no_view_of_the_stream():
    noise = TorchNoise(1)
    kept = noise.state()
    first = noise.normal((1000,))
    np.testing.assert_array_equal(restore_noise(kept).normal((1000,)), first)
    np.testing.assert_array_equal(restore_noise(kept).normal((1000,)), first)


@pytest.mark.parametrize(
    "changes",
    [
        {"rng": "gpu"},
        {"key": np.zeros(623, np.uint32)},
        {"key": np.zeros(624, np.int32)},
        {"key": [0] * 624},
        {"position": 625},
        {"position": -1},
        {"position": 1.0},
        {"spare": "0"},
    ],
)
def test_states_that_are_none(changes):
    with pytest.raises(InputError, match="the state of the random generator is damaged"):
        restore_noise({**TorchNoise(1).state(), **changes})


@pytest.mark.parametrize(
    "state", [{}, {"rng": "cuda", "seed": -1, "calls": 0}, {"rng": "cuda", "seed": 1, "calls": 2**32}]
)
def test_cuda_states_that_are_none(state):
    with pytest.raises(InputError, match="the state of the random generator is damaged"):
        restore_noise(state)


@pytest.mark.parametrize("rng", ["cpu", "cuda"])
def test_noise_for_several_pictures(rng):
    """From the source of each, or all of it from the only one."""
    shape = (4, 5, 6)
    each = draw([make_noise(rng, 1), make_noise(rng, 2)], 2, shape)
    np.testing.assert_array_equal(each, [make_noise(rng, seed).normal(shape) for seed in (1, 2)])
    np.testing.assert_array_equal(draw([make_noise(rng, 1)], 2, shape), make_noise(rng, 1).normal((2, *shape)))
    np.testing.assert_array_equal(draw([make_noise(rng, 1)], 1, shape)[0], make_noise(rng, 1).normal(shape))
