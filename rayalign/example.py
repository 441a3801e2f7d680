"""Tuned examples as data: the settings in `CONFIG` of a Python file, with full names, the last word on each winning."""

from __future__ import annotations

import runpy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rayalign.config import flatten
from rayalign.errors import ConfigError
from rayalign.runs.recipe import settings_of

SHORT_NAMES = {"budget": "loop.budget", "seed": "loop.seed", "max_staleness": "loop.max_staleness"}
"""What `rayalign.run` takes as arguments of its own, and the settings that they are."""


def load_example(file: str | Path, choices: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings in `CONFIG` of a Python file, which is executed for it; `choices` are for a recipe."""
    if not Path(file).is_file():
        raise ConfigError(
            f"{str(file)!r} is not a file. Name a tuned example, or an agent (`rayalign agents` lists them)."
        )
    config = runpy.run_path(str(file), run_name="rayalign_example").get("CONFIG")
    if not isinstance(config, Mapping) and not callable(config):
        raise ConfigError(
            f"{str(file)!r} does not define CONFIG, a dict of settings such as dict(agent='sea', budget=2000)."
        )
    return settings_of(config, choices)


def merged(base: Mapping[str, Any], changes: Iterable[tuple[str, Any]] = ()) -> dict[str, Any]:
    """Dotted names only, each once: `seed` and `loop.seed` are one setting, and the last word on it wins.

    >>> merged({"seed": 1, "learner": {"lora": {"rank": 4}}}, [("loop.seed", 2)])
    {'loop.seed': 2, 'learner.lora.rank': 4}
    """
    settings: dict[str, Any] = {}
    for name, value in [*flatten(base).items(), *changes]:
        settings[SHORT_NAMES.get(name, name)] = value
    return settings
