"""The shape of a UNet, as its ``config.json`` gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import MAX_LAYERS, ConfigReader

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")

# Features of other families, and of experiments, that would change the result: key -> the values that mean "not used".
UNUSED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the UNet. Names and defaults are those of diffusers, where one integer may stand for all levels.

    The exception is ``num_attention_heads``: diffusers calls it ``attention_head_dim``.
    """

    sample_size: int | tuple[int, int] = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    num_attention_heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    downsample_padding: int = 1
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    time_embedding_dim: int = 1280
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """Read a parsed ``config.json``; keys that do not matter are ignored.

        Raises
        ------
        ModelError
            A value has the wrong type or is not supported.
        """
        read = ConfigReader(values, "unet")
        for key, supported in UNUSED.items():
            read.only(key, *supported)
        if "norm_num_groups" in values and values["norm_num_groups"] is None:
            read.fail("norm_num_groups", "an integer")
        channels = read.integers("block_out_channels", cls.block_out_channels)
        levels = len(channels)
        heads = "attention_head_dim" if values.get("num_attention_heads") is None else "num_attention_heads"
        config = cls(
            sample_size=read.sides("sample_size", cls.sample_size),
            in_channels=read.integer("in_channels", cls.in_channels),
            out_channels=read.integer("out_channels", cls.out_channels),
            down_block_types=read.words("down_block_types", cls.down_block_types, DOWN_BLOCKS),
            up_block_types=read.words("up_block_types", cls.up_block_types, UP_BLOCKS),
            block_out_channels=channels,
            layers_per_block=read.per_level("layers_per_block", 2, levels, MAX_LAYERS),
            transformer_layers_per_block=read.per_level("transformer_layers_per_block", 1, levels, MAX_LAYERS),
            num_attention_heads=read.per_level(heads, 8, levels),
            cross_attention_dim=read.integer("cross_attention_dim", cls.cross_attention_dim),
            use_linear_projection=read.flag("use_linear_projection", cls.use_linear_projection),
            norm_num_groups=read.integer("norm_num_groups", cls.norm_num_groups),
            norm_eps=read.number("norm_eps", cls.norm_eps),
            downsample_padding=read.integer("downsample_padding", cls.downsample_padding, 0, 1),
            flip_sin_to_cos=read.flag("flip_sin_to_cos", cls.flip_sin_to_cos),
            freq_shift=read.number("freq_shift", cls.freq_shift),
            time_embedding_dim=read.integer("time_embedding_dim", 4 * channels[0]),
            conv_in_kernel=_kernel_size(read, "conv_in_kernel"),
            conv_out_kernel=_kernel_size(read, "conv_out_kernel"),
        )
        config._check(read, heads)
        return config

    @property
    def finest_attention(self) -> int:
        """The level of the highest resolution with attention; the middle block always has it."""
        crossed = zip(self.down_block_types, reversed(self.up_block_types), strict=True)
        levels = [level for level, types in enumerate(crossed) if any(t.startswith("CrossAttn") for t in types)]
        return min(levels, default=len(self.block_out_channels) - 1)

    def _check(self, read: ConfigReader, heads: str) -> None:
        """Raise ModelError if values contradict each other."""
        channels, levels = self.block_out_channels, len(self.block_out_channels)
        for key in ("down_block_types", "up_block_types"):
            if len(getattr(self, key)) != levels:
                read.fail(key, f"{levels} of them, as many as block_out_channels")
        if any(c % self.norm_num_groups for c in channels):
            read.fail("norm_num_groups", f"a divisor of every one of block_out_channels {list(channels)}")
        if any(h > c for h, c in zip(self.num_attention_heads, channels, strict=True)):
            read.fail(heads, f"no more heads than block_out_channels {list(channels)}")
        if not self.freq_shift < channels[0] // 2:
            read.fail("freq_shift", f"less than half of the first of block_out_channels, {channels[0]}")


def _kernel_size(read: ConfigReader, key: str) -> int:
    size = read.integer(key, 3)
    if size not in {1, 3, 5, 7}:
        read.fail(key, "1, 3, 5 or 7")
    return size
