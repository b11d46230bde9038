"""The options of ``sd-numba generate``. Those that determine a picture have no defaults here: those are a recipe's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ..generation.model import PRECISIONS, TILINGS, WEIGHT_POLICIES
from ..pictures.preview import PREVIEWS
from ..prompts.encoding import SYNTAXES
from ..recipes import recipe
from ..samplers import SAMPLER_NAMES
from .common import ANY_PATH, threads_option

SPACINGS = ("normal", *recipe.SPACINGS)
RECIPE: dict[str, str] = {}  # option -> field of `sd_numba.recipes.recipe.Recipe`
SAMPLERS = ", ".join(name for name in SAMPLER_NAMES if not name.endswith(SPACINGS))


class Numbers(click.ParamType):
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


def setting(*names: str, field: str, **attributes: Any) -> Callable[[Any], Any]:
    """Declare an option that sets this field of the recipe."""
    RECIPE[next(name for name in names if not name.startswith("-"))] = field
    return click.option(*names, **attributes)


OPTIONS: list[Callable[[Any], Any]] = [
    click.option("-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt, instead of the argument."),
    click.option(
        "--prompt-file", type=ANY_PATH,
        help="Prompts, one a line; or .csv, .json, .jsonl with settings for each: prompt, seed, steps...",
    ),
    setting(
        "-n", "--negative-prompt", "negative_prompt", field="negative_prompt", metavar="TEXT",
        help="What to steer away from.",
    ),
    setting(
        "--prompt-syntax", "prompt_syntax", field="prompt_syntax", type=click.Choice(SYNTAXES),
        help="What (word:1.2), [a:b:0.5] and BREAK mean: as in AUTOMATIC1111 (the default), or nothing.",
    ),
    setting(
        "--clip-skip", "clip_skip", field="clip_skip", type=int,
        help="Layer of the text encoder to take, from its end; 1 is the last.  [default: 1]",
    ),
    click.option(
        "-m", "--model", type=ANY_PATH,
        help="Folder in diffusers layout, .safetensors file, or id of a downloaded model.  [default: embedded model]",
    ),
    click.option("--vae", type=ANY_PATH, help="Another VAE than the model's own: a .safetensors file or a folder."),
    click.option(
        "--taesd", type=ANY_PATH, help="File or folder of a tiny autoencoder: decodes in a fraction of the time."
    ),
    click.option("--taesd-preview-only", is_flag=True, help="Use it for --preview tae alone."),
    click.option(
        "--lora", "loras", multiple=True, metavar="FILE[:WEIGHT]",
        help="A LoRA or LoCon (.safetensors); may be given several times.",
    ),
    click.option(
        "--lora-dir", "--lora-model-dir", type=ANY_PATH,
        help="Folder of the LoRAs that <lora:NAME:WEIGHT> in prompts means.",
    ),
    click.option(
        "--embedding-dir", "--embd-dir", type=ANY_PATH,
        help="Folder of textual inversion embeddings; the name of a file in a prompt stands for it.",
    ),
    click.option(
        "-o", "--output", default="output.png", show_default=True, help="File; may hold {seed}, {n} or %03d."
    ),
    setting(
        "--steps", "steps", field="num_inference_steps", type=int,
        help="Sampling steps.  [default: the model's own, or 20]",
    ),
    setting(
        "--cfg-scale", "--guidance-scale", "scale", field="guidance_scale", type=float,
        help="Guidance; 1 is none.  [default: the model's own, or 7.5]",
    ),
    setting(
        "-s", "--seed", "seed", field="seed", type=int,
        help="Number of the noise; negative: a random one.  [default: -1]",
    ),
    setting("-W", "--width", "width", field="width", type=int, help="Pixels.  [default: the model's own]"),
    setting("-H", "--height", "height", field="height", type=int, help="Pixels.  [default: the model's own]"),
    setting(
        "--sampler", "--sampling-method", "sampler", field="scheduler", metavar="NAME",
        help=f"{SAMPLERS}.  [default: the model's own]",
    ),
    click.option(
        "--scheduler", "spacing", type=click.Choice(SPACINGS),
        help="Spacing of the noise levels; normal: what the sampler's name or the model says.  [default: normal]",
    ),
    setting(
        "--eta", "eta", field="eta", type=float,
        help="Noise that ddim adds: 0 none, 1 as much as ddpm.  [default: 0]",
    ),
    setting(
        "--rng", "rng", field="rng", type=click.Choice(recipe.RNGS),
        help="Noise of a seed as torch makes it on the CPU (the default), or as AUTOMATIC1111 on a GPU.",
    ),
    setting(
        "-i", "--init-img", "init_img", field="init_image", type=ANY_PATH,
        help="Picture to start from, of any size and format.",
    ),
    setting(
        "--strength", "strength", field="strength", type=float,
        help="How much of it is lost, 0 to 1.  [default: 0.75]",
    ),
    setting("--mask", "mask", field="mask_image", type=ANY_PATH, help="Paint only where this picture is white."),
    setting(
        "--expand", "expand", field="expand", type=Numbers("0,0,64,0", int), metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="Pixels to paint beyond the sides of the picture.",
    ),
    setting(
        "--hires", "hires", field="hires_scale", type=float, metavar="SCALE",
        help="Refine the picture at so many times its size, in a second pass.",
    ),
    setting(
        "--hires-steps", "hires_steps", field="hires_steps", type=int,
        help="Steps of its schedule.  [default: as many as --steps]",
    ),
    setting(
        "--hires-strength", "hires_strength", field="hires_strength", type=float,
        help="How much of the first picture it may change, 0 to 1.  [default: 0.7]",
    ),
    click.option("-b", "--batch-count", default=1, show_default=True, help="Pictures, with seeds counted on."),
    click.option("--batch-size", default=1, show_default=True, help="Pictures that are made at the same time."),
    click.option("--grid", type=ANY_PATH, metavar="FILE", help="Write a contact sheet of all pictures, too."),
    click.option("--overwrite", is_flag=True, help="Make those of several pictures again that are there already."),
    click.option(
        "--from", "from_file", type=ANY_PATH, metavar="FILE",
        help="Make the picture in this file again, by the text in it; other options change that.",
    ),
    click.option(
        "--resume", type=ANY_PATH, metavar="FILE",
        help="Go on with a run that was stopped, from its .state file; needs no other options.",
    ),
    click.option(
        "--precision", type=click.Choice(PRECISIONS),
        help="Of products: bf16 and int8 are faster and a little less exact; auto: the fastest for model and CPU.  "
        "[default: f32]",
    ),
    setting(
        "--cfg-interval", "cfg_interval", field="cfg_interval", type=Numbers("0,0.8", float), metavar="FROM,TO",
        help="Guidance only in this part of the steps; the others take half the time.",
    ),
    setting(
        "--cache", "cache", field="cache", metavar="deepcache:N", help="Compute the whole UNet at every N-th step only."
    ),
    setting(
        "--tome", "tome", field="tome", type=float, metavar="RATIO",
        help="Merge this share of the tokens in self-attention, up to 0.75.",
    ),
    click.option(
        "--weights", type=click.Choice(WEIGHT_POLICIES), default="auto", show_default=True,
        help="Keep packed copies of the weights in memory (faster), or not; auto packs small networks.",
    ),
    click.option(
        "--vae-tiling", type=click.Choice(TILINGS),
        help="Decode large pictures in strips, in a third of the memory; auto: if memory would be short.  "
        "[default: auto]",
    ),
    threads_option,
    click.option(
        "--preview", type=click.Choice(PREVIEWS), default="none", show_default=True,
        help="Show the picture while it comes about: a projection of the latents (free), or --taesd.",
    ),
    click.option("--preview-interval", default=1, show_default=True, help="Steps from one preview to the next."),
    click.option(
        "--preview-path", type=ANY_PATH, metavar="FILE", default="preview.png", show_default=True,
        help="File of the last preview; a terminal that can shows it, too.",
    ),
    click.option(
        "--state", type=ANY_PATH, metavar="FILE",
        help="Keep what --resume needs in this file, step by step.  [default: OUTPUT.state, for work over a minute]",
    ),
    click.option("--no-metadata", is_flag=True, help="Do not say in the PNG how it was made."),
    click.option("--profile", is_flag=True, help="Time, GFLOP and share of the peak of each kind of layer."),
    click.option("-v", "--verbose", is_flag=True, help="Seconds of each stage."),
]  # fmt: skip


def generate_options(command: Any) -> Any:
    """Add all of them, and the argument PROMPT."""
    for option in reversed(OPTIONS):
        command = option(command)
    return click.argument("prompt", required=False)(command)
