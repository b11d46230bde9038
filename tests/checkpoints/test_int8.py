"""Files with int8 weights: how tensors and their scales are read."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from sd_numba import kernels
from sd_numba.checkpoints.weights import Weights, take_all
from sd_numba.networks.layers import Conv2d, Embedding, LayerNorm, Linear
from tests.checkpoints.test_weights import entry, fault, write


def random_weight(n=4, *rest, seed=0):
    """Values and scales."""
    rng = np.random.default_rng(seed)
    return rng.integers(-128, 128, (n, *rest), np.int8), rng.uniform(0.01, 0.1, n).astype(np.float32)


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_int8_weights(tmp_path, shape, dtype):
    values, scales = random_weight(4, 6)
    filters = values.reshape(4, 6, 1, 1)
    scales = scales.astype(dtype)
    tensors = {"a.weight": values, "b.weight": filters, "a.bias": np.ones(4, np.float16)}
    tensors |= {"a.weight_scale": scales.reshape(shape), "b.weight_scale": scales.reshape(shape)}
    save_file(tensors, tmp_path / "a.safetensors")
    weights = Weights.open(tmp_path / "a.safetensors")
    assert sorted(weights.names()) == ["a.bias", "a.weight", "b.weight"]
    a, matrix = (weights.take(name, (4, 6)) for name in ("a.weight", "b.weight"))
    b = weights.take("b.weight", (4, 6, 1, 1))
    weights.take("a.bias", (4,))
    weights.finish()
    for w, expected in ((a, values), (b, filters), (matrix, values), (b.reshape(4, 6), values)):
        assert isinstance(w, kernels.QuantizedWeight) and w.scales.dtype == np.float32
        np.testing.assert_array_equal(w.values, expected)
        np.testing.assert_array_equal(w.scales, scales)
        assert not w.values.flags.owndata and not w.values.flags.writeable
    wide = values * scales.astype(np.float32)[:, None]
    x = np.random.default_rng(1).standard_normal((5, 6), np.float32)
    for name, as_conv in (("a", False), ("b", True)):
        found = Linear(weights, name, 6, 4, bias=False, as_conv=as_conv)(x)
        np.testing.assert_allclose(found, x @ wide.T, rtol=1e-5, atol=1e-5)
    found = Conv2d(weights, "b", 6, 4, kernel=1, bias=False)(x.reshape(1, 5, 1, 6))
    np.testing.assert_allclose(found.reshape(5, 4), x @ wide.T, rtol=1e-5, atol=1e-5)


def test_scales_in_bfloat16_and_unaligned(tmp_path):
    (values, scales), x = random_weight(40, 70), np.random.default_rng(1).standard_normal((3, 70), np.float32)
    bits = (scales.view(np.uint32) >> 16).astype(np.uint16)
    header = {"a.weight": entry("I8", (40, 70), 0, 2800), "a.weight_scale": entry("BF16", (40, 1), 2801, 2881)}
    header["odd"] = entry("I8", (1,), 2800, 2801)
    for shift in range(4):
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8 + shift)
        path = write(tmp_path / f"{shift}.safetensors", text, values.tobytes() + b"x" + bits.tobytes())
        weights = Weights.open(path)
        w = weights.take("a.weight", (40, 70))
        np.testing.assert_array_equal(w.scales, kernels.widen(bits))
        np.testing.assert_allclose(kernels.linear(x, w), x @ w.widen().T, rtol=1e-5, atol=1e-4)
        for precision in kernels.precisions():
            aligned = kernels.QuantizedWeight(values.copy(), w.scales)
            found, expected = (kernels.linear(x, v, precision=precision) for v in (w, aligned))
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("a.weight_scale"), "found I8 without its scales, expected F32, F16 or BF16 (4, 1)"),
        (lambda t: t.update({"a.weight_scale": np.ones(3, np.float32)}), "found scales F32 (3,), expected F32"),
        (lambda t: t.update({"a.weight_scale": np.ones((4, 2), np.float32)}), "found scales F32 (4, 2), expected"),
        (lambda t: t.update({"a.weight_scale": np.array(1, np.float32)}), "found scales F32 (), expected"),
        (lambda t: t.update({"a.weight_scale": np.ones((4, 1), np.float64)}), "found scales F64 (4, 1), expected F32"),
        (lambda t: t["a.weight_scale"].put([0, 3], [np.nan, np.inf]), "found 2 scales that are NaN, infinite or neg"),
        (lambda t: t["a.weight_scale"].put(2, -0.5), "found 1 scales that are NaN, infinite or negative"),
        (lambda t: t["a.weight_scale"].put(2, 0), "found a scale of 0 for a row with other values than 0"),
    ],
)
def test_wrong_scales(tmp_path, change, expected):
    values, scales = random_weight(4, 6)
    tensors = {"a.weight": values, "a.weight_scale": scales[:, None]}
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    weights = Weights.open(tmp_path / "a.safetensors")
    weights.add_updates("a", np.ones((4, 2), np.float32), np.ones((2, 6), np.float32), 1.0)
    Linear(weights, "a", 6, 4, bias=False)
    message = fault(weights.finish)
    assert f"1 with wrong scales: a.weight ({expected}" in message and "unexpected" not in message


def test_rows_of_zeros_may_have_a_scale_of_zero(tmp_path):
    w = kernels.quantize(np.outer([0, 1, 0], np.ones(7)).astype(np.float32))
    assert w.scales.tolist() == [0, np.float32(1 / 127), 0]
    save_file({"a.weight": w.values, "a.weight_scale": w.scales}, tmp_path / "a.safetensors")
    weights = Weights.open(tmp_path / "a.safetensors")
    np.testing.assert_allclose(weights.take("a.weight", (3, 7)).widen()[:, 0], [0, 1, 0], rtol=1e-6)
    weights.finish()


def test_what_is_no_layer_cannot_be_int8(tmp_path):
    values, scales = random_weight(4, 6)
    tensors = {"e.weight": values, "e.weight_scale": scales, "n.weight": values[:, 0].copy(), "n.weight_scale": scales}
    tensors |= {"n.bias": values[:, 0].copy(), "s.weight": np.ones((4, 6), np.float32), "s.weight_scale": scales}
    save_file(tensors, tmp_path / "a.safetensors")
    weights = Weights.open(tmp_path / "a.safetensors")
    Embedding(weights, "e", 4, 6)
    LayerNorm(weights, "n", 4)
    Linear(weights, "s", 6, 4, bias=False)
    message = fault(weights.finish)
    assert "3 of a wrong shape or dtype: e.weight (found I8, expected F32, F16, BF16, F8_E4M3 or F8_E5M2)" in message
    assert "n.weight (found I8" in message and "n.bias (found I8" in message
    assert "1 unexpected: s.weight_scale" in message


def test_scales_in_another_shard(tmp_path):
    values, scales = random_weight(4, 6)
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    shards = {
        "1.safetensors": {name: values, "text_projection.weight": values, "x.weight_scale": scales},
        "2.safetensors": {f"{name.removeprefix('text_model.')}_scale": scales, "text_projection.weight_scale": scales},
    }
    shards["2.safetensors"]["x.weight"] = values
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    weights = Weights.open(tmp_path)
    take_all(weights, {name: (4, 6), "x.weight": (4, 6)})
    np.testing.assert_array_equal(weights.take(name, (4, 6)).scales, scales)
    assert sorted(weights.unused) == ["text_projection.weight", "text_projection.weight_scale"]
