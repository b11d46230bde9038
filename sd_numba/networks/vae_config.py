"""The shape of the autoencoder, read from ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import MAX_LAYERS, ConfigReader

# Features of other model families that would change the result: key -> values that mean "not used".
UNUSED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu", "swish"),
    "down_block_types": ("DownEncoderBlock2D",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None, 0),
    "up_block_types": ("UpDecoderBlock2D",),
}


@dataclass(frozen=True)
class VaeConfig:
    """Shape of the autoencoder. Names and defaults are those of diffusers' ``AutoencoderKL``.

    ``latent_rgb_factors`` is an addition: red, green and blue in [0, 1] for each scaled latent channel and, in the last
    row, for latents of 0; see `sd_numba.pictures.preview`. The file calls it ``_latent_rgb_factors``, because diffusers
    ignores keys that begin with an underscore.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    latent_rgb_factors: tuple[tuple[float, ...], ...] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VaeConfig:
        """Read a parsed ``config.json``; irrelevant keys are ignored.

        Raises
        ------
        ModelError
            A value has the wrong type or is unsupported.
        """
        read = ConfigReader(values, "vae")
        for key, supported in UNUSED.items():
            read.only(key, *supported)
        latent_channels = read.integer("latent_channels", cls.latent_channels)
        config = cls(
            in_channels=read.integer("in_channels", cls.in_channels),
            out_channels=read.integer("out_channels", cls.out_channels),
            latent_channels=latent_channels,
            block_out_channels=read.integers("block_out_channels", cls.block_out_channels),
            layers_per_block=read.integer("layers_per_block", cls.layers_per_block, maximum=MAX_LAYERS),
            norm_num_groups=read.integer("norm_num_groups", cls.norm_num_groups),
            sample_size=read.sides("sample_size", cls.sample_size),
            scaling_factor=read.number("scaling_factor", cls.scaling_factor),
            use_quant_conv=read.flag("use_quant_conv", cls.use_quant_conv),
            use_post_quant_conv=read.flag("use_post_quant_conv", cls.use_post_quant_conv),
            mid_block_add_attention=read.flag("mid_block_add_attention", cls.mid_block_add_attention),
            latent_rgb_factors=read.table("_latent_rgb_factors", latent_channels + 1, 3),
        )
        if any(c % config.norm_num_groups for c in config.block_out_channels):
            channels = list(config.block_out_channels)
            read.fail("norm_num_groups", f"a divisor of every one of block_out_channels {channels}")
        if not config.scaling_factor > 0:
            read.fail("scaling_factor", "a number above 0")
        for key in ("down_block_types", "up_block_types"):
            if len(values.get(key) or config.block_out_channels) != len(config.block_out_channels):
                read.fail(key, f"{len(config.block_out_channels)} of them, as many as block_out_channels")
        return config
