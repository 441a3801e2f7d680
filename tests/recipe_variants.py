"""The recipes, and every combination of their choices as settings and as a run's config."""

import itertools
import runpy
import typing
from pathlib import Path

from rayalign.agents import agent_class
from rayalign.cli import SHORT_NAMES
from rayalign.config import apply
from rayalign.errors import ConfigError
from rayalign.runs.config import RunConfig
from rayalign.runs.recipe import choices_of, settings_of

FOLDER = Path(__file__).parents[1] / "tuned_examples" / "recipes"
FILES = sorted(FOLDER.glob("*.py"))


def names(name):
    """Everything that the file of a recipe defines."""
    return runpy.run_path(str(FOLDER / f"{name}.py"), run_name="rayalign_example")


def recipe(name):
    """The function `CONFIG` of a recipe."""
    return names(name)["CONFIG"]


def variants(name):
    """Every combination of a recipe's choices that it does not refuse, and its settings."""
    options = {
        choice: typing.get_args(kind) or (default,) for choice, (kind, default) in choices_of(recipe(name)).items()
    }
    for values in itertools.product(*options.values()):
        choices = dict(zip(options, values, strict=True))
        try:
            yield choices, settings_of(recipe(name), choices)
        except ConfigError as error:
            assert str(error).startswith("recipe."), "a combination that makes no sense is refused by its choice"


def resolved(settings):
    """The run's config, as `rayalign.run` makes it; unknown settings and bad values are errors."""
    base = RunConfig(agent=agent_class(settings["agent"]).Config())
    given = {SHORT_NAMES.get(name, name): value for name, value in settings.items()}
    return apply(base, {k: v for k, v in given.items() if k not in ("agent", "env") and not k.startswith("env.")})
