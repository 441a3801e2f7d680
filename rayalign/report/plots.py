"""The figures of a report. Each function draws one, or returns None where its numbers were not recorded.

Figures are drawn in two neutral colours that the HTML page replaces by its own, so that they follow the reader's
light or dark scheme; as PNG files they are dark on white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rayalign.evaluation.evaluate import mean_curve
from rayalign.runs.record import RunRecord, interval

INK, RULE = "#1a1b1c", "#d8d9da"
COLOURS = (
    *("#0b78c2", "#d1600a", "#16956c", "#b4559a", "#7b6fd0", "#a8821a"),
    *("#3f9fb5", "#c2445a", "#6f9a2c", "#8a6a55", "#5566c9", "#8a8f96"),
)
"""Distinguishable with the usual colour deficiencies, and on black as on white."""
STAGES = ("gate", "sync", "generate", "select", "label", "observe", "evaluate")
ONLINE_ENDINGS = ("offered", "chosen", "skipped", "expired")
LEARNER_PANELS = (
    ("loss", "loss"),
    ("accuracy", "share of pairs in the right order"),
    ("margin", "margin, nats"),
    ("grad_norm", "gradient norm"),
)

STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "text.parse_math": False,
}


# -- one run ------------------------------------------------------------------------------------------------------
@mpl.rc_context(STYLE)
def win_rate(record: RunRecord) -> Figure | None:
    """Held-out win rate against labels, 95% Wilson band over prompts."""
    rows = [(row["labels"], found) for row in record.evaluations if (found := interval(row)) is not None]
    if not rows:
        return None
    figure, (ax,) = _figure(1)
    x = [labels for labels, _ in rows]
    colour = COLOURS[0]
    ax.fill_between(x, [e.low for _, e in rows], [e.high for _, e in rows], color=colour, alpha=0.18, linewidth=0)
    ax.plot(x, [e.value for _, e in rows], color=colour, marker="o", markersize=3.5, label="greedy answer")
    labels, best = record.curve("best_of_n_win_rate")
    if any(value is not None for value in best):
        ax.plot(labels, _floats(best), color=COLOURS[1], marker="s", markersize=3.5, label="best of n by the agent")
    ax.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    ax.set(xlabel="labels bought", ylabel=f"win rate against {record.evaluations[-1].get('against', 'the opponent')}")
    _legend(ax)
    return figure


@mpl.rc_context(STYLE)
def regret(record: RunRecord) -> Figure | None:
    """Regret of the duels, each form in its own panel, their online win rate, and the held-out regret."""
    panels = [
        ("regret_reward", "online duels, reward form\nr* − (r + r′)/2", "metrics"),
        ("regret_preference", "online duels, preference form\nP(a* > a) + P(a* > a′) − 1", "metrics"),
        ("online_win_rate", "online duels, share of responses\nthat beats the reference", "metrics"),
        ("regret_mean", "held-out greedy answers\nr* − r", "evaluations"),
    ]
    drawn = []
    for name, title, source in panels:
        x, y = record.series(name, "labels") if source == "metrics" else record.curve(name)
        if any(value is not None for value in y):
            drawn.append((x, _floats(y), title))
    if not drawn:
        return None
    figure, axes = _figure(len(drawn))
    for ax, (x, y, title) in zip(axes, drawn, strict=True):
        _noisy(ax, x, y, COLOURS[0])
        ax.set_title(title)
        ax.set_xlabel("labels bought")
        ax.set_ylim(bottom=min(0.0, float(np.nanmin(y))))
    return figure


@mpl.rc_context(STYLE)
def online_regret(record: RunRecord) -> Figure | None:
    """Cumulative regret of what users were shown against the questions they asked; else how comparisons ended."""
    x, y = record.series("online/cumulative_regret", "online/questions")
    if x:
        figure, (ax,) = _figure(1)
        ax.plot(x, y, color=COLOURS[0])
        ax.set(xlabel="questions answered", ylabel="cumulative regret", ylim=(0, None))
        return figure
    endings = [(name, *record.series(f"online/{name}", "online/questions")) for name in ONLINE_ENDINGS]
    if not any(x for _, x, _ in endings):
        return None
    figure, (ax,) = _figure(1)
    for colour, (name, x, y) in zip(COLOURS, endings, strict=False):
        ax.plot(x, y, color=colour, label=name)
    ax.set(xlabel="questions answered", ylabel="comparisons", ylim=(0, None))
    _legend(ax)
    return figure


@mpl.rc_context(STYLE)
def learning(record: RunRecord) -> Figure | None:
    """What the learner reported: loss, accuracy, margin, gradient norm, where they are."""
    drawn = []
    for name, title in LEARNER_PANELS:
        found = next((k for k in _names(record, "learner/") if k.removeprefix("learner/") == name), None)
        found = found or next((k for k in _names(record, "learner/") if name in k), None)
        if found:
            drawn.append((*record.series(found), title))
    if not drawn:
        return None
    figure, axes = _figure(len(drawn))
    for ax, (x, y, title) in zip(axes, drawn, strict=True):
        _noisy(ax, x, y, COLOURS[0])
        ax.set_title(title)
        ax.set_xlabel("batch")
    return figure


@mpl.rc_context(STYLE)
def stages(record: RunRecord) -> Figure | None:
    """Where the collector's time goes: seconds by stage, stacked, means over neighbouring batches in long runs."""
    prefix = "seconds/"
    names = [prefix + stage for stage in STAGES if prefix + stage in _names(record, prefix)]
    names += [name for name in _names(record, prefix) if name not in names]
    rows = [row for row in record.metrics if any(name in row for name in names)]
    if not names or not rows:
        return None
    batches = np.array([row["batch"] for row in rows], dtype=float)
    seconds = np.array([[row.get(name) or 0.0 for row in rows] for name in names])
    bins = np.array_split(np.arange(len(rows)), min(len(rows), 80))
    x = np.array([batches[b].mean() for b in bins])
    heights = np.array([[line[b].mean() for b in bins] for line in seconds])
    figure, (ax,) = _figure(1)
    width = (x[-1] - x[0]) / max(1, len(x) - 1) or 1.0
    base = np.zeros(len(x))
    every = [*(prefix + stage for stage in STAGES), *names]
    for name, line in zip(names, heights, strict=True):
        colour = COLOURS[every.index(name) % len(COLOURS)]
        ax.bar(x, line, bottom=base, width=width, color=colour, label=name.removeprefix(prefix))
        base += line
    ax.set(xlabel="batch", ylabel="seconds per batch")
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)  # in the order of the stack
    return figure


@mpl.rc_context(STYLE)
def staleness(record: RunRecord) -> Figure | None:
    """Batches between the weights that generated a batch and the weights that it trained, with the bound."""
    x, y = record.series("staleness")
    if not x:
        return None
    figure, (ax,) = _figure(1, height=2.4)
    ax.step(x, y, where="mid", color=COLOURS[0], label="staleness")
    bound = record.settings.get("loop.max_staleness")
    if bound is not None:
        ax.axhline(bound, color=COLOURS[1], linestyle="--", linewidth=1.2, label="loop.max_staleness")
    ax.set(xlabel="batch", ylabel="batches", ylim=(-0.1, max([*y, bound or 0, 1]) * 1.15))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


@mpl.rc_context(STYLE)
def timeline(record: RunRecord, batches: int = 8) -> Figure | None:
    """Who worked when, over some batches from the middle of the run: is generation overlapping learning?"""
    spans = record.timeline
    if not spans:
        return None
    known = sorted({row["batch"] for row in spans})
    start = max(0, len(known) // 2 - batches // 2)
    window = set(known[start : start + batches])
    # Waiting is not work: a gap in the row shows it better than a bar would.
    shown = [row for row in spans if row["batch"] in window and row["stage"] not in ("gate", "wait")]
    if not shown:
        return None
    roles = sorted({row["role"] for row in shown}, key=lambda role: (role == "learner", role))
    found = {row["stage"] for row in shown}
    every = [*STAGES, *sorted(found - set(STAGES))]  # a stage keeps its colour from the figure of stages
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(every) if name in found}
    origin = min(row["start"] for row in shown)
    figure, (ax,) = _figure(1, height=1.3 + 0.55 * len(roles))
    for row in shown:
        y, x, width = roles.index(row["role"]), row["start"] - origin, row["end"] - row["start"]
        ax.barh(y, width, left=x, height=0.7, color=colour[row["stage"]], edgecolor="none")
    end = max(row["end"] for row in shown) - origin
    for y, role in enumerate(roles):
        for batch in sorted(window):
            mine = [row for row in shown if row["role"] == role and row["batch"] == batch]
            middle = sum((row["start"] + row["end"]) / 2 - origin for row in mine) / len(mine) if mine else 0.0
            if mine and sum(row["end"] - row["start"] for row in mine) > 0.02 * end:
                ax.text(middle, y - 0.42, str(batch), ha="center", va="bottom", fontsize=8)
    ax.set_yticks(range(len(roles)), roles)
    ax.set_ylim(len(roles) - 0.5, -0.75)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="seconds (batch numbers above the bars; gaps are waiting)")
    handles = [Patch(color=colour[name], label=name) for name in colour]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


SINGLE = {
    "win_rate": win_rate,
    "regret": regret,
    "online_regret": online_regret,
    "learning": learning,
    "stages": stages,
    "staleness": staleness,
    "timeline": timeline,
}
"""File name -> figure of one run, in the order of the page."""


# -- several runs -------------------------------------------------------------------------------------------------
class Curved(Protocol):
    """A run, or what was kept of one."""

    def curve(self, name: str = "win_rate") -> tuple[list[float], list[Any]]:
        """Labels and values of an evaluation's column."""


@mpl.rc_context(STYLE)
def compare_win_rate(groups: Mapping[str, Sequence[Curved]]) -> Figure | None:
    """Held-out win rate by agent: mean over seeds, band of its 95% bootstrap interval, thin lines single runs."""
    figure, (ax,) = _figure(1, height=3.2 if len(groups) <= MOST_WITH_BANDS else 5.0)
    drawn = _curves(ax, {name: [run.curve() for run in runs] for name, runs in groups.items()})
    ax.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    ax.set(xlabel="labels bought", ylabel="win rate")
    _legend(ax)
    return figure if drawn else None


@mpl.rc_context(STYLE)
def compare_regret(groups: Mapping[str, Sequence[RunRecord]]) -> Figure | None:
    """Regret of the held-out greedy answers by agent, in the same way."""
    figure, (ax,) = _figure(1)
    curves = {name: [run.curve("regret_mean") for run in runs] for name, runs in groups.items()}
    present = {name: [c for c in pairs if any(v is not None for v in c[1])] for name, pairs in curves.items()}
    drawn = _curves(ax, present)
    ax.set(xlabel="labels bought", ylabel="held-out regret, r* − r")
    _legend(ax)
    return figure if drawn else None


MOST_WITH_BANDS = 7
"""Agents of a comparison that are drawn with bands and single runs."""
DASHES = ("-", "--", ":")
"""Where the colours are used up, they begin again with other lines."""
COMPARISON = {"win_rate": compare_win_rate, "regret": compare_regret}
"""File name -> figure of several runs."""


def _curves(ax: Axes, curves: Mapping[str, Sequence[tuple[list[float], list[float]]]]) -> bool:
    """Where there are too many to tell bands and single runs apart, the means alone."""
    drawn = False
    few = len(curves) <= MOST_WITH_BANDS
    for i, (name, pairs) in enumerate(curves.items()):
        x, estimates = mean_curve(pairs, intervals=few)
        if not len(x):
            continue
        colour, dashes = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        for labels, values in pairs if few and len(pairs) > 1 else ():
            ax.plot(labels, _floats(values), color=colour, linewidth=0.6, alpha=0.45)
        if few:
            ax.fill_between(
                x, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.2, linewidth=0
            )
        label = f"{name} ({len(pairs)} run{'s' * (len(pairs) > 1)})"
        ax.plot(x, [e.value for e in estimates], color=colour, linestyle=dashes, label=label)
        drawn = True
    return drawn


# -- pieces -------------------------------------------------------------------------------------------------------
def _figure(panels: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    columns = min(panels, 2)
    rows = -(-panels // columns)
    figure = Figure(figsize=(8.4, height if rows == 1 else 2.6 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def _noisy(ax: Axes, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    """Single values faint, a running mean on top where there are enough of them."""
    width = len(x) // 20
    if width < 2:
        ax.plot(x, y, color=colour)
        return
    ax.plot(x, y, color=colour, linewidth=0.7, alpha=0.4)
    kernel = np.ones(width)
    smooth = np.convolve(y, kernel, mode="same") / np.convolve(np.ones(len(y)), kernel, mode="same")
    ax.plot(x, smooth, color=colour)


def _legend(ax: Axes) -> None:
    """In the axes where it has room; else beside them, in the order in which the lines end."""
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > MOST_WITH_BANDS:
        lines: list[Any] = list(handles)
        ends = [line.get_ydata()[-1] for line in lines]
        order = sorted(range(len(labels)), key=lambda i: -ends[i])
        where = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "fontsize": "small"}
        ax.legend([handles[i] for i in order], [labels[i] for i in order], **where)
    elif len(labels) > 1:
        ax.legend(loc="best")


def _names(record: RunRecord, prefix: str) -> list[str]:
    return list(dict.fromkeys(name for row in record.metrics for name in row if name.startswith(prefix)))


def _floats(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, dark on white."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=144, facecolor="white")
    figure.set_layout_engine(
        None
    )  # where things are now is right for the page, too: more than half of drawing is saved
    return buffer.getvalue()


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an inline SVG element in the page's colours, with `description` for those who can't see it."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)  # several figures share one page
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    text = text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return text.replace(INK, "currentColor").replace(RULE, "var(--rule)")
