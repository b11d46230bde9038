"""Everything that a run is made from, each setting with all that programs need to know about it.

A field of `Settings` says how it is checked, which flags set it on the command line, what other programs call it, and
under which key a picture's text holds it. The checks of a request, recipes, picture texts, prompt files and the options
of the command line all follow from the fields: a new setting is a field here, an argument of
`StableDiffusionPipeline.generate`, and the code that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ..errors import InputError
from ..prompts.encoding import SYNTAXES
from ..samplers import SAMPLER_NAMES, canonical_sampler_name
from ..values import Choice, File, Kind, Number, Several, Text, UnfitError, Whole, number_text

MAX_STEPS = 1000
MAX_EXPANSION = 4096  # pixels on a side
MAX_SCALE = 16  # of the second pass, on each side
# Strengths where none is given. Python has diffusers', without and with a mask; recipes and the command line have that
# of stable-diffusion.cpp for both. The second pass has AUTOMATIC1111's.
IMAGE_STRENGTH, MASK_STRENGTH, RECIPE_STRENGTH, HIRES_STRENGTH = 0.8, 1.0, 0.75, 0.7
DEEPCACHE = "deepcache:"
PROMPT, START, MORE = "Prompt", "Start from a picture", "Larger and faster"  # sections of the help
RNGS = ("cpu", "cuda")
SAMPLERS = ", ".join(name for name in SAMPLER_NAMES if not name.endswith(("-karras", "-exponential")))


@dataclass(frozen=True)
class Setting:
    """All that is known about one field.

    Attributes
    ----------
    kind : Kind
        How it is read and checked.
    help : str
        For the command line.
    flags : tuple of str
        Options of the command line that set it; none if it is not an option.
    group : str
        Section of the help.
    metavar : str, optional
        What stands for the value in the help.
    default : str, optional
        The default, in the help's words; by default the field's own.
    aliases : tuple of str
        Other programs' names: options of stable-diffusion.cpp, AUTOMATIC1111's API and text, FastSD CPU.
    key : str, optional
        Key in a picture's text.
    write, parse : callable, optional
        Between the value and its text in a picture, if `kind` does not suffice.
    offset : int
        What people count more than Python: 1 for `clip_skip`.
    """

    kind: Kind
    help: str = ""
    flags: tuple[str, ...] = ()
    group: str = "Sampling"
    metavar: str | None = None
    default: str | None = None
    aliases: tuple[str, ...] = ()
    key: str | None = None
    write: Callable[[Any], str | None] | None = None
    parse: Callable[[str], Any] | None = None
    offset: int = 0


def setting(kind: Kind, default: Any = MISSING, **about: Any) -> Any:
    """Declare a field of `Settings`; see `Setting` for what can be said of it (`shown` is its `default`)."""
    if "shown" in about:
        about["default"] = about.pop("shown")
    return field(default=default, metadata={"setting": Setting(kind, **about)})


def settings_of(owner: type) -> Mapping[str, Setting]:
    """Return the settings of a class of settings, by the names of its fields."""
    return {one.name: one.metadata["setting"] for one in fields(owner)}


def defaults_of(owner: type) -> Mapping[str, Any]:
    """Return the default of each field that has one."""
    return {one.name: one.default for one in fields(owner) if one.default is not MISSING}


class _Seed(Whole):
    """A seed; a negative one stands for a random one."""

    def read(self, value: Any) -> Any:
        found = super().read(value)
        return found if found >= 0 else None


class _SecondSteps(Whole):
    """Steps of the second pass; 0 means as many as in the first."""

    def read(self, value: Any) -> Any:
        found = super().read(value)
        if found < 0:
            raise UnfitError("a whole number of at least 1, or 0 for as many as in the first pass")
        return found or None


class _Sampler(Text):
    """A sampler's name, in any spelling."""

    def read(self, value: Any) -> str:
        return canonical_sampler_name(super().read(value))

    def check(self, name: str, value: Any) -> str:
        return canonical_sampler_name(value)


class _Interval(Several):
    """Two shares of the steps, the smaller one first."""

    def check(self, name: str, value: Any) -> tuple[float, ...]:
        first, last = super().check(name, value)
        if first > last:
            raise InputError(name=name, found=value, expected="the smaller number first")
        return first, last


class _Cache(Text):
    """``deepcache:N``."""

    def check(self, name: str, value: Any) -> Any:
        interval = value.removeprefix(DEEPCACHE) if isinstance(value, str) and value.startswith(DEEPCACHE) else ""
        if not (interval.isascii() and interval.isdigit() and 1 <= int(interval[:9]) <= 1000):
            raise InputError(name=name, found=value, expected=f"{DEEPCACHE}N, such as {DEEPCACHE}3")
        return value


def _written_interval(value: tuple[float, float]) -> str | None:
    return None if tuple(value) == (0, 1) else "-".join(map(number_text, value))


def _parsed_interval(value: str) -> tuple[float, ...]:
    return Several(Number(), 2, "a share of the steps such as 0-0.8", "").read(value.split("-"))


@dataclass(frozen=True)
class Settings:
    """What pictures are made from. None stands for the model's default.

    `sd_numba.StableDiffusionPipeline.generate` says what each field is.
    """

    prompt: Any = setting(Text())  # as the next one and the seed: one, or in a batch one for each picture
    negative_prompt: Any = setting(
        Text(),
        "",
        group=PROMPT,
        flags=("-n", "--negative-prompt"),
        metavar="TEXT",
        help="What to steer away from.",
        aliases=("negative", "neg_prompt", "uncond_prompt"),
    )
    prompt_syntax: str = setting(
        Choice(SYNTAXES),
        "a1111",
        group=PROMPT,
        flags=("--prompt-syntax",),
        key="Prompt syntax",
        help="a1111 reads (word:1.2), [a:b:0.5], {a|b} and BREAK as AUTOMATIC1111 does; plain takes them literally.",
    )
    clip_skip: int | None = setting(
        Whole(0, 255),
        0,
        group=PROMPT,
        flags=("--clip-skip",),
        offset=1,
        key="Clip skip",
        help="Which layer of the text encoder to use, counted from the end; 1 is the last.",
        write=lambda skip: str(skip + 1) if skip else None,
    )
    num_inference_steps: int | None = setting(
        Whole(1, MAX_STEPS),
        None,
        flags=("--steps",),
        key="Steps",
        help="Sampling steps.",
        shown="the model's, or 20",
        aliases=("steps", "inference_steps", "sample_steps", "n_steps"),
    )
    guidance_scale: float | None = setting(
        Number(-1000, 1000),
        None,
        flags=("--cfg-scale", "--guidance-scale"),
        key="CFG scale",
        help="Guidance scale; 1 turns guidance off and halves the time.",
        shown="the model's, or 7.5",
        aliases=("cfg_scale", "cfg", "guidance"),
    )
    seed: Any = setting(
        _Seed(),
        None,
        flags=("-s", "--seed"),
        key="Seed",
        shown="-1",
        help="Random seed; a negative number picks one.",
    )
    width: int | None = setting(
        Whole(),
        None,
        flags=("-W", "--width"),
        help="Width in pixels.",
        shown="the model's",
        aliases=("image_width",),
    )
    height: int | None = setting(
        Whole(),
        None,
        flags=("-H", "--height"),
        help="Height in pixels.",
        shown="the model's",
        aliases=("image_height",),
    )
    scheduler: str | None = setting(
        _Sampler(),
        None,
        flags=("--sampler", "--sampling-method"),
        metavar="NAME",
        shown="the model's",
        help=f"{SAMPLERS}.",
        aliases=("sampler", "sampler_name", "sampling_method", "sample_method"),
    )
    eta: float = setting(
        Number(0),
        0.0,
        flags=("--eta",),
        key="Eta DDIM",
        shown="0",
        help="Noise that ddim adds: 0 none, 1 as much as ddpm.",
    )
    rng: str = setting(
        Choice(RNGS),
        "cpu",
        flags=("--rng",),
        key="RNG",
        aliases=("randn_source",),
        help="Random generator: cpu matches torch on the CPU, cuda matches AUTOMATIC1111 on a GPU.",
    )
    image: Any = setting(
        File(),
        None,
        group=START,
        flags=("-i", "--init-img"),
        key="Init image",
        aliases=("init_image", "init_img"),
        metavar="FILE",
        help="Picture to start from, of any size and format.",
    )
    mask_image: Any = setting(
        File(),
        None,
        group=START,
        flags=("--mask",),
        key="Mask",
        aliases=("mask",),
        metavar="FILE",
        help="Repaint only where this picture is white.",
    )
    strength: float | None = setting(
        Number(0, 1),
        None,
        group=START,
        flags=("--strength",),
        aliases=("denoising_strength", "img2img_strength"),
        shown="0.75",
        help="How far to change the input picture: 0 keeps it, 1 ignores it.",
    )
    expand: tuple[int, ...] | None = setting(
        Several(
            Whole(0, MAX_EXPANSION),
            4,
            "4 whole numbers: pixels on the left, the top, the right, the bottom",
            "0,0,64,0",
        ),
        None,
        group=START,
        flags=("--expand",),
        key="Expand",
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="Pixels to paint beyond the sides of the picture.",
    )
    hires_scale: float | None = setting(
        Number(1, MAX_SCALE),
        None,
        group=MORE,
        flags=("--hires",),
        key="Hires upscale",
        metavar="SCALE",
        aliases=("hr_scale", "hires_upscale"),
        help="Enlarge the picture by this factor and refine it in a second pass.",
    )
    hires_steps: int | None = setting(
        _SecondSteps(0, MAX_STEPS),
        None,
        group=MORE,
        flags=("--hires-steps",),
        key="Hires steps",
        shown="those of --steps",
        help="Steps of the second pass.",
        aliases=("hr_second_pass_steps",),
    )
    hires_strength: float | None = setting(
        Number(0, 1),
        None,
        group=MORE,
        flags=("--hires-strength",),
        aliases=("hires_denoising_strength",),
        shown="0.7",
        help="How far the second pass may change the picture, from 0 to 1.",
    )
    cfg_interval: tuple[float, ...] = setting(
        _Interval(Number(0, 1), 2, "2 numbers: from, to", "0,0.8"),
        (0.0, 1.0),
        group=MORE,
        flags=("--cfg-interval",),
        key="CFG interval",
        metavar="FROM,TO",
        write=_written_interval,
        parse=_parsed_interval,
        help="Guide only in this part of the steps; the other steps take half the time.",
    )
    cache: str | None = setting(
        _Cache(),
        None,
        group=MORE,
        flags=("--cache",),
        key="Cache",
        metavar="deepcache:N",
        help="Compute the whole UNet only in every N-th step.",
    )
    tome: float = setting(
        Number(0, 0.75),
        0.0,
        group=MORE,
        flags=("--tome",),
        key="Token merging ratio",
        aliases=("token_merging_ratio",),
        metavar="RATIO",
        help="Merge this share of the tokens in self-attention, up to 0.75.",
    )

    def check(self) -> None:
        """Check every field that is given, by itself; whether it fits the model is for a request to say.

        Raises
        ------
        InputError
            A value cannot be used.
        """
        for name, about in settings_of(type(self)).items():
            value = getattr(self, name)
            if value is not None and name not in PER_PICTURE:
                about.kind.check(name, value)


PER_PICTURE = ("prompt", "negative_prompt", "seed")
"""Fields of which each picture of a batch has its own."""
