"""Stable Diffusion text-to-image on ordinary CPUs."""

from .compatible import (
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
from .generator import Generator
from .pipeline import PipelineOutput, StableDiffusionPipeline
from .sampling import Step
from .tasks import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)

__version__ = "0.1.0"

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
