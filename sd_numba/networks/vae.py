"""The autoencoder between pictures and latents.

The KL-regularised autoencoder of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022).
Attribute names follow the tensors' names in diffusers' ``AutoencoderKL``. Inside, activations are ``(n, h, w, c)``.

At full size the activations are what fills memory (512 x 512 x 256 values are 268 MB), so every block may overwrite its
input, a residual sum is made by the layer that computes its last term, and pictures are taken one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import kernels
from ..config import MAX_LAYERS, ConfigReader
from ..errors import InputError
from .layers import Conv2d, GroupNorm, Linear, WeightSource, products, to_nchw, to_nhwc
from .vae_strips import decode_in_strips, encode_in_strips

EPS = 1e-6  # of every group norm

# Features of other families that would change the result: key -> the values that mean "not used".
UNUSED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu", "swish"),
    "down_block_types": ("DownEncoderBlock2D",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None, 0),
    "up_block_types": ("UpDecoderBlock2D",),
}


@dataclass(frozen=True)
class VaeConfig:
    """Shape of the autoencoder. Names and defaults are those of diffusers' ``AutoencoderKL``.

    ``latent_rgb_factors``, ours, is ``_latent_rgb_factors`` in the file, as diffusers ignores keys that begin so: red,
    green and blue in [0, 1] for each scaled latent channel and, as the last row, where all are 0; see
    `sd_numba.pictures.preview`.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    latent_rgb_factors: tuple[tuple[float, ...], ...] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VaeConfig:
        """Read a parsed ``config.json``; keys that do not matter are ignored.

        Raises
        ------
        ModelError
            A value has the wrong type or is not supported.
        """
        read = ConfigReader(values, "vae")
        for key, supported in UNUSED.items():
            read.only(key, *supported)
        latent_channels = read.integer("latent_channels", cls.latent_channels)
        config = cls(
            in_channels=read.integer("in_channels", cls.in_channels),
            out_channels=read.integer("out_channels", cls.out_channels),
            latent_channels=latent_channels,
            block_out_channels=read.integers("block_out_channels", cls.block_out_channels),
            layers_per_block=read.integer("layers_per_block", cls.layers_per_block, maximum=MAX_LAYERS),
            norm_num_groups=read.integer("norm_num_groups", cls.norm_num_groups),
            sample_size=read.sides("sample_size", cls.sample_size),
            scaling_factor=read.number("scaling_factor", cls.scaling_factor),
            use_quant_conv=read.flag("use_quant_conv", cls.use_quant_conv),
            use_post_quant_conv=read.flag("use_post_quant_conv", cls.use_post_quant_conv),
            mid_block_add_attention=read.flag("mid_block_add_attention", cls.mid_block_add_attention),
            latent_rgb_factors=read.table("_latent_rgb_factors", latent_channels + 1, 3),
        )
        if any(c % config.norm_num_groups for c in config.block_out_channels):
            channels = list(config.block_out_channels)
            read.fail("norm_num_groups", f"a divisor of every one of block_out_channels {channels}")
        if not config.scaling_factor > 0:
            read.fail("scaling_factor", "a number above 0")
        for key in ("down_block_types", "up_block_types"):
            if len(values.get(key) or config.block_out_channels) != len(config.block_out_channels):
                read.fail(key, f"{len(config.block_out_channels)} of them, as many as block_out_channels")
        return config


class ResnetBlock:
    """Two convolutions around a shortcut."""

    def __init__(self, weights: WeightSource, prefix: str, c_in: int, c_out: int, groups: int) -> None:
        self.norm1 = GroupNorm(weights, f"{prefix}.norm1", groups, c_in, EPS, silu=True)
        self.conv1 = Conv2d(weights, f"{prefix}.conv1", c_in, c_out)
        self.norm2 = GroupNorm(weights, f"{prefix}.norm2", groups, c_out, EPS, silu=True)
        self.conv2 = Conv2d(weights, f"{prefix}.conv2", c_out, c_out)
        same = c_in == c_out
        self.conv_shortcut = None if same else Linear(weights, f"{prefix}.conv_shortcut", c_in, c_out, as_conv=True)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Give ``(n, h, w, c_out)`` for ``x (n, h, w, c_in)``; ``x`` is overwritten."""
        if self.conv_shortcut is None:
            residual, h = x, self.norm1(x)
        else:
            residual, h = self.conv_shortcut(x), self.norm1(x, out=x)
        h = self.conv1(h)
        h = self.norm2(h, out=h)
        return self.conv2(h, out=residual, accumulate=True)


class Attention:
    """Attention of every pixel to every other, with one head."""

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
    """Picture to the mean and log-variance of its latents."""

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
        """Give ``(n, h / f, w / f, 2 * latent_channels)`` for ``x (n, h, w, in_channels)``."""
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, out=x))


class Decoder:
    """Latents to picture.

    Its blocks are one flat list: a list of lists would hold on to the input of each level until the level is done.
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
        """Give ``(n, f * h, f * w, out_channels)`` for ``x (n, h, w, latent_channels)``."""
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, out=x))


class Vae:
    """The autoencoder of Stable Diffusion.

    Parameters
    ----------
    weights : WeightSource
        Tensors named as in diffusers.
    config : VaeConfig

    Attributes
    ----------
    factor : int
        How many times smaller than pictures latents are, on each side.
    """

    def __init__(self, weights: WeightSource, config: VaeConfig) -> None:
        self.config = config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        c = config.latent_channels
        self.encoder = Encoder(weights, "encoder", config)
        self.decoder = Decoder(weights, "decoder", config)
        self.quant_conv = (
            Linear(weights, "quant_conv", 2 * c, 2 * c, as_conv=True, coarsest="f32") if config.use_quant_conv else None
        )
        self.post_quant_conv = None
        if config.use_post_quant_conv:
            self.post_quant_conv = Linear(weights, "post_quant_conv", c, c, as_conv=True, coarsest="f32")

    def decode(self, latents: np.ndarray, *, tiling: bool = False) -> np.ndarray:
        """Decode latents to pictures.

        Parameters
        ----------
        latents : float array ``(b, latent_channels, h, w)``
            Unscaled, that is, already divided by ``config.scaling_factor``.
        tiling : bool
            Compute the last levels in strips, as `sd_numba.networks.vae_strips` does: a third of the memory for large
            pictures, and all but the same result.

        Returns
        -------
        float32 array ``(b, out_channels, factor * h, factor * w)``
            About -1 .. 1, not clipped.

        Raises
        ------
        InputError
            ``latents`` has another shape.
        """
        x = to_nhwc(latents, self.config.latent_channels, "latents")
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x)
        with kernels.reuse():
            decode = partial(decode_in_strips, self.decoder) if tiling else self.decoder
            return np.concatenate([to_nchw(decode(x[i : i + 1])) for i in range(len(x))])

    def encode(self, image: np.ndarray, *, tiling: bool = False) -> np.ndarray:
        """Encode pictures to the mean of their latents.

        Parameters
        ----------
        image : float array ``(b, in_channels, h, w)``
            In -1 .. 1, at least ``factor`` pixels on each side.
        tiling : bool
            Compute the first levels in strips, as for `decode`.

        Returns
        -------
        float32 array ``(b, latent_channels, h // factor, w // factor)``
            Unscaled.

        Raises
        ------
        InputError
            ``image`` has another shape or is too small.
        """
        return to_nchw(self._encode(image, tiling)[..., : self.config.latent_channels])

    def moments(self, image: np.ndarray, *, tiling: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Encode pictures to the normal distribution of their latents, one that is independent value by value.

        Parameters
        ----------
        image : float array
        tiling : bool
            Both as for `encode`.

        Returns
        -------
        mean, std : float32 array ``(b, latent_channels, h // factor, w // factor)``
            Unscaled. The logarithm of the variance is kept in -30 .. 20, as diffusers does.

        Raises
        ------
        InputError
            ``image`` has another shape or is too small.
        """
        mean, log_variance = np.split(self._encode(image, tiling), 2, axis=-1)
        return to_nchw(mean), to_nchw(np.exp(np.float32(0.5) * np.clip(log_variance, -30, 20)))

    def _encode(self, image: np.ndarray, tiling: bool) -> np.ndarray:
        """Give means and log-variances, ``(b, h // factor, w // factor, 2 * latent_channels)``."""
        x = to_nhwc(image, self.config.in_channels, "image")
        if min(x.shape[1:3]) < self.factor:
            raise InputError(f"image: found {x.shape[1]} x {x.shape[2]} pixels, expected at least {self.factor} a side")
        with kernels.reuse():
            encode = partial(encode_in_strips, self.encoder) if tiling else self.encoder
            moments = np.concatenate([encode(x[i : i + 1]) for i in range(len(x))])
        return moments if self.quant_conv is None else self.quant_conv(moments)
