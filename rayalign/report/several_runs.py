"""The report of several runs: agents side by side, over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayalign.evaluation.evaluate import bootstrap_interval, over_seeds, paired_ratio
from rayalign.report.page import Table, figures, interval_text, rate_text, setting_text, targets_of, warnings_of
from rayalign.runs.record import RunRecord, group

if TYPE_CHECKING:
    from rayalign.report.plots import Curved

COMPARISON_CAPTIONS = {
    "win_rate": (
        "Held-out win rate by agent",
        "Mean over runs; band: its 95% bootstrap interval over runs; thin lines: single runs. Dotted: 0.5.",
    ),
    "regret": ("Held-out regret by agent", "Of the greedy answers, reward form; mean over runs, as above."),
}


def several_runs(records: Sequence[RunRecord], plots: Path) -> dict[str, Any]:
    """What the page of a comparison shows (see `page.render`); its figures go to `plots`, too."""
    from rayalign.report.plots import COMPARISON

    groups = group(records)
    targets = targets_of(records)
    tables = [_final_table(groups), _labels_table(groups, targets)]
    if len(groups) > 1:
        tables.append(_ratio_table(groups, targets))
    tables.append(_runs_table(records))
    shared = {
        name: value
        for name, value in records[0].settings.items()
        if all(name in r.settings and r.settings[name] == value for r in records)
    }
    return {
        "title": f"{len(records)} runs: {', '.join(groups)}",
        "subtitle": "Runs that differ in nothing but seed and world are one group; intervals are 95%.",
        "warnings": warnings_of(records),
        "cards": [],
        "tables": tables,
        "figures": figures(COMPARISON, groups, COMPARISON_CAPTIONS, plots),
        "samples": [],
        "settings": [(name, setting_text(value)) for name, value in shared.items()],
    }


def comparison_figures(runs: Mapping[str, Sequence[Curved]], plots: Path) -> list[dict[str, Any]]:
    """The figure of win rates by row, for a page's context; its PNG file goes to `plots`."""
    from rayalign.report.plots import compare_win_rate

    return figures({"win_rate": compare_win_rate}, runs, COMPARISON_CAPTIONS, plots)


def _final_table(groups: Mapping[str, Sequence[RunRecord]]) -> Table:
    rows = []
    for name, runs in groups.items():
        before = over_seeds([e.value for run in runs if (e := run.before())])
        finals = [e.value for run in runs if (e := run.after())]
        after = over_seeds(finals)
        interval = bootstrap_interval(finals)
        spent = sorted({run.labels_spent for run in runs})
        rows.append((name, str(len(runs)), _range(spent), _mean(before), _mean(after), interval_text(interval)))
    head = ("agent", "runs", "labels spent", "win rate before", "win rate after", "95% interval")
    return Table("Win rate", head, rows, "Mean and standard error over runs; the interval is a bootstrap over runs.")


def _labels_table(groups: Mapping[str, Sequence[RunRecord]], targets: Sequence[float]) -> Table:
    rows = []
    for name, runs in groups.items():
        cells = []
        for target in targets:
            reached = [labels for run in runs if (labels := run.labels_to(target)) is not None]
            if len(reached) < len(runs):
                cells.append(f"{len(reached)} of {len(runs)} runs reached it")
                continue
            cells.append(f"{np.mean(reached):,.0f} {interval_text(bootstrap_interval(reached), '{:,.0f}')}".strip())
        rows.append((name, *cells))
    note = (
        "Labels until the held-out win rate first reached the target, linear between evaluations: mean over runs and "
        "bootstrap interval over runs (too narrow for fewer than eight). No mean is given where a run never got there: "
        "it would leave out the worst."
    )
    return Table("Labels to target", ("agent", *(f"{t:.2f}" for t in targets)), rows, note)


def _ratio_table(groups: Mapping[str, Sequence[RunRecord]], targets: Sequence[float]) -> Table:
    baseline = next((name for name, runs in groups.items() if runs[0].agent == "passive"), next(iter(groups)))
    by_world = {run.world: run for run in groups[baseline]}
    rows = []
    for name, runs in groups.items():
        if name == baseline:
            continue
        cells = []
        for target in targets:
            pairs = [
                (by_world[run.world].labels_to(target), run.labels_to(target)) for run in runs if run.world in by_world
            ]
            both = [(base, own) for base, own in pairs if base and own]
            if not both:
                cells.append("no pair reached it" if pairs else "no pairs")
                continue
            ratio = paired_ratio([base for base, _ in both], [own for _, own in both])
            left_out = f", {len(pairs) - len(both)} left out" if len(both) < len(pairs) else ""
            plural = "s" * (len(both) > 1)
            cells.append(f"{ratio.value:.2f} {interval_text(ratio, '{:.2f}')} ({len(both)} pair{plural}{left_out})")
        rows.append((name, *cells))
    note = (
        f"How many times as many labels {baseline} needs: geometric mean over pairs of runs with the same environment "
        "and seed, bootstrap interval over pairs. Pairs in which either run never reached the target are left out."
    )
    return Table(f"Labels saved against {baseline}", ("agent", *(f"{t:.2f}" for t in targets)), rows, note)


def _runs_table(records: Sequence[RunRecord]) -> Table:
    rows = [
        (
            record.path.name,
            record.agent,
            record.env,
            str(record.seed),
            f"{record.labels_spent:,}",
            rate_text(record.before()),
            f"{rate_text(record.after())} {interval_text(record.after())}",
            "finished" if record.finished else "unfinished",
        )
        for record in records
    ]
    head = ("run", "agent", "environment", "seed", "labels", "before", "after (interval over prompts)", "state")
    return Table("Runs", head, rows)


def _mean(mean: tuple[float, float]) -> str:
    value, error = mean
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"
