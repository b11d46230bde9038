"""Weights with low-rank updates: layers of SD 1.5's UNet at 512x512 and a batch of two, with a LoRA.

Rates count the operations of the layer without its update, so that they compare with those of `bench_gemm` and
`bench_winograd`; torch applies the update as diffusers does.
"""

import pytest

from bench.common import compare, normal, on_torch
from sd_numba import kernels

RANKS = (32, 64)
LINEAR = [(8192, 320, 320), (2048, 640, 640), (512, 1280, 1280), (128, 1280, 1280), (154, 320, 768)]
CONV2D = [(2, 64, 320, 320), (2, 32, 640, 640), (2, 16, 1280, 1280), (2, 8, 1280, 1280)]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("m", "n", "k"), LINEAR)
def bench_linear(benchmark, m, n, k, rank):
    x, w, up, down = normal(m, k), normal(n, k), normal(n, rank), normal(rank, k)
    adapted = kernels.add_low_rank(w, [(up, down, 1.0)])
    compare(
        benchmark,
        lambda: kernels.linear(x, adapted),
        flop=2 * m * n * k,
        torch=on_torch(lambda F, x, w, up, down: F.linear(x, w) + F.linear(F.linear(x, down), up), x, w, up, down),
        numpy=lambda: x @ w.T + x @ down.T @ up.T,
    )


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("n", "size", "c_in", "c_out"), CONV2D)
def bench_conv2d(benchmark, n, size, c_in, c_out, rank):
    x, w = normal(n, size, size, c_in), normal(c_out, c_in, 3, 3)
    up, down = normal(c_out, rank), normal(rank, c_in, 3, 3)
    adapted = kernels.add_low_rank(w, [(up, down, 1.0)])

    def convolve(F, x, w, up, down):
        x = x.permute(0, 3, 1, 2)
        y = F.conv2d(x, w, padding=1) + F.conv2d(F.conv2d(x, down, padding=1), up[:, :, None, None])
        return y.permute(0, 2, 3, 1).contiguous()

    compare(
        benchmark,
        lambda: kernels.conv2d(x, adapted),
        flop=2 * n * size**2 * c_in * c_out * 9,
        torch=on_torch(convolve, x, w, up, down),
    )
