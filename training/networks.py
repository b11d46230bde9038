"""The three networks, as diffusers and transformers build them, and the folder that they are stored in."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from .art import SIZE

SCALING_FACTOR = 0.18215
FACTOR = 4  # pixels for each latent, on each side
CHANNELS = 4  # of latents
WIDTH = 192  # of the text encoder
STEPS = 1000  # of the noise schedule
SCHEDULE = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": STEPS,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_defaults": {"num_inference_steps": 12, "guidance_scale": 3.0, "scheduler": "dpm++2m"},
    "requires_safety_checker": False,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def make_autoencoder() -> AutoencoderKL:
    """Build the autoencoder: 1.7 million parameters, three levels, 4 pixels for each latent."""
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        scaling_factor=SCALING_FACTOR,
    )


def make_unet() -> UNet2DConditionModel:
    """Build the UNet: 8.7 million parameters, three levels, cross-attention on the lower two."""
    return UNet2DConditionModel(
        sample_size=SIZE // FACTOR,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(64, 128, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads, by an old misnomer of diffusers
        norm_num_groups=16,
    )


def make_text_encoder(vocabulary: int) -> CLIPTextModel:
    """Build the text encoder: 2.3 million parameters, 4 layers; the last two tokens are start and end."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        projection_dim=WIDTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


def save_network(network: torch.nn.Module, folder: Path) -> None:
    """Write one network in float16."""
    deepcopy(network).to(device="cpu", dtype=torch.float16, memory_format=torch.contiguous_format).save_pretrained(
        folder
    )


def save_settings(folder: Path, tokenizer: Path) -> None:
    """Write the rest of a diffusers folder of three networks: scheduler, tokenizer, index."""
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    for name, content in (("model_index.json", MODEL_INDEX), ("scheduler/scheduler_config.json", SCHEDULE)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
