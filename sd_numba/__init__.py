"""Stable Diffusion text-to-image on ordinary CPUs."""

from ._version import __version__
from .diffusers_api.pipelines import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from .diffusers_api.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from .errors import DownloadError, InputError, ModelError, SdNumbaError
from .generation.loop import Step
from .pipeline import PipelineOutput
from .samplers.generators import Generator

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DiffusionPipeline",
    "DownloadError",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "Generator",
    "HeunDiscreteScheduler",
    "InputError",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "ModelError",
    "PNDMScheduler",
    "PipelineOutput",
    "SdNumbaError",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
    "Step",
    "UniPCMultistepScheduler",
    "__version__",
]

globals().update(SCHEDULERS)  # also schedulers that are not named above
