"""What a run writes down about itself while it runs, and the functions that read it back.

    metrics.jsonl       one object per batch and writer: labels, staleness, seconds/<stage>, learner/<name>, ...
    evaluations.jsonl   one object per evaluation: labels, win_rate, stderr, ...
    timeline.jsonl      one object per span of work: role, stage, batch, start, end (unix seconds)
    tensorboard/        the same numbers; also Weights & Biases and MLflow when asked for

The JSON lines are the record that reports are made of; the others are views. A killed process may leave half a
line, and a resumed run repeats batches: readers skip the one, and let the last word win in the other.
"""

from __future__ import annotations

import importlib.util
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import pyarrow as pa

from rayalign.config import flatten, to_plain
from rayalign.errors import ConfigError

METRICS, EVALUATIONS, TIMELINE, SAMPLES = "metrics.jsonl", "evaluations.jsonl", "timeline.jsonl", "samples.jsonl"

PROGRESS_MODES = ("auto", "live", "plain", "off")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where numbers go while a run runs. JSON lines and TensorBoard files are always written."""

    progress: str = "auto"
    """Display: `live`, `plain` (a line now and then), `off`, or `auto` (live on a terminal, else plain)."""
    progress_every_s: float = 15.0
    """Seconds between two lines of the plain display."""
    report: bool = True
    """Write plots and the HTML page when the run ends; `rayalign report RUN_DIR` writes them later, too."""
    wandb: bool = False
    """Also log to Weights & Biases (the `wandb` package has to be installed; its own variables configure it)."""
    wandb_project: str = "rayalign"
    """Project in Weights & Biases."""
    mlflow: bool = False
    """Also log to MLflow (the `mlflow` package has to be installed)."""
    mlflow_uri: str | None = None
    """Tracking server or folder of MLflow; None: what its own variables say."""
    mlflow_experiment: str = "rayalign"
    """Experiment in MLflow."""

    def __post_init__(self) -> None:
        if self.progress not in PROGRESS_MODES:
            raise ConfigError(f"logging.progress={self.progress!r} must be one of {', '.join(PROGRESS_MODES)}.")
        if self.progress_every_s <= 0:
            raise ConfigError(f"logging.progress_every_s={self.progress_every_s} must be positive.")


def validate(config: LoggingConfig) -> None:
    """Raise `ConfigError` if a tracker is asked for that is not installed; called before anything is bought."""
    for name in ("wandb", "mlflow"):
        if getattr(config, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"logging.{name}=true, but the package {name} is not installed. `pip install {name}`, "
                f"or set logging.{name}=false."
            )


# -- writing ------------------------------------------------------------------------------------------------------
class RunLog:
    """Writes the record of one run. Thread-safe. Opening a run directory again appends to what is there."""

    def __init__(self, run_dir: str | Path, config: LoggingConfig | None = None, *, resolved: Any = None) -> None:
        """`resolved` is the run's whole config, which Weights & Biases and MLflow show beside the curves."""
        config = config or LoggingConfig()
        validate(config)
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        resumed = (self.run_dir / METRICS).exists()
        self._lock = threading.Lock()
        self._files: dict[str, TextIO] = {name: _open(self.run_dir / name) for name in (METRICS, EVALUATIONS, TIMELINE)}
        self._trackers: list[Tracker] = [TensorBoard(self.run_dir / "tensorboard", resumed=resumed)]
        if config.wandb:
            self._trackers.append(WeightsAndBiases(self.run_dir, config, resolved))
        if config.mlflow:
            self._trackers.append(MLflow(self.run_dir, config, resolved))

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Write numbers of batch `record["batch"]`. Several writers may each add theirs: readers merge them."""
        self._write(METRICS, record)
        self._track("training", record, step=record["batch"])

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Write one evaluation, made after `record["labels"]` labels."""
        self._write(EVALUATIONS, record)
        self._track("evaluation", record, step=record["labels"])

    def timeline(self, role: str, stage: str, batch: int, start: float, end: float) -> None:
        """Write that `role` was busy with `stage` of `batch` from `start` to `end`, unix seconds."""
        self._write(TIMELINE, {"role": role, "stage": stage, "batch": batch, "start": start, "end": end})

    def close(self) -> None:
        """Close the files and the trackers. Nothing is lost by not calling it, except a tracker's last seconds."""
        with self._lock:
            for file in self._files.values():
                file.close()
            for tracker in self._trackers:
                tracker.close()

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        line = json.dumps({key: _json_value(value) for key, value in record.items()}, allow_nan=False)
        with self._lock:
            self._files[name].write(line + "\n")
            self._files[name].flush()

    def _track(self, group: str, record: Mapping[str, Any], step: int) -> None:
        numbers = {key: float(value) for key, value in record.items() if _is_number(value)}
        with self._lock:
            for tracker in self._trackers:
                tracker.log(group, numbers, int(step))


def _open(path: Path) -> TextIO:
    """Append; what a killed process left of a line is closed off first."""
    broken = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    file = path.open("a", encoding="utf-8")
    if broken:
        file.write("\n")
    return file


def _json_value(value: Any) -> Any:
    """JSON has no NaN and no infinity; None says as much."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


class Tracker(Protocol):
    """A place where curves are looked at."""

    def log(self, group: str, numbers: Mapping[str, float], step: int) -> None:
        """Add `numbers` at `step`: the batch in group `training`, the labels in group `evaluation`."""

    def close(self) -> None:
        """Hand over what is buffered."""


class TensorBoard:
    """Event files, one folder per group because their steps count different things."""

    def __init__(self, folder: Path, *, resumed: bool) -> None:
        self.folder, self.resumed = folder, resumed
        self._writers: dict[str, Any] = {}

    def log(self, group: str, numbers: Mapping[str, float], step: int) -> None:
        """Add scalars; after a resume the group's first step hides what an earlier process wrote from there on."""
        if group not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            purge = step if self.resumed else None
            self._writers[group] = SummaryWriter(str(self.folder / group), purge_step=purge, flush_secs=10)
        for name, value in numbers.items():
            self._writers[group].add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered."""
        for writer in self._writers.values():
            writer.close()


class WeightsAndBiases:
    """One run per run directory, continued by a resume."""

    def __init__(self, run_dir: Path, config: LoggingConfig, resolved: Any) -> None:
        import wandb

        self._run = wandb.init(
            project=config.wandb_project,
            name=run_dir.name,
            id=_stored_id(run_dir / "wandb_id.txt", f"{run_dir.name}-{time.time_ns():x}"[-60:]),
            resume="allow",
            dir=str(run_dir),
            config=None if resolved is None else to_plain(resolved),
        )
        for group, axis in (("training", "batch"), ("evaluation", "labels")):
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/{axis}")

    def log(self, group: str, numbers: Mapping[str, float], step: int) -> None:
        """Add numbers; the record itself holds the axis."""
        self._run.log({f"{group}/{name}": value for name, value in numbers.items()})

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()


class MLflow:
    """One MLflow run per run directory, continued by a resume."""

    def __init__(self, run_dir: Path, config: LoggingConfig, resolved: Any) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=config.mlflow_uri)
        file = run_dir / "mlflow_id.txt"
        if not file.exists():
            found = self._client.get_experiment_by_name(config.mlflow_experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(config.mlflow_experiment)
            run = self._client.create_run(experiment, run_name=run_dir.name)
            _stored_id(file, run.info.run_id)
            for name, value in ({} if resolved is None else flatten(resolved)).items():
                self._client.log_param(run.info.run_id, name, str(value)[:500])
        self._run_id = file.read_text().strip()

    def log(self, group: str, numbers: Mapping[str, float], step: int) -> None:
        """Add metrics at `step`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(f"{group}/{name}", value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)


def _stored_id(file: Path, new: str) -> str:
    if not file.exists():
        file.write_text(new)
    return file.read_text().strip()


# -- reading ------------------------------------------------------------------------------------------------------
def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """One dict per batch, in order; the numbers of several writers merged, the last word of each name wins."""
    merged: dict[int, dict[str, Any]] = {}
    for row in read_lines(Path(run_dir) / METRICS):
        merged.setdefault(row["batch"], {}).update(row)
    return [merged[batch] for batch in sorted(merged)]


def read_evaluations(run_dir: str | Path) -> list[dict[str, Any]]:
    """One dict per evaluation, by labels and then by policy version; of a repeated one the last."""
    rows = {(row["labels"], row.get("version", 0)): row for row in read_lines(Path(run_dir) / EVALUATIONS)}
    return [rows[key] for key in sorted(rows)]


def read_timeline(run_dir: str | Path) -> list[dict[str, Any]]:
    """Every span of work, by start."""
    return sorted(read_lines(Path(run_dir) / TIMELINE), key=lambda row: row["start"])


def read_samples(run_dir: str | Path) -> list[dict[str, Any]]:
    """Answers of the evaluations, as they were written."""
    return list(read_lines(Path(run_dir) / SAMPLES))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; none if there is no file; half a line of a killed process is skipped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def to_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as an Arrow table with every column that any row has; absent values are null.

    >>> to_table([{"a": 1}, {"a": 2, "b": 0.5}]).column_names
    ['a', 'b']
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})
