"""What several agents made of their labels, side by side: kept as JSON, told as tables and one sentence a row.

    run directories -> RunCurve per row and seed --+-> JSON: whole curves and settings, enough to make all of it again
    JSON of an earlier day ------------------------+-> table, ratios to the baseline, sentences

A row is an agent with its settings; its runs differ in seed and world alone. Pairs are runs of two rows in the same
world with the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.evaluation.evaluate import (
    TARGETS,
    Estimate,
    Saving,
    area_under_curve,
    bootstrap_interval,
    cautious_interval,
    common_target,
    labels_to_target,
    saving,
)
from rayalign.runs.record import RunRecord

IRRELEVANT = (
    "run_dir",
    "logging.",
    "loop.seed",
    "env_kwargs.",
    "policy",
    "loop.gate_timeout_s",
    "oracle.target_ongoing",
)
"""Settings in which runs of one row may differ: where they are kept, how long they wait, how replicas are added, and
that each world brings its own policy."""


@dataclass(frozen=True, kw_only=True)
class RunCurve:
    """One finished run, without its directory."""

    world: tuple[Any, ...]
    """Environment, its arguments, seed: what two runs have to share to be a pair."""
    budget: int
    labels: list[float]
    """Training labels at each evaluation."""
    win_rate: list[float | None]
    """Held-out win rate at each evaluation."""
    stderr: list[float | None] = field(default_factory=list)
    """Its standard error over prompts."""
    online_win_rate: float | None = None
    """Of the duels that were bought, both responses against the reference; mean over batches."""
    best_of_n: float | None = None
    """Held-out win rate at the end of the answers that the agent picked among samples; None: it was not asked to."""
    steps: int = 0
    """Optimizer steps."""
    labels_spent: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted name -> value."""
    code: list[str] = field(default_factory=list)
    """Versions of the code that worked on it."""
    known: dict[str, float | None] = field(default_factory=dict)
    """Target -> labels, of a run whose curve was not kept whole."""
    known_area: float | None = None
    """Area under the curve of such a run."""

    @classmethod
    def of(cls, record: RunRecord) -> RunCurve:
        """What there is to keep of a run directory."""
        labels, rates = record.curve()
        online = [value for value in record.series("online_win_rate")[1] if value is not None]
        picked = [value for value in record.curve("best_of_n_win_rate")[1] if value is not None]
        losses = record.series("loss")[1] or record.series("learner/loss")[1]
        return cls(
            world=record.world,
            budget=int(record.settings.get("loop.budget", record.labels_spent)),
            labels=labels,
            win_rate=rates,
            stderr=record.curve("stderr")[1],
            online_win_rate=float(np.mean(online)) if online else None,
            best_of_n=picked[-1] if picked else None,
            steps=len(losses) * int(record.settings.get("learner.updates_per_batch", 1)),
            labels_spent=record.labels_spent,
            settings={
                k: _without_folder(v) for k, v in record.settings.items() if not k.startswith(("run_dir", "logging."))
            },
            code=list(record.code),
        )

    def curve(self, name: str = "win_rate") -> tuple[list[float], list[Any]]:
        """Labels and values, as `RunRecord.curve` gives them."""
        return self.labels, getattr(self, name)

    def labels_to(self, target: float) -> float | None:
        """Labels at which the held-out win rate first reached `target`; None if it never did."""
        if f"{target:g}" in self.known:
            return self.known[f"{target:g}"]
        return labels_to_target(self.labels, np.array(self.win_rate, dtype=float), target)

    def rate_at(self, labels: float) -> float:
        """Win rate after `labels`, linear between evaluations; NaN beyond the last."""
        points = [(x, y) for x, y in zip(self.labels, self.win_rate, strict=True) if y is not None]
        if not points or labels > points[-1][0]:
            return math.nan
        return float(np.interp(labels, np.array([x for x, _ in points]), np.array([y for _, y in points])))

    @property
    def last(self) -> float:
        """The last win rate; NaN if none was measured."""
        known = [rate for rate in self.win_rate if rate is not None]
        return known[-1] if known else math.nan

    @property
    def area(self) -> float:
        """Mean height of the curve up to the budget; NaN if the run stopped before."""
        if self.known_area is not None:
            return self.known_area
        return area_under_curve(self.labels, np.array(self.win_rate, dtype=float), up_to=float(self.budget))


FEWEST_SEEDS = 3
"""Fewer are never called enough to tell two rows apart, however alike they are."""
Rows = Mapping[str, Sequence[RunCurve]]


# -- keep and read back -------------------------------------------------------------------------------------------
def rows_to_plain(rows: Rows, marks: Sequence[int], targets: Sequence[float] = TARGETS) -> dict[str, Any]:
    """Row -> numbers by run, and the runs themselves; JSON can hold it. Every list is in the order of `worlds`."""
    return {
        name: {
            "worlds": [run.world for run in runs],
            "win_rate_at": {str(mark): [_plain(run.rate_at(mark)) for run in runs] for mark in marks},
            "area_under_curve": [_plain(run.area) for run in runs],
            "online_win_rate": [run.online_win_rate for run in runs],
            "labels_to": {f"{target:g}": [run.labels_to(target) for run in runs] for target in targets},
            "steps": [run.steps for run in runs],
            "runs": [asdict(run) for run in runs],
        }
        for name, runs in rows.items()
    }


def rows_from_plain(stored: Mapping[str, Any], budget: int) -> dict[str, list[RunCurve]]:
    """The inverse of `rows_to_plain`. Of rows that were stored without their runs (by older code, all with `budget`)
    the points that are there make the curve.
    """
    return {
        name: [RunCurve(**(run | {"world": freeze(run["world"])})) for run in row["runs"]]
        if "runs" in row
        else _runs_without_curves(row, budget)
        for name, row in stored.items()
    }


def _runs_without_curves(row: Mapping[str, Any], budget: int) -> list[RunCurve]:
    marks = sorted(row["win_rate_at"], key=float)
    return [
        RunCurve(
            world=freeze(world),
            budget=budget,
            labels=[float(mark) for mark in marks],
            win_rate=[row["win_rate_at"][mark][i] for mark in marks],
            online_win_rate=row["online_win_rate"][i],
            steps=row["steps"][i],
            labels_spent=budget,
            known={f"{float(target):g}": labels[i] for target, labels in row["labels_to"].items()},
            known_area=row["area_under_curve"][i],
        )
        for i, world in enumerate(row["worlds"])
    ]


def merge(old: Rows, new: Rows) -> tuple[dict[str, list[RunCurve]], list[str]]:
    """Rows with all their runs, a new one in place of an old one of the same world and budget; and notes.

    Runs of one row have one meaning: where the settings of a row changed since, its old runs are dropped, and a note
    says so.
    """
    merged: dict[str, list[RunCurve]] = {}
    notes = []
    for name in [*old, *(name for name in new if name not in old)]:
        fresh = list(new.get(name, ()))
        kept = [run for run in old.get(name, ()) if all(_key(run) != _key(other) for other in fresh)]
        changed = sorted({key for run in kept for other in fresh for key in differing(run, other)})
        if changed:
            notes.append(f"{name}: {len(kept)} earlier runs dropped, their settings were others ({', '.join(changed)})")
            kept = []
        merged[name] = sorted([*kept, *fresh], key=_key)
    return {name: runs for name, runs in merged.items() if runs}, notes


def differing(left: RunCurve, right: RunCurve) -> list[str]:
    """Settings that say that two runs are not of one row; of an old record without settings nothing is known."""
    if not left.settings or not right.settings or left.budget != right.budget:
        return []
    both = left.settings.keys() & right.settings.keys()  # a setting that only one knows is newer than the other run
    return [k for k in both if not k.startswith(IRRELEVANT) and left.settings[k] != right.settings[k]]


def _key(run: RunCurve) -> tuple[str, int]:
    return repr(run.world), run.budget


def freeze(value: Any) -> Any:
    """Lists as tuples, all the way down: JSON knows no tuples."""
    return tuple(freeze(item) for item in value) if isinstance(value, list | tuple) else value


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


# -- tell ---------------------------------------------------------------------------------------------------------
def default_marks(budget: int) -> list[int]:
    """Labels at which a table shows the win rate: an eighth, a quarter, half, three quarters and all of the budget."""
    return sorted({max(1, round(budget * part)) for part in (0.125, 0.25, 0.5, 0.75, 1)})


def table(
    rows: Rows, marks: Sequence[int], targets: Sequence[float], unit: str = "runs"
) -> tuple[list[str], list[list[str]]]:
    """Head and cells: win rate at `marks`, area, the duels' own win rate, labels to `targets`, steps.

    Where some agents picked among samples: the win rate of that at the end, too.
    """
    picks = any(run.best_of_n is not None for runs in rows.values() for run in runs)
    head = ["row", unit, *(f"win rate at {mark}" for mark in marks), *["best of n at the end"] * picks]
    head += ["area under curve", "duels' own win rate"]
    head += [*(f"labels to {target:.2f}" for target in targets), "steps"]
    lines = []
    for name, runs in rows.items():
        at = [[run.rate_at(mark) for run in runs] for mark in marks]
        online = [math.nan if run.online_win_rate is None else run.online_win_rate for run in runs]
        picked = [math.nan if run.best_of_n is None else run.best_of_n for run in runs]
        cells = [name, str(len(runs)), *map(mean_cell, at), *[mean_cell(picked)] * picks]
        cells += [mean_cell([run.area for run in runs]), mean_cell(online)]
        cells += [labels_cell([run.labels_to(target) for run in runs]) for target in targets]
        lines.append([*cells, f"{np.mean([run.steps for run in runs]):.0f}"])
    return head, lines


def mean_cell(values: Sequence[float]) -> str:
    """Mean and its 95% bootstrap interval over runs.

    >>> mean_cell([0.5, 0.5]), mean_cell([0.5]), mean_cell([float("nan")])
    ('0.500 [0.500, 0.500]', '0.500', '-')
    """
    estimate = bootstrap_interval(values)
    if math.isnan(estimate.value):
        return "-"
    return f"{estimate.value:.3f}" + ("" if math.isnan(estimate.low) else f" [{estimate.low:.3f}, {estimate.high:.3f}]")


def labels_cell(labels: Sequence[float | None]) -> str:
    """Median over the runs that got there, where most did, and how many.

    >>> labels_cell([100.0, 300.0, None]), labels_cell([100.0, None])
    ('200 (2/3)', '- (1/2)')
    """
    reached = [value for value in labels if value is not None]
    middle = f"{np.median(reached):.0f}" if 2 * len(reached) > len(labels) else "-"
    return f"{middle} ({len(reached)}/{len(labels)})"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A table as lines of Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in [head]] + [
        "|---" * len(head) + "|",
        *("| " + " | ".join(cells) + " |" for cells in lines),
    ]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one row is worth against the baseline."""

    row: str
    baseline: str
    target: float | None
    """Win rate at which labels are compared; None: no target was reached by enough runs."""
    saving: Saving | None
    """Labels to the target over the baseline's."""
    gain: Estimate
    """Win rate at the end of the budget, minus the baseline's in the same world and seed."""

    @property
    def told_apart(self) -> bool:
        """Whether the interval of the ratio leaves 1 out, on the side that its bound vouches for, with enough seeds."""
        if self.saving is None or math.isnan(self.saving.ratio.low) or self.saving.used < FEWEST_SEEDS:
            return False
        low, high = self.saving.ratio.low, self.saving.ratio.high
        return (high < 1 and self.saving.bound != "at least") or (low > 1 and self.saving.bound != "at most")

    @property
    def sentence(self) -> str:
        """The answer, in one honest sentence."""
        row, base, n = self.row, self.baseline, self.saving.pairs if self.saving else 0
        seeds = f"{n} seed{'s' * (n != 1)}"
        if self.saving is None or self.target is None:
            return f"{row} and {base} have no win rate that both can be measured at, with {seeds}; {self._end()}."
        found = self.saving
        got = (
            f"{row} reached {self.target:.2f} in {found.row_reached} and {base} in {found.baseline_reached} of {seeds}"
        )
        ends_apart = (self.gain.low > 0 or self.gain.high < 0) and found.pairs >= FEWEST_SEEDS
        apart = f"Labels don't tell {row} and {base} apart" if ends_apart else f"{row} and {base} can't be told apart"
        end = f"but {self._end()}" if ends_apart else self._end()
        if found.bound == "unknown" or not found.used:
            return f"{apart} with {seeds}: {got}; {end}."
        amount = f"{found.bound} {_interval(found.ratio)}".strip()
        if found.used < 2:
            return f"{row} took {amount} of {base}'s labels to {self.target:.2f} in one seed; others may differ."
        what = f"{amount} of {base}'s labels to {self.target:.2f}"
        if not self.told_apart:
            return f"{apart} with {seeds}: {what} ({got}); {end}."
        return f"{row} needs {what} ({got if found.bound else f'{found.row_reached} of {seeds}'})."

    def _end(self) -> str:
        if math.isnan(self.gain.value):
            return "the win rates at the end don't compare either"
        sure = "" if math.isnan(self.gain.low) else f" [{self.gain.low:+.3f}, {self.gain.high:+.3f}]"
        return f"at the end its win rate differs from {self.baseline}'s by {self.gain.value:+.3f}{sure}"


def verdicts(rows: Rows, baseline: str, target: float | None = None) -> list[Verdict]:
    """Each row but the baseline against it, in pairs; at `target`, or at one that suits all (`common_target`)."""
    if target is None:
        labels = {name: [[run.labels_to(t) for run in runs] for t in TARGETS] for name, runs in rows.items()}
        target = common_target(labels, TARGETS, baseline)
    by_world = {run.world: run for run in rows[baseline]}
    found = []
    for name, runs in rows.items():
        if name == baseline:
            continue
        pairs = [(run, by_world[run.world]) for run in runs if run.world in by_world]
        saved = None
        if target is not None and pairs:
            own, theirs = ([run.labels_to(target) for run in side] for side in zip(*pairs, strict=True))
            saved = saving(own, theirs, budget=max(run.budget for run, _ in pairs))
        gain = cautious_interval([run.last - base.last for run, base in pairs])
        found.append(Verdict(row=name, baseline=baseline, target=target, saving=saved, gain=gain))
    return found


def ratio_cell(found: Saving) -> str:
    """`0.42 [0.35, 0.60] (5 pairs)`, with what is bounded or left out."""
    if math.isnan(found.ratio.value):
        return f"– (reached in {found.row_reached} and {found.baseline_reached} of {found.pairs})"
    left_out = f", {found.pairs - found.used} left out" if found.used < found.pairs else ""
    return f"{found.bound} {_interval(found.ratio)} ({found.used} pair{'s' * (found.used != 1)}{left_out})".strip()


def _interval(estimate: Estimate) -> str:
    text = f"{estimate.value:.2f}"
    return text if math.isnan(estimate.low) else f"{text} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _without_folder(value: Any) -> Any:
    """Of an absolute path the name alone: where a machine keeps a model says nothing of the run."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
