"""From recipes to pictures with their texts: what the command line shows, and programs can call.

A `Studio` opens a model, fills in what recipes leave open, and makes pictures. It prints nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from .checkpoints.finding import find_lora, find_tagged, named_embeddings
from .checkpoints.opening import open_model
from .checks import check_number
from .errors import InputError, ModelError, argument
from .files.hashes import files_hash
from .generation.model import Lora
from .generation.run import Generation
from .generation.settings import HIRES_STRENGTH, MAX_SCALE, RECIPE_STRENGTH, Settings
from .pictures.canvas import Canvas, lay_out
from .pictures.files import open_mask, open_picture
from .pipeline import Pipeline
from .prompts.tags import split_tags, split_weight
from .recipes.infotext import recipe_text
from .recipes.recipe import Recipe, with_spacing

T = TypeVar("T", bound="Task")


@dataclass(frozen=True)
class Opening:
    """Which model to open, and how; see `sd_numba.pipeline.Pipeline.from_pretrained`."""

    model: str | None = None
    vae: str | None = None
    taesd: str | None = None
    precision: str = "f32"
    weights: str = "auto"
    vae_tiling: str = "auto"
    lora_dir: str | None = None
    embedding_dir: str | None = None


@dataclass(frozen=True)
class Task:
    """A picture to make.

    Attributes
    ----------
    recipe : Recipe
    loras : tuple of (str, float, float)
        Files, and their weights in the UNet and in the text encoder.
    """

    recipe: Recipe
    loras: tuple[Lora, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A picture, the recipe it was made from, and the text for its file."""

    image: Image.Image
    recipe: Recipe
    text: str


class Studio:
    """Makes pictures from recipes.

    Parameters
    ----------
    opening : Opening
        The model.

    Attributes
    ----------
    pipe : Pipeline
        The open model.

    Raises
    ------
    ModelError, InputError
        The model cannot be opened.

    Examples
    --------
    >>> from sd_numba.recipes.recipe import Recipe
    >>> from sd_numba.studio import Studio, Task
    >>> studio = Studio()
    >>> making = studio.make([studio.complete(Task(Recipe("a fox in the snow", seed=42)))])
    >>> for step in making.run:
    ...     print(step.index + 1, "of", step.total)
    >>> picture = making.pictures()[0]  # .image and .text
    """

    def __init__(self, opening: Opening = Opening()) -> None:  # frozen
        self._canvas: tuple[object, Canvas] = (None, Canvas())
        self.open(opening)

    def open(self, opening: Opening) -> None:
        """Open another model; nothing happens if it is open already.

        Raises
        ------
        ModelError, InputError
            The model cannot be opened.
        """
        if getattr(self, "opening", None) == opening:
            return
        self.pipe = Pipeline.open(opening.model, precision=opening.precision, vae=opening.vae, taesd=opening.taesd)
        self.pipe.vae_tiling = opening.vae_tiling
        self.pipe.embedding_dir = opening.embedding_dir
        self.opening, self._prepared = opening, False

    def prepare(self) -> None:
        """Pack weights as the opening says. It runs compiled kernels."""
        if not self._prepared:
            self.pipe.prepare(self.opening.weights)
            self._prepared = True

    def complete(self, task: T, *, spacing: str | None = None, loras: Sequence[str] = (), hashed: bool = True) -> T:
        """Fill a recipe's unset fields from the model and its files.

        Parameters
        ----------
        task : Task
            With the recipe.
        spacing : str, optional
            Spacing of the noise levels: see `sd_numba.recipes.recipe.with_spacing`.
        loras : sequence of str
            LoRAs to add, as ``FILE:WEIGHT``; they are added to the prompt as tags.
        hashed : bool
            Whether to compute the hashes of the model, the LoRAs and the embeddings.

        Raises
        ------
        InputError, ModelError
            A setting, a LoRA or a picture does not fit.
        """
        pipe, opening = self.pipe, self.opening
        recipe = self._sized(task.recipe)
        prompt, found = self._with_loras(recipe.prompt, loras)
        embeddings = named_embeddings(opening.embedding_dir, (prompt, recipe.negative_prompt))
        scheduler = pipe.scheduler_name(recipe.scheduler)
        steps, scale, hires_strength = recipe.num_inference_steps, recipe.guidance_scale, recipe.hires_strength
        if recipe.hires_scale is not None and hires_strength is None:
            hires_strength = HIRES_STRENGTH
        larger = 1.0 if recipe.hires_scale is None else check_number("hires_scale", recipe.hires_scale, 1, MAX_SCALE)
        sides = (int((side or 0) * larger / pipe.vae.factor) for side in (recipe.height, recipe.width))
        recipe = replace(
            with_input_hashes(recipe),
            prompt=prompt,
            num_inference_steps=pipe.defaults["num_inference_steps"] if steps is None else steps,
            guidance_scale=pipe.defaults["guidance_scale"] if scale is None else scale,
            hires_strength=hires_strength,
            scheduler=scheduler if spacing is None else with_spacing(scheduler, spacing),
            precision=pipe.precision,
            model_name=pipe.name,
            model_hash=files_hash(pipe.unet_files) if hashed else None,
            vae=Path(opening.vae).name if opening.vae and not opening.taesd else None,
            taesd=Path(opening.taesd).name if opening.taesd else None,
            lora_hashes=tuple((Path(path).stem, files_hash([Path(path)])) for path, _, _ in found if hashed),
            ti_hashes=tuple((word, files_hash([path])) for word, path in embeddings.items() if hashed),
            vae_tiling=pipe.tiled(*sides),
        )
        return replace(task, recipe=recipe, loras=found)

    def check(self, tasks: Sequence[Task]) -> None:
        """Find what is wrong with the settings before kernels compile and hours of work begin.

        Raises
        ------
        InputError, ModelError
            A setting, a LoRA or a picture does not fit.
        """
        self._name_embeddings(tasks)
        for loras in {task.loras: None for task in tasks}:
            self.pipe.set_loras(loras)
        for task in {alike(task): task for task in tasks}.values():
            self._run([task], None)  # checks its settings, and waits to be asked for steps

    def check_files(self, tasks: Sequence[Task]) -> None:
        """Raise InputError if the model, or a picture to start from, is not the one that the recipes are for."""
        for digest in {task.recipe.model_hash for task in tasks} - {None}:
            if digest != (found := files_hash(self.pipe.unet_files)):
                raise InputError(f"the model {self.pipe.name} has changed since (hash {found}, expected {digest})")
        for task in tasks:
            with_input_hashes(task.recipe)

    def make(self, tasks: Sequence[Task], state: Any = None) -> Making:
        """Begin pictures that are made at the same time, or continue with them.

        Parameters
        ----------
        tasks : sequence of Task
            Completed, and `alike`.
        state : mapping, optional
            The state of a `Step` of the same pictures, to continue after it.

        Raises
        ------
        InputError, ModelError
            A setting, a LoRA or a picture does not fit.
        """
        self.prepare()
        self._name_embeddings(tasks)
        self.pipe.set_loras(tasks[0].loras)
        self.pipe.vae_tiling = "on" if tasks[0].recipe.vae_tiling else "off"
        return Making(self._run(tasks, state), tuple(task.recipe for task in tasks))

    def _run(self, tasks: Sequence[Task], state: Any) -> Generation:
        recipe = tasks[0].recipe
        canvas = self._lay_out(recipe)
        values = {one.name: getattr(recipe, one.name) for one in fields(Settings)}
        values |= {
            "prompt": [split_tags(task.recipe.prompt)[0] for task in tasks],
            "negative_prompt": [task.recipe.negative_prompt for task in tasks],
            "seed": [task.recipe.seed for task in tasks],
            "image": canvas.picture,
            "mask_image": canvas.mask,
            "expand": None,
        }
        return self.pipe.run(Settings(**values), state=state)

    def _name_embeddings(self, tasks: Sequence[Task]) -> None:
        """Load the embeddings that prompts name."""
        texts = {text for task in tasks for text in (task.recipe.prompt, task.recipe.negative_prompt)}
        self.pipe.load_named_embeddings(texts)

    def _with_loras(self, prompt: str, added: Sequence[str]) -> tuple[str, tuple[Lora, ...]]:
        """Return a prompt with tags of the LoRAs that are added, and all its LoRAs."""
        _, tagged = split_tags(prompt)
        found: list[Lora] = []
        for option in added:
            name, weight = split_weight(option)
            path = find_lora(name, self.opening.lora_dir)
            found.append((str(path), weight, weight))
            prompt += f" <lora:{path.name.removesuffix('.safetensors')}:{weight:g}>"
        found += [(str(find_tagged(name, self.opening.lora_dir)), unet, text) for name, (unet, text) in tagged]
        return prompt, tuple(found)

    def _sized(self, recipe: Recipe) -> Recipe:
        """Fill in the size, and the strength if there is a picture."""
        if recipe.image is None:
            for name in ("mask_image", "strength", "expand"):
                if getattr(recipe, name) is not None:
                    raise InputError(f"{argument(name)} needs {argument('image')} as well", name=name)
            height, width = self.pipe.default_size
            width = width if recipe.width is None else recipe.width
            height = height if recipe.height is None else recipe.height
            return replace(recipe, width=width, height=height)
        picture = self._lay_out(recipe).picture
        assert picture is not None
        strength = RECIPE_STRENGTH if recipe.strength is None else recipe.strength
        return replace(recipe, width=picture.width, height=picture.height, strength=strength)

    def _lay_out(self, recipe: Recipe) -> Canvas:
        """Open the pictures of a recipe at the size to work at; the last ones are kept for recipes that share them."""
        if recipe.image is None:
            return Canvas()
        paths = [path for path in (recipe.image, recipe.mask_image) if path is not None]
        key = (recipe.image, recipe.mask_image, recipe.expand, recipe.height, recipe.width, *map(_stamp, paths))
        if self._canvas[0] != key:
            Settings("", expand=recipe.expand).check()
            mask = None if recipe.mask_image is None else open_mask(recipe.mask_image)
            canvas = lay_out(
                open_picture(recipe.image),
                mask,
                borders=recipe.expand,
                height=recipe.height,
                width=recipe.width,
                own_size=self.pipe.default_size,
                factor=self.pipe.vae.factor,
            )
            self._canvas = key, canvas
        return self._canvas[1]


class Making:
    """Pictures in the making.

    Attributes
    ----------
    run : Generation
        An iterator over the steps.
    recipes : tuple of Recipe
        One for each picture.
    """

    def __init__(self, run: Generation, recipes: tuple[Recipe, ...]) -> None:
        self.run, self.recipes = run, recipes

    def pictures(self) -> list[Picture]:
        """Decode the pictures, after the last step."""
        images = self.run.images()
        return [Picture(image, recipe, recipe_text(recipe)) for image, recipe in zip(images, self.recipes, strict=True)]


def batches(tasks: Sequence[T], size: int) -> Iterator[list[T]]:
    """Put pictures together that can be made at the same time: their recipes differ in prompts and seeds alone."""
    batch: list[T] = []
    for task in tasks:
        if batch and (len(batch) == size or alike(batch[0]) != alike(task)):
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch


def alike(task: Task) -> tuple[object, Recipe]:
    """Return what pictures that are made at the same time have in common."""
    return task.loras, replace(task.recipe, prompt="", negative_prompt="", seed=0)


def with_input_hashes(recipe: Recipe) -> Recipe:
    """Note the hashes of the pictures that a recipe starts from, or compare them.

    Raises
    ------
    InputError
        One does not exist, or is not the one that the recipe was made with.
    """
    hashes: dict[str, Any] = {}
    for name, noted in (("image", "image_hash"), ("mask_image", "mask_hash")):
        path, known = getattr(recipe, name), getattr(recipe, noted)
        if path is None:
            continue
        found = files_hash([Path(path)])
        if known is not None and known != found:
            raise InputError(f"{path}: has changed since (hash {found}, expected {known}); give the picture again")
        hashes[noted] = found
    return replace(recipe, **hashes)


def find_model(recipe: Recipe) -> str | None:
    """Return the model that a picture was made with, as `Opening` takes it; None is the embedded one.

    Raises
    ------
    InputError
        It was not found.
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
        f"give it with {argument('model')}"
    )


def _stamp(path: str) -> tuple[str, int, int] | None:
    """Tell the versions of a file apart, so that a changed file is read again."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # opening it says what is wrong
        return None
    return os.path.abspath(path), found.st_size, found.st_mtime_ns
