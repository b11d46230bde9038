"""Activations with the shapes of SD 1.5 and 2.x at 512x512: the UNet's with a batch of two, the text encoders'."""

import numpy as np
import pytest

from bench.common import compare, normal, on_torch
from sd_numba import kernels


def torch_geglu(F, x):
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def numpy_gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x * x * x)))


CASES = [
    ("geglu", (2, 4096, 2560), torch_geglu, None),
    ("geglu", (2, 1024, 5120), torch_geglu, None),
    ("geglu", (2, 256, 10240), torch_geglu, None),
    ("gelu", (2, 77, 4096), lambda F, x: F.gelu(x), None),
    ("gelu_tanh", (2, 77, 4096), lambda F, x: F.gelu(x, approximate="tanh"), numpy_gelu_tanh),
    ("quick_gelu", (2, 77, 3072), lambda _, x: x * (1.702 * x).sigmoid(), lambda x: x / (1 + np.exp(-1.702 * x))),
    ("silu", (2, 4096, 320), lambda F, x: F.silu(x), lambda x: x / (1 + np.exp(-x))),
    ("silu", (2, 1280), lambda F, x: F.silu(x), lambda x: x / (1 + np.exp(-x))),
]


@pytest.mark.parametrize(
    ("name", "shape", "torch", "numpy"),
    [pytest.param(*case, id=f"{case[0]}-{'x'.join(map(str, case[1]))}") for case in CASES],
)
def bench_activation(benchmark, name, shape, torch, numpy):
    x, function = normal(*shape), getattr(kernels, name)
    compare(
        benchmark,
        lambda: function(x),
        traffic=x.nbytes + function(x).nbytes,
        torch=on_torch(torch, x),
        numpy=numpy and (lambda: numpy(x)),
    )
