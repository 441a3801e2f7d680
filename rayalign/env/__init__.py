"""Environments: alignment as a contextual dueling bandit, as real Gymnasium environments.

Importing this package registers them: `gymnasium.make("rayalign/TinyWorld-v0")`, `gymnasium.make_vec(...)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import gymnasium

from rayalign.config import check
from rayalign.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rayalign.env.world import World


@dataclass(frozen=True, kw_only=True)
class EnvEntry:
    """A registered environment: the dueling bandit over some world."""

    world: str
    """Import path `package.module:Class` of the `World`; imported when the environment is made."""
    summary: str
    """One line for lists."""


ENVS: dict[str, EnvEntry] = {
    "rayalign/TinyWorld-v0": EnvEntry(
        world="rayalign.env.tinyworld:TinyWorld",
        summary="Name the items that matter: a small language task with an exact hidden reward and its own policy.",
    ),
    "rayalign/Tabular-v0": EnvEntry(
        world="rayalign.env.tabular:Tabular",
        summary="A table of prompts and arms with known utilities; the whole loop in seconds.",
    ),
    "rayalign/Prompts-v0": EnvEntry(
        world="rayalign.env.prompts:Prompts",
        summary="Your own prompts, from JSONL, Parquet or a Hugging Face dataset; needs an oracle.",
    ),
    "rayalign/Haiku-v0": EnvEntry(
        world="rayalign.env.haiku:Haiku",
        summary="Write a haiku about a subject; a program counts the syllables.",
    ),
}
"""Everything that `rayalign.run` and `make_world` know by name. Add your own, then call `register`."""


def register(env_id: str, entry: EnvEntry) -> None:
    """Make `env_id` known to rayalign and to Gymnasium, in place of an environment of the same name."""
    ENVS[env_id] = entry
    gymnasium.registry.pop(env_id, None)
    gymnasium.register(
        env_id,
        entry_point="rayalign.env.dueling_bandit:DuelingBandit",
        vector_entry_point="rayalign.env.dueling_bandit:DuelingBanditVector",
        kwargs={"world": entry.world},
    )


for _id, _entry in list(ENVS.items()):
    register(_id, _entry)


NUMERIC: dict[str, str] = {"rayalign/RFF-v0": "rayalign.env.rff:RFFBandit"}
"""Dueling bandits on vectors rather than texts (`module:Class`, the vector environment is `...Vector`): known to
Gymnasium alone, for algorithms that need no language model."""

for _id, _path in NUMERIC.items():
    gymnasium.register(_id, entry_point=_path, vector_entry_point=f"{_path}Vector")


def list_envs() -> list[str]:
    """Ids of the registered environments."""
    return sorted(ENVS)


def read_keywords(env: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` of a registered environment's world, texts (from a command line) read as its constructor's types.

    Raises `ConfigError` for a text that can't be read as that type. Unknown names are left to `make_world`.

    >>> read_keywords("rayalign/Tabular-v0", {"seed": "2", "scale": 0.5})
    {'seed': 2, 'scale': 0.5}
    """
    texts = {name for name, value in kwargs.items() if isinstance(value, str)}
    if not texts or env not in ENVS:
        return dict(kwargs)
    module, _, name = ENVS[env].world.partition(":")
    known = inspect.signature(getattr(import_module(module), name), eval_str=True).parameters
    typed = {n: p.annotation for n, p in known.items() if p.annotation is not p.empty}
    return {n: check(f"env.{n}", v, typed[n]) if n in texts & set(typed) else v for n, v in kwargs.items()}


def make_world(env: str | gymnasium.Env | gymnasium.vector.VectorEnv | World, **kwargs: Any) -> World:
    """The world behind a registered id, built with `kwargs`, or behind a Gymnasium env that was made of one.

    Raises `ConfigError` for an unknown id, an unknown keyword, or an env that has no world.
    """
    from rayalign.env.dueling_bandit import build_world

    if isinstance(env, str):
        if env in NUMERIC:
            raise ConfigError(
                f"env={env!r} has vectors for contexts and actions, no texts, so no language model can be run on it. "
                "Step it with gymnasium.make, as benchmarks/borda_rff.py does."
            )
        if env not in ENVS:
            raise ConfigError(f"env={env!r} is unknown. {did_you_mean(env, ENVS)}")
        return build_world(ENVS[env].world, kwargs)
    world = getattr(getattr(env, "unwrapped", env), "world", env)
    from rayalign.env.world import World

    if not isinstance(world, World):
        raise ConfigError(
            f"env={env!r:.200} is not a dueling bandit of rayalign: its unwrapped env has no `world`. Build it with "
            "rayalign.env.dueling_bandit.DuelingBandit(your_world)."
        )
    return build_world(world, kwargs)
