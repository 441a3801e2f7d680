"""The display: what it works out from snapshots, and that it never stops a run."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayalign.report.progress import Progress, ProgressState, summary_rows
from rayalign.runs.logs import LoggingConfig, RunLog
from rayalign.runs.result import Result


def screen(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=terminal, legacy_windows=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def snapshot(batch: int, **more: Any) -> dict[str, Any]:
    return {"budget": 1000, "labels": 100 * batch, "batch": batch, "phase": "collecting", "staleness": 1, **more}


def test_time_left_is_measured_from_the_first_labels_on_and_not_from_the_start() -> None:
    state = ProgressState(title="t", run_dir="r")
    state.update(snapshot(0), now=0.0)
    assert state.eta_s() is None
    state.update(snapshot(1), now=500.0)  # a long start
    assert state.eta_s() is None
    state.update(snapshot(3), now=520.0)  # 200 labels in 20 s, 700 to go
    assert state.eta_s() == pytest.approx(70.0)


def test_a_resumed_run_measures_its_own_rate() -> None:
    state = ProgressState(title="t", run_dir="r")
    state.update(snapshot(5), now=0.0)
    state.update(snapshot(6), now=10.0)
    assert state.eta_s() == pytest.approx(40.0)


def test_a_plain_display_says_first_where_the_run_is() -> None:
    console = screen()
    Progress(LoggingConfig(progress="plain"), title="sea on Haiku", run_dir="runs/mine", console=console)
    assert text_of(console) == "sea on Haiku: runs/mine\n"


def test_the_panel_says_what_the_learner_spends_its_time_on() -> None:
    state = ProgressState(title="t", run_dir="r")
    state.update(snapshot(1, **{"learner/loss": 0.5, "learner/seconds/learn": 0.25, "seconds/generate": 2.0}), now=0.0)
    console = screen()
    console.print(state.panel())
    assert "loss 0.5  learn 0.25 s" in text_of(console)


def test_the_line_says_where_the_run_stands() -> None:
    state = ProgressState(title="t", run_dir="r")
    state.update(snapshot(1, win_rate=0.4), now=0.0)
    state.update(
        snapshot(2, win_rate=0.55, win_rate_stderr=0.02, **{"seconds/generate": 2.0, "learner/loss": 0.5}), now=65.0
    )
    assert state.line() == (
        "[1:05] collecting: 200/1000 labels, win rate 0.550 ±0.020  (+0.150), 2.00 s/batch, staleness 1, loss 0.5000, "
        "8:40 left"
    )


def test_stage_times_count_once_per_batch_however_often_it_is_asked() -> None:
    state = ProgressState(title="t", run_dir="r")
    for _ in range(5):
        state.update(snapshot(1, **{"seconds/label": 1.0}), now=0.0)
    state.update(snapshot(2, **{"seconds/label": 2.0}), now=1.0)
    assert state.seconds == {"label": pytest.approx(0.8 * 1.0 + 0.2 * 2.0)}


def test_the_plain_display_prints_a_line_now_and_then_and_at_each_new_phase() -> None:
    console = screen()
    display = Progress(LoggingConfig(progress_every_s=1000.0), title="t", run_dir="r", console=console)
    for batch in range(20):
        display.update(snapshot(batch))
    display.update(snapshot(20, phase="finishing"))
    lines = text_of(console).splitlines()
    assert len(lines) == 3
    assert "collecting: 0/1000" in lines[1]
    assert "finishing: 2000/1000" in lines[2]


def test_the_live_display_shows_labels_win_rate_stages_and_staleness() -> None:
    console = screen(terminal=True)
    display = Progress(LoggingConfig(), title="sea on [world]", run_dir="r", console=console)
    display.update(snapshot(2, win_rate=0.61, version=1, **{"seconds/generate": 1.0, "learner/loss": 0.25}))
    display.close()
    for part in ("sea on [world]", "200 of 1,000", "0.610", "generate 1.00", "loss 0.25", "1 batches"):
        assert part in text_of(console)


def test_nothing_is_shown_when_it_is_off() -> None:
    console = screen(terminal=True)
    display = Progress(LoggingConfig(progress="off"), title="t", run_dir="r", console=console)
    display.update(snapshot(1))
    display.close()
    assert text_of(console) == ""


def test_following_asks_until_the_block_ends_and_survives_errors() -> None:
    console = screen()
    display = Progress(LoggingConfig(), title="t", run_dir="r", console=console)
    asked: list[int] = []

    def status() -> dict[str, Any]:
        asked.append(1)
        raise TimeoutError("collector is busy")

    with display.following(status):
        deadline = time.monotonic() + 10
        while not asked and time.monotonic() < deadline:
            time.sleep(0.05)
    assert asked
    assert "no answer from the collector (TimeoutError)" in text_of(console)


def test_the_summary_tells_before_after_labels_and_places(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for version, (labels, rate) in enumerate([(0, 0.41), (100, 0.51), (200, 0.71)]):
        log.evaluation({"labels": labels, "version": version, "win_rate": rate})
    result = Result(
        path=tmp_path,
        win_rate=0.71,
        win_rate_stderr=0.03,
        initial_win_rate=0.41,
        labels_spent=200,
        labels_spent_on_evaluation=600,
        checkpoint=tmp_path / "checkpoint",
        warning="stopped early",
    )
    rows = dict(summary_rows(result))
    assert rows["win rate before"] == "0.410"
    assert rows["win rate after"] == "0.710 ±0.030 (standard error over prompts)"
    assert rows["labels spent"] == "200 (and 600 for evaluation)"
    assert rows["labels to 0.65"] == "170"  # 0.14 / 0.20 of the way from 100 to 200
    assert rows["labels to 0.75"] == "not reached"
    assert rows["policy"].endswith("checkpoint")
    assert rows["warning"] == "stopped early"
    console = screen()
    Progress(LoggingConfig(), title="t", run_dir="r", console=console).summary(result)
    assert "labels spent" in text_of(console)
