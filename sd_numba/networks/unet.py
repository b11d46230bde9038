"""The UNet that predicts the noise in latents, given a timestep and the encoded text.

The architecture of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022): residual
blocks that take the timestep as a bias, and transformers that attend to the text. Attribute names follow the
tensors' names in diffusers' ``UNet2DConditionModel``. Inside, activations are ``(n, h, w, c)``; a transformer's tokens
``(n, h * w, c)`` are the same memory.

Two conventions save most of the memory traffic: a transformer updates its input in place, and the layer that computes
the last term of a residual sum also adds it (``accumulate``).
"""

from __future__ import annotations

import math

import numpy as np

from .. import kernels
from ..errors import InputError
from .deepcache import FeatureCache
from .layers import Conv2d, GroupNorm, Linear, WeightSource, to_nchw, to_nhwc
from .token_merging import TokenMerging, check_ratio
from .unet_blocks import DownBlock, EncodedContext, MidBlock, Tome, UpBlock, repeat
from .unet_config import UNetConfig

__all__ = ["EncodedContext", "FeatureCache", "UNet", "UNetConfig", "timestep_embedding"]

LONGEST_PERIOD = 10000  # of the timestep's sinusoids, in units of 2 pi
ALL_BUT_LAST, LAST = slice(-1), slice(-1, None)  # residual blocks of a level


def timestep_embedding(timesteps: np.ndarray, c: int, flip_sin_to_cos: bool, freq_shift: float) -> np.ndarray:
    """Return sinusoids of ``timesteps (n,)`` in ``c`` channels, at frequencies that fall geometrically from 1.

    Vaswani et al., "Attention Is All You Need" (2017), section 3.5. Models were trained with angles rounded to float32,
    which moves them by up to 3e-5 at timestep 999, so they are rounded at the same places here.

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
        """Return ``(n, c_time)`` for sinusoids ``(n, c)``, after the SiLU that every user would apply first."""
        return self.linear_2(self.linear_1(waves))


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
        """Compute what depends on the text alone, once for each prompt instead of once for each step.

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
        tome: float = 0.0,
    ) -> np.ndarray:
        """Predict the noise (or the velocity) in ``sample``.

        Parameters
        ----------
        sample : float array ``(n, in_channels, h, w)``
            Noisy latents of any size.
        timestep : float or array ``(n,)``
            Fractions are allowed.
        context : float array ``(b, t, cross_attention_dim)`` or EncodedContext
            The encoded text, or the result of ``encode_context`` for it. If b is a multiple of n, as in classifier-free
            guidance, the samples are repeated, and everything before the first cross-attention is computed only once.
        cache : FeatureCache, optional
            Lets calls of one run share most of their work; each group of pictures in a run needs its own.
        tome : float
            Share of the tokens, from 0 to 0.75, to merge in self-attention at the highest resolution that has
            attention; see `sd_numba.networks.token_merging`.

        Returns
        -------
        float32 array ``(b, out_channels, h, w)``

        Raises
        ------
        InputError
            A shape does not fit, or the share is out of range.
        """
        merge_ratio = check_ratio(tome)
        x = self._checked(sample)
        if not isinstance(context, EncodedContext):
            context = self.encode_context(context)
        if context.batch % len(x):
            raise InputError(f"context: found a batch of {context.batch}, expected {len(x)} as in the sample, or twice")
        with kernels.reuse():
            time = repeat(self._embed(timestep, len(x)), context.batch)
            seed = abs(round(float(np.ravel(timestep)[0])))
            merging = TokenMerging(merge_ratio, seed) if merge_ratio else None
            return self._predict(x, time, context, cache, merging)

    def _predict(
        self, x: np.ndarray, time: np.ndarray, context: EncodedContext, cache: FeatureCache | None, tome: Tome
    ) -> np.ndarray:
        x = self.conv_in(x)
        skips = [repeat(x, context.batch)]
        features = None if cache is None else cache.recall(skips[0].shape)
        if features is None:
            features = self._deepen(x, time, context, skips, tome)
        x = self.up_blocks[-1](features, time, context, skips, tome, LAST)
        if cache is not None:
            cache.keep(features)
        return to_nchw(self.conv_out(self.conv_norm_out(x, out=x)))

    def _deepen(
        self, x: np.ndarray, time: np.ndarray, context: EncodedContext, skips: list[np.ndarray], tome: Tome
    ) -> np.ndarray:
        """Return the last residual block's input for ``x``, the result of the first convolution."""
        if self.down_blocks[0].attentions[0] is None:
            x = skips[0]
        for down in self.down_blocks:
            x = down(x, time, context, skips, tome)
        x = self.mid_block(x, time, context, tome)
        for up in self.up_blocks[:-1]:
            x = up(x, time, context, skips, tome)
        return self.up_blocks[-1](x, time, context, skips, tome, ALL_BUT_LAST)

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
