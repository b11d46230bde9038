"""The autoencoder between pictures and latents.

The KL-regularised autoencoder of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022).
Attribute names follow the tensors' names in diffusers' ``AutoencoderKL``. Inside, activations are ``(n, h, w, c)``.

At full size the activations dominate memory use (512 x 512 x 256 values are 268 MB), so pictures are processed one at
a time.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from .. import kernels
from ..errors import InputError
from .layers import Linear, WeightSource, to_nchw, to_nhwc
from .vae_blocks import Decoder, Encoder
from .vae_config import VaeConfig
from .vae_strips import decode_in_strips, encode_in_strips

__all__ = ["Vae", "VaeConfig"]

WHOLE_BYTES, STRIP_BYTES = 2800, 1200  # of anonymous memory that decoding takes for a pixel, measured on SD 1.5


class Vae:
    """The autoencoder of Stable Diffusion, an `sd_numba.networks.autoencoder.Autoencoder`.

    Parameters
    ----------
    weights : WeightSource
        Tensors named as in diffusers.
    config : VaeConfig

    Attributes
    ----------
    factor : int
        Ratio of a picture's side to its latents' side.
    """

    draws_noise, fast = True, False

    def __init__(self, weights: WeightSource, config: VaeConfig) -> None:
        self.config = config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.latent_rgb_factors = config.latent_rgb_factors
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
            Compute the last levels in strips, as `sd_numba.networks.vae_strips` describes: a third of the memory for
            large pictures, and nearly the same result.

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

    def encode_distribution(self, image: np.ndarray, *, tiling: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Encode pictures to the normal distribution of their latents, whose values are independent.

        Parameters
        ----------
        image : float array
        tiling : bool
            Both as for `encode`.

        Returns
        -------
        mean, std : float32 array ``(b, latent_channels, h // factor, w // factor)``
            Unscaled. The logarithm of the variance is clipped to -30 .. 20, as in diffusers.

        Raises
        ------
        InputError
            ``image`` has another shape or is too small.
        """
        mean, log_variance = np.split(self._encode(image, tiling), 2, axis=-1)
        return to_nchw(mean), to_nchw(np.exp(np.float32(0.5) * np.clip(log_variance, -30, 20)))

    def bytes_per_pixel(self, *, tiling: bool = False) -> int:
        """Return how much memory decoding takes for each pixel of a picture."""
        return STRIP_BYTES if tiling else WHOLE_BYTES

    def _encode(self, image: np.ndarray, tiling: bool) -> np.ndarray:
        """Return means and log-variances, ``(b, h // factor, w // factor, 2 * latent_channels)``."""
        x = to_nhwc(image, self.config.in_channels, "image")
        if min(x.shape[1:3]) < self.factor:
            raise InputError(f"image: found {x.shape[1]} x {x.shape[2]} pixels, expected at least {self.factor} a side")
        with kernels.reuse():
            encode = partial(encode_in_strips, self.encoder) if tiling else self.encoder
            moments = np.concatenate([encode(x[i : i + 1]) for i in range(len(x))])
        return moments if self.quant_conv is None else self.quant_conv(moments)
