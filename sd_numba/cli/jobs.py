"""What a command line asks for: the pictures to make, one by one, each with its recipe and its file."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checks import check_whole, resolve_seeds
from ..errors import InputError
from ..files.hashes import files_hash
from ..prompts.encoding import expand_variants
from ..recipes.a1111 import parse_parameters
from ..recipes.infotext import recipe_from_parameters
from ..recipes.png import read_parameters
from ..recipes.prompt_file import read_prompt_file
from ..recipes.recipe import Recipe

MAX_BATCH = 10_000  # far more than anyone waits for, far fewer than would exhaust memory


@dataclass(frozen=True)
class Job:
    """A picture to make.

    Attributes
    ----------
    recipe : Recipe
        With a seed.
    path : Path
        The file to write.
    row : int
        Number of the prompt that it belongs to, for contact sheets.
    loras : tuple of (str, float, float)
        Files, and their weights in the UNet and in the text encoder.
    """

    recipe: Recipe
    path: Path
    row: int
    loras: tuple[tuple[str, float, float], ...] = ()


def settings_of_file(path: str) -> tuple[Recipe, list[str]]:
    """Read how the picture in a file was made; returns what is not supported, too.

    Raises
    ------
    InputError
        It does not say.
    """
    text = read_parameters(path)
    if text is None:
        raise InputError(f"{path}: does not say how it was made; expected a picture of sd-numba or AUTOMATIC1111")
    return recipe_from_parameters(parse_parameters(text))


def plan_jobs(
    base: Recipe | None, given: Mapping[str, Any], prompt: str | None, prompt_file: str | None, count: int, pattern: str
) -> list[Job]:
    """List the pictures: for each prompt of the file or the option, each of its variants, as many as asked for.

    Variants share their seeds, so that they can be compared; so do the lines of a file if a seed is given.

    Parameters
    ----------
    base : Recipe, optional
        What the others change.
    given : mapping
        Fields of a recipe that options set. Those in a prompt file's lines take their place.
    prompt : str, optional
    prompt_file : str, optional
    count : int
        Pictures of each variant, with seeds counted on.
    pattern : str
        Of names, as for `output_paths`.

    Raises
    ------
    InputError
        Too many, or a setting is wrong.
    """
    check_whole("batch-count", count, 1, MAX_BATCH)
    rows: list[dict[str, Any]] = [{}] if prompt is None else [{"prompt": prompt}]
    if prompt_file is not None:
        rows = read_prompt_file(prompt_file)
    recipes: list[tuple[Recipe, str | None, int]] = []
    number = 0
    for row in rows:
        fields = {**given, **row}
        output = fields.pop("output", None)
        recipe = replace(base or Recipe(""), **fields)
        literal = "prompt" not in fields or recipe.prompt_syntax == "plain"  # that of `base` is one of the variants
        texts = [recipe.prompt] if literal else expand_variants(recipe.prompt)
        first = secrets.randbelow(2**32 - count) if recipe.seed is None else recipe.seed
        if len(recipes) + len(texts) * count > MAX_BATCH:
            raise InputError(f"found more than {MAX_BATCH} pictures to make, expected fewer; split the prompt file")
        for text in texts:
            number += 1
            for seed in resolve_seeds(first, count):
                recipes.append((replace(recipe, prompt=text, seed=seed), output, number))
    paths = output_paths(pattern, [recipe.seed or 0 for recipe, _, _ in recipes])
    jobs = [
        Job(recipe, path if output is None else Path(output), row)
        for (recipe, output, row), path in zip(recipes, paths, strict=True)
    ]
    _check_names(jobs)
    return jobs


def skipped_layers(clip_skip: int) -> int:
    """Return how many layers are left out: users count from 1, for none."""
    if clip_skip < 1:
        raise InputError(f"clip-skip: found {clip_skip}, expected 1 (nothing is left out) or more")
    return clip_skip - 1


def output_paths(pattern: str, seeds: Sequence[int]) -> list[Path]:
    """Return a file for each seed: ``{seed}``, ``{n}`` and ``%03d`` are replaced, or a number is added for several.

    Raises
    ------
    InputError
        If the pattern is empty.
    """
    if not pattern:
        raise InputError("output: found nothing, expected the name of a file, such as output.png")
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
            raise InputError(f"output: found {job.path} for two pictures, expected different names")
        seen.add(job.path)


def batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Put pictures together that can be made at the same time: their recipes differ in prompts and seeds alone."""
    batch: list[Job] = []
    for job in jobs:
        if batch and (len(batch) == size or alike(batch[0]) != alike(job)):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def alike(job: Job) -> tuple[object, Recipe]:
    """Return what pictures that are made at the same time have in common."""
    return job.loras, replace(job.recipe, prompt="", negative_prompt="", seed=0)


def check_inputs(recipe: Recipe) -> Recipe:
    """Note the hashes of the pictures that a recipe starts from, or compare them.

    Raises
    ------
    InputError
        One is not there, or not the one that the recipe was made with.
    """
    hashes: dict[str, Any] = {}
    for name, noted in (("init_image", "init_hash"), ("mask_image", "mask_hash")):
        path, known = getattr(recipe, name), getattr(recipe, noted)
        if path is None:
            continue
        found = files_hash([Path(path)])
        if known is not None and known != found:
            raise InputError(f"{path}: has changed since (hash {found}, expected {known}); give the picture again")
        hashes[noted] = found
    return replace(recipe, **hashes)
