"""CPU kernels of diffusion networks, in Numba: matrix products, convolution, attention, norms, activations.

Arrays are float32, C-contiguous, channels last. Weights have the shape and the dtype that checkpoints store: float32,
float16, bfloat16 as uint16 bits, or float8 as the structured dtypes `float8_e4m3` and `float8_e5m2`, since NumPy has
none. In place of one, kernels take what `quantize`, `add_low_rank`, `pack_linear` or `pack_conv2d` made of it. Every
function takes ``out=``, and those that multiply take ``precision=``, one of `precisions`.
"""

from kernels.activations import geglu, gelu, gelu_tanh, quick_gelu, silu
from kernels.arrays import float8_e4m3, float8_e5m2, narrow, widen
from kernels.attention import attention
from kernels.conv2d import conv2d, pack_conv2d
from kernels.gemm import linear, matmul, pack_linear
from kernels.isa import precisions
from kernels.jit import set_threads, threads, warmup
from kernels.low_rank import add_low_rank, merge
from kernels.memory import reuse, trim
from kernels.norm import group_norm, group_statistics, layer_norm
from kernels.packing import AdaptedWeight, PackedWeight, StoredWeight
from kernels.quantize import QuantizedWeight, quantize

__all__ = [
    "AdaptedWeight",
    "PackedWeight",
    "QuantizedWeight",
    "StoredWeight",
    "add_low_rank",
    "attention",
    "conv2d",
    "float8_e4m3",
    "float8_e5m2",
    "geglu",
    "gelu",
    "gelu_tanh",
    "group_norm",
    "group_statistics",
    "layer_norm",
    "linear",
    "matmul",
    "merge",
    "narrow",
    "pack_conv2d",
    "pack_linear",
    "precisions",
    "quantize",
    "quick_gelu",
    "reuse",
    "set_threads",
    "silu",
    "threads",
    "trim",
    "warmup",
    "widen",
]
