"""What the profiler counts."""

import numpy as np
import pytest

from sd_numba import kernels
from sd_numba.tools.profile import profile, table


def test_operations_are_those_of_the_direct_algorithms():
    x = np.ones((2, 8, 8, 16), np.float32)
    with profile() as rows:
        kernels.linear(x, np.ones((64, 16), np.float32), activation="geglu")
        kernels.conv2d(x, np.ones((32, 16, 3, 3), np.float32))
        tokens = x.reshape(2, 64, 16)
        kernels.attention(tokens, tokens, tokens, 2)
        kernels.attention(tokens, tokens[:, :3].copy(), tokens[:, :3].copy(), 2)
        kernels.silu(x)
        kernels.linear((x, x), np.ones((8, 32), np.float32))
    expected = {
        "linear": 2 * 128 * 16 * 64 + 2 * 128 * 32 * 8,
        "conv2d 3x3": 2 * 128 * 16 * 9 * 32,
        "self-attention": 4 * 128 * 64 * 16,
        "cross-attention": 4 * 128 * 3 * 16,
        "activations": 0,
    }
    for kind, flop in expected.items():
        assert rows[kind].gflop == pytest.approx(flop / 1e9), kind
        assert rows[kind].calls == (2 if kind == "linear" else 1)
    assert rows["everything"].gflop == pytest.approx(sum(expected.values()) / 1e9)
    calls = rows["linear"].calls
    kernels.linear(x, np.ones((8, 16), np.float32))
    assert rows["linear"].calls == calls  # nobody listens after the block


def test_an_operation_inside_another_is_counted_once():
    with profile() as rows:
        kernels.conv2d(np.ones((1, 4, 4, 16), np.float32), np.ones((8, 16, 1, 1), np.float32), padding=0)
    assert {kind: row.calls for kind, row in rows.items()} == {"conv2d 1x1": 1, "everything": 1}


def test_table():
    with profile() as rows:
        pass
    rows["linear"].seconds, rows["linear"].gflop = 2.0, 100.0
    text = table(rows, 200.0)
    assert "25%" in text and "peak: 200 GFLOP/s" in text
