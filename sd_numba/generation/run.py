"""Pictures in the making: an iterator over the steps of a run, and the pictures at its end."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from ..pictures.arrays import masks_to_pil, painted_share, paste_back, to_pil
from .loop import Step, sample
from .model import Lora, Model
from .request import Request


class Generation(Generator[Step, "np.ndarray | None", None]):
    """Pictures in the making.

    Iterating makes one call of the network after another. Latents sent to it replace those of the last step. Nothing
    is computed before the first step is requested.

    Parameters
    ----------
    model : Model
    request : Request
    state : mapping, optional
        The ``state`` of a `Step`, to continue after it.
    loras : tuple of Lora
        LoRAs of this run; other runs of the same model may use others at the same time.

    Attributes
    ----------
    latents : float32 array ``(b, c, h, w)``, optional
        Latents after the last step, or those in the state.
    """

    def __init__(
        self, model: Model, request: Request, state: Mapping[str, Any] | None, loras: tuple[Lora, ...]
    ) -> None:
        self.model, self.request, self._loras = model, request, loras
        self.latents: np.ndarray | None = None if state is None else state["x"]
        self._steps = sample(model, request, state)

    def send(self, value: np.ndarray | None) -> Step:
        """Make a step, from the latents sent unless these are None."""
        if value is not None:
            self.latents = value
        self.model.apply_loras(self._loras)
        try:
            step = self._steps.send(value)
        except BaseException:  # also after the last step
            self.model.apply_loras(self.model.loras)
            raise
        self.latents = step.latents
        return step

    def throw(self, *error: Any) -> Step:
        """End the run with an error."""
        self.model.apply_loras(self.model.loras)
        return self._steps.throw(*error)

    def arrays(self, paste: bool = True) -> np.ndarray:
        """Decode the latents.

        Parameters
        ----------
        paste : bool
            Whether to copy pixels outside the mask, if there is one, from the picture that the run started from. The
            painted part fades in within a few pixels of the mask's edge.

        Returns
        -------
        float32 array ``(b, height, width, 3)`` in [0, 1]

        Raises
        ------
        ModelError
            The decoder returns NaN.
        """
        pictures = self._decoded()
        for index, (original, mask) in enumerate(self._kept(len(pictures)) if paste else ()):
            share = np.asarray(painted_share(mask), np.float32)[..., None] / 255
            pictures[index] = original + share * (pictures[index] - original)
        return pictures

    def images(self, paste: bool = True) -> list[Image.Image]:
        """Decode the latents to PIL images; see `arrays`."""
        images = to_pil(self._decoded())
        kept = self._kept(len(images)) if paste else ()
        for index, (original, mask) in enumerate(kept):
            images[index] = paste_back(to_pil(original[None])[0], images[index], mask)
        return images

    def _decoded(self) -> np.ndarray:
        if self.latents is None:
            raise ValueError("no step was made: iterate over the run first")
        return self.model.decode(self.latents)

    def _kept(self, count: int) -> Iterator[tuple[np.ndarray, Image.Image]]:
        """Yield each picture's starting picture and mask, if there are masks."""
        pictures, masks = self.request.pictures, self.request.masks
        if pictures is None or masks is None:
            return
        images = masks_to_pil(masks)
        for index in range(count):
            yield pictures[min(index, len(pictures) - 1)], images[min(index, len(images) - 1)]
