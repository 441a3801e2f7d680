"""What a search found: its trials as a table and a plot, and the best settings as they are typed.

`SearchResults.of(tune.Tuner(rayalign.trainable(...), ...).fit())`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayalign.config import flatten
from rayalign.errors import DataError
from rayalign.report.plots import compare_win_rate, png
from rayalign.report.standings import markdown
from rayalign.runs.record import RunRecord

if TYPE_CHECKING:
    from ray.tune import ResultGrid


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a search."""

    settings: Mapping[str, Any]
    """What the search chose, by dotted names."""
    labels: int
    """That its last evaluated weights were trained on."""
    bought: int
    """By itself; a trial of population-based training inherits others."""
    evaluation_labels: int
    """Bought to judge its policies, counted apart."""
    win_rate: float
    stderr: float | None
    run: RunRecord

    def curve(self, name: str = "win_rate") -> tuple[list[float], list[Any]]:
        """Labels and values at its evaluations."""
        return self.run.curve(name)


@dataclass(frozen=True, kw_only=True)
class SearchResults:
    """The trials that were evaluated at least once, the best first; and how many failed."""

    trials: Sequence[Trial]
    failed: int = 0

    @classmethod
    def of(cls, results: ResultGrid) -> SearchResults:
        """Read what the trials wrote. Raises `DataError` if none was evaluated."""
        trials = [
            Trial(
                settings=flatten(result.config or {}),
                labels=result.metrics["labels"],
                bought=result.metrics["labels_bought"],
                evaluation_labels=result.metrics.get("evaluation_labels", 0),
                win_rate=result.metrics["win_rate"],
                stderr=result.metrics.get("win_rate_stderr"),
                run=RunRecord.read(result.metrics["run_dir"]),
            )
            for result in results
            if result.metrics and "win_rate" in result.metrics
        ]
        if not trials:
            raise DataError("no trial of the search was evaluated; its errors say why.")
        return cls(trials=sorted(trials, key=lambda trial: -trial.win_rate), failed=len(results.errors))

    @property
    def best(self) -> Trial:
        """The trial with the highest last win rate. Among many trials that is an optimistic number: run it again."""
        return self.trials[0]

    @property
    def labels_bought(self) -> int:
        """By all trials together."""
        return sum(trial.bought for trial in self.trials)

    @property
    def evaluation_labels(self) -> int:
        """Of all trials together; they are not among `labels_bought`."""
        return sum(trial.evaluation_labels for trial in self.trials)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and lines: number, win rate, labels, and each setting that was searched."""
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.settings))
        head = ["trial", "win rate", "labels", "bought by it", *names]
        lines = [
            [
                str(number),
                f"{trial.win_rate:.3f}" + (f" ± {trial.stderr:.3f}" if trial.stderr is not None else ""),
                f"{trial.labels:,}",
                f"{trial.bought:,}",
                *(_short(trial.settings.get(name, "")) for name in names),
            ]
            for number, trial in enumerate(self.trials, 1)
        ]
        return head, lines

    def command(self, run: str) -> str:
        """`run` (a `rayalign run ...` command) with the best trial's settings."""
        return " ".join([run, *(f"--set {name}={value}" for name, value in self.best.settings.items())])

    def write(self, folder: str | Path) -> list[Path]:
        """`search.md` and `search.png` (win rate over labels, a line a trial) in `folder`; returns what was written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        page, plot = folder / "search.md", folder / "search.png"
        bought = (
            f"{self.labels_bought:,} labels bought by {len(self.trials)} trials, and {self.evaluation_labels:,} for"
        )
        text = [*markdown(*self.table()), "", f"{bought} evaluation, which are counted apart."]
        figure = compare_win_rate({f"trial {number}": [trial] for number, trial in enumerate(self.trials, 1)})
        if figure is not None:
            plot.write_bytes(png(figure))
            text += ["", "![win rate over labels](search.png)"]
        page.write_text("\n".join(text) + "\n", encoding="utf-8")
        return [page, plot] if figure is not None else [page]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
