"""CPU kernels of diffusion networks, in Numba: matrix products, convolution, attention, norms, activations.

Arrays are float32, C-contiguous, channels last. Weights have the shape and the dtype that checkpoints store: float32,
float16, bfloat16 as uint16 bits, or float8 as the structured dtypes `float8_e4m3` and `float8_e5m2`, since NumPy has
none. In place of one, kernels take what `quantize`, `add_low_rank`, `pack_linear` or `pack_conv2d` made of it. Every
function takes ``out=``, and those that multiply take ``precision=``, one of `precisions`.
"""

import sys

if __name__ == "kernels":
    # Imported by its folder's name, from a checkout. The package is sd_numba.kernels: hand out that one and its
    # modules, so that there is one copy of each. All are loaded now: Python would load a later one anew.
    from importlib import import_module
    from pkgutil import walk_packages

    sys.modules["kernels"] = import_module("sd_numba.kernels")
    for module in walk_packages(sys.modules["kernels"].__path__, "sd_numba.kernels."):
        sys.modules[module.name.removeprefix("sd_numba.")] = import_module(module.name)

from .activations import geglu, gelu, gelu_tanh, quick_gelu, silu
from .attention import attention
from .conv2d import conv2d, pack_conv2d
from .dtypes import float8_e4m3, float8_e5m2, narrow, widen
from .gemm import linear, matmul, pack_linear
from .low_rank import add_low_rank, merge
from .machine.isa import precisions
from .machine.jit import set_threads, threads, warmup
from .machine.memory import reuse, trim
from .norm import group_norm, group_statistics, layer_norm
from .products.packing import AdaptedWeight, PackedWeight, StoredWeight
from .quantize import QuantizedWeight, quantize

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
