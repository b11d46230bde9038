"""The UNet that predicts the noise in latents, given a timestep and the encoded text.

The architecture of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022): residual
blocks that learn of the timestep through a bias, and transformers that attend to the text. Attribute names follow the
tensors' names in diffusers' ``UNet2DConditionModel``. Inside, activations are ``(n, h, w, c)``; a transformer's tokens
``(n, h * w, c)`` are the same memory.

Two conventions save most of the memory traffic: a transformer updates its input in place, and a residual sum is made by
the layer that computes its last term (``accumulate``).
"""

from __future__ import annotations

import math

import numpy as np

from .. import kernels
from ..errors import InputError
from .deepcache import FeatureCache
from .layers import Conv2d, GroupNorm, Linear, Padding, Parts, WeightSource, to_nchw, to_nhwc
from .token_merging import TokenMerging, check_ratio
from .unet_blocks import EncodedContext, Merging, Transformer, repeat
from .unet_config import UNetConfig

__all__ = ["EncodedContext", "FeatureCache", "UNet", "UNetConfig", "timestep_embedding"]

LONGEST_PERIOD = 10000  # of the timestep's sinusoids, in units of 2 pi
ALL, ALL_BUT_LAST, LAST = slice(None), slice(-1), slice(-1, None)  # residual blocks of a level


def timestep_embedding(timesteps: np.ndarray, c: int, flip_sin_to_cos: bool, freq_shift: float) -> np.ndarray:
    """Sinusoids of ``timesteps (n,)`` in ``c`` channels, at frequencies falling geometrically from 1.

    Vaswani et al., "Attention Is All You Need" (2017), section 3.5. Models were trained with the angle rounded to
    float32, which at timestep 999 moves it by up to 3e-5; so it is rounded here at the same places.

    Returns
    -------
    float32 array ``(n, c)``
        Sines then cosines, or the other way round if ``flip_sin_to_cos``; a zero last if ``c`` is odd.
    """
    half = c // 2
    exponent = np.float32(-math.log(LONGEST_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = (timesteps.astype(np.float32)[:, None] * frequencies).astype(np.float64)
    waves = [np.cos(angles), np.sin(angles)] if flip_sin_to_cos else [np.sin(angles), np.cos(angles)]
    return np.concatenate([*waves, np.zeros((len(angles), c % 2))], axis=1).astype(np.float32)


class TimestepEmbedding:
    """Two linear layers, each with a SiLU."""

    def __init__(self, weights: WeightSource, prefix: str, c: int, c_time: int) -> None:
        self.linear_1 = Linear(weights, f"{prefix}.linear_1", c, c_time, activation="silu", coarsest="f32")
        self.linear_2 = Linear(weights, f"{prefix}.linear_2", c_time, c_time, activation="silu", coarsest="f32")

    def __call__(self, waves: np.ndarray) -> np.ndarray:
        """Give ``(n, c_time)`` for sinusoids ``(n, c)``, with the SiLU on it that every user of it starts with."""
        return self.linear_2(self.linear_1(waves))


class ResnetBlock:
    """Two convolutions around a shortcut; the timestep enters as a bias of the first one, image by image."""

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
        if c_in != c_out:  # bytes would lose most here: no norm has made the channels alike
            self.conv_shortcut = Linear(weights, f"{prefix}.conv_shortcut", c_in, c_out, as_conv=True, coarsest="bf16")

    def __call__(self, x: Parts, time: np.ndarray) -> np.ndarray:
        """Give ``(n, h, w, c_out)`` for ``x (n, h, w, c_in)`` and ``time (n, c_time)``; ``x`` stays as it is."""
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
    """Convolution of stride 2."""

    def __init__(self, weights: WeightSource, prefix: str, c: int, padding: int) -> None:
        sides: Padding = 1 if padding else ((0, 1), (0, 1))  # without padding, one row and column at the far ends
        self.conv = Conv2d(weights, f"{prefix}.conv", c, c, stride=2, padding=sides)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Give ``(n, h', w', c)``, half the size, for ``x (n, h, w, c)``."""
        return self.conv(x)


class Upsample:
    """Enlargement by nearest neighbour, then a convolution."""

    def __init__(self, weights: WeightSource, prefix: str, c: int) -> None:
        self.conv = Conv2d(weights, f"{prefix}.conv", c, c)

    def __call__(self, x: np.ndarray, h: int, w: int) -> np.ndarray:
        """Enlarge ``x`` to ``(n, h, w, c)``: twice its size, or one more or less where a level had an odd size."""
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
        self, x: np.ndarray, time: np.ndarray, context: EncodedContext, skips: list[np.ndarray], merging: Merging
    ) -> np.ndarray:
        """Give the level's output; every feature map on the way is appended to ``skips``."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = resnet(x, time[: len(x)])
            if attention is not None:
                x = attention(x, context, merging)
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

    def __call__(self, x: np.ndarray, time: np.ndarray, context: EncodedContext, merging: Merging) -> np.ndarray:
        """Give ``(n, h, w, c)`` for ``x (n, h, w, c)``."""
        x = self.attention(self.resnets[0](x, time), context, merging)
        return self.resnets[1](x, time)


class UpBlock:
    """One level on the way up, with one residual block more than on the way down; each reads one of the skips."""

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
        merging: Merging,
        part: slice = ALL,
    ) -> np.ndarray:
        """Give the level's output, as large as the next of the ``skips``, which are taken from the end.

        Or what a part of its residual blocks makes of ``x``; then it is not enlarged.
        """
        for resnet, attention in zip(self.resnets[part], self.attentions[part], strict=True):
            x = resnet((x, skips.pop()), time)
            if attention is not None:
                x = attention(x, context, merging)
        return x if self.upsample is None else self.upsample(x, *skips[-1].shape[1:3])


class UNet:
    """The denoising network of Stable Diffusion 1.x and 2.x.

    Parameters
    ----------
    weights : WeightSource
        Tensors named as in diffusers.
    config : UNetConfig
    """

    def __init__(self, weights: WeightSource, config: UNetConfig) -> None:
        self.config = config
        channels, levels = config.block_out_channels, range(len(config.block_out_channels))
        self.conv_in = Conv2d(
            weights, "conv_in", config.in_channels, channels[0], config.conv_in_kernel, coarsest="f32"
        )
        self.time_embedding = TimestepEmbedding(weights, "time_embedding", channels[0], config.time_embedding_dim)
        self.down_blocks = [DownBlock(weights, f"down_blocks.{i}", i, config) for i in levels]
        self.mid_block = MidBlock(weights, "mid_block", config)
        self.up_blocks = [UpBlock(weights, f"up_blocks.{i}", i, config) for i in levels]
        self.conv_norm_out = GroupNorm(
            weights, "conv_norm_out", config.norm_num_groups, channels[0], config.norm_eps, silu=True
        )
        self.conv_out = Conv2d(
            weights, "conv_out", channels[0], config.out_channels, config.conv_out_kernel, coarsest="f32"
        )

    def encode_context(self, context: np.ndarray) -> EncodedContext:
        """Compute what depends on the text alone: once a prompt instead of once a step.

        Parameters
        ----------
        context : float array ``(b, t, cross_attention_dim)``

        Raises
        ------
        InputError
            ``context`` has another shape.
        """
        width = self.config.cross_attention_dim
        context = np.ascontiguousarray(context, dtype=np.float32)
        if context.ndim != 3 or context.shape[2] != width or 0 in context.shape:
            raise InputError(f"context: found shape {context.shape}, expected (batch, tokens, {width})")
        blocks: list[DownBlock | UpBlock] = [*self.down_blocks, *self.up_blocks]
        attentions = [self.mid_block.attention, *(a for b in blocks for a in b.attentions if a is not None)]
        crossed = [block.attn2 for attention in attentions for block in attention.transformer_blocks]
        return EncodedContext(len(context), {layer.prefix: layer.encode(context) for layer in crossed})

    def __call__(
        self,
        sample: np.ndarray,
        timestep: float | np.ndarray,
        context: np.ndarray | EncodedContext,
        *,
        cache: FeatureCache | None = None,
        merge: float = 0.0,
    ) -> np.ndarray:
        """Predict the noise (or the velocity) in ``sample``.

        Parameters
        ----------
        sample : float array ``(n, in_channels, h, w)``
            Noisy latents of any size.
        timestep : float or array ``(n,)``
            Need not be whole.
        context : float array ``(b, t, cross_attention_dim)`` or EncodedContext
            The encoded text, or what ``encode_context`` made of it. If b is a multiple of n, as for classifier-free
            guidance, the samples are repeated, and what comes before they meet the text is computed once.
        cache : FeatureCache, optional
            Lets calls of one run share most of their work; each group of pictures in a run needs one of its own.
        merge : float
            Share of the tokens, from 0 to 0.75, that self-attention at the highest resolution which has attention
            merges with others.

        Returns
        -------
        float32 array ``(b, out_channels, h, w)``

        Raises
        ------
        InputError
            A shape does not fit, or the share is none.
        """
        ratio = check_ratio(merge)
        x = self._checked(sample)
        if not isinstance(context, EncodedContext):
            context = self.encode_context(context)
        if context.batch % len(x):
            raise InputError(f"context: found a batch of {context.batch}, expected {len(x)} as in the sample, or twice")
        with kernels.reuse():
            time = repeat(self._embed(timestep, len(x)), context.batch)
            merging = TokenMerging(ratio, abs(round(float(np.ravel(timestep)[0])))) if ratio else None
            return self._predict(x, time, context, cache, merging)

    def _predict(
        self, x: np.ndarray, time: np.ndarray, context: EncodedContext, cache: FeatureCache | None, merging: Merging
    ) -> np.ndarray:
        x = self.conv_in(x)
        skips = [repeat(x, context.batch)]
        features = None if cache is None else cache.recall(skips[0].shape)
        if features is None:
            features = self._deepen(x, time, context, skips, merging)
        x = self.up_blocks[-1](features, time, context, skips, merging, LAST)
        if cache is not None:
            cache.keep(features)
        return to_nchw(self.conv_out(self.conv_norm_out(x, out=x)))

    def _deepen(
        self, x: np.ndarray, time: np.ndarray, context: EncodedContext, skips: list[np.ndarray], merging: Merging
    ) -> np.ndarray:
        """Give what enters the last residual block for ``x``, the result of the first convolution."""
        if self.down_blocks[0].attentions[0] is None:
            x = skips[0]
        for down in self.down_blocks:
            x = down(x, time, context, skips, merging)
        x = self.mid_block(x, time, context, merging)
        for up in self.up_blocks[:-1]:
            x = up(x, time, context, skips, merging)
        return self.up_blocks[-1](x, time, context, skips, merging, ALL_BUT_LAST)

    def _checked(self, sample: np.ndarray) -> np.ndarray:
        x = to_nhwc(sample, self.config.in_channels, "sample")
        smallest = 1 if self.config.downsample_padding else 2 ** (len(self.config.block_out_channels) - 1)
        if min(x.shape[1:3]) < smallest:
            raise InputError(f"sample: found {x.shape[1]} x {x.shape[2]}, expected at least {smallest} x {smallest}")
        return x

    def _embed(self, timestep: float | np.ndarray, n: int) -> np.ndarray:
        timesteps = np.asarray(timestep, dtype=np.float32).reshape(-1)
        if len(timesteps) not in {1, n} or not np.isfinite(timesteps).all():
            raise InputError(f"timestep: found {timestep!r:.80}, expected one number, or one for each of {n} images")
        c, flip, shift = self.config.block_out_channels[0], self.config.flip_sin_to_cos, self.config.freq_shift
        return self.time_embedding(timestep_embedding(np.repeat(timesteps, n // len(timesteps)), c, flip, shift))
