"""A setting is declared once: options, recipes, texts of pictures, prompt files and checks follow from its field."""

import inspect
import json
from dataclasses import dataclass, fields

import click
import pytest
from click.testing import CliRunner

from sd_numba.cli.options import GroupedCommand, setting_options
from sd_numba.errors import InputError
from sd_numba.generation.settings import Settings, defaults_of, setting, settings_of
from sd_numba.pipeline import Pipeline
from sd_numba.recipes.a1111 import format_parameters, parse_parameters
from sd_numba.recipes.infotext import recipe_from_parameters, recipe_to_parameters
from sd_numba.recipes.recipe import Recipe, read_fields
from sd_numba.values import Number


@dataclass(frozen=True)
class Warm(Recipe):
    """Recipes with a setting that no table of the package knows."""

    warmth: float = setting(
        Number(0, 2),
        0.5,
        flags=("--warmth", "--cosiness"),
        group="Sampling",
        help="How warm the colours are.",
        key="Warmth",
        aliases=("hygge",),
    )


def command():
    """A command with the options of these recipes, which prints what was given."""

    def show(**options):
        given = {name: value for name, value in options.items() if value is not None}
        Warm("", **given).check()
        click.echo(json.dumps(given))

    for decorate in reversed(setting_options(Warm)):
        show = decorate(show)
    return click.command(cls=GroupedCommand)(show)


def test_a_new_setting_is_an_option():
    result = CliRunner().invoke(command(), ["--warmth", "1.5"])
    assert json.loads(result.stdout) == {"warmth": 1.5}
    help_text = " ".join(CliRunner().invoke(command(), ["--help"]).stdout.split())
    assert "--warmth, --cosiness FLOAT How warm the colours are. [default: 0.5]" in help_text


def test_its_error_names_the_flag_that_was_typed():
    for flag in ("--warmth", "--cosiness"):
        result = CliRunner().invoke(command(), [f"{flag}=9"])
        assert result.exit_code == 1
        assert result.stderr == f"Error: {flag}: found 9.0, expected a number from 0 to 2\n"
    with pytest.raises(InputError, match="warmth: found 9, expected a number from 0 to 2") as caught:
        Warm("", warmth=9).check()
    assert (caught.value.name, caught.value.found, str(caught.value.expected)) == ("warmth", 9, "a number from 0 to 2")


def test_it_is_in_the_text_of_a_picture():
    recipe = Warm("a fox", seed=3, num_inference_steps=4, warmth=1.25)
    text = format_parameters(recipe_to_parameters(recipe, "0"))
    assert "Warmth: 1.25" in text
    assert recipe_from_parameters(parse_parameters(text), Warm) == (recipe, [])
    assert "Warmth" not in format_parameters(recipe_to_parameters(Warm("a fox"), "0"))


def test_it_is_in_json_and_in_prompt_files():
    recipe = Warm("a fox", warmth=1.25)
    assert Warm.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert read_fields({"Hygge": "1.25"}, Warm) == {"warmth": 1.25}
    with pytest.raises(InputError, match="hygge: found 'much', expected a number"):
        read_fields({"hygge": "much"}, Warm)
    with pytest.raises(InputError, match="hygge: unknown setting"):
        read_fields({"hygge": 1})


def test_generate_takes_every_setting():
    """It declares them again, for the sake of their types; only what no recipe can hold is there besides."""
    parameters = inspect.signature(Pipeline.generate).parameters
    assert parameters.keys() - settings_of(Settings).keys() == {"self", "generator", "latents", "state"}
    assert settings_of(Settings).keys() <= parameters.keys()
    differs = {
        name
        for name, default in defaults_of(Settings).items()
        if parameters[name].default not in (default, inspect.Parameter.empty) and (parameters[name].default or default)
    }
    assert differs == {"prompt_syntax"}


def test_names_and_keys_are_of_one_setting_each():
    known = settings_of(Recipe).values()
    for names in (
        [flag for about in known for flag in about.flags],
        [about.key for about in known if about.key],
        [alias for about in known for alias in about.aliases],
    ):
        assert len(names) == len(set(names))
    assert all("setting" in one.metadata for one in fields(Recipe))
