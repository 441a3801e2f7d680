"""A run directory as the reports read it: settings, numbers and answers, finished or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayalign import storage
from rayalign.system.code_version import recorded
from rayalign.config import flatten, read_yaml
from rayalign.errors import DataError
from rayalign.evaluation.evaluate import Estimate, labels_to_target, wilson_interval
from rayalign.runs.logs import METRICS, read_evaluations, read_metrics, read_samples, read_timeline

CONFIG = "config.yaml"
"""All settings; its presence says that a directory holds a run."""
REPLAY = "replay.yaml"
"""Whose ledger a replay trained on; its presence says that nothing may be bought in this directory."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything that one run wrote about itself."""

    path: Path
    settings: Row
    """Dotted name -> value."""
    metrics: list[Row]
    """One row per batch."""
    evaluations: list[Row]
    """One row per evaluation, by labels."""
    timeline: list[Row]
    """One row per span of work."""
    samples: list[Row]
    """Held-out answers: labels, prompt, response, reference."""
    result: Row
    """What `result.json` says; empty while the run is not finished."""
    code: tuple[str, ...] = ()
    """Versions of the code that worked on it (`rayalign.system.code_version`)."""

    @classmethod
    def read(cls, run_dir: str | Path) -> RunRecord:
        """Read a run directory. Raises `DataError` if it holds no run."""
        path = storage.fetched(run_dir)
        config, result = path / CONFIG, path / "result.json"
        if not config.exists() and not (path / METRICS).exists():
            raise DataError(f"{storage.plain(run_dir)!r} holds no run (no {CONFIG}, no {METRICS}); name the folder of a run.")
        return cls(
            path=path,
            settings=flatten(read_yaml(config.read_text())) if config.exists() else {},
            metrics=read_metrics(path),
            evaluations=read_evaluations(path),
            timeline=read_timeline(path),
            samples=read_samples(path),
            result=json.loads(result.read_text()) if result.exists() else {},
            code=tuple(recorded(path)),
        )

    @property
    def agent(self) -> str:
        """Registered name of the agent; a replay says so."""
        return str(self.settings.get("agent_name", "?")) + (" (replay)" if self.is_replay else "")

    @property
    def is_replay(self) -> bool:
        """Whether it trained on the labels of another run, and bought none."""
        return (self.path / REPLAY).exists()

    @property
    def env(self) -> str:
        """Id of the environment, with its keyword arguments."""
        kwargs = ", ".join(f"{key}={value}" for key, value in self._env_kwargs())
        return f"{self.settings.get('env', '?')}" + (f" ({kwargs})" if kwargs else "")

    @property
    def seed(self) -> Any:
        """The run's seed."""
        return self.settings.get("loop.seed", "?")

    @property
    def world(self) -> tuple[Any, ...]:
        """What has to agree for two runs to be a pair: environment, its arguments, and the seed."""
        return (self.settings.get("env"), tuple(self._env_kwargs()), self.seed)

    @property
    def labels_spent(self) -> int:
        """Labels bought for training so far."""
        if self.is_replay:
            return 0
        seen = [int(row["labels"]) for row in self.metrics if "labels" in row]
        return int(self.result.get("labels_spent", max(seen, default=0)))

    @property
    def labels_replayed(self) -> int:
        """Labels of another run that a replay trains on, all of them; 0 for a run."""
        return int(self.settings.get("loop.budget", 0)) if self.is_replay else 0

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.result)

    def online(self) -> Row:
        """Numbers about online users (see `Result.online`), of the end or of the last batch; empty without users."""
        prefix = "online/"
        last = next((row for row in reversed(self.metrics) if prefix + "questions" in row), {})
        so_far = {name.removeprefix(prefix): value for name, value in last.items() if name.startswith(prefix)}
        return dict(self.result.get("online") or so_far)

    def before(self) -> Estimate | None:
        """Held-out win rate of the initial policy with its 95% Wilson interval; None if it was not evaluated."""
        return interval(self.evaluations[0]) if self.evaluations and self.evaluations[0].get("labels") == 0 else None

    def after(self) -> Estimate | None:
        """The same for the last policy that was evaluated."""
        return interval(self.evaluations[-1]) if self.evaluations else None

    def curve(self, name: str = "win_rate") -> tuple[list[float], list[Any]]:
        """Labels and values of an evaluation's column; None where it is absent."""
        return [row["labels"] for row in self.evaluations], [row.get(name) for row in self.evaluations]

    def labels_to(self, target: float) -> float | None:
        """Labels at which the held-out win rate first reached `target`."""
        return labels_to_target(*self.curve(), target)

    def series(self, name: str, axis: str = "batch") -> tuple[list[float], list[float]]:
        """A metric against `axis`, where both are there."""
        rows = [row for row in self.metrics if row.get(name) is not None and row.get(axis) is not None]
        return [row[axis] for row in rows], [row[name] for row in rows]

    def _env_kwargs(self) -> list[tuple[str, Any]]:
        prefix = "env_kwargs."
        return sorted((k.removeprefix(prefix), v) for k, v in self.settings.items() if k.startswith(prefix))


def interval(evaluation: Row) -> Estimate | None:
    """Win rate of an evaluation with its 95% Wilson interval over prompts."""
    rate = evaluation.get("win_rate")
    return None if rate is None else wilson_interval(float(rate), int(evaluation.get("num_prompts") or 0))


def answers(record: RunRecord, limit: int = 10) -> list[Row]:
    """For held-out prompts: the first answer (if it was given before training), the last one, and the opponent's."""
    last = max((row["labels"] for row in record.samples), default=0)
    first = {row["prompt"]: row for row in record.samples if row["labels"] == 0}
    final = {row["prompt"]: row for row in record.samples if row["labels"] == last}
    rows = [
        {
            "prompt": prompt,
            "initial": first[prompt]["response"] if prompt in first and last > 0 else None,
            "final": row["response"],
            "reference": row.get("reference"),
        }
        for prompt, row in final.items()
    ]
    return rows[:limit]


def group(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs that differ in nothing but seed and world, under a name that says what tells the groups apart."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        varied = _varied([other for other in records if other.agent == record.agent])
        parts = [f"{name}={record.settings[name]}" for name in varied if name in record.settings]
        groups.setdefault(", ".join([record.agent, *parts]), []).append(record)
    return groups


def _varied(records: Sequence[RunRecord]) -> list[str]:
    """Settings whose values differ between the runs and are part of what is compared."""
    worlds = len({record.world[1] for record in records})
    names = dict.fromkeys(name for record in records for name in record.settings)
    return [
        name
        for name in names
        if not name.startswith(("loop.seed", "run_dir", "logging.", "env_kwargs."))
        and not (name == "policy" and worlds > 1)  # each world brings its own initial policy
        and len({repr(record.settings.get(name)) for record in records}) > 1
    ]
