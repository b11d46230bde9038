"""The pictures that a command line asks for, each with its recipe and its file."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checks import check_whole, resolve_seeds
from ..errors import InputError
from ..generation.settings import settings_of
from ..prompts.syntax import expand_variants
from ..recipes.a1111 import parse_parameters
from ..recipes.infotext import recipe_from_parameters
from ..recipes.png import read_parameters
from ..recipes.prompt_file import read_prompt_file
from ..recipes.recipe import Recipe
from ..studio import Opening, Task
from ..values import read_value

MAX_BATCH = 10_000  # far more than anyone waits for, far fewer than would exhaust memory
KIND = "sd-numba generate"  # of a state file
# Options besides the recipes that stay the same when a run is resumed.
KEPT = (
    "model", "vae", "taesd", "taesd_preview_only", "lora_dir", "embedding_dir", "precision", "weights", "vae_tiling",
    "batch_size", "no_metadata", "grid",
)  # fmt: skip


@dataclass(frozen=True)
class Job(Task):
    """A picture to make and to save.

    Attributes
    ----------
    recipe : Recipe
        With a seed.
    path : Path
        The file to write.
    row : int
        Number of its prompt, for contact sheets.
    """

    path: Path = field(kw_only=True)
    row: int = field(kw_only=True)


@dataclass(frozen=True)
class Order:
    """Pictures to make with one model.

    Attributes
    ----------
    settings : mapping
        The options of `KEPT`.
    jobs : tuple of Job
        Pictures to make.
    sheet : tuple of (str, int)
        Files of all pictures for the contact sheet, including those that existed already, and their rows.
    """

    settings: Mapping[str, Any]
    jobs: tuple[Job, ...]
    sheet: tuple[tuple[str, int], ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything, as `json` writes it."""
        jobs = [
            {"recipe": job.recipe.to_json(), "path": str(job.path), "row": job.row, "loras": job.loras}
            for job in self.jobs
        ]
        return {"kind": KIND, "settings": dict(self.settings), "jobs": jobs, "sheet": self.sheet}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Order:
        """Make an order from the result of `to_json`.

        Raises
        ------
        InputError
            The values are not an order.
        """
        try:
            if values["kind"] != KIND:
                raise InputError(f"the state was written by {values['kind']!r:.80}, not by {KIND}")
            jobs = tuple(
                Job(
                    Recipe.from_json(job["recipe"]),
                    tuple((str(path), float(unet), float(text)) for path, unet, text in job["loras"]),
                    path=Path(job["path"]),
                    row=int(job["row"]),
                )
                for job in values["jobs"]
            )
            sheet = tuple((str(path), int(row)) for path, row in values["sheet"])
            return cls({name: values["settings"][name] for name in KEPT}, jobs, sheet)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise InputError(f"not a state that {KIND} can continue: {reason}") from None


def opening_of(settings: Mapping[str, Any]) -> Opening:
    """Return which model the options of `KEPT` ask for."""
    taesd = None if settings["taesd_preview_only"] else settings["taesd"]
    names = ("model", "vae", "precision", "weights", "vae_tiling", "lora_dir", "embedding_dir")
    return Opening(taesd=taesd, **{name: settings[name] for name in names})


def settings_of_file(path: str) -> tuple[Recipe, list[str]]:
    """Read how the picture in a file was made; also return notes on what is not supported.

    Raises
    ------
    InputError
        The file does not say.
    """
    text = read_parameters(path)
    if text is None:
        raise InputError(f"{path}: does not say how it was made; expected a picture of sd-numba or AUTOMATIC1111")
    return recipe_from_parameters(parse_parameters(text))


def plan_jobs(
    base: Recipe | None, given: Mapping[str, Any], prompt: str | None, prompt_file: str | None, count: int, pattern: str
) -> list[Job]:
    """List the pictures: for each prompt of the file or the option, each of its variants, `count` times.

    Variants share their seeds, so that they can be compared; so do the lines of a file if a seed is given.

    Parameters
    ----------
    base : Recipe, optional
        The recipe that the others change.
    given : mapping
        Fields of a recipe that options set; those in a prompt file's lines override them.
    prompt : str, optional
    prompt_file : str, optional
    count : int
        Pictures of each variant; seeds count up.
    pattern : str
        Pattern of the file names, as for `output_paths`.

    Raises
    ------
    InputError
        There are too many pictures, or a setting is wrong.
    """
    check_whole("batch_count", count, 1, MAX_BATCH)
    rows: list[dict[str, Any]] = [{}] if prompt is None else [{"prompt": prompt}]
    if prompt_file is not None:
        rows = read_prompt_file(prompt_file)
    recipes: list[tuple[Recipe, str | None, int]] = []
    number = 0
    for row in rows:
        fields = {**given, **row}
        output = fields.pop("output", None)
        recipe = replace(base or Recipe(""), **fields)
        literal = "prompt" not in fields or recipe.prompt_syntax == "plain"  # `base` is already one variant
        texts = [recipe.prompt] if literal else expand_variants(recipe.prompt)
        first = secrets.randbelow(2**32 - count) if recipe.seed is None else recipe.seed
        if len(recipes) + len(texts) * count > MAX_BATCH:
            raise InputError(f"more than {MAX_BATCH:,} pictures; ask for fewer, or split the prompt file")
        for text in texts:
            number += 1
            for seed in resolve_seeds(first, count):
                recipes.append((replace(recipe, prompt=text, seed=seed), output, number))
    paths = output_paths(pattern, [recipe.seed or 0 for recipe, _, _ in recipes])
    jobs = [
        Job(recipe, path=path if output is None else Path(output), row=row)
        for (recipe, output, row), path in zip(recipes, paths, strict=True)
    ]
    _check_names(jobs)
    return jobs


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe that options set, counted as in Python.

    Raises
    ------
    InputError
        A value cannot be read.
    """
    given: dict[str, Any] = {}
    for name, about in settings_of(Recipe).items():
        if not about.flags or options.get(name) is None:
            continue
        value = options[name]
        if about.offset:
            value -= about.offset
            about.kind.check(name, value)
        given[name] = read_value(name, value, about.kind.read)
    for name, noted in (("image", "image_hash"), ("mask_image", "mask_hash")):
        if name in given:
            given[noted] = None
    return given


def output_paths(pattern: str, seeds: Sequence[int]) -> list[Path]:
    """Return a file for each seed: ``{seed}``, ``{n}`` and ``%03d`` are replaced, or a number is added for several.

    Raises
    ------
    InputError
        If the pattern is empty.
    """
    if not pattern:
        raise InputError(name="output", found=pattern, expected="the name of a file, such as output.png")
    number = r"%\d{0,2}d"
    varied = re.search(number, pattern) or "{n}" in pattern or ("{seed}" in pattern and len(set(seeds)) == len(seeds))
    if len(seeds) > 1 and not varied:
        path = Path(pattern)
        pattern = str(path.with_name(f"{path.stem}-%03d{path.suffix}"))
    paths = []
    for index, seed in enumerate(seeds, 1):
        name = pattern.replace("{seed}", str(seed)).replace("{n}", str(index))
        paths.append(Path(re.sub(number, lambda match: match[0] % index, name)))  # noqa: B023
    return paths


def _check_names(jobs: Sequence[Job]) -> None:
    seen: set[Path] = set()
    for job in jobs:
        if job.path in seen:
            raise InputError(f"output: two pictures have the same file name {job.path}; give them different ones")
        seen.add(job.path)
