"""CPU kernels of diffusion networks, in Numba: matrix products, convolution, attention, norms, activations.

Arrays are float32, C-contiguous, channels last. Weights are float32, float16, or bfloat16 as uint16 bits, in the shape
that checkpoints store; or packed beforehand by `pack_linear` and `pack_conv2d`. Every function takes ``out=``.
"""

from kernels.activations import geglu, gelu, gelu_tanh, quick_gelu, silu
from kernels.arrays import widen
from kernels.attention import attention
from kernels.conv2d import conv2d, pack_conv2d
from kernels.gemm import linear, matmul, pack_linear
from kernels.jit import set_threads, threads, warmup
from kernels.memory import reuse
from kernels.norm import group_norm, layer_norm
from kernels.packing import PackedWeight

__all__ = [
    "PackedWeight",
    "attention",
    "conv2d",
    "geglu",
    "gelu",
    "gelu_tanh",
    "group_norm",
    "layer_norm",
    "linear",
    "matmul",
    "pack_conv2d",
    "pack_linear",
    "quick_gelu",
    "reuse",
    "set_threads",
    "silu",
    "threads",
    "warmup",
    "widen",
]
