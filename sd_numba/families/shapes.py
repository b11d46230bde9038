"""Configurations read off the names and shapes of a checkpoint's tensors, by their names in diffusers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ModelError
from .names import count_numbers

HEAD_WIDTH = 64  # of CLIP's text encoders

Shapes = Mapping[str, tuple[int, ...]]
# Channels of the levels, and whether linear layers surround the transformers -> heads of the attention.
Heads = Callable[[list[int], bool], int | list[int]]


# --- shapes -----------------------------------------------------------------------------------------------------------


def infer_text_encoder(shapes: Shapes, activation: str) -> dict[str, Any]:
    """Read the configuration of a text encoder off its tensors' shapes, by their names in diffusers.

    Raises
    ------
    ModelError
        A tensor that tells it is missing.
    """
    vocabulary, width = _shape(shapes, "text_model.embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": count_numbers(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": _shape(shapes, "text_model.embeddings.position_embedding.weight", 2)[0],
        "hidden_act": activation,
    }


def infer_unet(shapes: Shapes, heads: Heads) -> dict[str, Any]:
    """Read the configuration of a UNet off its tensors' shapes, by their names in diffusers.

    Heads leave no trace in them: ``heads`` tells how many there are.

    Raises
    ------
    ModelError
        A tensor that tells it is missing.
    """
    levels = range(count_numbers(shapes, r"down_blocks\.(\d+)\."))
    channels = [_shape(shapes, f"down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in levels]
    crossed = [f"down_blocks.{i}.attentions.0.proj_in.weight" in shapes for i in levels]
    middle = "mid_block.attentions.0"
    linear = len(shapes.get(f"{middle}.proj_in.weight", ())) == 2
    return {
        "sample_size": 64,
        "in_channels": _shape(shapes, "conv_in.weight", 4)[1],
        "out_channels": _shape(shapes, "conv_out.weight", 4)[0],
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crossed],
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(crossed)],
        "block_out_channels": channels,
        "layers_per_block": [count_numbers(shapes, rf"down_blocks\.{i}\.resnets\.(\d+)\.") for i in levels],
        "transformer_layers_per_block": count_numbers(shapes, rf"{re.escape(middle)}\.transformer_blocks\.(\d+)\."),
        "attention_head_dim": heads(channels, linear),
        "cross_attention_dim": _shape(shapes, f"{middle}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "use_linear_projection": linear,
    }


def infer_vae(shapes: Shapes, scaling_factor: float) -> dict[str, Any]:
    """Read the configuration of an autoencoder off its tensors' shapes, by their names in diffusers.

    Raises
    ------
    ModelError
        A tensor that tells it is missing.
    """
    levels = range(count_numbers(shapes, r"encoder\.down_blocks\.(\d+)\."))
    return {
        "in_channels": _shape(shapes, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(shapes, "decoder.conv_out.weight", 4)[0],
        "latent_channels": _shape(shapes, "decoder.conv_in.weight", 4)[1],
        "block_out_channels": [_shape(shapes, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in levels],
        "layers_per_block": count_numbers(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "sample_size": 512,
        "scaling_factor": scaling_factor,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.group_norm.weight" in shapes,
    }


def _shape(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != dimensions:
        found = "no such tensor" if shape is None else f"shape {shape}"
        raise ModelError(f"tensor {name}: found {found}, expected one with {dimensions} dimensions")
    return shape
