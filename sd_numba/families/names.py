"""Single-file checkpoints: the tensors' names and the networks' shapes in the layout of the latent-diffusion code.

Such a file holds all networks of a Stable Diffusion 1.x or 2.x model under one prefix each, and no configuration. Names
are translated to those of diffusers (and back, for writing) by tables of modules, which follow from how many blocks
each level of a network has; the configurations are read off the tensors' names and shapes.

Layout: https://github.com/CompVis/stable-diffusion (``ldm/modules/diffusionmodules``), with OpenCLIP's text encoder in
the files of https://github.com/Stability-AI/stablediffusion.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..files.tensors import TensorInfo
from ..networks.unet_config import UNetConfig

EMA = "model_ema."  # averages that training keeps
CLIP, OPENCLIP = "transformer.", "model."  # what follows the prefix of the text encoder, in 1.x and in 2.x
OPENCLIP_LAYERS = 23  # of 24: Stable Diffusion 2.x takes the output of the last but one

_INPUT_BLOCK = re.compile(r"input_blocks\.(\d+)\.([01])\.(op|in_layers|norm)\.")

DEEPEST = 6  # words in a module's name, in either layout


@dataclass(frozen=True)
class Names:
    """A two-way translation of tensors' names: modules by their place, and what is in them by its own name."""

    modules: Mapping[str, str]
    parts: Mapping[str, str]

    def to_diffusers(self, name: str) -> str:
        """Translate a name from the single file."""
        return _translate(name, self.modules, self.parts)

    def to_single(self, name: str) -> str:
        """Translate a name of diffusers."""
        return _translate(name, {new: old for old, new in self.modules.items()}, {n: o for o, n in self.parts.items()})


def _translate(name: str, modules: Mapping[str, str], parts: Mapping[str, str]) -> str:
    words = name.split(".")
    for count in range(min(len(words) - 1, DEEPEST), 0, -1):
        module = modules.get(".".join(words[:count]))
        if module is not None:
            rest = ".".join(words[count:-1])
            return ".".join(filter(None, (module, parts.get(rest, rest), words[-1])))
    return name


# Tensor names of older or newer files -> the names that the networks use (those of diffusers; the text encoder's
# with `text_model.`). The first pattern that matches counts; None: the tensor is not used.
RENAMES: tuple[tuple[str, str | None], ...] = (
    (r"(text_model\.)?embeddings\.position_ids", None),  # just 0 .. 76
    (r"text_projection\.weight(_scale)?", None),  # behind the output that Stable Diffusion uses
    (r"((embeddings|encoder\.layers|final_layer_norm)\..+)", r"text_model.\1"),
    (r"((?:en|de)coder\.mid_block\.attentions\.\d+)\.query\.(\w+)", r"\1.to_q.\2"),  # VAE before diffusers 0.17
    (r"((?:en|de)coder\.mid_block\.attentions\.\d+)\.key\.(\w+)", r"\1.to_k.\2"),
    (r"((?:en|de)coder\.mid_block\.attentions\.\d+)\.value\.(\w+)", r"\1.to_v.\2"),
    (r"((?:en|de)coder\.mid_block\.attentions\.\d+)\.proj_attn\.(\w+)", r"\1.to_out.0.\2"),
)


def canonical_name(name: str) -> str | None:
    """The name that the networks use for a stored tensor, or None for one that they do not need."""
    for pattern, replacement in RENAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return None if replacement is None else match.expand(replacement)
    return name


UNET_PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_PARTS = {
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
OPENCLIP_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def unet_names(layers: Sequence[int], crossed: Sequence[bool]) -> Names:
    """Return the names of a UNet with `layers` residual blocks at each level, and attention at the `crossed` levels."""
    modules = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    last, n = len(layers) - 1, 1
    for level, count in enumerate(layers):
        for i in range(count):
            modules[f"input_blocks.{n}.0"] = f"down_blocks.{level}.resnets.{i}"
            if crossed[level]:
                modules[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{i}"
            n += 1
        if level < last:
            modules[f"input_blocks.{n}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            n += 1
    n = 0
    for block, level in enumerate(range(last, -1, -1)):
        for i in range(layers[level] + 1):
            modules[f"output_blocks.{n}.0"] = f"up_blocks.{block}.resnets.{i}"
            if crossed[level]:
                modules[f"output_blocks.{n}.1"] = f"up_blocks.{block}.attentions.{i}"
            if level and i == layers[level]:
                modules[f"output_blocks.{n}.{1 + crossed[level]}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
            n += 1
    return Names(modules, UNET_PARTS)


def unet_names_of(config: UNetConfig) -> Names:
    """Give the names of a UNet of this configuration."""
    return unet_names(config.layers_per_block, [kind == "CrossAttnDownBlock2D" for kind in config.down_block_types])


def vae_names(levels: int, layers: int) -> Names:
    """Return the names of an autoencoder with `levels` levels of `layers` residual blocks each in the encoder."""
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        for old, new in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            modules[f"{half}.{old}"] = f"{half}.{new}"
        for old, new in (("block_1", "resnets.0"), ("attn_1", "attentions.0"), ("block_2", "resnets.1")):
            modules[f"{half}.mid.{old}"] = f"{half}.mid_block.{new}"
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for i in range(layers):
            modules[f"encoder.down.{level}.block.{i}"] = f"{down}.resnets.{i}"
        for i in range(layers + 1):
            modules[f"decoder.up.{level}.block.{i}"] = f"{up}.resnets.{i}"
        modules[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        modules[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return Names(modules, VAE_PARTS)


def openclip_names(layers: int) -> Names:
    """Give the names of OpenCLIP's text encoder, but for the joint projections of its attention."""
    modules = {
        "token_embedding": "text_model.embeddings.token_embedding",
        "positional_embedding": "text_model.embeddings.position_embedding",
        "ln_final": "text_model.final_layer_norm",
    }
    modules |= {f"transformer.resblocks.{i}": f"text_model.encoder.layers.{i}" for i in range(layers)}
    return Names(modules, OPENCLIP_PARTS)


# --- reading ----------------------------------------------------------------------------------------------------------


def renamed(tensors: Mapping[str, TensorInfo], names: Names) -> dict[str, TensorInfo]:
    """Translate the names of a single file's tensors."""
    return {names.to_diffusers(name): info for name, info in tensors.items()}


def names_of_unet(names: Iterable[str]) -> Names:
    """Find out from the names in a single file, without the prefix, how its UNet's levels are laid out."""
    found = {match.groups() for name in names if (match := _INPUT_BLOCK.match(name))}
    layers, crossed, n = [0], [False], 1
    while True:
        if (str(n), "0", "op") in found:
            layers.append(0)
            crossed.append(False)
        elif (str(n), "0", "in_layers") in found:
            layers[-1] += 1
            crossed[-1] |= (str(n), "1", "norm") in found
        else:
            return unet_names(layers, crossed)
        n += 1


def vae_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Pick the tensors of an autoencoder that a decoder or encoder needs, under diffusers' names if it has others."""
    modules = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    kept = {name: info for name, info in tensors.items() if name.startswith(modules)}
    levels, layers = (
        count_numbers(kept, r"decoder\.up\.(\d+)\."),
        count_numbers(kept, r"encoder\.down\.0\.block\.(\d+)\."),
    )
    if levels:
        return renamed(kept, vae_names(levels, layers))
    return {name: info for old, info in kept.items() if (name := canonical_name(old)) is not None}


def clip_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Pick the tensors of a text encoder with CLIP's own names, and give them transformers' names."""
    result = {canonical_name(name.removeprefix(CLIP)): info for name, info in tensors.items()}
    return _of_text_model(result)


def _of_text_model(tensors: Mapping[str | None, TensorInfo]) -> dict[str, TensorInfo]:
    return {name: info for name, info in tensors.items() if name is not None and name.startswith("text_model.")}


def openclip_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Pick the tensors that Stable Diffusion 2.x needs of OpenCLIP's text encoder, under the names of transformers."""
    tensors = {name.removeprefix(OPENCLIP): info for name, info in tensors.items()}
    names = openclip_names(min(count_numbers(tensors, r"transformer\.resblocks\.(\d+)\."), OPENCLIP_LAYERS))
    result: dict[str | None, TensorInfo] = {}
    for old, info in tensors.items():
        # Its embedding of positions is no module in OpenCLIP, and so has no ".weight".
        new = names.to_diffusers(f"{old}.weight" if old == "positional_embedding" else old)
        joint = re.fullmatch(r"(.+)\.attn\.in_proj_(weight|bias)", new)
        if joint:
            for i, projection in enumerate("qkv"):
                result[f"{joint[1]}.self_attn.{projection}_proj.{joint[2]}"] = info.rows(i, 3)
        else:
            result[new] = info
    return _of_text_model(result)


def count_numbers(names: Iterable[str], pattern: str) -> int:
    """Count the different numbers that a pattern finds at the start of names."""
    found = re.compile(pattern)
    return len({match[1] for name in names if (match := found.match(name))})
