"""Test a text-to-image model of the emoji world, and let a judge score its pictures.

    python -m training.evaluate [--model MODEL] [--settings NAME] [--write FILE] [--grid FILE] [--failures FILE]
    python -m training.evaluate --compare MODEL MODEL
    python -m training.evaluate --check-judge

MODEL is a folder or file for `StableDiffusionPipeline.from_pretrained`, by default the embedded model. The prompts are
those of `held_out.py`, the marks those of `judge.py`, and the seed of a prompt is made of its text: two models, or
settings, draw the same prompts from the same noise. It needs sd-numba and the artwork (`training/data/art.npz`), no
other package. The settings:

default
    All prompts, with the defaults of the model.
sweep
    About 60 prompts of all categories, with many samplers, numbers of steps and CFG scales, one of them at a time
    unlike DPM++ 2M, 20 steps, CFG 4.
roll-call
    Every single thing by its usual name.
autoencoder
    Perfect pictures of all prompts, encoded and decoded by the model: the best fidelity that it could reach.

Two models are compared with DPM++ 2M, 20 steps, CFG 4: **the one that passes more prompts over all categories is
better; if they pass as many, the one with the higher mean fidelity over the prompts that both pass.** A difference of a
few prompts is chance: ``--seed`` gives other noise.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from sd_numba import SdNumbaError, StableDiffusionPipeline

from .art import Art
from .check_judge import check, perfect
from .held_out import Prompt, exam, roll_call, some_of_each
from .judge import Judge
from .references import References
from .report import Judged, Run, Setting, comparison_table, run_table, sweep_table
from .sheet import save_sheet

ART = Path(__file__).parent / "data" / "art.npz"
BATCH = 12
SWEEP_PROMPTS, GRID_PROMPTS = 60, 48
Report = tuple[str, list[Run]]  # Markdown, and the pictures that it is about
SETTINGS = ("default", "sweep", "roll-call", "autoencoder")
USUAL = Setting()
SWEEP = (
    *(replace(USUAL, guidance=guidance) for guidance in (2, 3, 4, 5, 7.5)),
    *(replace(USUAL, steps=steps) for steps in (8, 10, 12, 16, 30)),
    *(replace(USUAL, scheduler=name) for name in ("dpm++2m-karras", "dpm++2m-sde", "ddim", "euler", "euler-a")),
    *(replace(USUAL, scheduler=name) for name in ("pndm", "lms", "unipc")),
    replace(USUAL, scheduler="heun", steps=10),  # two network calls for each step
)


def ask(pipe: StableDiffusionPipeline, judge: Judge, prompts: Sequence[Prompt], setting: Setting, seed: int) -> Run:
    """Draw prompts with a model in one setting, and judge the pictures."""

    def draw(batch: Sequence[Prompt]) -> np.ndarray:
        return pipe(
            [prompt.text for prompt in batch],
            seed=[(zlib.crc32(prompt.text.encode()) + seed) % 2**32 for prompt in batch],
            num_inference_steps=setting.steps,
            guidance_scale=setting.guidance,
            scheduler=setting.scheduler,
            output_type="np",
        ).images

    return _run(str(setting), draw, judge, prompts)


def copy(pipe: StableDiffusionPipeline, judge: Judge, prompts: Sequence[Prompt]) -> Run:
    """Judge perfect pictures after a model's autoencoder, which gives an upper bound."""

    def draw(batch: Sequence[Prompt]) -> np.ndarray:
        pictures = np.stack([perfect(judge.references, prompt) for prompt in batch])
        decoded = pipe.vae.decode(pipe.vae.encode_distribution(pictures.transpose(0, 3, 1, 2) * 2 - 1)[0])
        return (decoded.transpose(0, 2, 3, 1) / 2 + 0.5).clip(0, 1)

    return _run("perfect pictures through the autoencoder", draw, judge, prompts)


def _run(title: str, draw: Callable[[Sequence[Prompt]], np.ndarray], judge: Judge, prompts: Sequence[Prompt]) -> Run:
    judged: list[Judged] = []
    seconds = 0.0
    with click.progressbar(length=len(prompts), label=title, show_pos=True, file=sys.stderr) as bar:
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            before = time.perf_counter()
            pictures = draw(batch)
            seconds += time.perf_counter() - before
            for prompt, picture in zip(batch, pictures, strict=True):
                judged.append(Judged(prompt, picture, judge(picture, prompt)))
            bar.update(len(batch))
    return Run(title, tuple(judged), seconds / len(prompts))


def exam_of_one(
    model: str | None, judge: Judge, prompts: Sequence[Prompt], settings: str, seed: int
) -> Iterator[Report]:
    """Examine one model; a sweep takes long, so it yields a report after each setting."""
    pipe = StableDiffusionPipeline.from_pretrained(model)
    if settings == "autoencoder":
        runs = [copy(pipe, judge, prompts)]
        yield run_table(runs[0]), runs
    elif settings == "sweep":
        runs = []
        for setting in SWEEP:
            runs.append(ask(pipe, judge, prompts, setting, seed))
            yield sweep_table(runs), runs
    else:
        defaults = pipe.defaults
        setting = Setting(pipe.scheduler_name(None), defaults["num_inference_steps"], defaults["guidance_scale"])
        runs = [ask(pipe, judge, prompts, setting, seed)]
        yield run_table(runs[0]), runs


def exam_of_two(models: tuple[str, str], judge: Judge, prompts: Sequence[Prompt], seed: int) -> Iterator[Report]:
    """Examine two models, and say which is better."""
    pipes = (StableDiffusionPipeline.from_pretrained(model) for model in models)
    runs = [ask(pipe, judge, prompts, USUAL, seed) for pipe in pipes]
    yield comparison_table(models, *runs), runs


def trial_of_judge(judge: Judge, prompts: Sequence[Prompt]) -> Iterator[Report]:
    """Examine the judge."""
    trial = check(judge, prompts)
    yield "\n".join((str(trial), *trial.mistakes)), []


def save_grid(path: Path, judged: Sequence[Judged]) -> None:
    """Write some pictures of each category, good or bad, with their prompts."""
    some = some_of_each(judged, GRID_PROMPTS)
    save_sheet(path, [one.picture for one in some], [(one.prompt.text,) for one in some])


def save_failures(path: Path, failures: Sequence[Judged]) -> None:
    """Write all pictures that failed, with their prompts and faults."""
    if failures:
        save_sheet(
            path, [one.picture for one in failures], [(one.prompt.text, *one.verdict.faults) for one in failures]
        )


@click.command(help=__doc__.partition("\n\n")[0])
@click.option("--model", help="Folder or file.  [default: the embedded model]")
@click.option("--settings", type=click.Choice(SETTINGS), default="default", show_default=True)
@click.option("--compare", nargs=2, metavar="MODEL MODEL", help="Two models in the same setting.")
@click.option("--check-judge", is_flag=True, help="Try the judge on painted pictures; no model.")
@click.option("--limit", type=int, help="How many of the prompts.")
@click.option("--seed", default=0, show_default=True, help="Other noise.")
@click.option("--art", default=ART, type=click.Path(exists=True, path_type=Path), help="The artwork.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the report to this file, too.")
@click.option("--grid", type=click.Path(path_type=Path), help="Write a sheet of pictures to this JPEG file.")
@click.option("--failures", type=click.Path(path_type=Path), help="Write a sheet of the failures to this JPEG file.")
def main(
    model: str | None,
    settings: str,
    compare: tuple[str, str] | None,
    check_judge: bool,
    limit: int | None,
    seed: int,
    art: Path,
    write: Path | None,
    grid: Path | None,
    failures: Path | None,
) -> None:
    """Run the command."""
    artwork = Art.load(art)
    judge = Judge(References(artwork))
    prompts = roll_call(artwork) if settings == "roll-call" else exam(artwork)
    if settings == "sweep":
        limit = limit or SWEEP_PROMPTS
    prompts = some_of_each(prompts, limit or len(prompts))

    if check_judge:
        reports = trial_of_judge(judge, prompts)
    elif compare:
        reports = exam_of_two(compare, judge, prompts, seed)
    else:
        reports = exam_of_one(model, judge, prompts, settings, seed)
    try:
        for report, runs in reports:  # noqa: B007
            if write:
                write.write_text(f"{report}\n", encoding="utf-8")
    except SdNumbaError as error:
        raise click.ClickException(str(error)) from None
    click.echo(report)
    if grid and runs:
        save_grid(grid, runs[-1].judged)
    if failures:
        save_failures(failures, [one for run in runs for one in run.failures])


if __name__ == "__main__":
    main()
