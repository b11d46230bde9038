"""A whole order of pictures: what to make, with which model; to be worked off, kept in a file, and gone on with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoints.opening import open_model
from ..checks import check_number
from ..errors import InputError, ModelError
from ..files.hashes import files_hash
from ..generation.request import HIRES_STRENGTH, MAX_SCALE
from ..pipeline import StableDiffusionPipeline
from ..recipes.a1111 import format_parameters
from ..recipes.infotext import recipe_to_parameters
from ..recipes.recipe import Recipe, with_spacing
from .canvas import lay_out
from .jobs import Job, check_inputs
from .loras import find_lora, find_tagged, named_embeddings, split_tags, split_weight

KIND = "sd-numba generate"  # of a state file
# Options, beside the recipes, that the rest of a run must find as they were.
KEPT = (
    "model", "vae", "taesd", "taesd_preview_only", "lora_dir", "embedding_dir", "precision", "weights", "vae_tiling",
    "batch_size", "no_metadata", "grid",
)  # fmt: skip


@dataclass(frozen=True)
class Order:
    """Pictures to make with one model.

    Attributes
    ----------
    settings : mapping
        The options of `KEPT`.
    jobs : tuple of Job
        To be done.
    sheet : tuple of (str, int)
        Files of all pictures for the contact sheet, those that were there already among them, and their rows.
    """

    settings: Mapping[str, Any]
    jobs: tuple[Job, ...]
    sheet: tuple[tuple[str, int], ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, as `json` writes it."""
        jobs = [
            {"recipe": job.recipe.to_json(), "path": str(job.path), "row": job.row, "loras": job.loras}
            for job in self.jobs
        ]
        return {"kind": KIND, "settings": dict(self.settings), "jobs": jobs, "sheet": self.sheet}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Order:
        """Make an order of what `to_json` gave.

        Raises
        ------
        InputError
            It is something else.
        """
        try:
            if values["kind"] != KIND:
                raise InputError(f"found the state of {values['kind']!r:.80}, expected that of {KIND}")
            jobs = tuple(
                Job(
                    Recipe.from_json(job["recipe"]),
                    Path(job["path"]),
                    int(job["row"]),
                    tuple((str(path), float(unet), float(text)) for path, unet, text in job["loras"]),
                )
                for job in values["jobs"]
            )
            sheet = tuple((str(path), int(row)) for path, row in values["sheet"])
            return cls({name: values["settings"][name] for name in KEPT}, jobs, sheet)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"found a state without {error}, expected one that was kept by {KIND}") from None


def check_files(jobs: Sequence[Job], pipe: StableDiffusionPipeline) -> None:
    """Raise InputError if the model, or a picture to start from, is not the one that the jobs were completed with."""
    for digest in {job.recipe.model_hash for job in jobs} - {None}:
        if digest != (found := files_hash(pipe.unet_files)):
            raise InputError(f"the model {pipe.name} has changed since (hash {found}, expected {digest})")
    for job in jobs:
        check_inputs(job.recipe)


def _decoding_taesd(settings: Mapping[str, Any]) -> str | None:
    """Return the tiny autoencoder that takes the place of the model's own."""
    return None if settings["taesd_preview_only"] else settings["taesd"]


def open_pipeline(settings: Mapping[str, Any], jobs: Sequence[Job]) -> StableDiffusionPipeline:
    """Open the model of an order, and the embeddings that its prompts name."""
    pipe = StableDiffusionPipeline.open(
        settings["model"], precision=settings["precision"], vae=settings["vae"], taesd=_decoding_taesd(settings)
    )
    pipe.vae_tiling = settings["vae_tiling"]
    texts = {text for job in jobs for text in (job.recipe.prompt, job.recipe.negative_prompt)}
    for word, path in named_embeddings(settings["embedding_dir"], texts).items():
        pipe.load_textual_inversion(path, token=word)
    return pipe


def complete(
    job: Job, pipe: StableDiffusionPipeline, settings: Mapping[str, Any], spacing: str | None, loras: Sequence[str]
) -> Job:
    """Put what the model and the files say in place of what a recipe leaves open.

    Parameters
    ----------
    spacing : str, optional
        Of the noise levels.
    loras : sequence of str
        Those of the option, as ``FILE:WEIGHT``.
    """
    recipe, _ = lay_out(job.recipe, pipe)
    prompt, found = recipe.prompt, []
    _, tagged = split_tags(prompt)
    for option in loras:
        name, weight = split_weight(option)
        path = find_lora(name, settings["lora_dir"])
        found.append((str(path), weight, weight))
        prompt += f" <lora:{path.name.removesuffix('.safetensors')}:{weight:g}>"
    for name, (unet, text) in tagged:
        found.append((str(find_tagged(name, settings["lora_dir"])), unet, text))
    scheduler = pipe.scheduler_name(recipe.scheduler)
    defaults = pipe.defaults
    steps, scale, hires_strength = recipe.num_inference_steps, recipe.guidance_scale, recipe.hires_strength
    if recipe.hires_scale is not None and hires_strength is None:
        hires_strength = HIRES_STRENGTH
    taesd = _decoding_taesd(settings)
    larger = check_number("hires_scale", recipe.hires_scale, 1, MAX_SCALE, 1)
    sides = (int((side or 0) * larger / pipe.vae.factor) for side in (recipe.height, recipe.width))
    embeddings = named_embeddings(settings["embedding_dir"], (prompt, recipe.negative_prompt))
    hashed = not settings["no_metadata"]
    recipe = replace(
        check_inputs(recipe),
        prompt=prompt,
        num_inference_steps=defaults["num_inference_steps"] if steps is None else steps,
        guidance_scale=defaults["guidance_scale"] if scale is None else scale,
        hires_strength=hires_strength,
        scheduler=scheduler if spacing is None else with_spacing(scheduler, spacing),
        precision=pipe.precision,
        model_name=pipe.name,
        model_hash=files_hash(pipe.unet_files) if hashed else None,
        vae=Path(settings["vae"]).name if settings["vae"] and not taesd else None,
        taesd=Path(taesd).name if taesd else None,
        lora_hashes=tuple((Path(path).stem, files_hash([Path(path)])) for path, _, _ in found if hashed),
        ti_hashes=tuple((word, files_hash([path])) for word, path in embeddings.items() if hashed),
        vae_tiling=pipe.tiled(*sides),
    )
    return replace(job, recipe=recipe, loras=tuple(found))


def infotext(recipe: Recipe) -> str:
    """The text that a picture gets."""
    return format_parameters(recipe_to_parameters(recipe, __version__))


def find_model(recipe: Recipe) -> str | None:
    """Return the model that a picture was made with, as ``--model`` takes it; None is the embedded one.

    Raises
    ------
    InputError
        It is not known where it is.
    """
    if recipe.model_hash is None:
        return None
    for name in (None, recipe.model_name):
        try:
            files = open_model(name).weights("unet").files
        except (InputError, ModelError):
            continue
        if files_hash(files) == recipe.model_hash:
            return name
    raise InputError(
        f"made with the model {recipe.model_name or 'without a name'} (hash {recipe.model_hash}), which was not found; "
        "give it with --model"
    )


class LoraSwitch:
    """Keeps the LoRAs of a pipeline those that the next picture wants."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        self.pipe = pipe
        self.loaded: tuple[tuple[str, float, float], ...] = ()

    def set(self, wanted: tuple[tuple[str, float, float], ...]) -> float:
        """Load these instead of what is loaded; returns the seconds that it took."""
        start = time.perf_counter()
        if wanted != self.loaded:
            if self.loaded:
                self.pipe.unload_lora_weights()
            for path, unet, text in wanted:
                self.pipe.load_lora_weights(path, unet, text_encoder_weight=text)
            self.loaded = wanted
        return time.perf_counter() - start
