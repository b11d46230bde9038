"""The pipeline by the names that scripts written for diffusers know it by.

All do the same; what differs is which arguments may follow the prompt without names, and the size that is assumed.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from ..generation.loop import Step
from ..pipeline import StableDiffusionPipeline


class StableDiffusionImg2ImgPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline`, called as ``pipe(prompt, image, strength)``."""

    positional = ("image", "strength", "num_inference_steps")


class StableDiffusionInpaintPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline`, called as ``pipe(prompt, image, mask_image)``.

    Pictures have the size that the model was made for unless ``height`` and ``width`` say otherwise, as in diffusers.
    """

    positional = ("image", "mask_image")

    def generate(
        self, prompt: str | Sequence[str], *, height: int | None = None, width: int | None = None, **options: Any
    ) -> Generator[Step, np.ndarray | None, None]:
        """Do what `StableDiffusionPipeline.generate` does."""
        own = self.default_size
        height, width = own[0] if height is None else height, own[1] if width is None else width
        return super().generate(prompt, height=height, width=width, **options)


DiffusionPipeline = AutoPipelineForText2Image = StableDiffusionPipeline
AutoPipelineForImage2Image = StableDiffusionImg2ImgPipeline
AutoPipelineForInpainting = StableDiffusionInpaintPipeline
