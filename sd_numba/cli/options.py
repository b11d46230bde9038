"""The options of ``sd-numba generate``.

Options that determine a picture follow from the fields of `sd_numba.generation.settings.Settings`. They have no
defaults here: the recipe and the model fill in what is not given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ..generation.model import PRECISIONS, TILINGS, WEIGHT_POLICIES
from ..generation.settings import Setting, Settings, defaults_of, settings_of
from ..pictures.preview import PREVIEWS
from ..recipes.recipe import SPACINGS as NAMED_SPACINGS
from ..values import Choice, File, Kind, Number, Several, Whole
from .common import ANY_PATH, Command, threads_option

SPACINGS = ("normal", *NAMED_SPACINGS)
GROUPS = ("Prompt", "Model", "Sampling", "Start from a picture", "Larger and faster", "Output", "Run")
OTHERS = GROUPS[-1]  # of options that name no group


if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:  # click 8.1 and 8.2 do not take the type of the result
    _ParamType = click.ParamType


class Numbers(_ParamType):
    """A fixed count of numbers with commas between them."""

    def __init__(self, example: str, kind: type) -> None:
        self.name, self.example, self.kind = example, example, kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a tuple."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        wanted = self.example.count(",") + 1
        if len(numbers) != wanted:
            self.fail(f"found {value!r:.40}, expected {wanted} numbers with commas, such as {self.example}", param, ctx)
        return numbers


class GroupedOption(click.Option):
    """An option in a group of the help."""

    def __init__(self, *names: Any, group: str = OTHERS, **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.group = group


class GroupedCommand(Command):
    """A command whose help lists options by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, a section for each group."""
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                rows[getattr(parameter, "group", OTHERS)].append(record)
        for group, records in rows.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)


def option(group: str, *names: str, **attributes: Any) -> Callable[[Any], Any]:
    """Declare an option of a group."""
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


def _type(kind: Kind) -> Any:
    """Return click's type for a kind of value."""
    if isinstance(kind, Several):
        return Numbers(kind.example, float if isinstance(kind.kind, Number) else int)
    if isinstance(kind, Choice):
        return click.Choice(kind.words)
    if isinstance(kind, File):
        return ANY_PATH
    return int if isinstance(kind, Whole) else float if isinstance(kind, Number) else str


def _setting_option(name: str, about: Setting, default: Any) -> Callable[[Any], Any]:
    shown = about.default
    if shown is None and (default or about.offset):
        value = default + about.offset if about.offset else default
        shown = ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)
    text = f"{about.help}  [default: {shown}]" if shown else about.help
    return option(about.group, *about.flags, name, type=_type(about.kind), metavar=about.metavar, help=text)


def setting_options(owner: type[Settings]) -> list[Callable[[Any], Any]]:
    """Declare an option, named as the field, for every field that has flags."""
    known, defaults = settings_of(owner), defaults_of(owner)
    return [_setting_option(name, about, defaults.get(name)) for name, about in known.items() if about.flags]


OPTIONS: list[Callable[[Any], Any]] = [
    option("Prompt", "-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt, instead of the argument."),
    option(
        "Prompt", "--prompt-file", type=ANY_PATH,
        help="File with a prompt on each line; or .csv, .json, .jsonl with settings for each picture.",
    ),
    option(
        "Model", "-m", "--model", type=ANY_PATH,
        help="Folder in diffusers layout, .safetensors file, or id of a downloaded model.  [default: embedded model]",
    ),
    option(
        "Model", "--vae", type=ANY_PATH,
        help="Another VAE in place of the model's own: a .safetensors file or a folder.",
    ),
    option(
        "Model", "--taesd", type=ANY_PATH,
        help="File or folder of a tiny autoencoder, which decodes in a fraction of the time.",
    ),
    option("Model", "--taesd-preview-only", is_flag=True, help="Use --taesd for --preview tae only."),
    option(
        "Model", "--lora", "loras", multiple=True, metavar="FILE[:WEIGHT]",
        help="Add a LoRA or LoCon (.safetensors); can be repeated.",
    ),
    option(
        "Model", "--lora-dir", "--lora-model-dir", type=ANY_PATH,
        help="Folder of the LoRAs that <lora:NAME:WEIGHT> in a prompt refers to.",
    ),
    option(
        "Model", "--embedding-dir", "--embd-dir", type=ANY_PATH,
        help="Folder of textual inversion embeddings; a prompt uses one by its file name.",
    ),
    option(
        "Model", "--precision", type=click.Choice(PRECISIONS),
        help="Arithmetic of matrix products. bf16 and int8 are faster and slightly less exact; auto picks the fastest "
        "for the model and the CPU.  [default: f32]",
    ),
    option(
        "Model", "--weights", type=click.Choice(WEIGHT_POLICIES), default="auto", show_default=True,
        help="packed keeps rearranged copies of the weights in memory, which is faster; mmap does not; auto packs only "
        "small networks.",
    ),
    option(
        "Sampling", "--scheduler", "spacing", type=click.Choice(SPACINGS),
        help="Spacing of the noise levels; normal follows the sampler's name or the model.  [default: normal]",
    ),
    option(
        "Output", "-o", "--output", default="output.png", show_default=True,
        help="File name; can contain {seed}, {n} or %03d.",
    ),
    option("Output", "-b", "--batch-count", default=1, show_default=True, help="Number of pictures; seeds count up."),
    option("Output", "--batch-size", default=1, show_default=True, help="Number of pictures to make at once."),
    option("Output", "--grid", type=ANY_PATH, metavar="FILE", help="Also write a contact sheet of all pictures."),
    option("Output", "--overwrite", is_flag=True, help="Remake pictures that already exist."),
    option(
        "Output", "--from", "from_file", type=ANY_PATH, metavar="FILE",
        help="Remake the picture in this file from the text in it; other options change settings.",
    ),
    option(
        "Output", "--vae-tiling", type=click.Choice(TILINGS),
        help="Decode large pictures in strips, in a third of the memory; auto does so if memory would be short.  "
        "[default: auto]",
    ),
    option("Output", "--no-metadata", is_flag=True, help="Do not store the settings in the PNG."),
    option("Run", "--resume", type=ANY_PATH, metavar="FILE", help="Continue an unfinished run from its .state file."),
    option(
        "Run", "--state", type=ANY_PATH, metavar="FILE",
        help="Keep the state of the run in this file after every step.  [default: OUTPUT.state, if the work takes more "
        "than a minute]",
    ),
    option(
        "Run", "--preview", type=click.Choice(PREVIEWS), default="none", show_default=True,
        help="Show the unfinished picture: proj is a projection of the latents, at no cost; tae decodes with --taesd.",
    ),
    option("Run", "--preview-interval", default=1, show_default=True, help="Steps between previews."),
    option(
        "Run", "--preview-path", type=ANY_PATH, metavar="FILE", default="preview.png", show_default=True,
        help="File of the last preview; terminals that can show pictures show it as well.",
    ),
    threads_option,
    option("Run", "--profile", is_flag=True, help="Print time, GFLOP and share of the peak for each kind of layer."),
    option("Run", "-v", "--verbose", is_flag=True, help="Print the seconds of each stage."),
]  # fmt: skip


def generate_options(command: Any) -> Any:
    """Add all of them, and the argument PROMPT."""
    for decorate in reversed([*OPTIONS[:2], *setting_options(Settings), *OPTIONS[2:]]):
        command = decorate(command)
    return click.argument("prompt", required=False)(command)
