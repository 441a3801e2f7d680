"""Who labelled: LLM judges, people and users, as tables of the report."""

from __future__ import annotations

import json
from pathlib import Path

from rayalign.report.page import Table, share_text
from rayalign.runs.record import RunRecord
from rayalign.serve.call_book import NAME
from rayalign.serve.judge_stats import JudgeStats, judge_stats


def judges(record: RunRecord) -> list[Table]:
    """What LLM judges cost, and how far they can be trusted; nothing where none was asked."""
    tables = []
    for title, folder in (("LLM judge", "oracle"), ("LLM judge of evaluations", "oracle-evaluation")):
        if not (record.path / folder / NAME).exists():
            continue
        stats = judge_stats(record.path / folder)
        rows = [
            ("calls", f"{stats.calls:,}: {stats.answers:,} read, {stats.wasted:,} in vain, {stats.not_billed:,} free"),
            ("money", f"{stats.spent:g}, calls in vain included"),
            ("ties and abstentions", f"{stats.ties:,} and {stats.abstentions:,} of the answers"),
            (
                "orders that disagree",
                share_text(stats.order_disagreement, stats.both_orders, "duels asked in both orders"),
            ),
            ("position bias", _bias(stats)),
            ("self-agreement", share_text(stats.self_agreement, stats.rechecked, "questions asked twice")),
        ]
        over = "duels asked in both orders" if stats.both_orders else "answers, each to one order drawn at random"
        note = f"Position bias: P(shown first wins) - P(shown second wins), mean and standard error over {over}."
        tables.append(Table(title, (), rows, note))
    return tables


def _bias(stats: JudgeStats) -> str:
    if stats.position_bias is None:
        return "not measured"
    error = "" if stats.position_bias_stderr is None else f" ± {stats.position_bias_stderr:.3f}"
    return f"{stats.position_bias:+.3f}{error}"


def people(record: RunRecord) -> list[Table]:
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
        agreed = share_text(pair["agreed"] / pair["shared"], pair["shared"], "duels that both judged")
        rows.append((" and ".join(pair["annotators"]), f"agree on {agreed}{beyond}"))
    if (alpha := summary["krippendorff_alpha"]) is not None:
        rows.append(("all together", f"Krippendorff's alpha {alpha:.2f}"))
    note = "Kappa and alpha: 0 is what chance brings, 1 full agreement; first, second and tie are three categories."
    return [Table("People", (), rows, note)]


def users(record: RunRecord) -> list[Table]:
    """What online users asked, were shown and chose; nothing where there were none."""
    numbers = record.online()
    if not numbers:
        return []
    endings = ", ".join(f"{numbers[name]:,} {name}" for name in ("chosen", "skipped", "expired", "open"))
    chosen = numbers["chosen"]
    rows = [
        ("questions", f"{numbers['questions']:,} answered"),
        ("comparisons", f"{numbers['offered']:,} offered: {endings}"),
        ("preferred one", share_text(numbers.get("preferred_share"), chosen, "choices; the others were ties")),
    ]
    if (regret := numbers.get("cumulative_regret")) is not None:
        known = numbers["known"]
        rows.append(("cumulative regret", f"{regret:,.2f} over {known:,} questions, {regret / known:.3f} a question"))
    else:
        rows.append(("cumulative regret", "not known: the environment knows no rewards of what users asked"))
    return [Table("Users", (), rows, "A reply that was lost with a killed process counts as shown.")]
