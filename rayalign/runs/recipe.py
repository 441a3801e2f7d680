"""Examples with choices: a `CONFIG` that is a function of a few keywords, each with the values it may have.

    def recipe(size: Literal["1b", "2.8b"] = "1b", gpus: int = 8) -> dict[str, Any]: ...
    CONFIG = recipe
        rayalign run FILE.py --set recipe.size=2.8b --set loop.seed=1

A choice changes several settings together (a model and where it fits, a loss and its strength); a setting changes one,
and comes after all choices.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rayalign.config import check, type_name
from rayalign.errors import ConfigError, did_you_mean

PREFIX = "recipe."

Recipe = Callable[..., Mapping[str, Any]]
"""Choices as keyword arguments in, settings out; every argument has a type and a default."""


def split_choices(changes: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """The `recipe.*` among changes, without their prefix, and the other changes in order.

    >>> split_choices([("recipe.size", "1b"), ("loop.seed", "3")])
    ({'size': '1b'}, [('loop.seed', '3')])
    """
    pairs = list(changes)
    choices = {name.removeprefix(PREFIX): value for name, value in pairs if name.startswith(PREFIX)}
    return choices, [(name, value) for name, value in pairs if not name.startswith(PREFIX)]


def settings_of(config: Mapping[str, Any] | Recipe, choices: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of an example's `CONFIG`. `ConfigError` for a choice that it has not, or of no such value."""
    choices = choices or {}
    known = choices_of(config)
    for name in choices:
        if name not in known:
            have = f"{did_you_mean(name, known)}" if known else "This example has no choices, only settings."
            raise ConfigError(f"{PREFIX}{name} is not a choice of this example. {have}")
    if not callable(config):
        return dict(config)
    return dict(config(**{name: check(PREFIX + name, value, known[name][0]) for name, value in choices.items()}))


def choices_of(config: Mapping[str, Any] | Recipe) -> dict[str, tuple[Any, Any]]:
    """Name -> (type, default) of every choice; none where `CONFIG` is a dict."""
    if not callable(config):
        return {}
    parameters = inspect.signature(config, eval_str=True).parameters.values()
    return {parameter.name: (parameter.annotation, parameter.default) for parameter in parameters}


def describe_choices(config: Mapping[str, Any] | Recipe) -> str:
    """One line for help texts, e.g. `recipe.size='1b' | '2.8b' (default 1b)`; empty where there are none."""
    return "; ".join(
        f"{PREFIX}{name}={type_name(kind)} (default {default})" for name, (kind, default) in choices_of(config).items()
    )
