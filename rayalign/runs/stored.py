"""A run directory as the code needs it: settings, agent, world, and what no name brings back. For resuming and after.

`run_record` reads the same directory as the reports need it: numbers and texts, and no class is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray import cloudpickle

from rayalign import config as settings
from rayalign import storage
from rayalign.agents import make_agent
from rayalign.agents.agent import Agent
from rayalign.env import make_world
from rayalign.env.world import World
from rayalign.errors import ConfigError, DataError
from rayalign.models import resolve_policy
from rayalign.runs.config import RunConfig
from rayalign.runs.record import CONFIG, REPLAY

POLICY_NAME = "policy_name.txt"
"""The policy as the user named it, for machines that have to get it anew; empty: the world's own."""
CUSTOM_INPUTS = "inputs.pkl"
"""Objects that no name can bring back (an env instance, an oracle function); written only if there are any."""


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """What a run was started with."""

    path: Path
    config: RunConfig
    agent: Agent
    """With the run's settings; not set up."""
    custom: Mapping[str, Any] = field(default_factory=dict)
    """`CUSTOM_INPUTS`: world, agent and oracle, None where a name was given."""

    @classmethod
    def read(cls, run_dir: str | Path) -> StoredRun:
        """Read a run directory. Raises `ConfigError` if it holds no run."""
        folder = storage.fetched(run_dir).absolute()
        if not (folder / CONFIG).exists():
            shown = storage.plain(run_dir)
            raise ConfigError(f"run_dir={shown!r} holds no run (no {CONFIG}). Start one with `rayalign run`.")
        custom: dict[str, Any] = {}
        if (folder / CUSTOM_INPUTS).exists():
            custom = cloudpickle.loads((folder / CUSTOM_INPUTS).read_bytes())
        stored = settings.read_yaml((folder / CONFIG).read_text())
        kind = type(custom.get("agent") or make_agent(stored["agent_name"]))
        config = settings.apply(RunConfig(agent=kind.Config()), stored, yaml_text=False)
        found = cls(path=folder, config=config, agent=kind(config.agent), custom=custom)
        return found if Path(config.policy).is_dir() else found._elsewhere()

    def _elsewhere(self) -> StoredRun:
        """On another machine the initial policy is where its name leads to, if it does: not everybody needs it."""
        name = self.path / POLICY_NAME
        if not name.exists():
            return self
        try:
            policy = name.read_text() or self.world().default_policy() or self.config.policy
            return replace(self, config=replace(self.config, policy=str(resolve_policy(policy))))
        except DataError:
            return self

    @property
    def oracle(self) -> Any:
        """A function of the user's, or None for what the settings say."""
        return self.custom.get("oracle")

    @property
    def is_replay(self) -> bool:
        """Whether it trained on another run's labels."""
        return (self.path / REPLAY).exists()

    def world_if_there(self) -> World | None:
        """The same, or None where what it reads (a file of prompts) is there no more."""
        try:
            return self.world()
        except DataError:
            return None

    def world(self) -> World:
        """The world, made anew from its name, or the instance that the run was given."""
        return self.custom.get("world") or make_world(self.config.env, **self.config.env_kwargs)
