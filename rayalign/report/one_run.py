"""The report of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rayalign.report.oracle_tables import judges, people, users
from rayalign.report.page import Table, figures, interval_text, place, rate_text, setting_text, targets_of, warnings_of
from rayalign.runs.record import RunRecord, answers

ARTIFACTS = (
    ("policy", "checkpoint", ", a Hugging Face directory"),
    ("preferences", "preferences", ", Parquet for datasets and TRL"),
    ("ledger", "ledger.arrow", ", every label asked for and answered"),
    ("metrics", "metrics.jsonl", ""),
    ("evaluations", "evaluations.jsonl", ""),
    ("TensorBoard", "tensorboard", ""),
)
"""What may lie in a run directory: label, name, remark."""

CAPTIONS = {
    "win_rate": (
        "Held-out win rate",
        "Wins plus half the ties of the greedy answers. Band: 95% interval over prompts (Wilson). Dotted: 0.5.",
    ),
    "regret": (
        "Regret and online win rate",
        "How far the duels that were paid for, and the greedy answers, are from the best response.",
    ),
    "online_regret": (
        "What users were shown",
        "Best reward minus that of the answer, or of both answers on average, summed over all questions; where the "
        "truth is not known, how comparisons ended instead.",
    ),
    "learning": ("Learning", "What the learner reported for each update; the strong line is a running mean."),
    "stages": ("Where the time goes", "The collector's seconds per batch by stage; gate is waiting for the learner."),
    "staleness": ("Staleness", "Batches between the weights that generated a batch and those it was used to train."),
    "timeline": ("Timeline", "Some batches from the middle of the run: bars above one another ran at the same time."),
}


def one_run(record: RunRecord, plots: Path) -> dict[str, Any]:
    """What the page of one run shows (see `page.render`); its figures go to `plots`, too."""
    from rayalign.report.plots import SINGLE  # matplotlib takes its time to load

    before, after = record.before(), record.after()
    cards = [
        ("win rate before", rate_text(before), interval_text(before)),
        ("win rate after", rate_text(after), interval_text(after)),
        _labels_card(record),
    ]
    crossings = [(f"labels to {target:.2f}", _labels(record.labels_to(target))) for target in targets_of([record])]
    last = record.evaluations[-1] if record.evaluations else {}
    picked = last.get("best_of_n_win_rate")
    facts = [
        ("agent", record.agent),
        ("environment", record.env),
        ("seed", str(record.seed)),
        ("policy", setting_text(record.settings.get("policy", "?"))),
        ("opponent", str(last.get("against", "not evaluated"))),
        ("labels for evaluation", f"{record.result.get('labels_spent_on_evaluation', 0):,}, counted apart"),
        *_metrics(record),
        *([("win rate, best of n", f"{picked:.3f}, by the agent's own choice")] if picked is not None else []),
        *crossings,
        *_times(record),
    ]
    where = [(label, name + remark) for label, name, remark in ARTIFACTS if (record.path / name).exists()]
    return {
        "title": f"{record.agent} on {record.env}, seed {record.seed}",
        "subtitle": f"{place(record.path.absolute())}. Intervals are 95%, over prompts.",
        "warnings": warnings_of([record]),
        "cards": cards,
        "tables": [
            Table("Summary", (), facts),
            *judges(record),
            *people(record),
            *users(record),
            Table("Where things are", (), where, note="Relative to the run's directory."),
        ],
        "figures": figures(SINGLE, record, CAPTIONS, plots),
        "samples": answers(record),
        "settings": [(name, setting_text(value)) for name, value in record.settings.items()],
    }


def _metrics(record: RunRecord) -> list[tuple[str, str]]:
    """The other numbers of the first and of the last evaluation."""
    if not record.evaluations:
        return []
    first, last = record.evaluations[0], record.evaluations[-1]
    names = [name for name in last if name.startswith("metric/")]
    shown = {name: [row.get(name) for row in (first, last)] for name in names}
    return [
        (name.removeprefix("metric/"), " -> ".join("unknown" if v is None else f"{v:.3f}" for v in values))
        for name, values in shown.items()
    ]


def _labels_card(record: RunRecord) -> tuple[str, str, str]:
    if record.is_replay:
        return "labels replayed", f"{record.labels_replayed:,}", "of another run's ledger; none was bought"
    return (
        "labels spent",
        f"{record.labels_spent:,}",
        f"of a budget of {_count(record.settings.get('loop.budget', '?'))}",
    )


def _times(record: RunRecord) -> list[tuple[str, str]]:
    """Median seconds from one batch to the next."""
    _, times = record.series("time")
    if len(times) < 3:
        return []
    return [("seconds per batch", f"{float(np.median(np.diff(times))):.2f} (median)")]


def _labels(value: float | None) -> str:
    return "not reached" if value is None else f"{value:,.0f}"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
