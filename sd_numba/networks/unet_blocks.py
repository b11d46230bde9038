"""The blocks of the UNet: transformers, residual blocks, and the levels that are made of them.

In transformers, feature maps attend to themselves and to the text: Rombach et al., "High-Resolution Image Synthesis
with Latent Diffusion Models" (2022), section 3.3. Attribute names and conventions are those of
`sd_numba.networks.unet`: a transformer updates its input in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .. import kernels
from . import token_merging
from .layers import Conv2d, GroupNorm, LayerNorm, Linear, Padding, Parts, WeightSource, products
from .token_merging import TokenMerging
from .unet_config import UNetConfig

TRANSFORMER_EPS = 1e-6  # of a transformer's group norm, whatever the config's norm_eps

KeysValues = tuple[np.ndarray, np.ndarray]
Tome = TokenMerging | None  # how a call merges tokens, if it does


@dataclass(frozen=True)
class EncodedContext:
    """Keys and values of every cross-attention for one encoded text; made by ``UNet.encode_context``."""

    batch: int
    keys_values: Mapping[str, KeysValues]


def repeat(x: np.ndarray, n: int) -> np.ndarray:
    """Repeat ``x (m, ...)`` along the first axis to a length of n; returns x itself if that is its length."""
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
        """Add the attention of ``h (n, t, c)`` to the residual stream ``x (n, t, c)``."""
        h = kernels.attention(self.to_q(h), *keys_values, self.heads, precision=self.precision)
        self.to_out(h, out=x, accumulate=True)


class FeedForward:
    """GEGLU network, four times as wide inside (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, weights: WeightSource, prefix: str, c: int) -> None:
        self.proj_in = Linear(weights, f"{prefix}.net.0.proj", c, 8 * c, activation="geglu")
        self.proj_out = Linear(weights, f"{prefix}.net.2", 4 * c, c)

    def __call__(self, h: np.ndarray, x: np.ndarray) -> None:
        """Add the network's output for ``h (n, t, c)`` to the residual stream ``x (n, t, c)``."""
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

    def __call__(self, x: np.ndarray, context: EncodedContext, size: tuple[int, int], tome: Tome) -> np.ndarray:
        """Update the residual stream ``x (n, h * w, c)`` in place, or a copy repeated to the batch of the context."""
        h = self.norm1(x)
        if tome is None:
            self.attn1(h, self.attn1.encode(h), x)
        else:
            groups = tome.group(x, *size)
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
        # int8 hurts these more than the layers between them: see the quality of precisions in bench/RESULTS.md.
        self.proj_in = Linear(weights, f"{prefix}.proj_in", c, inner, as_conv=as_conv, coarsest="bf16")
        self.transformer_blocks = [
            TransformerBlock(weights, f"{prefix}.transformer_blocks.{i}", inner, config.cross_attention_dim, heads)
            for i in range(config.transformer_layers_per_block[level])
        ]
        self.proj_out = Linear(weights, f"{prefix}.proj_out", inner, c, as_conv=as_conv, coarsest="bf16")
        self.merges = level == config.finest_attention

    def __call__(self, x: np.ndarray, context: EncodedContext, tome: Tome) -> np.ndarray:
        """Update ``x (n, h, w, c)`` in place, or a copy repeated to the batch of the context."""
        n, h, w, _ = x.shape
        tome = tome if self.merges else None
        stream = self.proj_in(self.norm(x)).reshape(n, h * w, -1)
        for block in self.transformer_blocks:
            stream = block(stream, context, (h, w), tome)
        x = repeat(x, context.batch)
        return self.proj_out(stream.reshape(len(x), h, w, -1), out=x, accumulate=True)


class ResnetBlock:
    """Two convolutions with a shortcut around them; the timestep adds to the first one's bias, image by image."""

    def __init__(self, weights: WeightSource, prefix: str, c_in: int, c_out: int, config: UNetConfig) -> None:
        groups, eps = config.norm_num_groups, config.norm_eps
        self.norm1 = GroupNorm(weights, f"{prefix}.norm1", groups, c_in, eps, silu=True)
        self.conv1 = Conv2d(weights, f"{prefix}.conv1", c_in, c_out)
        self.time_emb_proj = Linear(
            weights, f"{prefix}.time_emb_proj", config.time_embedding_dim, c_out, coarsest="f32"
        )
        self.norm2 = GroupNorm(weights, f"{prefix}.norm2", groups, c_out, eps, silu=True)
        self.conv2 = Conv2d(weights, f"{prefix}.conv2", c_out, c_out)
        self.conv_shortcut = None
        if c_in != c_out:  # int8 would lose most here: no norm has evened out the channels
            self.conv_shortcut = Linear(weights, f"{prefix}.conv_shortcut", c_in, c_out, as_conv=True, coarsest="bf16")

    def __call__(self, x: Parts, time: np.ndarray) -> np.ndarray:
        """Return ``(n, h, w, c_out)`` for ``x (n, h, w, c_in)`` and ``time (n, c_time)``; ``x`` is unchanged."""
        normed = self.norm1(x)
        h = self.conv1(normed, bias=self.time_emb_proj(time) + self.conv1.bias)
        h = self.norm2(h, out=h)
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(x)
        else:
            residual = normed  # no longer needed, and of the right size
            residual[...] = x
        return self.conv2(h, out=residual, accumulate=True)


class Downsample:
    """Convolution with stride 2."""

    def __init__(self, weights: WeightSource, prefix: str, c: int, padding: int) -> None:
        sides: Padding = 1 if padding else ((0, 1), (0, 1))  # without padding, one row and column at the far ends
        self.conv = Conv2d(weights, f"{prefix}.conv", c, c, stride=2, padding=sides)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return ``(n, h', w', c)``, half the size, for ``x (n, h, w, c)``."""
        return self.conv(x)


class Upsample:
    """Enlargement by nearest neighbour, then a convolution."""

    def __init__(self, weights: WeightSource, prefix: str, c: int) -> None:
        self.conv = Conv2d(weights, f"{prefix}.conv", c, c)

    def __call__(self, x: np.ndarray, h: int, w: int) -> np.ndarray:
        """Enlarge ``x`` to ``(n, h, w, c)``: twice its size, or one more or less if the level had an odd size."""
        h_in, w_in = x.shape[1:3]
        if (h, w) == (2 * h_in, 2 * w_in):
            return self.conv(x, upsample=True)
        rows, cols = np.arange(h) * h_in // h, np.arange(w) * w_in // w
        return self.conv(np.ascontiguousarray(x[:, rows[:, None], cols]))


class DownBlock:
    """One level on the way down: residual blocks, each with a transformer if the block's type has attention."""

    def __init__(self, weights: WeightSource, prefix: str, level: int, config: UNetConfig) -> None:
        channels, layers = config.block_out_channels, config.layers_per_block[level]
        c_in, c = channels[max(level - 1, 0)], channels[level]
        self.resnets = [
            ResnetBlock(weights, f"{prefix}.resnets.{i}", c if i else c_in, c, config) for i in range(layers)
        ]
        crossed = config.down_block_types[level] == "CrossAttnDownBlock2D"
        self.attentions = [
            Transformer(weights, f"{prefix}.attentions.{i}", level, config) if crossed else None for i in range(layers)
        ]
        self.downsample = None
        if level < len(channels) - 1:
            self.downsample = Downsample(weights, f"{prefix}.downsamplers.0", c, config.downsample_padding)

    def __call__(
        self, x: np.ndarray, time: np.ndarray, context: EncodedContext, skips: list[np.ndarray], tome: Tome
    ) -> np.ndarray:
        """Return the level's output; appends every feature map on the way to ``skips``."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = resnet(x, time[: len(x)])
            if attention is not None:
                x = attention(x, context, tome)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(x)
            skips.append(x)
        return x


class MidBlock:
    """Residual block, transformer, residual block at the smallest size."""

    def __init__(self, weights: WeightSource, prefix: str, config: UNetConfig) -> None:
        c, last = config.block_out_channels[-1], len(config.block_out_channels) - 1
        self.resnets = [ResnetBlock(weights, f"{prefix}.resnets.{i}", c, c, config) for i in range(2)]
        self.attention = Transformer(weights, f"{prefix}.attentions.0", last, config)

    def __call__(self, x: np.ndarray, time: np.ndarray, context: EncodedContext, tome: Tome) -> np.ndarray:
        """Return ``(n, h, w, c)`` for ``x (n, h, w, c)``."""
        x = self.attention(self.resnets[0](x, time), context, tome)
        return self.resnets[1](x, time)


class UpBlock:
    """One level on the way up, with one more residual block than on the way down; each reads one of the skips."""

    def __init__(self, weights: WeightSource, prefix: str, index: int, config: UNetConfig) -> None:
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        level, layers = last - index, config.layers_per_block[last - index] + 1
        c, c_in, c_down = channels[level], channels[min(level + 1, last)], channels[max(level - 1, 0)]
        widths = [(c if i else c_in) + (c if i < layers - 1 else c_down) for i in range(layers)]
        self.resnets = [ResnetBlock(weights, f"{prefix}.resnets.{i}", widths[i], c, config) for i in range(layers)]
        crossed = config.up_block_types[index] == "CrossAttnUpBlock2D"
        self.attentions = [
            Transformer(weights, f"{prefix}.attentions.{i}", level, config) if crossed else None for i in range(layers)
        ]
        self.upsample = Upsample(weights, f"{prefix}.upsamplers.0", c) if level else None

    def __call__(
        self,
        x: np.ndarray,
        time: np.ndarray,
        context: EncodedContext,
        skips: list[np.ndarray],
        tome: Tome,
        part: slice = slice(None),
    ) -> np.ndarray:
        """Return the level's output, enlarged to the size of the next of the ``skips``, which are taken from the end.

        With ``part``, only these residual blocks are computed.
        """
        for resnet, attention in zip(self.resnets[part], self.attentions[part], strict=True):
            x = resnet((x, skips.pop()), time)
            if attention is not None:
                x = attention(x, context, tome)
        return x if self.upsample is None else self.upsample(x, *skips[-1].shape[1:3])
