"""The record of a run: what is written is what is read, whatever happened in between."""

from __future__ import annotations

import importlib.util
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rayalign.errors import ConfigError
from rayalign.runs.logs import (
    LoggingConfig,
    RunLog,
    read_evaluations,
    read_metrics,
    read_timeline,
    to_table,
    validate,
)


def test_numbers_of_several_writers_are_merged_by_batch_in_order(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.metrics({"batch": 1, "labels": 64})
    log.metrics({"batch": 0, "labels": 32})
    log.metrics({"batch": 0, "learner/loss": 0.5})
    assert read_metrics(tmp_path) == [{"batch": 0, "labels": 32, "learner/loss": 0.5}, {"batch": 1, "labels": 64}]


def test_a_record_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.metrics({"batch": 0, "labels": 1})
    assert len(read_metrics(tmp_path)) == 1  # nothing is buffered
    log.close()


def test_after_a_resume_the_last_word_on_a_batch_wins(tmp_path: Path) -> None:
    first = RunLog(tmp_path)
    for batch in range(3):
        first.metrics({"batch": batch, "labels": 10 * batch, "seconds/label": 1.0})
        first.evaluation({"labels": 10 * batch, "version": batch, "win_rate": 0.1})
    first.close()
    second = RunLog(tmp_path)
    second.metrics({"batch": 2, "labels": 20, "seconds/label": 9.0})
    second.evaluation({"labels": 20, "version": 2, "win_rate": 0.9})
    second.close()
    assert [row["seconds/label"] for row in read_metrics(tmp_path)] == [1.0, 1.0, 9.0]
    assert [row["win_rate"] for row in read_evaluations(tmp_path)] == [0.1, 0.1, 0.9]


def test_evaluations_at_the_same_labels_but_of_other_weights_are_both_kept(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.evaluation({"labels": 100, "version": 5, "win_rate": 0.5})
    log.evaluation({"labels": 100, "version": 9, "win_rate": 0.6})
    assert [row["version"] for row in read_evaluations(tmp_path)] == [5, 9]


def test_half_a_line_of_a_killed_process_costs_nothing_but_itself(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.metrics({"batch": 0, "labels": 1})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"batch": 1, "lab')
    assert [row["batch"] for row in read_metrics(tmp_path)] == [0]
    again = RunLog(tmp_path)
    again.metrics({"batch": 1, "labels": 2})
    assert [row["batch"] for row in read_metrics(tmp_path)] == [0, 1]


def test_what_is_not_finite_is_null_and_numpy_numbers_are_plain(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.metrics({"batch": np.int64(0), "a": math.nan, "b": np.float32(0.5), "c": -math.inf, "d": "text"})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"batch": 0, "a": None, "b": 0.5, "c": None, "d": "text"}


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    log = RunLog(tmp_path)

    def work(role: str) -> None:
        for batch in range(200):
            log.timeline(role, "work" * 50, batch, batch, batch + 1)

    threads = [threading.Thread(target=work, args=(f"role-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = read_timeline(tmp_path)
    assert len(rows) == 800
    assert [row["start"] for row in rows] == sorted(row["start"] for row in rows)


def test_a_directory_without_a_record_reads_as_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == read_evaluations(tmp_path) == read_timeline(tmp_path) == []


def test_tensorboard_shows_training_by_batch_evaluation_by_labels_and_hides_what_a_resume_repeats(
    tmp_path: Path,
) -> None:
    first = RunLog(tmp_path)
    for batch in range(3):
        first.metrics({"batch": batch, "learner/loss": 1.0, "phase": "not a number"})
    first.evaluation({"labels": 96, "win_rate": 0.6})
    first.close()
    second = RunLog(tmp_path)
    second.metrics({"batch": 2, "learner/loss": 0.5})
    second.close()
    training = EventAccumulator(str(tmp_path / "tensorboard" / "training")).Reload()
    assert [(e.step, e.value) for e in training.Scalars("learner/loss")] == [(0, 1.0), (1, 1.0), (2, 0.5)]
    assert "phase" not in training.Tags()["scalars"]
    evaluation = EventAccumulator(str(tmp_path / "tensorboard" / "evaluation")).Reload()
    assert [e.step for e in evaluation.Scalars("win_rate")] == [96]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed here")
    with pytest.raises(ConfigError, match=rf"logging\.{name}=true, but the package {name} is not installed"):
        validate(LoggingConfig(**{name: True}))


def test_an_unknown_progress_mode_is_named() -> None:
    with pytest.raises(ConfigError, match=r"logging\.progress='loud' must be one of auto, live, plain, off"):
        LoggingConfig(progress="loud")


def test_mlflow_gets_the_numbers_and_a_resume_goes_on_with_the_same_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    config = LoggingConfig(mlflow=True, mlflow_uri=f"sqlite:///{tmp_path}/mlflow.db")
    for batch in range(2):
        log = RunLog(tmp_path / "run", config, resolved=config)
        log.metrics({"batch": batch, "learner/loss": 1.0 / (1 + batch)})
        log.close()
    client = mlflow.MlflowClient(tracking_uri=config.mlflow_uri)
    run_id = (tmp_path / "run" / "mlflow_id.txt").read_text()
    history = client.get_metric_history(run_id, "training/learner/loss")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (1, 0.5)]
    assert client.get_run(run_id).data.params["mlflow_experiment"] == "rayalign"


def test_wandb_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = RunLog(tmp_path / "run", LoggingConfig(wandb=True), resolved=LoggingConfig())
    log.metrics({"batch": 0, "learner/loss": 1.0})
    log.evaluation({"labels": 0, "win_rate": 0.5})
    log.close()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_a_table_has_every_column_that_any_row_has() -> None:
    table = to_table([{"a": 1}, {"b": 2.5, "a": 3}])
    assert table.to_pylist() == [{"a": 1, "b": None}, {"a": 3, "b": 2.5}]
    assert to_table([]).num_rows == 0
