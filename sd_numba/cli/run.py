"""Working off an order: picture by picture, or batch by batch, to files."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import click
from PIL import Image

from .. import kernels
from ..kernels.machine.peak import measure_peak
from ..pictures.contact_sheet import contact_sheet
from ..pictures.files import open_picture
from ..pipeline import StableDiffusionPipeline, to_pil
from ..recipes.png import check_output, save_png
from ..tools import profile
from .canvas import lay_out
from .jobs import Job, alike, batches
from .loras import split_tags
from .plan import LoraSwitch, Order, infotext
from .progress import Keeper, Previews, watch

# Fields of a recipe that `StableDiffusionPipeline.generate` takes by the same name, for all pictures of a batch.
SHARED = (
    "width", "height", "num_inference_steps", "guidance_scale", "scheduler", "eta", "rng", "strength", "prompt_syntax",
    "clip_skip", "hires_scale", "hires_steps", "hires_strength", "cfg_interval", "cache", "tome",
)  # fmt: skip


class Maker:
    """Makes the pictures of an order that are left.

    Attributes
    ----------
    stages : mapping
        Seconds of each stage.
    """

    def __init__(
        self, pipe: StableDiffusionPipeline, order: Order, keeper: Keeper, previews: Previews, profiled: bool
    ) -> None:
        self.pipe, self.order, self.keeper, self.previews, self.profiled = pipe, order, keeper, previews, profiled
        self.loras = LoraSwitch(pipe)
        self.stages: defaultdict[str, float] = defaultdict(float)

    def check(self) -> None:
        """Find what is wrong before kernels compile and hours of work.

        Raises
        ------
        InputError, ModelError
            A setting, a LoRA or a picture does not fit, or a file cannot be written.
        """
        for job in self.order.jobs:
            check_output(job.path)
        if self.order.settings["grid"]:
            check_output(self.order.settings["grid"])
        jobs = self.order.jobs[self.keeper.done :]
        for loras in {job.loras: None for job in jobs}:
            self.loras.set(loras)
        for job in {alike(job): job for job in jobs}.values():
            self.pipe.generate(**self._arguments([job]))  # checks its arguments, and waits to be asked for steps

    def make(self) -> None:
        """Make the pictures, the first batch from the state that the keeper has of it, and the contact sheet."""
        jobs = self.order.jobs[self.keeper.done :]
        todo = list(batches(jobs, self.order.settings["batch_size"]))
        for number, batch in enumerate(todo, 1):
            self.stages["load"] += self.loras.set(batch[0].loras)
            counting: Any = profile.profile() if self.profiled else nullcontext({})
            label = "sampling" if len(todo) == 1 else f"sampling {number} of {len(todo)}"
            with kernels.reuse(), counting as rows:
                images = self._draw(batch, label, len(todo) - number + 1)
            start = time.perf_counter()
            for job, image in zip(batch, images, strict=True):
                save_png(job.path, image, None if self.order.settings["no_metadata"] else infotext(job.recipe))
                click.echo(f"{job.path}  (seed {job.recipe.seed})")
            self.keeper.finish(len(batch))
            self.stages["save"] += time.perf_counter() - start
            if self.profiled:
                click.echo(profile.table(rows, measure_peak()), err=True)
        if self.order.settings["grid"]:
            self._save_sheet()

    def _draw(self, batch: Sequence[Job], label: str, runs: int) -> list[Image.Image]:
        """Make the pictures of a batch, or go on with them; `runs` batches are left with this one."""
        start, state = time.perf_counter(), self.keeper.state
        recipe = batch[0].recipe
        self.pipe.vae_tiling = "on" if recipe.vae_tiling else "off"
        self.previews.screen.leave()
        steps = self.pipe.generate(**self._arguments(batch), state=state)

        def see(step: Any, expected: float) -> None:
            self.keeper.see(step, expected * runs)
            self.previews.see(step)

        latents, sampling = watch(steps, label, recipe.num_inference_steps or 1, see)
        if latents is None and state is not None:
            latents = state["x"]  # it was stopped after the last step
        self.stages["text"] += time.perf_counter() - start - sampling
        self.stages["sampling"] += sampling
        click.echo("decoding", err=True)
        start = time.perf_counter()
        canvas = lay_out(recipe, self.pipe)[1]
        images = [canvas.finish(picture) for picture in to_pil(self.pipe.decode(latents))]
        self.stages["decode"] += time.perf_counter() - start
        return images

    def _arguments(self, batch: Sequence[Job]) -> dict[str, Any]:
        """Return what `StableDiffusionPipeline.generate` takes for pictures that are made at the same time."""
        recipe = batch[0].recipe
        canvas = lay_out(recipe, self.pipe)[1]
        return {
            **{name: getattr(recipe, name) for name in SHARED},
            "prompt": [split_tags(job.recipe.prompt)[0] for job in batch],
            "negative_prompt": [job.recipe.negative_prompt for job in batch],
            "seed": [job.recipe.seed for job in batch],
            "image": canvas.picture,
            "mask_image": canvas.mask,
        }

    def _save_sheet(self) -> None:
        """Write the contact sheet: a row for each prompt if there are several, with several pictures each."""
        sheet, path = self.order.sheet, self.order.settings["grid"]
        rows = Counter(row for _, row in sheet)
        columns = max(rows.values()) if len(rows) > 1 and max(rows.values()) > 1 else None
        save_png(path, contact_sheet([open_picture(file) for file, _ in sheet], columns))
        click.echo(f"{path}  (contact sheet)")
