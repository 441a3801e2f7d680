"""The gate in a whole run: nothing is generated with weights that are too old, and generation overlaps learning."""

from whole_runs import WITH_ENGINE, contents

from rayalign.ledger.ledger import Ledger
from rayalign.runs.logs import read_timeline


def test_generation_runs_ahead_within_the_bound_and_overlaps_learning(small_run):
    result = small_run(budget=64, max_staleness=2, **WITH_ENGINE | {"evaluation.every": 16})
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

    versions, labels = (result.evaluations[name].to_pylist() for name in ("version", "labels"))
    assert labels == [4 * version for version in versions]
    assert [number // 16 for number in labels] == list(range(5)), "each mark of the schedule is evaluated once"


def test_offline_buys_every_pair_from_the_initial_policy_before_it_trains_over_them_again(small_run):
    result = small_run(budget=16, **{"agent.schedule": "offline", "loop.epochs": 2, "evaluation.every": 0})
    bought = contents(result.path)
    assert len(bought) == 16 and {version for *_, version, _ in bought} == {0}
    assert result.evaluations["version"].to_pylist()[-1] == 8  # 4 batches, twice


def test_policies_between_the_first_and_the_last_are_evaluated_though_the_initial_one_samples_all_pairs(small_run):
    result = small_run(budget=32, **{"agent.schedule": "offline", "evaluation.every": 8})
    assert {version for *_, version, _ in contents(result.path)} == {0}
    evaluations = result.evaluations
    assert evaluations["version"].to_pylist() == [0, 2, 4, 6, 8]
    assert evaluations["labels"].to_pylist() == [0, 8, 16, 24, 32]


def test_so_are_those_within_a_round_and_the_round_goes_on_with_the_policy_that_began_it(small_run):
    schedule = {"agent.schedule": "iterative", "agent.batches_per_round": 3}
    result = small_run(budget=32, **WITH_ENGINE | schedule | {"evaluation.every": 8})
    sampled = {batch: version for _, batch, _, _, version, _ in contents(result.path)}
    assert sampled == {batch: batch - batch % 3 for batch in range(8)}
    assert result.evaluations["version"].to_pylist() == [0, 2, 4, 6, 8]
