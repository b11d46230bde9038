"""What the autoencoders have in common: all that the code around them may rely on."""

from __future__ import annotations

from typing import Protocol

import numpy as np

RgbFactors = tuple[tuple[float, ...], ...]


class AutoencoderConfig(Protocol):
    """What every autoencoder's config says."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        ...

    @property
    def scaling_factor(self) -> float:
        """Number that turns the encoder's latents into those of the sampler, by multiplication."""
        ...


class Autoencoder(Protocol):
    """A network between pictures and latents.

    Attributes
    ----------
    factor : int
        How many times smaller than pictures latents are, on each side.
    draws_noise : bool
        Whether a picture has a distribution of latents, to be sampled with noise, rather than one latent.
    fast : bool
        Whether decoding is fast enough to show a preview after each step.
    latent_rgb_factors : tuple of tuples, optional
        Red, green and blue in [0, 1] for each scaled latent channel and, as the last row, where all are 0; see
        `sd_numba.pictures.preview`.
    """

    factor: int
    draws_noise: bool
    fast: bool

    @property
    def config(self) -> AutoencoderConfig:
        """The network's shape."""
        ...

    @property
    def latent_rgb_factors(self) -> RgbFactors | None:
        """See the attributes."""
        ...

    def decode(self, latents: np.ndarray, *, tiling: bool = False) -> np.ndarray:
        """Decode latents to pictures.

        Parameters
        ----------
        latents : float array ``(b, latent_channels, h, w)``
            Already divided by ``config.scaling_factor``.
        tiling : bool
            Save memory, if the network has a way to.

        Returns
        -------
        float32 array ``(b, out_channels, factor * h, factor * w)``
            About -1 to 1, not clipped.

        Raises
        ------
        InputError
            ``latents`` has another shape.
        """
        ...

    def encode_distribution(self, image: np.ndarray, *, tiling: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """Encode pictures to the mean and the standard deviation of their latents.

        Parameters
        ----------
        image : float array ``(b, in_channels, h, w)``
            In -1 to 1.
        tiling : bool
            As for `decode`.

        Returns
        -------
        mean : float32 array ``(b, latent_channels, h / factor, w / factor)``
            Not yet multiplied by ``config.scaling_factor``.
        std : float32 array of the same shape, or None
            None if the network does not draw noise.

        Raises
        ------
        InputError
            ``image`` has another shape, or the network has no encoder.
        """
        ...

    def bytes_per_pixel(self, *, tiling: bool = False) -> int:
        """Return how much memory decoding takes for each pixel of a picture."""
        ...
