"""What is kept of runs, and what is said about them: against hand sums, and never more than the runs bear out."""

from __future__ import annotations

import json
import math

import pytest
from written_runs import write_run

from rayalign.evaluation.evaluate import TARGETS, cautious_interval, common_target, saving
from rayalign.report.standings import (
    RunCurve,
    default_marks,
    merge,
    ratio_cell,
    rows_from_plain,
    rows_to_plain,
    table,
    verdicts,
)
from rayalign.runs.record import RunRecord


def run(seed: int, labels_to_all: float, *, budget: int = 1000, **changes: object) -> RunCurve:
    """A straight curve from 0.4 that is 0.6 after `labels_to_all` labels, up to the budget."""
    slope = 0.2 / labels_to_all
    points = [0.0, budget / 2, float(budget)]
    rates = [min(0.9, 0.4 + slope * x) for x in points]
    given = {"settings": {"agent.beta": 0.1}, "code": ["1"], "steps": 10, "labels_spent": budget, **changes}
    return RunCurve(world=("w", (("seed", seed),), seed), budget=budget, labels=points, win_rate=rates, **given)


def sentence(rows: dict[str, list[RunCurve]], target: float | None = None) -> str:
    (verdict,) = verdicts(rows, "passive", target)
    return verdict.sentence


def test_a_row_that_needs_half_the_labels_in_every_seed_is_told_apart() -> None:
    rows = {
        "passive": [run(s, 600 + 10 * s) for s in range(5)],
        "sea": [run(s, 300 + 5 * s) for s in range(5)],
    }
    assert sentence(rows, 0.6) == "sea needs 0.50 [0.50, 0.50] of passive's labels to 0.60 (5 of 5 seeds)."


def test_rows_whose_order_changes_with_the_seed_are_not_told_apart() -> None:
    rows = {"passive": [run(s, 600) for s in range(4)], "sea": [run(s, (300, 900)[s % 2]) for s in range(4)]}
    said = sentence(rows, 0.6)
    assert said.startswith("sea and passive can't be told apart with 4 seeds: 0.87 [")
    assert "differs from passive's by" in said


def test_a_baseline_that_never_gets_there_makes_an_upper_bound() -> None:
    rows = {"passive": [run(s, 3000) for s in range(4)], "sea": [run(s, 200 + s) for s in range(4)]}
    said = sentence(rows, 0.6)  # passive is at 0.4 + 0.2 / 3 after 1,000 labels
    assert said.startswith("sea needs at most 0.20 [0.20, 0.20] of passive's labels to 0.60 (sea reached 0.60 in 4 and")


def test_a_row_that_never_gets_there_is_not_said_to_need_fewer() -> None:
    rows = {"passive": [run(s, 600 + s) for s in range(4)], "bad": [run(s, 3000) for s in range(4)]}
    assert sentence(rows, 0.6).startswith("bad needs at least 1.66 [")


def test_two_seeds_never_tell_rows_apart_and_one_says_so() -> None:
    rows = {"passive": [run(s, 600) for s in range(2)], "sea": [run(s, 300) for s in range(2)]}
    assert "can't be told apart with 2 seeds" in sentence(rows, 0.6)
    rows = {name: runs[:1] for name, runs in rows.items()}
    assert sentence(rows, 0.6) == "sea took 0.50 of passive's labels to 0.60 in one seed; others may differ."


def test_only_runs_of_the_same_world_and_seed_are_pairs() -> None:
    rows = {"passive": [run(s, 600) for s in range(3)], "sea": [run(s, 300) for s in range(1, 5)]}
    (verdict,) = verdicts(rows, "passive", 0.6)
    assert verdict.saving is not None and verdict.saving.pairs == 2


def test_win_rates_at_the_end_are_told_apart_where_labels_to_a_target_are_not() -> None:
    rows = {"passive": [run(s, 3000 + s) for s in range(4)], "bad": [run(s, 9000 + s) for s in range(4)]}
    said = sentence(rows, 0.6)  # nobody is at 0.6 after 1,000 labels; at the end they are at 0.467 and 0.422
    assert said.startswith(
        "Labels don't tell bad and passive apart with 4 seeds: bad reached 0.60 in 0 and passive in 0"
    )
    assert "but at the end its win rate differs from passive's by -0.044 [" in said


@pytest.mark.parametrize(
    ("row", "baseline", "value", "bound", "used"),
    [
        ([100.0, 400.0], [200.0, 800.0], 0.5, "", 2),
        ([100.0, 500.0], [None, 1000.0], math.sqrt(0.1 * 0.5), "at most", 2),
        ([None, 500.0], [500.0, 500.0], math.sqrt(2), "at least", 2),
        ([None, 500.0], [500.0, None], math.nan, "unknown", 2),
        ([None, 100.0], [None, 200.0], 0.5, "", 1),
        ([None], [None], math.nan, "", 0),
        ([0.0, 100.0], [0.0, 200.0], 0.5, "", 1),
    ],
)
def test_a_saving_is_a_geometric_mean_in_which_missing_runs_bound_it(row, baseline, value, bound, used) -> None:
    found = saving(row, baseline, 1000)
    assert found.ratio.value == pytest.approx(value, nan_ok=True)
    assert (found.bound, found.used) == (bound, used)
    assert found.pairs == len(row)


def test_a_cautious_interval_is_never_narrower_than_students() -> None:
    values = [0.1, 0.4, 0.2, 0.9]
    found = cautious_interval(values)
    # mean 0.4, s = sqrt((0.09 + 0 + 0.04 + 0.25) / 3), t with 3 degrees of freedom 3.1824
    half = 3.182446 * math.sqrt(0.38 / 3) / 2
    assert found.value == pytest.approx(0.4)
    assert found.low <= 0.4 - half + 1e-6 and found.high >= 0.4 + half - 1e-6


def test_the_common_target_is_where_the_baseline_mostly_ends() -> None:
    targets = [0.5, 0.6, 0.7, 0.8]
    passive = [[0.0, 1.0, 1.0], [5.0, 5.0, 5.0], [9.0, 9.0, None], [None, None, 9.0]]
    sea = [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0], [4.0, 4.0, 4.0]]
    assert common_target({"passive": passive, "sea": sea}, targets, "passive") == 0.7
    never = [[0.0] * 3, *[[None] * 3] * 3]
    assert common_target({"passive": never, "sea": sea}, targets, "passive") == 0.8  # where any row got
    assert common_target({"passive": never}, targets, "passive") is None


def test_rows_come_back_from_json_as_they_were(tmp_path) -> None:
    record = RunRecord.read(write_run(tmp_path / "sea-0", "sea", 0, last=0.9))
    rows = {"sea": [RunCurve.of(record)], "passive": [run(0, 600)]}
    stored = json.loads(json.dumps(rows_to_plain(rows, [100])))
    back = rows_from_plain(stored, 1000)
    assert back == rows
    assert back["sea"][0].labels_to(0.65) == record.labels_to(0.65) == pytest.approx(50.0)
    assert stored["sea"]["win_rate_at"]["100"] == [pytest.approx(0.9)]
    assert table(back, [100], [0.65]) == table(rows, [100], [0.65])


def test_rows_stored_without_curves_keep_their_numbers() -> None:
    rows = {"sea": [run(3, 400), run(4, 500)]}
    marks = default_marks(1000)
    stored = json.loads(json.dumps(rows_to_plain(rows, marks)))
    del stored["sea"]["runs"]
    back = rows_from_plain(stored, 1000)["sea"]
    assert [r.labels_to(0.6) for r in back] == [r.labels_to(0.6) for r in rows["sea"]]
    assert [r.area for r in back] == [r.area for r in rows["sea"]]
    assert [r.world for r in back] == [r.world for r in rows["sea"]]
    assert table({"sea": back}, marks, TARGETS[2:4]) == table(rows, marks, TARGETS[2:4])


def test_a_new_run_replaces_the_old_one_of_its_world_and_others_stay() -> None:
    old = {"passive": [run(0, 600), run(1, 600)], "sea": [run(0, 300)]}
    merged, notes = merge(old, {"passive": [run(1, 500)]})
    assert [r.labels_to(0.6) for r in merged["passive"]] == [pytest.approx(600), pytest.approx(500)]
    assert len(merged["sea"]) == 1 and not notes


def test_old_runs_of_a_row_whose_settings_changed_are_dropped_with_a_note() -> None:
    old = {"sea": [run(0, 300), run(1, 300)]}
    merged, notes = merge(old, {"sea": [run(1, 300, settings={"agent.beta": 0.2})]})
    assert len(merged["sea"]) == 1
    assert notes == ["sea: 1 earlier runs dropped, their settings were others (agent.beta)"]


def test_a_ratio_says_what_it_is_made_of() -> None:
    assert ratio_cell(saving([100.0, None], [200.0, None], 1000)) == "0.50 (1 pair, 1 left out)"
    assert ratio_cell(saving([None, 500.0], [500.0, None], 1000)) == "– (reached in 1 and 1 of 2)"


def test_answers_that_agents_picked_have_a_column_where_there_are_any():
    head, lines = table(
        {"a": [run(0, 600, best_of_n=0.75), run(1, 600, best_of_n=0.75)], "b": [run(0, 600)]}, [500], []
    )
    at = head.index("best of n at the end")
    assert [line[at] for line in lines] == ["0.750 [0.750, 0.750]", "-"]
    assert "best of n at the end" not in table({"b": [run(0, 600)]}, [500], [])[0]
