"""``sd-numba generate``: from prompts, and pictures, to PNG files."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .. import kernels
from ..checkpoints.opening import open_taesd
from ..checks import check_whole
from ..errors import InputError, argument
from ..generation.model import PRODUCTS
from ..generation.state import load_state
from ..pictures.preview import Previewer
from ..recipes.infotext import recipe_text
from ..recipes.png import check_output, read_parameters
from ..recipes.recipe import Recipe
from ..studio import Studio, find_model
from .common import EXAMPLE, warm_up
from .options import GroupedCommand, generate_options
from .plan import KEPT, Job, Order, given_settings, opening_of, plan_jobs, settings_of_file
from .progress import Keeper, Previews
from .run import Maker
from .terminal import Screen

NO_PROMPT = f"""no prompt; say what to draw, for example:

  {EXAMPLE}
  sd-numba generate "a penguin holding an ice cream cone in the snow"
  sd-numba generate "three strawberries, twemoji style" --seed 7 -o strawberries.png

The model that comes with sd-numba draws things that have an emoji, in colours, numbers, places, scenes and styles.
Others draw anything: see "sd-numba download --help". "sd-numba generate --help" lists the options."""
MAX_BATCH_SIZE = 64
# Options for how to run and what to show, not for what to make; only these can be given with --resume.
HOW = {"threads", "preview", "preview_interval", "preview_path", "profile", "verbose", "resume"}
MAX_INTERVAL = 1_000_000  # steps from one preview to the next


@click.command(cls=GroupedCommand)
@generate_options
@click.pass_context
def generate(context: click.Context, /, **options: Any) -> None:
    """Make a picture from PROMPT and write it as PNG.

    Example: sd-numba generate "a red apple on a blue background" --steps 20 --seed 42 -o apple.png
    """
    kernels.set_threads(options["threads"])
    check_whole("preview_interval", options["preview_interval"], 1, MAX_INTERVAL)
    start = time.perf_counter()
    if options["resume"] is not None:
        order, studio, keeper = _kept(context, options["resume"])
    else:
        order, studio = _ordered(options)
        path = Path(options["state"] or f"{order.sheet[0][0]}.state")
        if path.exists():
            click.echo(f"Note: {path} holds an unfinished run; continue it with --resume {path}", err=True)
        keeper = Keeper(path, order, always=options["state"] is not None)
    maker = Maker(studio, order, keeper, _previews(studio, order.settings["taesd"], options), options["profile"])
    maker.check()
    _warn_about_size(order.jobs)
    maker.stages["load"] = time.perf_counter() - start
    warm_up(*PRODUCTS[studio.pipe.precision])
    start = time.perf_counter()
    studio.prepare()
    maker.stages["load"] += time.perf_counter() - start
    try:
        maker.make()
    except (KeyboardInterrupt, SystemExit) as stop:
        if not keeper.keep():
            raise
        advice = f"continue with: sd-numba generate --resume {shlex.quote(str(keeper.path))}"
        if isinstance(stop, KeyboardInterrupt):
            raise KeyboardInterrupt(advice) from None
        click.echo(f"\nstopped; {advice}", err=True)
        raise
    keeper.remove()
    if options["verbose"]:
        for stage, seconds in maker.stages.items():
            click.echo(f"{stage:<12}{seconds:8.2f} s", err=True)


def _kept(context: click.Context, file: str) -> tuple[Order, Studio, Keeper]:
    """Read the state of a stopped run: its order, its model and its progress."""
    for name in context.params:
        if name not in HOW and context.get_parameter_source(name) not in {ParameterSource.DEFAULT, None}:
            raise InputError(
                f"--resume: {argument(name)} cannot be given as well; the settings are those of the unfinished run"
            )
    state, about = load_state(file)
    try:
        order = Order.from_json(about)
        check_whole("done", about.get("done"), 0, len(order.jobs))
        studio = Studio(opening_of(order.settings))
        studio.check_files(order.jobs)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return order, studio, Keeper(Path(file), order, about["done"], always=True, state=state)


def _ordered(options: Mapping[str, Any]) -> tuple[Order, Studio]:
    """Work out which pictures the options ask for."""
    prompt = options["prompt"] if options["prompt"] is not None else options["prompt_option"]
    if options["prompt"] is not None and options["prompt_option"] is not None:
        raise click.UsageError("the prompt is given twice, as an argument and with -p; give it once")
    if prompt is not None and options["prompt_file"] is not None:
        raise click.UsageError("a prompt and --prompt-file exclude each other; give one of them")
    base, settings = None, {name: options[name] for name in KEPT}
    if options["from_file"] is not None:
        base = _again(options["from_file"], settings, options)
    elif prompt is None and options["prompt_file"] is None:
        raise click.UsageError(NO_PROMPT)
    settings["precision"] = settings["precision"] or (base.precision if base else "f32")
    settings["vae_tiling"] = settings["vae_tiling"] or ("auto" if base is None else "on" if base.vae_tiling else "off")
    check_whole("batch_size", settings["batch_size"], 1, MAX_BATCH_SIZE)
    given = given_settings(options)
    _check_spacing(options["spacing"], given)
    jobs = plan_jobs(base, given, prompt, options["prompt_file"], options["batch_count"], options["output"])
    studio = Studio(opening_of(settings))
    completed = tuple(
        studio.complete(job, spacing=options["spacing"], loras=options["loras"], hashed=not settings["no_metadata"])
        for job in jobs
    )
    if base is not None:
        _note_other_files(base, completed[0].recipe)
    sheet = tuple((str(job.path), job.row) for job in completed)
    if len(jobs) > 1 and not options["overwrite"] and not settings["no_metadata"]:
        completed = _without_those_there(completed)
    return Order(settings, completed, sheet), studio


def _again(file: str, settings: dict[str, Any], options: Mapping[str, Any]) -> Recipe:
    """Read how a picture was made, and choose its model."""
    base, notes = settings_of_file(file)
    for note in notes:
        if note.startswith("Sampler ") and options["scheduler"] is None:
            raise InputError(f"{file}: {note.replace('left out; choose', 'choose with --sampler')}")
        click.echo(f"Note: {file}: {note}", err=True)
    if settings["model"] is None:
        try:
            settings["model"] = find_model(base)
        except InputError as error:
            raise InputError(f"{file}: {error.text}") from None
    for name in ("vae", "taesd"):
        wanted = getattr(base, name)
        if wanted is not None and options[name] is None:
            raise InputError(f"{file}: made with the autoencoder {wanted}; give it with --{name}")
    return base


def _note_other_files(base: Recipe, recipe: Recipe) -> None:
    """Say which LoRAs and embeddings have changed since the picture was made."""
    now = dict(recipe.lora_hashes + recipe.ti_hashes)
    for name, digest in base.lora_hashes + base.ti_hashes:
        if name in now and len(digest) == len(now[name]) and digest != now[name]:
            click.echo(f"Note: {name} has changed since then (hash {digest}, now {now[name]})", err=True)


def _check_spacing(spacing: str | None, given: Mapping[str, Any]) -> None:
    """Raise InputError if a sampler's name and ``--scheduler`` ask for different spacings."""
    other = {"karras": "exponential", "exponential": "karras"}.get(spacing or "")
    if other and given.get("scheduler", "").endswith(f"-{other}"):
        raise InputError(
            f"{argument('spacing')} {spacing} and {argument('scheduler')} {given['scheduler']} "
            "ask for different spacings; choose one"
        )


def _without_those_there(jobs: Sequence[Job]) -> tuple[Job, ...]:
    """Leave out the pictures that already exist with the same settings."""
    rest = []
    for job in jobs:
        if job.path.is_file() and _says(job.path) == recipe_text(job.recipe):
            click.echo(f"{job.path}  exists already; --overwrite remakes it")
        else:
            rest.append(job)
    return tuple(rest)


def _says(path: Path) -> str | None:
    try:
        return read_parameters(path)
    except InputError:
        return None


def _previews(studio: Studio, taesd: str | None, options: Mapping[str, Any]) -> Previews:
    kind = options["preview"]
    if kind != "none":
        check_output(options["preview_path"])
    tiny = open_taesd(taesd) if kind == "tae" and taesd is not None else None
    previewer = Previewer(kind, studio.pipe.vae, tiny, studio.pipe.family.preview_factors)
    return Previews(previewer, options["preview_interval"], options["preview_path"], Screen(sys.stderr))


def _warn_about_size(jobs: Sequence[Job]) -> None:
    for size in sorted({side for job in jobs for side in (job.recipe.width, job.recipe.height) if side}):
        if size % 64:
            click.echo(f"Note: {size} pixels is not a multiple of 64; pictures may look worse.", err=True)
