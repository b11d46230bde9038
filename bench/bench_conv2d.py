"""3x3 convolutions by the direct algorithm, where Winograd's is impossible or slower."""

import numpy as np
import pytest

from bench.common import compare, normal, on_torch
from sd_numba import kernels


def compare_conv2d(benchmark, n, size, c_in, c_out, stride=1, upsample=False, algorithm="auto", precision="f32"):
    x, w = normal(n, size, size, c_in), normal(c_out, c_in, 3, 3)

    def on_channels_last(F, x, w):
        x, w = x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2)
        if upsample:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv2d(x, w, stride=stride, padding=1).permute(0, 2, 3, 1)

    weight = kernels.quantize(w) if precision == "int8" else w
    side = size * (2 if upsample else 1) // stride
    compare(
        benchmark,
        lambda: kernels.conv2d(x, weight, stride=stride, upsample=upsample, algorithm=algorithm, precision=precision),
        flop=2 * n * side * side * c_out * c_in * 9,
        torch=on_torch(on_channels_last, x, np.ascontiguousarray(w.transpose(0, 2, 3, 1))),
        precision=precision,
    )


@pytest.mark.parametrize(
    ("n", "size", "c_in", "c_out", "stride"),
    [
        pytest.param(2, 64, 320, 320, 2, id="2x64x64-320-320-stride2"),
        pytest.param(2, 64, 4, 320, 1, id="2x64x64-4-320"),
        pytest.param(2, 64, 320, 4, 1, id="2x64x64-320-4"),
    ],
)
def bench_direct(benchmark, n, size, c_in, c_out, stride):
    compare_conv2d(benchmark, n, size, c_in, c_out, stride, algorithm="direct")
