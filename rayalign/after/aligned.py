"""An aligned policy, ready to answer: a run's checkpoint, how it was sampled, and the agent that can judge answers.

A model that rayalign did not train (a directory, or a Hugging Face id) will do as well; it has no agent.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayalign import config as settings
from rayalign import storage
from rayalign.agents.agent import Agent, AgentContext
from rayalign.errors import ConfigError
from rayalign.ledger.ledger import Ledger
from rayalign.models import resolve_policy
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.encode import PromptEncoder
from rayalign.runs.agent_state import has_opinion, load_agent, recover_agent
from rayalign.runs.config import RunConfig
from rayalign.runs.record import CONFIG
from rayalign.runs.result import Result
from rayalign.runs.stored import StoredRun


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """A policy and what belongs to it."""

    name: str
    """The last name of where it was found."""
    policy: str
    """Hugging Face directory."""
    rollout: RolloutConfig
    """As in the run, or as the settings say."""
    run: str = ""
    """The run directory, of a run in a bucket this machine's copy; empty for a model that is none."""

    @classmethod
    def find(cls, what: str | Path, changes: Mapping[str, Any] | None = None) -> Aligned:
        """The final policy of the finished run in `what` (a folder, or a URI in a bucket), or the model that it names.

        `changes` are settings of the section `rollout`, by dotted names. Raises `DataError` for an unfinished run or
        what is no model, and `ConfigError` for another section's settings.
        """
        for name in changes or {}:
            if not name.startswith("rollout."):
                raise ConfigError(f"{name} has no meaning after the run; only rollout.* may be changed.")
        if storage.in_bucket(what) or (Path(what) / CONFIG).exists():
            result = Result.load(what)  # of a run in a bucket the only download
            stored = StoredRun.read(result.path)
            config, policy, run = stored.config, result.checkpoint.absolute(), str(stored.path)
        else:
            config, policy, run = RunConfig(), resolve_policy(what), ""
        rollout = settings.apply(config, dict(changes or {})).rollout
        name = storage.last_name(what if storage.in_bucket(what) else run or what)
        return cls(name=name, policy=str(policy), rollout=rollout, run=run)

    def check_best_of(self, best_of: int) -> None:
        """Raise `ConfigError` if answers are to be picked and nobody can pick."""
        if best_of <= 1:
            return
        if not self.run:
            raise ConfigError(f"best_of={best_of} needs an agent that picks, and {self.policy!r} is no run directory.")
        stored = StoredRun.read(self.run)
        if not has_opinion(stored.agent):
            raise ConfigError(
                f"best_of={best_of} needs an agent that has learned what is a good answer; "
                f"{stored.config.agent_name!r} has no model of its own. Leave it out, or replay the ledger with one: "
                "`rayalign replay RUN_DIR --agent sea`."
            )
        if self.rollout.temperature == 0:
            raise ConfigError(
                f"best_of={best_of} picks among samples, but rollout.temperature=0 makes them all the same. "
                "Set a higher one: --set rollout.temperature=0.7."
            )


def load_chooser(run_dir: str) -> Agent:
    """The agent of a finished run with all that it learned; loads its backbone. Called where it is used."""
    stored = StoredRun.read(run_dir)
    config, agent = stored.config, stored.agent
    encoder = PromptEncoder(config.policy, config.rollout.max_prompt_tokens, chat=config.rollout.chat)
    number = agent.prompts_per_batch(config.loop.batch_size)
    world = stored.world()
    context = AgentContext(
        policy=Path(config.policy),
        seed=config.loop.seed,
        batch_size=config.loop.batch_size,
        device=config.loop.agent_device,
        sample_prompts=[encoder.encode(world.prompt(i)) for i in range(number)],
    )
    if stored.is_replay:  # it saved the agent at its end, and its batches need not be the ledger's
        agent.setup(context)
        load_agent(agent, stored.path, most=sys.maxsize)
        return agent
    with Ledger(stored.path / "ledger.arrow", read_only=True) as ledger:
        recover_agent(agent, context, stored.path, ledger)
    return agent
