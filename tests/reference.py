"""The slow, obvious NumPy twin of every function in ``kernels``.

Every function computes in float64 and returns float32, so that what differs from a kernel is the kernel's rounding.
Nothing is validated beyond what NumPy itself refuses. Weights may be stored in any dtype that the kernels take.
The module has the names and signatures of ``kernels``, so a whole network runs on it in place of the kernels:
``sys.modules["sd_numba.kernels"] = tests.reference`` before ``sd_numba`` is imported.
"""

import math
from dataclasses import dataclass

import numpy as np

float8_e4m3, float8_e5m2 = np.dtype([("e4m3", np.uint8)]), np.dtype([("e5m2", np.uint8)])


def _float8_values(dtype):
    """The values of the codes 0 to 255: sign, exponent, fraction."""
    values = []
    for code in range(256):
        bits, bias = (3, 7) if dtype == float8_e4m3 else (2, 15)
        sign, exponent, fraction = (-1) ** (code >> 7), (code & 0x7F) >> bits, (code & (1 << bits) - 1) / (1 << bits)
        value = (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
        if dtype == float8_e4m3 and code & 0x7F == 0x7F:
            value = math.nan
        if dtype == float8_e5m2 and exponent == 31:
            value = math.nan if fraction else math.inf
        values.append(sign * value)
    return np.array(values, np.float32)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Whole numbers, and what 1 of them is worth in each output channel."""

    values: np.ndarray
    scales: np.ndarray

    @property
    def shape(self):
        return self.values.shape


def widen(w):
    """Float32 copy of a float32, float16, bfloat16 (uint16 bits), float8 or quantized weight."""
    if not isinstance(w, np.ndarray):
        return w.values * w.scales.reshape(-1, *[1] * (w.values.ndim - 1))
    if w.dtype in (float8_e4m3, float8_e5m2):
        return _float8_values(w.dtype)[w.view(np.uint8)]
    if w.dtype == np.uint16:  # the upper half of a float32
        return (w.astype(np.uint32) << 16).view(np.float32)
    return np.array(w, dtype=np.float32, order="C")


def _f64(w):
    return widen(w).astype(np.float64)


def _store(result, out, accumulate=False):
    """Round ``result`` to float32: into ``out``, onto ``out``, or as a new array."""
    if accumulate:
        result = result + out.astype(np.float64)
    if out is None:
        return np.ascontiguousarray(result, dtype=np.float32)
    if out.shape != result.shape:
        raise ValueError(f"out has shape {out.shape}, the result has {result.shape}")
    out[...] = result
    return out


def round_bf16(x):
    """Round float32 to the nearest bfloat16, ties to even, and back; CPUs take subnormals for zeros."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    subnormal = bits & 0x7F800000 == 0
    rounded = np.where(subnormal, bits & 0x80000000, rounded).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), x, rounded)


def round_rows(x):
    """Whole numbers of -127 .. 127 for each row, and what 1 of them is worth: NaN if the row is not finite.

    A row of which nothing exceeds 4e-37 counts as zeros.
    """
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    largest = np.where(finite, np.abs(x).max(axis=-1, keepdims=True), np.float32(0))
    factor = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 4e-37)
    codes = np.rint(np.where(finite, x, np.float32(0)) * factor)
    return codes, np.where(finite, largest / np.float32(127), np.float32(np.nan))


def quantize(w):
    w = widen(w)
    columns = w.reshape(len(w), -1)
    scales = np.abs(columns).max(axis=1) / np.float32(127)
    values = np.zeros(columns.shape, np.int8)
    for row, scale, out in zip(columns, scales, values, strict=True):
        if np.isfinite(scale) and scale > 0:
            out[:] = np.rint(row * (np.float32(1) / scale))
    return QuantizedWeight(values.reshape(w.shape), scales)


def precisions():
    return ("f32", "bf16", "int8")


def merge(w):
    return w


def add_low_rank(w, pairs, *, gated=False):
    w = _f64(w)
    for up, down, scale in pairs:
        w = w + scale * (_f64(up) @ _f64(down).reshape(len(down), -1)).reshape(w.shape)
    return w.astype(np.float32)


def pack_linear(w, *, precision="f32"):
    return w


def pack_conv2d(w):
    return w


# ---------------------------------------------------------------------------------------------------------- products


def matmul(a, b, *, out=None):
    return _store(_f64(a) @ _f64(b), out)


def winograd2(x, w, b=None, *, padding=1, upsample=False, precision="f32"):
    """Convolution by F(2x2, 3x3) whose transformed tiles and filters are rounded before they are multiplied.

    bf16 rounds every value; int8 those of a part of a tile or filter, over all channels, to whole numbers up to 127.
    Lavin and Gray, "Fast algorithms for convolutional neural networks" (2016), section 4.1.
    """
    left = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]], np.float32)
    right = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
    back = np.array([[1, 1, 1, 0], [0, 1, -1, 1]])
    if upsample:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
    (top, bottom), (start, end) = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    n, height, width = x.shape[0], x.shape[1] + top + bottom - 2, x.shape[2] + start + end - 2
    x = np.pad(x, ((0, 0), (top, bottom + height % 2), (start, end + width % 2), (0, 0)))
    tiles = np.lib.stride_tricks.sliding_window_view(x, (4, 4), axis=(1, 2))[:, ::2, ::2]  # n, h, w, c, 4, 4
    filters = widen(w)
    factors = []
    for transformed in (left @ tiles @ left.T, right @ filters @ right.T):
        if precision == "bf16":
            factors.append(_f64(round_bf16(transformed)))
        elif precision == "int8":
            codes, scale = round_rows(np.ascontiguousarray(np.moveaxis(transformed, -3, -1)))
            factors.append(np.moveaxis(_f64(codes) * _f64(scale), -1, -3))
        else:
            factors.append(_f64(transformed))
    y = back @ np.einsum("nhwcij,ocij->nhwoij", *factors) @ back.T  # n, h, w, o, 2, 2
    y = y.transpose(0, 1, 4, 2, 5, 3).reshape(n, 2 * y.shape[1], 2 * y.shape[2], len(filters))[:, :height, :width]
    return (y if b is None else y + _f64(b).reshape(-1, 1, 1, len(filters))).astype(np.float32)


def linear(x, w, b=None, *, out=None, accumulate=False, precision="f32"):
    """bf16 rounds both factors; int8 rounds rows of x and needs a quantized weight; sums are exact."""
    if precision == "int8":
        codes, scale = round_rows(x)
        y = _f64(codes) @ w.values.T.astype(np.float64) * (_f64(scale) * _f64(w.scales))
    elif precision == "bf16" and not isinstance(w, np.ndarray):
        y = _f64(round_bf16(x)) @ w.values.T.astype(np.float64) * _f64(w.scales)
    elif precision == "bf16":
        y = _f64(round_bf16(x)) @ _f64(round_bf16(widen(w))).T
    else:
        y = _f64(x) @ _f64(w).T
    if b is not None:
        y += _f64(b)
    return _store(y, out, accumulate)


def conv2d(x, w, b=None, stride=1, padding=1, *, upsample=False, out=None, accumulate=False, activation=None):
    """One product per tap of the filter: shift, multiply, add; the activation comes after what is accumulated."""
    if upsample:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
    rows, cols = (padding, padding) if isinstance(padding, int) else padding
    rows, cols = (rows, rows) if isinstance(rows, int) else rows, (cols, cols) if isinstance(cols, int) else cols
    x = np.pad(_f64(x), ((0, 0), rows, cols, (0, 0)))
    w = _f64(w)
    n, h, wd, _ = x.shape
    c_out, _, kh, kw = w.shape
    h_out, w_out = (h - kh) // stride + 1, (wd - kw) // stride + 1
    y = np.zeros((n, h_out, w_out, c_out))
    for i in range(kh):
        for j in range(kw):
            tap = x[:, i : i + (h_out - 1) * stride + 1 : stride, j : j + (w_out - 1) * stride + 1 : stride]
            y += tap @ w[:, :, i, j].T
    if b is not None:  # (c_out,) for all images or (n, c_out), one row an image
        y += _f64(b).reshape(-1, 1, 1, c_out)
    if activation == "relu":
        y, accumulate = np.maximum(y + (out.astype(np.float64) if accumulate else 0), 0), False
    return _store(y, out, accumulate)


# ------------------------------------------------------------------------------------------------------------- norms


def group_statistics(x, groups):
    g = _f64(x).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    return np.stack([g.mean(axis=(1, 3)), g.var(axis=(1, 3))], axis=-1)


def group_norm(x, groups, weight, bias, eps=1e-5, silu=False, *, statistics=None, out=None):
    g = _f64(x).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    found = group_statistics(x, groups) if statistics is None else statistics
    mean, var = found[:, None, :, None, 0], found[:, None, :, None, 1]
    y = ((g - mean) / np.sqrt(var + eps)).reshape(x.shape) * _f64(weight) + _f64(bias)
    return _store(_silu(y) if silu else y, out)


def layer_norm(x, weight, bias, eps=1e-5, *, out=None):
    x = _f64(x)
    mean = x.mean(axis=-1, keepdims=True)
    var = x.var(axis=-1, keepdims=True)
    return _store((x - mean) / np.sqrt(var + eps) * _f64(weight) + _f64(bias), out)


# --------------------------------------------------------------------------------------------------------- attention


def attention(q, k, v, heads, causal=False, *, out=None, precision="f32"):
    """softmax(q k^T / sqrt(d)) v in each head; causal: token i sees tokens 0 .. i.

    bf16 rounds q, scaled for a softmax in base 2, k and v, but not the softmax; int8 does the same.
    """
    n, tq, c = q.shape
    tk, d = k.shape[1], c // heads
    scale = 1 / math.sqrt(d)
    if precision != "f32" and d % 2 == 0:
        q = round_bf16(q * np.float32(scale * math.log2(math.e)))
        k, v, scale = round_bf16(k), round_bf16(v), math.log(2)
    q, k, v = (_f64(a).reshape(n, -1, heads, d).transpose(0, 2, 1, 3) for a in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * scale
    if causal:
        scores = np.where(np.tril(np.ones((tq, tk), dtype=bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return _store((p @ v).transpose(0, 2, 1, 3).reshape(n, tq, c), out)


# ------------------------------------------------------------------------------------------------------- activations


def _sigmoid(x):
    e = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def _silu(x):
    return x * _sigmoid(x)


def _gelu(x):
    erf = np.fromiter(map(math.erf, (x / math.sqrt(2.0)).ravel().tolist()), dtype=np.float64, count=x.size)
    return 0.5 * x * (1.0 + erf.reshape(x.shape))


def gelu(x, *, out=None):
    return _store(_gelu(_f64(x)), out)


def gelu_tanh(x, *, out=None):
    x = _f64(x)
    return _store(0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))), out)


def quick_gelu(x, *, out=None):
    x = _f64(x)
    return _store(x * _sigmoid(1.702 * x), out)


def silu(x, *, out=None):
    return _store(_silu(_f64(x)), out)


def geglu(x, *, out=None):
    value, gate = np.split(_f64(x), 2, axis=-1)
    return _store(value * _gelu(gate), out)
