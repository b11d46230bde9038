"""Working off an order: picture by picture, or batch by batch, to files."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import click

from .. import kernels
from ..kernels.machine.peak import measure_peak
from ..pictures.contact_sheet import contact_sheet
from ..pictures.files import open_picture
from ..recipes.png import check_output, save_png
from ..studio import Picture, Studio, batches
from ..tools import profile
from .plan import Job, Order
from .progress import Keeper, Previews, watch


class Maker:
    """Makes the remaining pictures of an order.

    Attributes
    ----------
    stages : mapping
        Seconds of each stage.
    """

    def __init__(self, studio: Studio, order: Order, keeper: Keeper, previews: Previews, profiled: bool) -> None:
        self.studio, self.order, self.keeper, self.previews = studio, order, keeper, previews
        self.profiled = profiled
        self.stages: defaultdict[str, float] = defaultdict(float)

    def check(self) -> None:
        """Check everything before kernels compile and hours of work begin.

        Raises
        ------
        InputError, ModelError
            A setting, a LoRA or a picture does not fit, or a file cannot be written.
        """
        for job in self.order.jobs:
            check_output(job.path)
        if self.order.settings["grid"]:
            check_output(self.order.settings["grid"])
        self.studio.check(self.order.jobs[self.keeper.done :])

    def make(self) -> None:
        """Make the pictures and the contact sheet; the first batch continues from the keeper's state."""
        jobs = self.order.jobs[self.keeper.done :]
        todo = list(batches(jobs, self.order.settings["batch_size"]))
        for number, batch in enumerate(todo, 1):
            counting: Any = profile.profile() if self.profiled else nullcontext({})
            label = "sampling" if len(todo) == 1 else f"sampling {number} of {len(todo)}"
            with kernels.reuse(), counting as rows:
                pictures = self._draw(batch, label, len(todo) - number + 1)
            start = time.perf_counter()
            for job, picture in zip(batch, pictures, strict=True):
                save_png(job.path, picture.image, None if self.order.settings["no_metadata"] else picture.text)
                click.echo(f"{job.path}  (seed {job.recipe.seed})")
            self.keeper.finish(len(batch))
            self.stages["save"] += time.perf_counter() - start
            if self.profiled:
                click.echo(profile.table(rows, measure_peak()), err=True)
        if self.order.settings["grid"]:
            self._save_sheet()

    def _draw(self, batch: Sequence[Job], label: str, runs: int) -> list[Picture]:
        """Make or continue the pictures of a batch; `runs` is the number of batches left, this one included."""
        start, state = time.perf_counter(), self.keeper.state
        self.previews.screen.leave()
        making = self.studio.make(batch, state)
        self.stages["load"] += time.perf_counter() - start

        def see(step: Any, expected: float) -> None:
            self.keeper.see(step, expected * runs)
            self.previews.see(step)

        start = time.perf_counter()
        sampling = watch(making.run, label, batch[0].recipe.num_inference_steps or 1, see)
        self.stages["text"] += time.perf_counter() - start - sampling
        self.stages["sampling"] += sampling
        click.echo("decoding", err=True)
        start = time.perf_counter()
        pictures = making.pictures()
        self.stages["decode"] += time.perf_counter() - start
        return pictures

    def _save_sheet(self) -> None:
        """Write the contact sheet: a row for each prompt if there are several, with several pictures each."""
        sheet, path = self.order.sheet, self.order.settings["grid"]
        rows = Counter(row for _, row in sheet)
        columns = max(rows.values()) if len(rows) > 1 and max(rows.values()) > 1 else None
        save_png(path, contact_sheet([open_picture(file) for file, _ in sheet], columns))
        click.echo(f"{path}  (contact sheet)")
