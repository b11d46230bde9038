"""The transformers of the UNet, in which feature maps attend to themselves and to the text.

After Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 3.3. Attribute
names and conventions are those of `sd_numba.networks.unet`: a transformer updates its input in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .. import kernels
from . import token_merging
from .layers import GroupNorm, LayerNorm, Linear, WeightSource, products
from .token_merging import TokenMerging
from .unet_config import UNetConfig

TRANSFORMER_EPS = 1e-6  # of a transformer's group norm, whatever the config's norm_eps

KeysValues = tuple[np.ndarray, np.ndarray]
Merging = TokenMerging | None


@dataclass(frozen=True)
class EncodedContext:
    """Keys and values of every cross-attention for one encoded text; made by ``UNet.encode_context``."""

    batch: int
    keys_values: Mapping[str, KeysValues]


def repeat(x: np.ndarray, n: int) -> np.ndarray:
    """Give ``x (m, ...)`` one after the other until there are n, or x itself if it has as many."""
    return x if len(x) == n else np.concatenate([x] * (n // len(x)))


class Attention:
    """Attention of ``c`` channels to tokens of ``c_context`` channels: themselves, or the text."""

    def __init__(self, weights: WeightSource, prefix: str, c: int, c_context: int, heads: int) -> None:
        self.to_q = Linear(weights, f"{prefix}.to_q", c, c, bias=False)
        self.to_k = Linear(weights, f"{prefix}.to_k", c_context, c, bias=False)
        self.to_v = Linear(weights, f"{prefix}.to_v", c_context, c, bias=False)
        self.to_out = Linear(weights, f"{prefix}.to_out.0", c, c)
        self.prefix, self.heads, self.precision = prefix, heads, products(weights)

    def encode(self, context: np.ndarray) -> KeysValues:
        """Keys and values ``(n, t, c)`` of ``context (n, t, c_context)``."""
        return self.to_k(context), self.to_v(context)

    def __call__(self, h: np.ndarray, keys_values: KeysValues, x: np.ndarray) -> None:
        """Add what ``h (n, t, c)`` finds to the residual stream ``x (n, t, c)``."""
        h = kernels.attention(self.to_q(h), *keys_values, self.heads, precision=self.precision)
        self.to_out(h, out=x, accumulate=True)


class FeedForward:
    """GEGLU network, four times as wide inside (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, weights: WeightSource, prefix: str, c: int) -> None:
        self.proj_in = Linear(weights, f"{prefix}.net.0.proj", c, 8 * c, activation="geglu")
        self.proj_out = Linear(weights, f"{prefix}.net.2", 4 * c, c)

    def __call__(self, h: np.ndarray, x: np.ndarray) -> None:
        """Add the network's answer to ``h (n, t, c)`` to the residual stream ``x (n, t, c)``."""
        self.proj_out(self.proj_in(h), out=x, accumulate=True)


class TransformerBlock:
    """Self-attention, cross-attention and feed-forward network, each with a norm before it."""

    def __init__(self, weights: WeightSource, prefix: str, c: int, c_context: int, heads: int) -> None:
        self.norm1 = LayerNorm(weights, f"{prefix}.norm1", c)
        self.attn1 = Attention(weights, f"{prefix}.attn1", c, c, heads)
        self.norm2 = LayerNorm(weights, f"{prefix}.norm2", c)
        self.attn2 = Attention(weights, f"{prefix}.attn2", c, c_context, heads)
        self.norm3 = LayerNorm(weights, f"{prefix}.norm3", c)
        self.ff = FeedForward(weights, f"{prefix}.ff", c)

    def __call__(self, x: np.ndarray, context: EncodedContext, size: tuple[int, int], merging: Merging) -> np.ndarray:
        """Update the residual stream ``x (n, h * w, c)`` in place, or a copy repeated to the batch of the context."""
        h = self.norm1(x)
        if merging is None:
            self.attn1(h, self.attn1.encode(h), x)
        else:
            groups = merging.group(x, *size)
            h = token_merging.merge(h, groups)
            found = np.zeros_like(h)
            self.attn1(h, self.attn1.encode(h), found)
            token_merging.add_unmerged(found, groups, x)
        x = repeat(x, context.batch)
        h = self.norm2(x)
        self.attn2(h, context.keys_values[self.attn2.prefix], x)
        h = self.norm3(x, out=h)
        self.ff(h, x)
        return x


class Transformer:
    """Transformer blocks over the pixels of a feature map, between two projections."""

    def __init__(self, weights: WeightSource, prefix: str, level: int, config: UNetConfig) -> None:
        c, heads = config.block_out_channels[level], config.num_attention_heads[level]
        inner = c // heads * heads
        as_conv = not config.use_linear_projection
        self.norm = GroupNorm(weights, f"{prefix}.norm", config.norm_num_groups, c, TRANSFORMER_EPS)
        # These bear bytes worse than what is inside: see the quality of precisions in bench/RESULTS.md.
        self.proj_in = Linear(weights, f"{prefix}.proj_in", c, inner, as_conv=as_conv, coarsest="bf16")
        self.transformer_blocks = [
            TransformerBlock(weights, f"{prefix}.transformer_blocks.{i}", inner, config.cross_attention_dim, heads)
            for i in range(config.transformer_layers_per_block[level])
        ]
        self.proj_out = Linear(weights, f"{prefix}.proj_out", inner, c, as_conv=as_conv, coarsest="bf16")
        self.merges = level == config.finest_attention

    def __call__(self, x: np.ndarray, context: EncodedContext, merging: Merging) -> np.ndarray:
        """Update ``x (n, h, w, c)`` in place, or a copy repeated to the batch of the context."""
        n, h, w, _ = x.shape
        merging = merging if self.merges else None
        stream = self.proj_in(self.norm(x)).reshape(n, h * w, -1)
        for block in self.transformer_blocks:
            stream = block(stream, context, (h, w), merging)
        x = repeat(x, context.batch)
        return self.proj_out(stream.reshape(len(x), h, w, -1), out=x, accumulate=True)
