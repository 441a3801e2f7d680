"""The report of one run, or of several side by side: PNG plots and one HTML page that needs nothing but itself.

run directories -> RunRecord -> facts, tables, figures -> report.html.j2 (everything escaped) -> report.html
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from rayalign import storage
from rayalign.errors import DataError
from rayalign.evaluation.evaluate import Estimate, bootstrap_interval, over_seeds, paired_ratio, shown_targets
from rayalign.runs.record import RunRecord, answers, group

if TYPE_CHECKING:
    from rayalign.report.plots import Curved

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
COMPARISON_CAPTIONS = {
    "win_rate": (
        "Held-out win rate by agent",
        "Mean over runs; band: its 95% bootstrap interval over runs; thin lines: single runs. Dotted: 0.5.",
    ),
    "regret": ("Held-out regret by agent", "Of the greedy answers, reward form; mean over runs, as above."),
}


class Table(NamedTuple):
    """A table of the page; without a head it lists facts."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def write_report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write PNG plots and one HTML page about one run, or a comparison of several; returns the page's path.

    One run: `report.html` and `plots/` in its directory. Several: `comparison.html` and `comparison-plots/` in the
    directory that holds them all. `out` names another place for the page. Unfinished runs are reported as far as
    they got. Of a run in a bucket the page goes there, and the path is that of a copy. Raises `DataError` if a
    directory holds no run.
    """
    if out is not None:
        storage.local_only(out, "out")
    elif len(run_dirs) > 1:
        for run_dir in run_dirs:
            storage.local_only(run_dir, "run_dirs (without out)")
    records = [RunRecord.read(run_dir) for run_dir in run_dirs]
    if not records:
        raise DataError("There is no run to report on; name at least one run directory.")
    single, beside = len(records) == 1, out is None
    if out is None:
        common = Path(os.path.commonpath([record.path.absolute() for record in records]))
        out = records[0].path / "report.html" if single else common / "comparison.html"
    page = Path(out)
    plots = page.parent / ("plots" if single else f"{page.stem}-plots")
    render(_one(records[0], plots) if single else _several(records, plots), page)
    if beside and storage.in_bucket(run_dirs[0]):
        storage.upload(run_dirs[0], page.parent, page.name, plots.name)
    return page


def render(context: Mapping[str, Any], page: Path) -> Path:
    """Write the page that the template makes of `context` (see `_one` for what is in it); returns `page`."""
    environment = Environment(
        loader=PackageLoader("rayalign.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("report.html.j2").render(context)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(html, encoding="utf-8")
    return page


def comparison_figures(runs: Mapping[str, Sequence[Curved]], plots: Path) -> list[dict[str, Any]]:
    """The figure of win rates by row, for a page's context; its PNG file goes to `plots`."""
    from rayalign.report.plots import compare_win_rate

    return _figures({"win_rate": compare_win_rate}, runs, COMPARISON_CAPTIONS, plots)


# -- one run ------------------------------------------------------------------------------------------------------
def _one(record: RunRecord, plots: Path) -> dict[str, Any]:
    from rayalign.report.plots import SINGLE  # matplotlib takes its time to load

    before, after = record.before(), record.after()
    cards = [
        ("win rate before", _rate(before), _interval(before)),
        ("win rate after", _rate(after), _interval(after)),
        _labels_card(record),
    ]
    crossings = [(f"labels to {target:.2f}", _labels(record.labels_to(target))) for target in _targets([record])]
    last = record.evaluations[-1] if record.evaluations else {}
    picked = last.get("best_of_n_win_rate")
    facts = [
        ("agent", record.agent),
        ("environment", record.env),
        ("seed", str(record.seed)),
        ("policy", _setting(record.settings.get("policy", "?"))),
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
        "subtitle": f"{_place(record.path.absolute())}. Intervals are 95%, over prompts.",
        "warnings": _warnings([record]),
        "cards": cards,
        "tables": [
            Table("Summary", (), facts),
            *_judges(record),
            *_people(record),
            *_users(record),
            Table("Where things are", (), where, note="Relative to the run's directory."),
        ],
        "figures": _figures(SINGLE, record, CAPTIONS, plots),
        "samples": answers(record),
        "settings": [(name, _setting(value)) for name, value in record.settings.items()],
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


def _judges(record: RunRecord) -> list[Table]:
    """What LLM judges cost, and how far they can be trusted; nothing where none was asked."""
    from rayalign.serve.call_book import NAME
    from rayalign.serve.judge_stats import judge_stats

    tables = []
    for title, folder in (("LLM judge", "oracle"), ("LLM judge of evaluations", "oracle-evaluation")):
        if not (record.path / folder / NAME).exists():
            continue
        stats = judge_stats(record.path / folder)
        rows = [
            ("calls", f"{stats.calls:,}: {stats.answers:,} read, {stats.wasted:,} in vain, {stats.not_billed:,} free"),
            ("money", f"{stats.spent:g}, calls in vain included"),
            ("ties and abstentions", f"{stats.ties:,} and {stats.abstentions:,} of the answers"),
            ("orders that disagree", _share(stats.order_disagreement, stats.both_orders, "duels asked in both orders")),
            ("position bias", "not measured" if stats.position_bias is None else f"{stats.position_bias:+.3f}"),
            ("self-agreement", _share(stats.self_agreement, stats.rechecked, "questions asked twice")),
        ]
        note = "Position bias: P(shown first wins) - P(shown second wins), mean over duels asked in both orders."
        tables.append(Table(title, (), rows, note))
    return tables


def _people(record: RunRecord) -> list[Table]:
    """How much each annotator did, and how far they agree; nothing where no people were asked."""
    folder = record.settings.get("oracle.human.folder") or record.path / "labelling"
    try:
        summary = json.loads((Path(folder) / "summary.json").read_text())
    except (OSError, ValueError):
        return []
    rows = [
        (name, f"{did['answered']:,} answered, {did['skipped']:,} skipped")
        for name, did in summary["annotators"].items()
    ]
    for pair in summary["agreement"]:
        beyond = "" if pair["kappa"] is None else f", Cohen's kappa {pair['kappa']:.2f}"
        agreed = _share(pair["agreed"] / pair["shared"], pair["shared"], "duels that both judged")
        rows.append((" and ".join(pair["annotators"]), f"agree on {agreed}{beyond}"))
    if (alpha := summary["krippendorff_alpha"]) is not None:
        rows.append(("all together", f"Krippendorff's alpha {alpha:.2f}"))
    note = "Kappa and alpha: 0 is what chance brings, 1 full agreement; first, second and tie are three categories."
    return [Table("People", (), rows, note)]


def _users(record: RunRecord) -> list[Table]:
    """What online users asked, were shown and chose; nothing where there were none."""
    numbers = record.online()
    if not numbers:
        return []
    endings = ", ".join(f"{numbers[name]:,} {name}" for name in ("chosen", "skipped", "expired", "open"))
    chosen = numbers["chosen"]
    rows = [
        ("questions", f"{numbers['questions']:,} answered"),
        ("comparisons", f"{numbers['offered']:,} offered: {endings}"),
        ("preferred one", _share(numbers.get("preferred_share"), chosen, "choices; the others were ties")),
    ]
    if (regret := numbers.get("cumulative_regret")) is not None:
        known = numbers["known"]
        rows.append(("cumulative regret", f"{regret:,.2f} over {known:,} questions, {regret / known:.3f} a question"))
    else:
        rows.append(("cumulative regret", "not known: the environment knows no rewards of what users asked"))
    return [Table("Users", (), rows, "A reply that was lost with a killed process counts as shown.")]


def _share(share: float | None, of: int, what: str) -> str:
    return "not measured" if share is None else f"{share:.1%} of {of:,} {what}"


# -- several runs -------------------------------------------------------------------------------------------------
def _several(records: Sequence[RunRecord], plots: Path) -> dict[str, Any]:
    from rayalign.report.plots import COMPARISON

    groups = group(records)
    targets = _targets(records)
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
        "warnings": _warnings(records),
        "cards": [],
        "tables": tables,
        "figures": _figures(COMPARISON, groups, COMPARISON_CAPTIONS, plots),
        "samples": [],
        "settings": [(name, _setting(value)) for name, value in shared.items()],
    }


def _final_table(groups: Mapping[str, Sequence[RunRecord]]) -> Table:
    rows = []
    for name, runs in groups.items():
        before = over_seeds([e.value for run in runs if (e := run.before())])
        finals = [e.value for run in runs if (e := run.after())]
        after = over_seeds(finals)
        interval = bootstrap_interval(finals)
        spent = sorted({run.labels_spent for run in runs})
        rows.append((name, str(len(runs)), _range(spent), _mean(before), _mean(after), _interval(interval)))
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
            cells.append(f"{np.mean(reached):,.0f} {_interval(bootstrap_interval(reached), '{:,.0f}')}".strip())
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
            cells.append(f"{ratio.value:.2f} {_interval(ratio, '{:.2f}')} ({len(both)} pair{plural}{left_out})")
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
            _rate(record.before()),
            f"{_rate(record.after())} {_interval(record.after())}",
            "finished" if record.finished else "unfinished",
        )
        for record in records
    ]
    head = ("run", "agent", "environment", "seed", "labels", "before", "after (interval over prompts)", "state")
    return Table("Runs", head, rows)


# -- pieces -------------------------------------------------------------------------------------------------------
def _figures(
    draw: Mapping[str, Callable[[Any], Any]], data: Any, captions: Mapping[str, tuple[str, str]], plots: Path
) -> list[dict[str, Any]]:
    """Draw what there is, once as PNG file and once for the page."""
    from rayalign.report.plots import png, svg

    figures = []
    for name, function in draw.items():
        figure = function(data)
        if figure is None:
            continue
        title, caption = captions[name]
        plots.mkdir(parents=True, exist_ok=True)
        (plots / f"{name}.png").write_bytes(png(figure))
        inline = Markup(svg(figure, name, f"{title}. {caption}"))
        figures.append({"name": name, "title": title, "caption": caption, "svg": inline})
    return figures


def _targets(records: Sequence[RunRecord]) -> list[float]:
    """Targets between where the runs started and the best that any of them reached, and the next one."""
    rates = [row["win_rate"] for record in records for row in record.evaluations if row.get("win_rate") is not None]
    start = max((e.value for record in records if (e := record.before())), default=0.0)
    return shown_targets(start, max(rates)) if rates else []


def _warnings(records: Sequence[RunRecord]) -> list[str]:
    notes = [f"{r.path.name}: {r.result['warning']}" for r in records if r.result.get("warning")]
    unfinished = [r.path.name for r in records if not r.finished]
    if unfinished:
        notes.append(f"Not finished: {', '.join(unfinished)}. `rayalign resume` goes on; the page shows what there is.")
    return notes


def _rate(estimate: Estimate | None) -> str:
    return "–" if estimate is None or math.isnan(estimate.value) else f"{estimate.value:.3f}"


def _interval(estimate: Estimate | None, form: str = "{:.3f}") -> str:
    if estimate is None or math.isnan(estimate.low):
        return ""
    return f"[{form.format(estimate.low)}, {form.format(estimate.high)}]"


def _mean(mean: tuple[float, float]) -> str:
    value, error = mean
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


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


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _setting(value: Any) -> str:
    if isinstance(value, str) and value.startswith(os.sep):
        return _place(Path(value))
    return "null" if value is None else str(value)


def _place(path: Path) -> str:
    """A page is passed on: it says where things are from here, or their last names, not how the machine is laid out."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(Path("…", *path.parts[-2:]))
