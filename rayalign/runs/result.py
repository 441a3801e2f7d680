"""What a run leaves behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayalign import storage
from rayalign.errors import DataError
from rayalign.evaluation.evaluate import labels_to_target
from rayalign.runs.logs import read_evaluations, read_metrics, to_table


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run; everything in it can be read again with `Result.load(path)`."""

    path: Path
    """Run directory; of a run in a bucket this machine's copy."""
    win_rate: float | None
    """Held-out win rate of the final policy, ties one half; None if nothing was evaluated."""
    win_rate_stderr: float | None
    """Its standard error over prompts."""
    initial_win_rate: float | None
    """The same before training."""
    labels_spent: int
    """Labels bought for training."""
    labels_spent_on_evaluation: int
    """Labels bought for evaluation, counted apart."""
    checkpoint: Path
    """Hugging Face directory of the final policy, tokenizer included."""
    warning: str | None = None
    """Why the run stopped before its budget was spent, if it did."""
    labels_replayed: int = 0
    """Labels of another run's ledger that a replay trained on; 0 for a run, which buys its own."""

    online: dict[str, float] = field(default_factory=dict)
    """With online users: `questions`, comparisons `offered`, `chosen`, `skipped`, `expired` and `open`, the share of
    choices that were no ties (`preferred_share`) and, of the `known` questions, whose truth is known, the
    `cumulative_regret`. Empty otherwise."""

    @classmethod
    def of(cls, folder: Path, **facts: Any) -> Result:
        """Of the run in `folder`, by its evaluations and by `facts`, its other fields; written down with it."""
        evaluations = read_evaluations(folder)
        first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
        result = cls(
            path=folder,
            win_rate=last.get("win_rate"),
            win_rate_stderr=last.get("stderr"),
            initial_win_rate=first.get("win_rate") if first.get("version") == 0 else None,
            labels_spent_on_evaluation=int(last.get("labels_spent_on_evaluation", 0)),
            checkpoint=folder / "checkpoint",
            **facts,
        )
        result.save()
        return result

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read a finished run's result; one in a bucket is copied. Raises `DataError` if `path` holds none."""
        shown, path = storage.plain(path), storage.fetched(path, checkpoint=True)
        file = path / "result.json"
        if not file.exists():
            raise DataError(f"{shown} holds no finished run (no result.json). `rayalign resume {shown}` finishes it.")
        stored: dict[str, Any] = json.loads(file.read_text())
        return cls(path=path, checkpoint=path / "checkpoint", **stored)

    def save(self) -> None:
        """Write `result.json`; its presence says that the run is complete."""
        stored = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("path", "checkpoint")}
        partial = self.path / "result.json.partial"
        partial.write_text(json.dumps(stored, indent=1))
        partial.rename(self.path / "result.json")

    @property
    def history(self) -> pa.Table:
        """One row per batch: labels, version, staleness, seconds by stage, the learner's and the agent's numbers."""
        return to_table(read_metrics(self.path))

    @property
    def evaluations(self) -> pa.Table:
        """One row per evaluation: labels, win rate, standard error, regret where it is known."""
        return to_table(read_evaluations(self.path))

    @property
    def preferences(self) -> pa.Table:
        """Everything that was bought or labelled by the agent: prompt, chosen, rejected and where it came from.

        The same table lies in `path / "preferences"` as Parquet: `datasets.load_dataset("parquet", data_dir=...)`.
        """
        import pyarrow.parquet as parquet

        return parquet.read_table(self.path / "preferences")

    def labels_to(self, target: float) -> float | None:
        """Labels at which the held-out win rate first reached `target` (linear interpolation); None if it never did."""
        rows = read_evaluations(self.path)
        return labels_to_target([row["labels"] for row in rows], [row["win_rate"] for row in rows], target)
