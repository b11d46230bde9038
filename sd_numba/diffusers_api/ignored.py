"""Arguments of diffusers that have no effect here, and the ones that are refused because they would have one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import InputError

# Arguments of diffusers' `from_pretrained` that choose among files, devices and precisions, or leave out a part that is
# not here either.
IDLE_FILES = ("use_safetensors", "variant", "local_files_only", "revision", "cache_dir", "token", "force_download")
IDLE_OPENING = (
    *IDLE_FILES, "torch_dtype", "dtype", "low_cpu_mem_usage", "device_map", "safety_checker", "feature_extractor",
    "requires_safety_checker",
)  # fmt: skip
# Arguments of diffusers' `__call__` that are taken as long as they change nothing.
IDLE_CALL: dict[str, tuple[Any, ...]] = {
    "callback_on_step_end_tensor_inputs": (["latents"],),
    "guidance_rescale": (0,),
    "cross_attention_kwargs": (),
    "prompt_embeds": (),
    "negative_prompt_embeds": (),
    "ip_adapter_image": (),
    "timesteps": (),
    "sigmas": (),
    "padding_mask_crop": (),
}


def check_opening(options: Mapping[str, Any]) -> None:
    """Raise InputError unless these are arguments of diffusers' ``from_pretrained`` that have no effect here."""
    for name in options:
        if name not in IDLE_OPENING:
            raise InputError(f"from_pretrained has no argument {name}{closest(name, IDLE_OPENING)}")


def without_idle(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call that have an effect.

    Raises
    ------
    InputError
        One of them would change something in diffusers.
    """
    for name, idle in IDLE_CALL.items():
        value = options.get(name)
        if value is not None and not any(type(value) in {int, float, list} and value == one for one in idle):
            raise InputError(name=name, found=value, expected=" or ".join(map(repr, (*idle, None))))
    return {name: value for name, value in options.items() if name not in IDLE_CALL}


def closest(name: str, known: Collection[str]) -> str:
    """Return a hint at the known name that is most like this one, if any is."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
