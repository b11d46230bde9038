"""Which file of a folder holds the weights, and what their tensors are called in older files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of file: what to call it, whether it is a whole model, and the option that takes it."""

    title: str
    supported: bool = False
    option: str = ""

    @property
    def advice(self) -> str:
        """What to do with it, to end an error with."""
        return f"; use {self.option}" if self.option else ""


# A pattern that a tensor's name starts with -> what a file with such a tensor is; the first that is found counts.
_KINDS = (
    (r"(conditioner\.embedders\.|model\.diffusion_model\.label_emb\.)", Kind("SDXL checkpoint")),
    (r"(model\.diffusion_model\.)?(joint_blocks|double_blocks|double_layers)\.", Kind("SD 3 or Flux model")),
    (r"(control_model\.|controlnet_|input_hint_block\.)", Kind("ControlNet")),
    (r"model\.diffusion_model\.input_blocks\.", Kind("single-file Stable Diffusion checkpoint", supported=True)),
    (r".*\.(hada_w|lokr_w|oft_|dora_scale)", Kind("LoHa, LoKr, OFT or DoRA")),
    (r"(lora_(unet|te\d?)[._]|.*[._]lora(_[AB]|_linear_layer|\.down|\.up)?\.)", Kind("LoRA", option="--lora")),
    (
        r"((decoder|encoder)\.layers\.)?\d+\.(conv\.\d\.|weight)",
        Kind("tiny autoencoder (TAESD)", option="--taesd"),
    ),
    (r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid|mid_block)\.", Kind("VAE", option="--vae")),
    (r"(emb_params|clip_[lg]|<.+>)$", Kind("textual inversion embedding", option="--embedding-dir")),
    (r"(time_embedding|down_blocks)\.", Kind("UNet")),
    (r"(text_model\.|cond_stage_model\.|.*token_embedding\.)", Kind("CLIP text encoder")),
)
KINDS = tuple((re.compile(pattern), kind) for pattern, kind in _KINDS)


def kind_of(names: Iterable[str]) -> Kind:
    """Tell by its tensors' names what a file is."""
    names = list(names)
    for pattern, kind in KINDS:
        if any(pattern.match(name) for name in names):
            return kind
    return Kind("another kind of model")
