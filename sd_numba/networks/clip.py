"""CLIP's text encoder: token ids to the vectors that the UNet attends to.

A pre-norm transformer with causal attention (Radford et al., "Learning Transferable Visual Models From Natural
Language Supervision", 2021, section 2.4). Attribute names follow the tensors' names in transformers' ``CLIPTextModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import kernels
from ..config import MAX_LAYERS, ConfigReader
from ..errors import InputError
from .layers import Embedding, LayerNorm, Linear, WeightSource

ACTIVATIONS = {  # name in transformers -> name in kernels
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class TextEncoderConfig:
    """Shape of the text encoder. Names and defaults are those of transformers' ``CLIPTextConfig``."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextEncoderConfig:
        """Read a parsed ``config.json``; keys that do not matter are ignored.

        Raises
        ------
        ModelError
            A value has the wrong type or is not supported.
        """
        read = ConfigReader(values, "text_encoder")
        read.only("model_type", "clip_text_model", None)
        config = cls(
            vocab_size=read.integer("vocab_size", cls.vocab_size),
            hidden_size=read.integer("hidden_size", cls.hidden_size),
            intermediate_size=read.integer("intermediate_size", cls.intermediate_size),
            num_hidden_layers=read.integer("num_hidden_layers", cls.num_hidden_layers, maximum=MAX_LAYERS),
            num_attention_heads=read.integer("num_attention_heads", cls.num_attention_heads),
            max_position_embeddings=read.integer("max_position_embeddings", cls.max_position_embeddings),
            hidden_act=read.word("hidden_act", cls.hidden_act, tuple(ACTIVATIONS)),
            layer_norm_eps=read.number("layer_norm_eps", cls.layer_norm_eps),
        )
        if config.hidden_size % config.num_attention_heads:
            read.fail("num_attention_heads", f"a divisor of hidden_size {config.hidden_size}")
        return config


class SelfAttention:
    """Causal self-attention."""

    def __init__(self, weights: WeightSource, prefix: str, c: int, heads: int) -> None:
        self.q_proj = Linear(weights, f"{prefix}.q_proj", c, c)
        self.k_proj = Linear(weights, f"{prefix}.k_proj", c, c)
        self.v_proj = Linear(weights, f"{prefix}.v_proj", c, c)
        self.out_proj = Linear(weights, f"{prefix}.out_proj", c, c)
        self.heads = heads

    def __call__(self, h: np.ndarray, x: np.ndarray) -> None:
        """Add the attention within ``h (n, t, c)`` to the residual stream ``x (n, t, c)``."""
        h = kernels.attention(self.q_proj(h), self.k_proj(h), self.v_proj(h), self.heads, causal=True)
        self.out_proj(h, out=x, accumulate=True)


class Mlp:
    """Two linear layers, with an activation between them."""

    def __init__(self, weights: WeightSource, prefix: str, config: TextEncoderConfig) -> None:
        activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(weights, f"{prefix}.fc1", config.hidden_size, config.intermediate_size, activation=activation)
        self.fc2 = Linear(weights, f"{prefix}.fc2", config.intermediate_size, config.hidden_size)

    def __call__(self, h: np.ndarray, x: np.ndarray) -> None:
        """Add the network's output for ``h (n, t, c)`` to the residual stream ``x (n, t, c)``."""
        self.fc2(self.fc1(h), out=x, accumulate=True)


class EncoderLayer:
    """Attention and feed-forward network, each with a norm before it."""

    def __init__(self, weights: WeightSource, prefix: str, config: TextEncoderConfig) -> None:
        c, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(weights, f"{prefix}.layer_norm1", c, eps)
        self.self_attn = SelfAttention(weights, f"{prefix}.self_attn", c, config.num_attention_heads)
        self.layer_norm2 = LayerNorm(weights, f"{prefix}.layer_norm2", c, eps)
        self.mlp = Mlp(weights, f"{prefix}.mlp", config)

    def __call__(self, x: np.ndarray) -> None:
        """Update the residual stream ``x (n, t, c)`` in place."""
        self.self_attn(self.layer_norm1(x), x)
        self.mlp(self.layer_norm2(x), x)


class TextEncoder:
    """The text half of CLIP.

    Parameters
    ----------
    weights : WeightSource
        Tensors named as in transformers, with the ``text_model.`` prefix.
    config : TextEncoderConfig
    """

    def __init__(self, weights: WeightSource, config: TextEncoderConfig) -> None:
        self.config = config
        c, length, root = config.hidden_size, config.max_position_embeddings, "text_model"
        self.token_embedding = Embedding(weights, f"{root}.embeddings.token_embedding", config.vocab_size, c)
        self.position_embedding = Embedding(weights, f"{root}.embeddings.position_embedding", length, c)
        self.layers = [
            EncoderLayer(weights, f"{root}.encoder.layers.{i}", config) for i in range(config.num_hidden_layers)
        ]
        self.final_layer_norm = LayerNorm(weights, f"{root}.final_layer_norm", c, config.layer_norm_eps)

    def __call__(self, ids: np.ndarray, *, skip: int = 0) -> np.ndarray:
        """Encode token ids.

        Parameters
        ----------
        ids : integer array ``(b, t)``
            ``t`` at most ``max_position_embeddings`` (77), every id below the rows of ``token_embedding``.
        skip
            Number of last layers to leave out (``clip_skip`` in diffusers).

        Returns
        -------
        float32 array ``(b, t, hidden_size)``
            The last layer's output after the final layer norm.

        Raises
        ------
        InputError
            ``ids`` has another shape or dtype, an id is out of range, or no layer is left.
        """
        ids = self._checked(ids)
        if not 0 <= skip < len(self.layers):
            raise InputError(f"clip skip: found {skip}, expected 0 to {len(self.layers) - 1} layers to leave out")
        x = self.token_embedding(ids)
        x += self.position_embedding(np.arange(ids.shape[1]))
        for layer in self.layers[: len(self.layers) - skip]:
            layer(x)
        return self.final_layer_norm(x)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        ids, longest, count = np.asarray(ids), self.config.max_position_embeddings, len(self.token_embedding)
        if ids.ndim != 2 or 0 in ids.shape or ids.shape[1] > longest:
            raise InputError(f"token ids: found shape {ids.shape}, expected (batch, at most {longest})")
        if ids.dtype.kind not in "iu":
            raise InputError(f"token ids: found dtype {ids.dtype}, expected int64")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= count:
            raise InputError(f"token ids: found ids from {low} to {high}, expected 0 to {count - 1}")
        return ids
