"""The gate in a whole run: nothing is generated with weights that are too old, and generation overlaps learning."""

from whole_runs import WITH_ENGINE, contents

from rayalign.ledger import Ledger
from rayalign.logs import read_timeline


def test_generation_runs_ahead_within_the_bound_and_overlaps_learning(small_run):
    result = small_run(budget=64, max_staleness=2, **WITH_ENGINE | {"evaluation.every": 0})
    staleness = result.history["staleness"].to_pylist()
    assert max(staleness) in (1, 2) and min(staleness) == 0

    ledger = Ledger(result.path / "ledger.arrow", read_only=True)
    for preference in ledger.preferences():
        for candidate in (preference.duel.first, preference.duel.second):
            assert 0 <= preference.duel.batch - candidate.policy_version <= 2

    spans = read_timeline(result.path)
    learning = [s for s in spans if s["role"] == "learner" and s["stage"] in ("reference", "learn")]
    collecting = [s for s in spans if s["role"] == "collector" and s["stage"] in ("generate", "label")]
    together = [
        (a["batch"], b["batch"])
        for a in learning
        for b in collecting
        if a["start"] < b["end"] and b["start"] < a["end"]
    ]
    assert any(learnt < collected for learnt, collected in together)


def test_offline_buys_every_pair_from_the_initial_policy_before_it_trains_over_them_again(small_run):
    result = small_run(budget=16, **{"agent.schedule": "offline", "loop.epochs": 2, "evaluation.every": 0})
    bought = contents(result.path)
    assert len(bought) == 16 and {version for *_, version, _ in bought} == {0}
    assert result.evaluations["version"].to_pylist()[-1] == 8  # 4 batches, twice
