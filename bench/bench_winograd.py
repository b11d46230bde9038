"""3x3 convolutions by Winograd's algorithm, shapes of SD 1.5's UNet (batch of two) and decoder at 512x512.

Rates count the operations of the direct algorithm, hence shares of the peak above 100%.
"""

import pytest

from bench.bench_conv2d import compare_conv2d
from sd_numba import kernels

CASES = [
    (2, 64, 320, 320),
    (2, 32, 640, 640),
    (2, 16, 1280, 1280),
    (2, 8, 1280, 1280),
    (2, 64, 960, 320),
    (2, 32, 1920, 640),
    (2, 16, 2560, 1280),
    (1, 64, 512, 512),
    (1, 128, 512, 512),
    (1, 256, 256, 256),
    (1, 512, 128, 128),
]
ENLARGED = [(2, 16, 1280, 1280), (2, 32, 640, 640)]


@pytest.mark.parametrize(
    ("n", "size", "c_in", "c_out", "upsample"),
    [
        pytest.param(n, size, c_in, c_out, upsample, id=f"{n}x{size}x{size}-{c_in}-{c_out}" + upsample * "-enlarged")
        for upsample, cases in ((False, CASES), (True, ENLARGED))
        for n, size, c_in, c_out in cases
    ],
)
def bench_winograd(benchmark, n, size, c_in, c_out, upsample):
    compare_conv2d(benchmark, n, size, c_in, c_out, upsample=upsample, algorithm="winograd")


@pytest.mark.parametrize("precision", [p for p in kernels.precisions() if p != "f32"])
@pytest.mark.parametrize("case", CASES[:7], ids=lambda case: "{}x{}x{}-{}-{}".format(*case[:2], *case[1:]))
def bench_coarse(benchmark, case, precision):
    compare_conv2d(benchmark, *case, algorithm="winograd", precision=precision)
