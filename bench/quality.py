"""Measures of the similarity of two pictures."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

WINDOW, SIGMA = 11, 1.5  # of the structural similarity
K1, K2 = 0.01, 0.03


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    error = np.mean(np.square(found.astype(np.float64) - expected))
    return float(-10 * np.log10(error)) if error else float("inf")


def ssim(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the structural similarity of pictures (h, w, c) in [0, 1]: the mean over pixels and channels.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), with its Gaussian
    window of 11 x 11 pixels.
    """
    a, b = found.astype(np.float64), expected.astype(np.float64)
    mean_a, mean_b = _smooth(a), _smooth(b)
    var_a, var_b = _smooth(a * a) - mean_a**2, _smooth(b * b) - mean_b**2
    covariance = _smooth(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * covariance + K2**2) / (var_a + var_b + K2**2)
    return float(np.mean(luminance * structure))


def _smooth(x: np.ndarray) -> np.ndarray:
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        x = sliding_window_view(x, WINDOW, axis) @ weights
    return x
