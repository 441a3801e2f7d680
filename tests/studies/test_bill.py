"""What a comparison says that it buys, before it starts. Nothing here starts Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_runs import made_run
from whole_runs import SMALL

import rayalign
from rayalign.errors import ConfigError
from rayalign.studies.bill import bill
from rayalign.studies.comparison import _job, _plan, read_rows

EACH = {**SMALL, "loop.budget": 12}
"""Evaluated at the start and at the end: 2 x 4 prompts a run."""


def told(folder: Path, rows: str = "passive,twice=passive:learner.updates_per_batch=2", **settings: Any) -> str:
    return bill(*planned(folder, rows, **settings))


def planned(folder: Path, rows: str, **settings: Any) -> tuple[Any, Any]:
    given = (EACH | settings, 0, False)
    env = "rayalign/Tabular-v0"
    found = read_rows(rows)
    jobs = {r.name: [_job(r, env, None, None, given[0], seed, False, folder) for seed in (0, 1, 2)] for r in found}
    return jobs, {r.name: _plan(r, env, None, None, *given) for r in found}


def test_all_rows_and_seeds_are_counted_and_money_only_where_prices_are_set(tmp_path: Path) -> None:
    assert told(tmp_path) == "2 rows x 3 seeds x 12 labels = 72; for evaluation at most 48 more"
    priced = told(tmp_path, **{"oracle.price": 0.5, "evaluation.at_start": False})  # 6 runs x (12 + 4) x 0.5
    assert priced.endswith("for evaluation at most 24 more; left to pay at most 48.00 by the prices in the settings")


def test_rows_of_equal_settings_are_one_run_each_seed(tmp_path: Path) -> None:
    assert told(tmp_path, "passive,other=xpo").startswith("2 rows x 3 seeds x 12 labels = 72;")
    assert told(tmp_path, "passive,other=passive").startswith("3 runs x 12 labels = 36;")


def test_what_is_bought_already_is_said_and_not_counted_again(tmp_path: Path) -> None:
    jobs, plans = planned(tmp_path, "passive,twice=passive:learner.updates_per_batch=2", **{"oracle.price": 0.5})
    made_run(jobs["passive"][0].folder, batches=3)  # finished
    made_run(jobs["twice"][2].folder, batches=2)  # broken off after 8 labels
    (jobs["twice"][2].folder / "result.json").unlink()
    line = bill(jobs, plans)
    assert "= 72, of which 20 bought already" in line
    # left: 4 runs x (12 + 8), and 4 + 8 of the one that goes on, half a unit each
    assert line.endswith("left to pay at most 46.00 by the prices in the settings")
    for job in (job for own in jobs.values() for job in own):
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "result.json").write_text("{}")
    assert bill(jobs, plans) == "2 rows x 3 seeds: all finished, nothing is left to buy"


def test_a_judge_without_a_price_and_a_cap_of_each_run_are_named(tmp_path: Path) -> None:
    judge = {"oracle.kind": "judge", "oracle.target": "m", "oracle.judge.base_url": "http://localhost:1/v1"}
    assert told(tmp_path, **judge).endswith("oracle.judge.price is not set, so what it costs is not counted")
    capped = judge | {"oracle.judge.price": 0.1, "oracle.judge.max_spend": 3.0}  # two orders: 0.2 a label
    assert told(tmp_path, **capped).endswith(
        "left to pay at most 24.00 by the prices in the settings; oracle.judge.max_spend=3 holds for each run"
    )


def test_the_line_comes_before_anything_is_started_and_not_at_all_where_the_comparison_is_refused(
    tmp_path: Path,
) -> None:
    class Stop(Exception):
        pass

    def announce(line: str) -> None:
        assert not (tmp_path / "out").exists()
        raise Stop(line)

    asked = {**EACH, "seeds": 2, "out": tmp_path / "out", "announce": announce}
    with pytest.raises(Stop, match="2 rows x 2 seeds x 12 labels = 48"):
        rayalign.compare(["passive", "xpo"], "rayalign/Tabular-v0", **asked)
    with pytest.raises(ConfigError, match=r"row .b.: "):
        rayalign.compare(["passive", "b=xpo:agent.bta=1"], "rayalign/Tabular-v0", **asked)
