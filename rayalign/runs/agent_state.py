"""What an agent has learned beside the policy (a reward posterior), as a run directory keeps it.

    <run directory>/agent/observed-000120/    the agent's own files, after its first 120 stream batches

Checkpoints are now and then; what came after the newest is observed again from the ledger, with the same random
numbers. So ledger and checkpoints together always give the agent as it was at the ledger's end.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from rayalign.agents.agent import Agent, AgentContext
from rayalign.ledger.ledger import Ledger
from rayalign.random_streams import OBSERVE, stream

KEPT = 2
"""Checkpoints that are kept."""


def observe_rng(seed: int, batch: int) -> np.random.Generator:
    """What `Agent.observe` draws from in batch `batch` of a run with `seed`."""
    return stream(seed, batch, OBSERVE)


def save_agent(agent: Agent, run_dir: Path, observed: int) -> None:
    """Checkpoint the agent's state after `observed` batches; it appears whole or not at all."""
    folder = run_dir / "agent" / f"observed-{observed:06d}"
    partial = folder.with_suffix(".partial")
    for path in (partial, folder):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)
    agent.save(partial)
    partial.rename(folder)
    for old in sorted(folder.parent.glob("observed-??????"))[:-KEPT]:
        shutil.rmtree(old)


def load_agent(agent: Agent, run_dir: Path, most: int) -> int:
    """Load the newest checkpoint of at most `most` batches into an agent that is set up; returns its batches."""
    for folder in sorted((run_dir / "agent").glob("observed-??????"), reverse=True):
        observed = int(folder.name[-6:])
        if observed <= most:
            agent.load(folder)
            return observed
    return 0


def recover_agent(agent: Agent, context: AgentContext, run_dir: Path, ledger: Ledger) -> None:
    """Set `agent` up and bring it to where the ledger ends."""
    agent.setup(context)
    done = ledger.num_streamed
    for batch in range(load_agent(agent, run_dir, done), done):
        agent.observe(batch, ledger.stream_batch(batch), observe_rng(context.seed, batch))


def has_opinion(agent: Agent) -> bool:
    """Whether the agent has a model of its own that best-of-n asks, and that labels alone can teach."""
    return type(agent).best_of is not Agent.best_of and not agent.needs_scorer()
