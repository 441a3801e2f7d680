"""Whole runs of agents that use the loop in other ways than `passive` and `sea` do."""

import importlib
from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
from ray import cloudpickle
from whole_runs import contents

import rayalign
from rayalign.ledger.ledger import Ledger

GUIDE = Path(__file__).parents[2] / "docs" / "adding_an_agent.md"
QUICK = {
    "evaluation.every": 0,
    "learner.checkpoint_every": 2,
    "rollout.num_replicas": 0,  # engines and scorers inside the collector: fewer processes to start
    "scorer.num_replicas": 0,
}


def preferences(result):
    return Ledger(result.path / "ledger.arrow", read_only=True).preferences()


def test_the_agent_of_the_guide_is_added_by_its_import_path_and_spends_labels_where_it_says(
    small_run, tmp_path, monkeypatch
):
    (tmp_path / "extremes.py").write_text(GUIDE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("extremes")
    cloudpickle.register_pickle_by_value(module)  # this cluster's workers were started without the folder
    result = small_run(agent="extremes:Extremes", budget=6, **{**QUICK, "agent.num_candidates": 5})
    bought = list(preferences(result))
    assert result.labels_spent == len(bought) == 6
    assert pc.sum(result.history["asked"]).as_py() == 6
    assert all(len(p.duel.first.token_ids) >= len(p.duel.second.token_ids) for p in bought)


def test_xpo_asks_about_the_policys_response_against_the_references(small_run):
    result = small_run(agent="xpo", budget=8, **QUICK)
    bought = list(preferences(result))
    assert result.labels_spent == len(bought) == 8
    assert [p.duel.first.policy_version for p in bought] == [0] * 4 + [1] * 4
    assert {(p.duel.second.policy_version, p.duel.second.source) for p in bought} == {(0, "reference")}
    assert all(p.duel.meta["y_ref"]["token_ids"] for p in bought)


def test_selm_pays_three_labels_a_prompt_and_goes_on_where_the_budget_cut_it(small_run):
    settings = {"agent.fresh": 3, "agent.iterations": 2, "agent.batches_per_iteration": 2}
    result = small_run(agent="selm", budget=10, **QUICK, **settings)
    bought = list(preferences(result))
    assert result.labels_spent == len(bought) == 10
    assert sorted(Counter(p.duel.batch for p in bought).values()) == [1, 3, 3, 3]
    assert [p.duel.first.policy_version for p in bought] == [0] * 6 + [2] * 4
    first = contents(result.path)
    more = rayalign.resume(result.path, budget=13)
    assert more.labels_spent == 13 and contents(more.path)[:10] == first


def test_apl_asks_about_the_prompts_of_highest_entropy_and_no_others(small_run):
    result = small_run(
        agent="apl", budget=6, **QUICK, **{"agent.prompts_per_duel": 3, "agent.num_candidates": 4, "loop.batch_size": 3}
    )
    bought = list(preferences(result))
    assert result.labels_spent == len(bought) == 6
    assert pc.sum(result.history["skipped"]).as_py() == 2 * 3 * 2
    assert all(p.duel.meta["margin"] == 0 for p in bought[:3]), "the initial policy is its own reference"
    assert all(p.duel.meta["entropy"] > 0 for p in bought)
