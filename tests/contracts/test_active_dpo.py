"""Whole runs of ActiveDPO and APO: what they know of earlier batches survives a restart."""

from whole_runs import contents

import rayalign
from rayalign.ledger.ledger import Ledger

QUICK = {
    "evaluation.every": 0,
    "learner.checkpoint_every": 2,
    "agent.prompts_per_duel": 2,
    "loop.agent_checkpoint_every": 3,  # the first restart replays every batch, the second run of it one of four
}


def test_active_dpo_that_went_on_after_a_restart_bought_what_it_would_have_bought_without_one(small_run):
    settings = {**QUICK, "agent.dim": 32, "scorer.lora_rank": 2}
    whole = small_run("whole", agent="active_dpo", budget=16, **settings)
    part = small_run("part", agent="active_dpo", budget=8, **settings)
    resumed = rayalign.resume(part.path, budget=16)

    def bought(result):
        return [row[1:] for row in contents(result.path)]  # a duel's id names its run

    assert resumed.labels_spent == whole.labels_spent == 16
    assert bought(resumed) == bought(whole)
    assert whole.history["version"].to_pylist() == [0, 1, 2, 3]


def test_apo_asks_about_the_initial_policys_responses_alone(small_run):
    result = small_run(agent="apo", budget=8, **QUICK)
    duels = [p.duel for p in Ledger(result.path / "ledger.arrow", read_only=True).preferences()]
    assert {side.policy_version for duel in duels for side in (duel.first, duel.second)} == {0}
    assert len(duels) == result.labels_spent == 8 and all(duel.meta["uncertainty"] >= 0 for duel in duels)
