"""The tiny autoencoder: much faster, slightly less sharp pictures.

TAESD of Ollin Boer Bohan (https://github.com/madebyollin/taesd) is distilled from the autoencoder of Stable Diffusion
and works on the same latents, scaled as samplers have them. Tensors are named as in diffusers' ``AutoencoderTiny``; the
original files, one for the encoder and one for the decoder, number them differently. Inside, activations are
``(n, h, w, c)``; blocks overwrite their input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import kernels
from ..config import ConfigReader
from ..errors import InputError
from .autoencoder import RgbFactors
from .layers import Conv2d, WeightSource, to_nchw, to_nhwc

BAND = 16 << 20  # bytes of the last level's feature map that are computed at a time
PIXEL_BYTES = 400  # of anonymous memory that decoding takes for each pixel, measured

# Features of other tiny autoencoders that would change the result: key -> values that mean "not used".
UNUSED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderTiny",),
    "act_fn": ("relu",),
    "shift_factor": (None, 0),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}


@dataclass(frozen=True)
class TinyVaeConfig:
    """Shape of the tiny autoencoder. Names and defaults are those of diffusers' ``AutoencoderTiny``.

    Its ``latent_magnitude`` and ``latent_shift`` are for latents stored as bytes and have no effect here.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TinyVaeConfig:
        """Read a parsed ``config.json``; irrelevant keys are ignored.

        Raises
        ------
        ModelError
            A value has the wrong type or is unsupported.
        """
        read = ConfigReader(values, "taesd")
        for key, supported in UNUSED.items():
            read.only(key, *supported)
        config = cls(
            in_channels=read.integer("in_channels", cls.in_channels),
            out_channels=read.integer("out_channels", cls.out_channels),
            latent_channels=read.integer("latent_channels", cls.latent_channels),
            encoder_block_out_channels=read.integers("encoder_block_out_channels", cls.encoder_block_out_channels),
            decoder_block_out_channels=read.integers("decoder_block_out_channels", cls.decoder_block_out_channels),
            num_encoder_blocks=read.integers("num_encoder_blocks", cls.num_encoder_blocks),
            num_decoder_blocks=read.integers("num_decoder_blocks", cls.num_decoder_blocks),
            scaling_factor=read.number("scaling_factor", cls.scaling_factor),
        )
        levels = len(config.num_decoder_blocks)
        if levels < 2:
            read.fail("num_decoder_blocks", "two numbers or more, one a level")
        for key in ("encoder_block_out_channels", "decoder_block_out_channels"):
            widths = getattr(config, key)
            if len(widths) != levels or len(set(widths)) > 1:
                read.fail(key, f"one width {levels} times, as num_decoder_blocks has {levels} levels")
        if len(config.num_encoder_blocks) != levels:
            read.fail("num_encoder_blocks", f"{levels} numbers, as num_decoder_blocks has")
        if not config.scaling_factor > 0:
            read.fail("scaling_factor", "a number above 0")
        return config


class Block:
    """Three convolutions with a shortcut around them; ``prefix`` excludes ``.conv``."""

    def __init__(self, weights: WeightSource, prefix: str, c: int) -> None:
        self.convs = [Conv2d(weights, f"{prefix}.conv.{i}", c, c, activation="relu") for i in (0, 2, 4)]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return ``relu(x + convs(x))`` for ``x (n, h, w, c)``, which is overwritten."""
        first, second, last = self.convs
        return last(second(first(x)), out=x, accumulate=True)


Layer = Callable[[np.ndarray], np.ndarray]


def encoder_layers(weights: WeightSource, config: TinyVaeConfig) -> list[Layer]:
    """Picture ``(n, h, w, in_channels)`` in [0, 1] to latents ``(n, h', w', latent_channels)``."""
    c, layers = config.encoder_block_out_channels[0], list[Layer]()
    for level, blocks in enumerate(config.num_encoder_blocks):
        name = f"encoder.layers.{len(layers)}"
        if level:
            layers.append(Conv2d(weights, name, c, c, stride=2, bias=False))
        else:
            layers.append(Conv2d(weights, name, config.in_channels, c))
        for _ in range(blocks):
            layers.append(Block(weights, f"encoder.layers.{len(layers)}", c))
    layers.append(Conv2d(weights, f"encoder.layers.{len(layers)}", c, config.latent_channels))
    return layers


def decoder_layers(weights: WeightSource, config: TinyVaeConfig) -> list[Layer]:
    """Latents ``(n, h, w, latent_channels)`` to picture ``(n, f * h, f * w, out_channels)`` in [0, 1]."""
    c = config.decoder_block_out_channels[0]
    layers: list[Layer] = [Conv2d(weights, "decoder.layers.0", config.latent_channels, c, activation="relu")]
    number = 2  # the activation is number 1
    for level, blocks in enumerate(config.num_decoder_blocks):
        for _ in range(blocks):
            layers.append(Block(weights, f"decoder.layers.{number}", c))
            number += 1
        if level < len(config.num_decoder_blocks) - 1:
            number += 1  # the enlargement has a number too
            layers.append(partial(Conv2d(weights, f"decoder.layers.{number}", c, c, bias=False), upsample=True))
            number += 1
    last = Conv2d(weights, f"decoder.layers.{number}", c, config.out_channels)
    return [*layers, partial(last, algorithm="winograd")]  # twice as fast as `auto` for so few channels


class TinyVae:
    """The tiny autoencoder: an `Autoencoder` that takes the place of `sd_numba.networks.vae.Vae`.

    Parameters
    ----------
    weights : WeightSource
        Tensors named as in diffusers; the encoder's may be missing.
    config : TinyVaeConfig

    Attributes
    ----------
    factor : int
        Ratio of a picture's side to its latents' side.
    """

    draws_noise, fast = False, True
    latent_rgb_factors: RgbFactors | None = None

    def __init__(self, weights: WeightSource, config: TinyVaeConfig) -> None:
        self.config = config
        self.factor = 2 ** (len(config.num_decoder_blocks) - 1)
        self.decoder = decoder_layers(weights, config)
        half = "decoder.layers.0.weight" in weights and "encoder.layers.0.weight" not in weights
        self.encoder = None if half else encoder_layers(weights, config)

    def decode(self, latents: np.ndarray, *, tiling: bool = False) -> np.ndarray:
        """Decode latents to pictures.

        Parameters
        ----------
        latents : float array ``(b, latent_channels, h, w)``
            As the sampler has them, divided by ``config.scaling_factor``, which is 1.
        tiling : bool
            Changes nothing: the last level is always computed a band of rows at a time.

        Returns
        -------
        float32 array ``(b, out_channels, factor * h, factor * w)``
            About -1 .. 1, not clipped.

        Raises
        ------
        InputError
            ``latents`` has another shape.
        """
        x = np.tanh(to_nhwc(latents, self.config.latent_channels, "latents") / 3) * np.float32(3)
        b, h, w, _ = x.shape
        pictures = np.empty((b, self.config.out_channels, self.factor * h, self.factor * w), np.float32)
        with kernels.reuse():
            for i in range(b):
                self._decode(x[i : i + 1], pictures[i])
        pictures *= 2
        pictures -= 1
        return pictures

    def bytes_per_pixel(self, *, tiling: bool = False) -> int:
        """Return how much memory decoding takes for each pixel of a picture, in strips or not."""
        return PIXEL_BYTES

    def _decode(self, x: np.ndarray, picture: np.ndarray) -> None:
        """Decode ``x (1, h, w, latent_channels)`` to ``picture (out_channels, f * h, f * w)`` in [0, 1].

        The last level does most of the work, and its activations dominate memory use. So it is computed in bands of
        rows, with as many extra rows on either side as its convolutions read.
        """
        blocks = self.config.num_decoder_blocks[-1]
        whole = len(self.decoder) - blocks - 2  # layers before the enlargement, the blocks, the last convolution
        for layer in self.decoder[:whole]:
            x = layer(x)
        margin = (3 * blocks + 3) // 2  # each of 3 * blocks + 2 convolutions reads a row more, after the enlargement
        height = x.shape[1]
        step = max(1, BAND // (4 * x[:, 0].nbytes))
        for first in range(0, height, step):
            last = min(first + step, height)
            start = max(first - margin, 0)
            y = x[:, start : last + margin].copy()  # blocks overwrite their input
            for layer in self.decoder[whole:]:
                y = layer(y)
            rows = y[0, 2 * (first - start) : 2 * (last - start)]
            picture[:, 2 * first : 2 * last] = rows.transpose(2, 0, 1)

    def encode(self, image: np.ndarray) -> np.ndarray:
        """Encode pictures to latents.

        Parameters
        ----------
        image : float array ``(b, in_channels, h, w)``
            In -1 .. 1.

        Returns
        -------
        float32 array ``(b, latent_channels, h / factor, w / factor)``, rounded up
            The sampler's latents are these times ``config.scaling_factor``, which is 1.

        Raises
        ------
        InputError
            ``image`` has another shape, or the weights hold only a decoder.
        """
        if self.encoder is None:
            raise InputError("taesd: found a decoder without encoder, which cannot encode; open a file that holds both")
        x = (to_nhwc(image, self.config.in_channels, "image") + 1) / 2
        latents = []
        with kernels.reuse():
            for i in range(len(x)):
                one = x[i : i + 1]
                for layer in self.encoder:
                    one = layer(one)
                latents.append(to_nchw(one))
        return np.concatenate(latents)

    def encode_distribution(self, image: np.ndarray, *, tiling: bool = False) -> tuple[np.ndarray, None]:
        """Return the latents that `encode` gives and no standard deviation; ``tiling`` changes nothing."""
        return self.encode(image), None
