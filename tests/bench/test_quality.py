"""The measures of how like two pictures are."""

import numpy as np
import pytest

from bench.quality import psnr, ssim


def test_the_noise_ratio():
    picture = np.full((4, 4, 3), 0.5)
    assert psnr(picture, picture) == np.inf
    assert psnr(picture + 0.1, picture) == pytest.approx(20)
    assert psnr(np.ones((4, 4, 3)), np.zeros((4, 4, 3))) == pytest.approx(0)


def test_the_structural_similarity_as_its_twin():
    rng = np.random.default_rng(0)
    a = rng.random((14, 17, 2))
    b = np.clip(a + 0.2 * rng.standard_normal(a.shape), 0, 1)
    line = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    window = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for y, x, c in np.ndindex(4, 7, 2):
        p, q = a[y : y + 11, x : x + 11, c], b[y : y + 11, x : x + 11, c]
        mean_p, mean_q = (window * p).sum(), (window * q).sum()
        var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
        covariance = (window * (p - mean_p) * (q - mean_q)).sum()
        values.append(
            (2 * mean_p * mean_q + 1e-4) * (2 * covariance + 9e-4)
            / ((mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4))
        )  # fmt: skip
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, 1 - a) < 0
