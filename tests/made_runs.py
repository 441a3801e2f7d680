"""Directories of finished runs without a cluster: settings and ledger as a run writes them, the initial policy.

For tests of what comes after a run, where it does not matter that the policy has not learned anything.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from whole_runs import SMALL

from rayalign.env.truth import TruthOracle
from rayalign.ledger.ledger import Ledger
from rayalign.ledger.purchase import Purchaser
from rayalign.loop import preparation
from rayalign.rollout.encode import PromptEncoder
from rayalign.rollout.transformers_engine import TransformersEngine
from rayalign.runs.result import Result
from rayalign.types import Duel

SEA = {
    "agent.num_candidates": 4,
    "agent.posterior.updates": 5,
    "rollout.temperature": 1.0,
}


def made_run(folder: Path, agent: str = "passive", batches: int = 3, **settings: object) -> Result:
    """A run of `agent` on the tabular world whose labels, four a batch, are the truth."""
    given = {
        **SMALL,
        "loop.budget": 4 * batches,
        **(SEA if agent == "sea" else {}),
        **settings,
    }
    plan = preparation.new_run(agent, "rayalign/Tabular-v0", run_dir=folder, given=given)
    config = plan.config
    encoder, engine = PromptEncoder(config.policy), TransformersEngine(config.policy)
    with Ledger(folder / "ledger.arrow") as ledger:
        desk = Purchaser(ledger, TruthOracle(plan.world), mode="deterministic", budget=config.loop.budget)
        for batch in range(batches):
            prompts = [encoder.encode(plan.world.prompt(4 * batch + i)) for i in range(4)]
            groups = engine.generate(prompts, config.rollout.sampling(n=8), seed=batch)
            duels = [
                Duel(
                    id=f"{batch}-{i}",
                    batch=batch,
                    prompt=prompt,
                    first=group[0],
                    second=next((other for other in group if other.text != group[0].text), group[1]),
                )
                for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
            ]
            desk.commit(batch, duels)
            desk.label(duels)
    shutil.copytree(config.policy, folder / "checkpoint")
    result = Result(
        path=folder,
        win_rate=0.5,
        win_rate_stderr=0.1,
        initial_win_rate=0.5,
        labels_spent=4 * batches,
        labels_spent_on_evaluation=0,
        checkpoint=folder / "checkpoint",
    )
    result.save()
    return result
