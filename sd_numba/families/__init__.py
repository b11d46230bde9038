"""Facts about the kinds of model: which components they have, and which classes can be run."""

from __future__ import annotations

COMPONENTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
PIPELINE = "StableDiffusionPipeline"
# Components that have weights -> the classes in their config.json that can be run.
CLASSES: dict[str, tuple[str, ...]] = {
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}
