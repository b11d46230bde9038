"""A look at latents while they are sampled.

``proj`` gives each latent pixel a colour, which is nearly linear in the channels of the pixels around it: as ComfyUI's
previews do, but smoothed with binomial weights over 3 x 3 pixels, because much in a latent pixel says how the colour
changes within it (`bench/fit_preview.py` measures it). It shows composition and colours, blurred, for next to nothing.
``tae`` decodes with a tiny autoencoder (`sd_numba.networks.taesd`): sharp, and slower.

A preview is of the picture that the sampler predicts at a step: the latents themselves are noise until the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..checks import check_choice
from ..errors import InputError, argument
from ..networks.autoencoder import Autoencoder

PREVIEWS = ("none", "proj", "tae")


def smooth(x: np.ndarray) -> np.ndarray:
    """Average ``x (b, h, w, c)`` over 3 x 3 pixels, with the weights 1, 2, 1 each way; edges are repeated."""
    h, w = x.shape[1:3]
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    x = (x[:, :h] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    smoothed: np.ndarray = (x[:, :, :w] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
    return smoothed


@dataclass(frozen=True)
class LatentProjection:
    """A linear map from the channels of smoothed latents to red, green and blue in [0, 1].

    Attributes
    ----------
    factors : float32 array ``(c, 3)``
    bias : float32 array ``(3,)``
    """

    factors: np.ndarray
    bias: np.ndarray

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[float]]) -> LatentProjection:
        """Take a row for each channel and the bias as the last, as a VAE's config has them."""
        table = np.array(rows, np.float32)
        return cls(table[:-1], table[-1])

    def project(self, latents: np.ndarray) -> np.ndarray:
        """Give uint8 ``(b, h, w, 3)`` for latents ``(b, c, h, w)``, scaled as samplers have them.

        Raises
        ------
        InputError
            ``latents`` has another shape.
        """
        channels = len(self.factors)
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise InputError(f"latents: found shape {latents.shape}, expected (b, {channels}, h, w)")
        colours = smooth(np.moveaxis(latents, 1, -1) @ self.factors + self.bias)
        pixels: np.ndarray = (np.clip(colours, 0, 1) * 255).round()
        return pixels.astype(np.uint8)


def projection_of(vae: Autoencoder, factors: Sequence[Sequence[float]] | None = None) -> LatentProjection:
    """Return the projection that an autoencoder's config holds, or else that of its family.

    Parameters
    ----------
    vae : Autoencoder
    factors : rows of numbers, optional
        The family's ``preview_factors``, as `LatentProjection.from_rows` takes them.

    Raises
    ------
    InputError
        The autoencoder has no projection, and the family's is missing or for other latents.
    """
    rows = vae.latent_rgb_factors
    if rows is not None:
        return LatentProjection.from_rows(rows)
    channels, known = vae.config.latent_channels, len(factors or ()) - 1
    if factors is None or channels != known:
        expected = f"expected {known} channels; choose none" if factors is not None else "choose none"
        raise InputError(
            f"preview proj: found an autoencoder of {channels} latent channels without _latent_rgb_factors in its "
            f"config, {expected}"
        )
    return LatentProjection.from_rows(factors)


class Previewer:
    """Turns latents into pictures to look at.

    Parameters
    ----------
    kind : {"none", "proj", "tae"}
    vae : Autoencoder
        The pipeline's.
    taesd : Autoencoder, optional
        The tiny one, for ``tae``, unless `vae` is one.
    factors : rows of numbers, optional
        For ``proj``, the ``preview_factors`` of the model's family.

    Raises
    ------
    InputError
        `kind` is none of these; ``tae`` without a tiny autoencoder, or with one for other latents; ``proj`` as
        `projection_of` says.
    """

    def __init__(
        self,
        kind: str,
        vae: Autoencoder,
        taesd: Autoencoder | None = None,
        factors: Sequence[Sequence[float]] | None = None,
    ) -> None:
        check_choice("preview", kind, PREVIEWS)
        self.kind, self.factor = kind, vae.factor
        if kind == "proj":
            self._projection = projection_of(vae, factors)
        elif kind == "tae":
            self._tiny = _tiny_vae(vae, taesd)

    def __call__(self, latents: np.ndarray) -> list[Image.Image]:
        """Show latents.

        Parameters
        ----------
        latents : float array ``(b, c, h, w)``
            A prediction of the noiseless latents, scaled as samplers have them.

        Returns
        -------
        list of Image
            ``b`` pictures of ``factor * w x factor * h`` pixels; none if the kind is ``none``.

        Raises
        ------
        InputError
            ``latents`` has another shape.
        """
        if self.kind == "none":
            return []
        if self.kind == "tae":
            pictures = self._tiny.decode(latents / np.float32(self._tiny.config.scaling_factor))
            pictures = np.clip(pictures * np.float32(127.5) + np.float32(127.5), 0, 255).round().astype(np.uint8)
            return [Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))) for picture in pictures]
        size = (self.factor * latents.shape[3], self.factor * latents.shape[2])
        small = self._projection.project(latents)
        return [Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC) for picture in small]


def _tiny_vae(vae: Autoencoder, taesd: Autoencoder | None) -> Autoencoder:
    if taesd is None:
        if not vae.fast:
            raise InputError(
                f"preview tae: found no tiny autoencoder; give one with {argument('taesd')}, or choose proj"
            )
        return vae
    found, expected = (taesd.config.latent_channels, taesd.factor), (vae.config.latent_channels, vae.factor)
    if found != expected:
        says = "latents of {} channels, {} times smaller than pictures".format
        raise InputError(
            f"preview tae: found a tiny autoencoder for {says(*found)}, the model has {says(*expected)}; choose proj"
        )
    return taesd
