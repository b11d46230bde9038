"""Matrix products: linear layers with the shapes of SD 1.5's UNet at 512x512 and a batch of two, and a square one."""

import numpy as np
import pytest

from bench.common import compare, normal, on_torch
from sd_numba import kernels

SHAPES = [
    (8192, 320, 320),
    (8192, 2560, 320),
    (8192, 320, 1280),
    (2048, 640, 640),
    (2048, 5120, 640),
    (512, 1280, 5120),
    (512, 10240, 1280),
    (128, 1280, 1280),
    (154, 320, 768),
    (154, 1280, 768),
]
STORED = {"f32": np.asarray, "f16": lambda w: w.astype(np.float16), "packed": kernels.pack_linear}


@pytest.mark.parametrize(
    ("m", "n", "k", "stored"),
    [
        pytest.param(*shape, stored, id="x".join(map(str, shape)) + f"-{stored}")
        for stored, shapes in (
            ("f32", SHAPES),
            ("f16", [(2048, 640, 640)]),
            ("packed", [(2048, 640, 640), (154, 1280, 768)]),
        )
        for shape in shapes
    ],
)
def bench_linear(benchmark, m, n, k, stored):
    x, w = normal(m, k), normal(n, k)
    weight = STORED[stored](w)
    theirs = weight if stored == "f16" else w
    compare(
        benchmark,
        lambda: kernels.linear(x, weight),
        flop=2 * m * n * k,
        torch=on_torch(lambda F, x, w: F.linear(x, w.float()), x, theirs),
        numpy=lambda: x @ theirs.astype(np.float32, copy=False).T,
    )


@pytest.mark.parametrize("precision", [p for p in kernels.precisions() if p != "f32"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES[:8], ids=["x".join(map(str, shape)) for shape in SHAPES[:8]])
def bench_coarse(benchmark, m, n, k, precision):
    x, w = normal(m, k), normal(n, k)
    weight = kernels.quantize(w) if precision == "int8" else w
    compare(
        benchmark,
        lambda: kernels.linear(x, weight, precision=precision),
        flop=2 * m * n * k,
        torch=on_torch(lambda F, x, w: F.linear(x.bfloat16(), w.bfloat16()).float(), x, w),
        precision=precision,
    )


@pytest.mark.parametrize("size", [1024])
def bench_matmul(benchmark, size):
    a, b = normal(size, size), normal(size, size)
    torch = on_torch(lambda _, a, b: a @ b, a, b)
    compare(benchmark, lambda: kernels.matmul(a, b), flop=2 * size**3, torch=torch, numpy=lambda: a @ b)
