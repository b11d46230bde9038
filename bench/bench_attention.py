"""Attention with the shapes of SD 1.5 at 512x512: the UNet's with a batch of two, the decoder's, the text encoder's."""

import pytest

from bench.common import compare, normal, on_torch
from sd_numba import kernels

UNET = [(4096, 40), (1024, 80), (256, 160), (64, 160)]  # tokens, width of a head
CASES = {
    **{f"{tokens}-keys{tokens}-8x{d}": (2, 8, tokens, tokens, d) for tokens, d in UNET},
    **{f"{tokens}-keys77-8x{d}": (2, 8, tokens, 77, d) for tokens, d in UNET},
    "4096-keys4096-1x512": (1, 1, 4096, 4096, 512),
    "77-keys77-12x64-causal": (2, 12, 77, 77, 64),
}


PRECISIONS = [p for p in kernels.precisions() if p != "int8"]  # attention has no int8 version


@pytest.mark.parametrize(
    ("case", "precision"),
    [(case, p) for p in PRECISIONS for case in CASES if p == "f32" or case.startswith(("4096", "1024"))],
)
def bench_attention(benchmark, case, precision):
    n, heads, tokens, keys, d = CASES[case]
    causal = case.endswith("causal")
    q, k, v = normal(n, tokens, heads * d), normal(n, keys, heads * d), normal(n, keys, heads * d)

    def scaled_dot_product(F, *tensors):
        q, k, v = (tensor.unflatten(-1, (heads, d)).transpose(1, 2) for tensor in tensors)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)

    pairs = tokens * (tokens + 1) // 2 if causal else tokens * keys
    compare(
        benchmark,
        lambda: kernels.attention(q, k, v, heads, causal, precision=precision),
        flop=4 * n * heads * d * pairs,
        torch=on_torch(scaled_dot_product, q, k, v),
        precision=precision,
    )
