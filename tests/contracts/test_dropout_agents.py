"""Whole runs of the agents that ask the policy itself, by dropout, which prompts are worth a label."""

import pyarrow.compute as pc
import pytest

import rayalign
from rayalign.ledger.ledger import Ledger

SMALL = {
    "loop.batch_size": 4,
    "rollout.num_replicas": 0,  # engines in the collector's process: two that need not be started
    "evaluation.num_prompts": 4,
    "evaluation.every": 0,
    "learner.checkpoint_every": 2,
    "logging.progress": "off",
}


@pytest.fixture
def small_run(cluster, tmp_path):
    def start(agent, **settings):
        return rayalign.run(
            agent, "rayalign/TinyWorld-v0", budget=8, seed=3, run_dir=tmp_path / "run", **SMALL, **settings
        )

    return start


def preferences(result):
    return list(Ledger(result.path / "ledger.arrow", read_only=True).preferences())


def test_ae_borda_dpo_asks_about_a_third_of_the_prompts_the_policys_best_against_one_of_the_reference(small_run):
    result = small_run("ae_borda_dpo", **{"agent.num_candidates": 4, "agent.num_opponents": 3})
    bought = preferences(result)
    assert result.labels_spent == len(bought) == 8
    assert pc.sum(result.history["skipped"]).as_py() == 2 * 8, "12 prompts a batch for 4 labels"
    assert [p.duel.first.policy_version for p in bought] == [0] * 4 + [1] * 4
    assert {(p.duel.second.policy_version, p.duel.second.source) for p in bought} == {(0, "reference")}
    alphas = {p.duel.prompt.id: p.duel.meta["alpha"] for p in bought}
    assert len(alphas) == 8 and all(0 < alpha < 1 for alpha in alphas.values())
    assert all(p.duel.first.text != p.duel.second.text and p.duel.meta["upper"] > 0.5 for p in bought)


def test_us_dpo_asks_about_the_given_pairs_with_the_largest_variance(small_run):
    result = small_run("us_dpo")
    bought = preferences(result)
    assert result.labels_spent == len(bought) == 8
    assert pc.sum(result.history["skipped"]).as_py() == 2 * 12, "16 pairs a batch for 4 labels"
    assert all(p.duel.first.source == p.duel.second.source == "data" for p in bought)
    assert all((p.duel.first.text, p.duel.second.text) == p.duel.prompt.pair for p in bought)
