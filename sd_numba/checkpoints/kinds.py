"""What a file is, by the names of its tensors: a whole model, a LoRA, a VAE and so on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import argument
from ..families import family_of_file
from ..families.stable_diffusion import OTHERS

# What a file is used as -> how.
USES = {
    "lora": f"load it with {argument('load_lora_weights')}",
    "taesd": f"give it as {argument('taesd')}",
    "vae": f"give it as {argument('vae')}",
    "embedding": f"load it with {argument('load_textual_inversion')}",
}


@dataclass(frozen=True)
class Kind:
    """A kind of file: what to call it, whether it is a whole model, and what it is used as."""

    title: str
    supported: bool = False
    use: str = ""  # a key of USES

    @property
    def advice(self) -> str:
        """What to do with it, to end an error with."""
        return f"; {USES[self.use]}" if self.use else ""


# A pattern that a tensor's name starts with -> what a file with such a tensor is; the first that is found counts.
_KINDS = (
    *((pattern, Kind(title)) for pattern, title in OTHERS),
    (r".*\.(hada_w|lokr_w|oft_|dora_scale)", Kind("LoHa, LoKr, OFT or DoRA")),
    (r"(lora_(unet|te\d?)[._]|.*[._]lora(_[AB]|_linear_layer|\.down|\.up)?\.)", Kind("LoRA", use="lora")),
    (
        r"((decoder|encoder)\.layers\.)?\d+\.(conv\.\d\.|weight)",
        Kind("tiny autoencoder (TAESD)", use="taesd"),
    ),
    (r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid|mid_block)\.", Kind("VAE", use="vae")),
    (r"(emb_params|clip_[lg]|<.+>)$", Kind("textual inversion embedding", use="embedding")),
    (r"(time_embedding|down_blocks)\.", Kind("UNet")),
    (r"(text_model\.|cond_stage_model\.|.*token_embedding\.)", Kind("CLIP text encoder")),
)
KINDS = tuple((re.compile(pattern), kind) for pattern, kind in _KINDS)


def kind_of(names: Iterable[str]) -> Kind:
    """Tell by its tensors' names what a file is."""
    names = list(names)
    family = family_of_file(names)
    if family is not None:
        return Kind(f"single-file {family.line} checkpoint", supported=True)
    for pattern, kind in KINDS:
        if any(pattern.match(name) for name in names):
            return kind
    return Kind("another kind of model")
