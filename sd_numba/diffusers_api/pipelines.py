"""The pipeline by the names, and with the methods, that scripts written for diffusers use.

The classes differ only in which arguments may follow the prompt without names, in the default size, and in whether
pixels outside a mask are pasted back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar, overload

import numpy as np

from ..errors import InputError
from ..generation.run import Generation
from ..pipeline import Pipeline, PipelineOutput, no_steps
from ..samplers import config_with_sampler
from .ignored import check_opening, without_idle
from .schedulers import SCHEDULERS, Scheduler, SchedulerConfig

log = logging.getLogger(__name__)

P = TypeVar("P", bound="StableDiffusionPipeline")
Callback = Callable[..., Mapping[str, Any] | None]


class StableDiffusionPipeline(Pipeline):
    """Text to image, image to image and inpainting with a model of the Stable Diffusion 1.x and 2.x families.

    Methods that would spare the memory of a GPU, or move networks to one, do nothing.

    Examples
    --------
    >>> from sd_numba import StableDiffusionPipeline
    >>> pipe = StableDiffusionPipeline.from_pretrained()
    >>> out = pipe("a red apple on a blue background", num_inference_steps=20, guidance_scale=4, seed=42)
    >>> out.images[0].save("apple.png")
    """

    positional: ClassVar[tuple[str, ...]] = ("height", "width", "num_inference_steps")
    """Arguments of a call that may follow the prompt without their names."""
    paste_back: ClassVar[bool] = True
    """Whether pixels outside a mask are copied from the picture, unless a call says otherwise."""
    _interrupt = False  # set by callbacks to end the run with the latents there are, as in diffusers

    device = "cpu"
    dtype = np.dtype(np.float32)
    safety_checker = None

    @classmethod
    def from_pretrained(
        cls: type[P],
        model: str | os.PathLike[str] | None = None,
        *,
        precision: str = "f32",
        weights: str = "auto",
        vae: str | os.PathLike[str] | None = None,
        taesd: str | os.PathLike[str] | None = None,
        vae_tiling: str = "auto",
        lora_dir: str | os.PathLike[str] | None = None,
        embedding_dir: str | os.PathLike[str] | None = None,
        scheduler: Scheduler | None = None,
        **idle: Any,
    ) -> P:
        """Open a model; see `sd_numba.pipeline.Pipeline.from_pretrained` for most arguments.

        Parameters
        ----------
        scheduler : Scheduler, optional
            What to sample with by default, instead of the model's own.
        **idle
            Other arguments of diffusers, which have no effect: `sd_numba.diffusers_api.ignored.IDLE_OPENING`.

        Raises
        ------
        ModelError
            If files are missing, damaged, or of another kind of model.
        InputError
            If an argument is unknown or cannot be used.
        """
        check_opening(idle)
        pipe = super().from_pretrained(
            model,
            precision=precision,
            weights=weights,
            vae=vae,
            taesd=taesd,
            vae_tiling=vae_tiling,
            lora_dir=lora_dir,
            embedding_dir=embedding_dir,
        )
        if scheduler is not None:
            pipe.scheduler = scheduler
        return pipe

    from_single_file = from_pretrained

    @overload
    def __call__(
        self, prompt: str | Sequence[str], *more: Any, return_dict: Literal[True] = True, **options: Any
    ) -> PipelineOutput: ...

    @overload
    def __call__(
        self, prompt: str | Sequence[str], *more: Any, return_dict: Literal[False], **options: Any
    ) -> tuple[Any, None]: ...

    def __call__(
        self,
        prompt: str | Sequence[str],
        *more: Any,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        paste_back: bool | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        **options: Any,
    ) -> PipelineOutput | tuple[Any, None]:
        """Make pictures.

        Parameters
        ----------
        prompt : str or list of str
        *more
            The arguments that `positional` names.
        num_images_per_prompt : int
            Pictures of each prompt.
        output_type : {"pil", "np", "latent"}
            PIL images; float32 ``(b, h, w, 3)`` in [0, 1]; or the sampler's last latents, float32
            ``(b, 4, h/8, w/8)``, still scaled.
        paste_back : bool, optional
            Whether to copy pixels outside `mask_image` from `image`. By default yes, except in the pipeline for
            inpainting, which does as diffusers.
        return_dict : bool
            False returns ``(images, None)``.
        callback_on_step_end : callable, optional
            Called after each call of the network as ``callback(pipe, index, timestep, {"latents": latents})``. If it
            returns a mapping, the run continues with its ``latents``. If it sets ``pipe._interrupt``, the run ends.
        **options
            Arguments of `generate`, and arguments of diffusers in `sd_numba.diffusers_api.ignored.IDLE_CALL` as long
            as they change nothing.

        Returns
        -------
        PipelineOutput

        Raises
        ------
        InputError
            If an argument cannot be used.
        ModelError
            If a network returns NaN.
        """
        options = without_idle({**self._named(more, options), **options})
        out = self._make(
            prompt,
            num_images_per_prompt,
            output_type,
            self.paste_back if paste_back is None else paste_back,
            options,
            lambda run: self._run_steps(run, callback_on_step_end),
        )
        return out if return_dict else (out.images, None)

    def _named(self, more: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Name the arguments that follow the prompt without names."""
        names, known = self.positional[: len(more)], " and ".join(self.positional)
        if len(more) > len(names) or any(name in options for name in names):
            raise InputError(f"found {len(more)} arguments after the prompt without names, expected at most {known}")
        return dict(zip(names, more, strict=True))

    def _run_steps(self, run: Generation, callback: Callback | None) -> float:
        """Make all steps, or those until the callback interrupts; returns the seconds that they took."""
        self._interrupt = False
        step, seconds = next(run, None), 0.0
        if step is None:
            raise no_steps()
        while True:
            sent, seconds = None, seconds + step.seconds
            if callback is not None:
                changed = callback(self, step.index, step.timestep, {"latents": step.latents})
                if changed and changed.get("latents", step.latents) is not step.latents:
                    sent = run.latents = np.asarray(changed["latents"], np.float32)
            try:
                if self._interrupt:
                    return seconds
                step = run.send(sent)
            except StopIteration:
                return seconds

    def to(self, *devices: Any, **named: Any) -> Any:
        """Return the pipeline itself: everything is computed on the CPU, in the precision it was opened with."""
        for device in (*devices, *named.values()):
            if not str(device).startswith("cpu"):
                log.info("to %s: stays on the CPU, in %s", device, self.precision)
        return self

    @property
    def scheduler(self) -> Scheduler:
        """The sampler that runs by default, with its settings; assign another one to change both."""
        name, config = self.defaults["scheduler"], self.scheduler_config
        if name is not None:
            return SCHEDULERS[(config := config_with_sampler(name, config))["_class_name"]].from_config(config)
        own = Scheduler.__new__(Scheduler)  # the model's own, which is not supported; others can be made of its config
        own.config = SchedulerConfig(config)
        return own

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        if not isinstance(scheduler, Scheduler):
            raise InputError(
                f"scheduler: found {type(scheduler).__name__}, expected a scheduler of sd_numba, such as "
                "EulerDiscreteScheduler.from_config(pipe.scheduler.config)"
            )
        self.defaults = {**self.defaults, "scheduler": scheduler.sampler}
        self.scheduler_config = dict(scheduler.config)

    def enable_vae_tiling(self) -> None:
        """Decode in strips, however much memory there is."""
        self.vae_tiling = "on"

    def disable_vae_tiling(self) -> None:
        """Decode in strips only if memory would be short."""
        self.vae_tiling = "auto"

    def fuse_lora(self, *, lora_scale: float = 1.0, **options: Any) -> None:
        """Do nothing: LoRAs are in effect once they are loaded."""
        if lora_scale != 1:
            raise InputError(
                f"lora_scale: found {lora_scale!r}, expected 1; set it with load_lora_weights(path, weight)"
            )

    def _idle(self, *arguments: Any, **named: Any) -> None:
        """Do nothing: there is no GPU memory to save, and no progress bar."""

    enable_attention_slicing = disable_attention_slicing = _idle
    enable_vae_slicing = disable_vae_slicing = _idle
    enable_model_cpu_offload = enable_sequential_cpu_offload = _idle
    enable_xformers_memory_efficient_attention = disable_xformers_memory_efficient_attention = _idle
    set_progress_bar_config = _idle


class StableDiffusionImg2ImgPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline`, called as ``pipe(prompt, image, strength)``."""

    positional = ("image", "strength", "num_inference_steps")


class StableDiffusionInpaintPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline`, called as ``pipe(prompt, image, mask_image)``.

    As in diffusers, pictures have the size that the model was made for unless ``height`` and ``width`` say otherwise,
    and pixels outside the mask are what the autoencoder makes of them unless ``paste_back=True``.
    """

    positional = ("image", "mask_image")
    paste_back = False

    def generate(
        self, prompt: str | Sequence[str], *, height: int | None = None, width: int | None = None, **options: Any
    ) -> Generation:
        """Do what `StableDiffusionPipeline.generate` does."""
        own = self.default_size
        height, width = own[0] if height is None else height, own[1] if width is None else width
        return super().generate(prompt, height=height, width=width, **options)


DiffusionPipeline = AutoPipelineForText2Image = StableDiffusionPipeline
AutoPipelineForImage2Image = StableDiffusionImg2ImgPipeline
AutoPipelineForInpainting = StableDiffusionInpaintPipeline
