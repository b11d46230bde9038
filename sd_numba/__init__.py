"""Stable Diffusion text-to-image on ordinary CPUs."""

from .errors import DownloadError, InputError, ModelError, SdNumbaError
from .pipeline import PipelineOutput, StableDiffusionPipeline, Step

__version__ = "0.1.0"

__all__ = [
    "DownloadError",
    "InputError",
    "ModelError",
    "PipelineOutput",
    "SdNumbaError",
    "StableDiffusionPipeline",
    "Step",
    "__version__",
]
