"""The page that a report is: what is on it, and its template (everything escaped)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from rayalign.evaluation.evaluate import Estimate, shown_targets
from rayalign.runs.record import RunRecord


class Table(NamedTuple):
    """A table of the page; without a head it lists facts."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def render(context: Mapping[str, Any], page: Path) -> Path:
    """Write the page that the template makes of `context` (see `one_run` for what is in it); returns `page`."""
    environment = Environment(
        loader=PackageLoader("rayalign.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("report.html.j2").render(context)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(html, encoding="utf-8")
    return page


def figures(
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


def targets_of(records: Sequence[RunRecord]) -> list[float]:
    """Targets between where the runs started and the best that any of them reached, and the next one."""
    rates = [row["win_rate"] for record in records for row in record.evaluations if row.get("win_rate") is not None]
    start = max((e.value for record in records if (e := record.before())), default=0.0)
    return shown_targets(start, max(rates)) if rates else []


def warnings_of(records: Sequence[RunRecord]) -> list[str]:
    """What a reader should know before the numbers."""
    notes = [f"{r.path.name}: {r.result['warning']}" for r in records if r.result.get("warning")]
    unfinished = [r.path.name for r in records if not r.finished]
    if unfinished:
        notes.append(f"Not finished: {', '.join(unfinished)}. `rayalign resume` goes on; the page shows what there is.")
    return notes


# -- texts -----------------------------------------------------------------------------------------------------------
def rate_text(estimate: Estimate | None) -> str:
    """Three digits, or a dash."""
    return "–" if estimate is None or math.isnan(estimate.value) else f"{estimate.value:.3f}"


def interval_text(estimate: Estimate | None, form: str = "{:.3f}") -> str:
    """In brackets; empty where there is none."""
    if estimate is None or math.isnan(estimate.low):
        return ""
    return f"[{form.format(estimate.low)}, {form.format(estimate.high)}]"


def share_text(share: float | None, of: int, what: str) -> str:
    """Percent of how many."""
    return "not measured" if share is None else f"{share:.1%} of {of:,} {what}"


def setting_text(value: Any) -> str:
    """As one would type it, paths shortened."""
    if isinstance(value, str) and value.startswith(os.sep):
        return place(Path(value))
    return "null" if value is None else str(value)


def place(path: Path) -> str:
    """A page is passed on: it says where things are from here, or their last names, not how the machine is laid out."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(Path("…", *path.parts[-2:]))
