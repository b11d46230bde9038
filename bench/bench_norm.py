"""Normalisation at 512x512 with the shapes of SD 1.5: the UNet's (batch of two), the decoder's, the text encoder's."""

import numpy as np
import pytest

from bench.common import compare, normal, on_torch
from sd_numba import kernels

IMAGES = [
    (2, 64, 64, 320),
    (2, 64, 64, 960),
    (2, 32, 32, 640),
    (2, 16, 16, 1280),
    (1, 256, 256, 256),
    (1, 512, 512, 128),
]
TOKENS = [(2, 4096, 320), (2, 1024, 640), (2, 256, 1280), (2, 77, 768)]
GROUPS, EPS = 32, 1e-5


def shape_id(shape):
    return "x".join(map(str, shape))


@pytest.mark.parametrize("shape", IMAGES, ids=shape_id)
def bench_group_norm_silu(benchmark, shape):
    x, weight, bias = normal(*shape), normal(shape[-1]), normal(shape[-1])

    def numpy():
        g = x.reshape(shape[0], -1, GROUPS, shape[-1] // GROUPS)
        g = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + EPS)
        y = g.reshape(shape) * weight + bias
        return y / (1 + np.exp(-y))

    def on_channels_last(F, x, weight, bias):
        return F.silu(F.group_norm(x.movedim(-1, 1), GROUPS, weight, bias, EPS)).movedim(1, -1)

    compare(
        benchmark,
        lambda: kernels.group_norm(x, GROUPS, weight, bias, EPS, silu=True),
        traffic=2 * x.nbytes,
        torch=on_torch(on_channels_last, x, weight, bias),
        numpy=numpy,
    )


@pytest.mark.parametrize("shape", TOKENS, ids=shape_id)
def bench_layer_norm(benchmark, shape):
    x, weight, bias = normal(*shape), normal(shape[-1]), normal(shape[-1])

    def numpy():
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS) * weight + bias

    compare(
        benchmark,
        lambda: kernels.layer_norm(x, weight, bias, EPS),
        traffic=2 * x.nbytes,
        torch=on_torch(lambda F, x, *rest: F.layer_norm(x, shape[-1:], *rest, EPS), x, weight, bias),
        numpy=numpy,
    )
