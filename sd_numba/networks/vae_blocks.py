"""The autoencoder's encoder and decoder, and their blocks.

Attribute names follow the tensors' names in diffusers' ``AutoencoderKL``. Activations are ``(n, h, w, c)``. To save
memory, every block may overwrite its input, and the layer that computes the last term of a residual sum also adds it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from .. import kernels
from .layers import Conv2d, GroupNorm, Linear, WeightSource, products
from .vae_config import VaeConfig

EPS = 1e-6  # of every group norm


class ResnetBlock:
    """Two convolutions with a shortcut around them."""

    def __init__(self, weights: WeightSource, prefix: str, c_in: int, c_out: int, groups: int) -> None:
        self.norm1 = GroupNorm(weights, f"{prefix}.norm1", groups, c_in, EPS, silu=True)
        self.conv1 = Conv2d(weights, f"{prefix}.conv1", c_in, c_out)
        self.norm2 = GroupNorm(weights, f"{prefix}.norm2", groups, c_out, EPS, silu=True)
        self.conv2 = Conv2d(weights, f"{prefix}.conv2", c_out, c_out)
        same = c_in == c_out
        self.conv_shortcut = None if same else Linear(weights, f"{prefix}.conv_shortcut", c_in, c_out, as_conv=True)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return ``(n, h, w, c_out)`` for ``x (n, h, w, c_in)``; ``x`` is overwritten."""
        if self.conv_shortcut is None:
            residual, h = x, self.norm1(x)
        else:
            residual, h = self.conv_shortcut(x), self.norm1(x, out=x)
        h = self.conv1(h)
        h = self.norm2(h, out=h)
        return self.conv2(h, out=residual, accumulate=True)


class Attention:
    """Self-attention over all pixels, with one head."""

    def __init__(self, weights: WeightSource, prefix: str, c: int, groups: int) -> None:
        self.group_norm = GroupNorm(weights, f"{prefix}.group_norm", groups, c, EPS)
        self.to_q = Linear(weights, f"{prefix}.to_q", c, c)
        self.to_k = Linear(weights, f"{prefix}.to_k", c, c)
        self.to_v = Linear(weights, f"{prefix}.to_v", c, c)
        self.to_out = Linear(weights, f"{prefix}.to_out.0", c, c)
        self.precision = products(weights)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Add the attention within ``x (n, h, w, c)`` to ``x`` itself."""
        n, h, w, c = x.shape
        stream = x.reshape(n, h * w, c)
        normed = self.group_norm(stream)
        found = kernels.attention(self.to_q(normed), self.to_k(normed), self.to_v(normed), 1, precision=self.precision)
        self.to_out(found, out=stream, accumulate=True)
        return x


Block = Callable[[np.ndarray], np.ndarray]


def mid_block(weights: WeightSource, prefix: str, config: VaeConfig) -> list[Block]:
    """Residual block, attention (in most models), residual block at the smallest size."""
    c, groups = config.block_out_channels[-1], config.norm_num_groups
    blocks: list[Block] = [ResnetBlock(weights, f"{prefix}.resnets.{i}", c, c, groups) for i in range(2)]
    if config.mid_block_add_attention:
        blocks.insert(1, Attention(weights, f"{prefix}.attentions.0", c, groups))
    return blocks


class Encoder:
    """Maps a picture to the mean and log-variance of its latents."""

    def __init__(self, weights: WeightSource, prefix: str, config: VaeConfig) -> None:
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(weights, f"{prefix}.conv_in", config.in_channels, channels[0], coarsest="f32")
        self.blocks: list[Block] = []
        c_in = channels[0]
        for level, c in enumerate(channels):
            block = f"{prefix}.down_blocks.{level}"
            for i in range(config.layers_per_block):
                self.blocks.append(ResnetBlock(weights, f"{block}.resnets.{i}", c if i else c_in, c, groups))
            if level < len(channels) - 1:
                halve = Conv2d(weights, f"{block}.downsamplers.0.conv", c, c, stride=2, padding=((0, 1), (0, 1)))
                self.blocks.append(halve)
            c_in = c
        self.blocks += mid_block(weights, f"{prefix}.mid_block", config)
        self.conv_norm_out = GroupNorm(weights, f"{prefix}.conv_norm_out", groups, channels[-1], EPS, silu=True)
        self.conv_out = Conv2d(weights, f"{prefix}.conv_out", channels[-1], 2 * config.latent_channels, coarsest="f32")

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return ``(n, h / f, w / f, 2 * latent_channels)`` for ``x (n, h, w, in_channels)``."""
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, out=x))


class Decoder:
    """Maps latents to a picture.

    Its blocks are one flat list: nested lists would keep each level's input alive until the level is done.
    """

    def __init__(self, weights: WeightSource, prefix: str, config: VaeConfig) -> None:
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(weights, f"{prefix}.conv_in", config.latent_channels, channels[-1], coarsest="f32")
        self.blocks = mid_block(weights, f"{prefix}.mid_block", config)
        c_in = channels[-1]
        for level, c in enumerate(reversed(channels)):
            block = f"{prefix}.up_blocks.{level}"
            for i in range(config.layers_per_block + 1):
                self.blocks.append(ResnetBlock(weights, f"{block}.resnets.{i}", c if i else c_in, c, groups))
            if level < len(channels) - 1:
                self.blocks.append(partial(Conv2d(weights, f"{block}.upsamplers.0.conv", c, c), upsample=True))
            c_in = c
        self.conv_norm_out = GroupNorm(weights, f"{prefix}.conv_norm_out", groups, channels[0], EPS, silu=True)
        self.conv_out = Conv2d(weights, f"{prefix}.conv_out", channels[0], config.out_channels, coarsest="f32")

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return ``(n, f * h, f * w, out_channels)`` for ``x (n, h, w, latent_channels)``."""
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, out=x))
