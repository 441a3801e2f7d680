"""What a run shows while it runs: a live panel on a terminal, now and then a line elsewhere, a table at the end.

The run hands over status snapshots (the keys of a metrics record, `budget`, `phase`, `win_rate`); everything else
(changes, rates, time left) is worked out here. The display never stops a run: a snapshot that can't be had is
shown as such.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rayalign.evaluation.evaluate import shown_targets
from rayalign.runs.logs import LoggingConfig
from rayalign.runs.result import Result

POLL_S = 1.0
BARS = "▁▂▃▄▅▆▇█"


class Progress:
    """The display of one run. Use `following` while it runs, `summary` at its end, `close` in any case."""

    def __init__(
        self, config: LoggingConfig, *, title: str, run_dir: str | Path, console: Console | None = None
    ) -> None:
        self.state = ProgressState(title=title, run_dir=str(run_dir))
        self._console = console or Console()
        self._every_s = config.progress_every_s
        self._mode = config.progress
        if self._mode == "auto":
            self._mode = "live" if self._console.is_terminal else "plain"
        self._live: Live | None = None
        self._last_line = -float("inf")
        self._lock = threading.Lock()
        if self._mode == "plain":
            self._console.print(f"{title}: {run_dir}", highlight=False, markup=False, soft_wrap=True)

    def update(self, status: Mapping[str, Any]) -> None:
        """Take in a snapshot, and show it if it is time to."""
        with self._lock:
            phase_before = self.state.phase
            self.state.update(status, time.monotonic())
            if self._mode == "live":
                self._show_live()
            elif self._mode == "plain":
                due = time.monotonic() - self._last_line >= self._every_s
                if due or self.state.phase != phase_before:
                    self._last_line = time.monotonic()
                    self._console.print(self.state.line(), highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def following(self, status: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Ask `status` for a snapshot every second, from another thread, while the block runs."""
        stop = threading.Event()

        def follow() -> None:
            while not stop.wait(POLL_S):
                try:
                    self.update(status())
                except Exception as error:  # the run decides what is fatal; the display only says what it sees
                    self.update({"phase": f"no answer from the collector ({type(error).__name__})"})

        thread = threading.Thread(target=follow, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=10.0)

    def summary(self, result: Result) -> None:
        """End the live display and print the table of results."""
        self.close()
        if self._mode != "off":
            self._console.print(summary_table(result))

    def close(self) -> None:
        """End the live display; its last state stays on the screen."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def _show_live(self) -> None:
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=4, transient=False)
            self._live.start()
        self._live.update(self.state.panel())


class ProgressState:
    """What is known of a run from the snapshots so far; renders itself."""

    def __init__(self, *, title: str, run_dir: str) -> None:
        self.title, self.run_dir = title, run_dir
        self.status: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        """Stage -> smoothed seconds per batch."""
        self.win_rates: list[float] = []
        self._started = self._now = time.monotonic()
        self._anchor: tuple[int, float] | None = None  # labels and time from which the rate is measured
        self._batch: int | None = None

    def update(self, status: Mapping[str, Any], now: float) -> None:
        """Take in a snapshot made at `now`, seconds on any clock."""
        if not self.status:
            self._started = now
        self._now = now
        self.status.update(status)
        rate = self.status.get("win_rate")
        if rate is not None and (not self.win_rates or rate != self.win_rates[-1]):
            self.win_rates.append(float(rate))
        if self.labels and self._anchor is None:  # the first labels come after start-up, which is no measure
            self._anchor = (self.labels, now)
        if "batch" in status and status["batch"] != self._batch:
            self._batch = status["batch"]
            for key, value in status.items():
                if key.startswith("seconds/") and value is not None:
                    stage = key.removeprefix("seconds/")
                    self.seconds[stage] = 0.8 * self.seconds.get(stage, value) + 0.2 * value

    @property
    def labels(self) -> int:
        """Labels bought."""
        return int(self.status.get("labels") or 0)

    @property
    def budget(self) -> int:
        """Labels to buy; 0 before it is known."""
        return int(self.status.get("budget") or 0)

    @property
    def phase(self) -> str:
        """What the run is doing, in words."""
        return str(self.status.get("phase", "starting"))

    def eta_s(self) -> float | None:
        """Seconds until the budget is spent at the present rate; None while there is no rate."""
        if self._anchor is None or self.labels <= self._anchor[0]:
            return None
        rate = (self.labels - self._anchor[0]) / max(1e-9, self._now - self._anchor[1])
        return (self.budget - self.labels) / rate

    def win_rate(self) -> str:
        """`0.612 +/-0.034  (+0.214 since the start)`, or why there is none yet."""
        if not self.win_rates:
            return "not evaluated yet"
        error = self.status.get("win_rate_stderr")
        text = f"{self.win_rates[-1]:.3f}" + (f" ±{error:.3f}" if error is not None else "")
        return text + (f"  ({self.win_rates[-1] - self.win_rates[0]:+.3f})" if len(self.win_rates) > 1 else "")

    def line(self) -> str:
        """One line for logs and pipes."""
        eta = self.eta_s()
        parts = [f"[{_duration(self._now - self._started)}] {self.phase}: {self.labels}/{self.budget} labels"]
        if self.status.get("queue"):
            parts.append(str(self.status["queue"]))
        if self.win_rates:
            parts.append(f"win rate {self.win_rate()}")
        if self.seconds:
            parts.append(f"{sum(self.seconds.values()):.2f} s/batch")
        if "staleness" in self.status:
            parts.append(f"staleness {self.status['staleness']}")
        if self.status.get("learner/loss") is not None:
            parts.append(f"loss {self.status['learner/loss']:.4f}")
        if eta is not None and self.labels < self.budget:
            parts.append(f"{_duration(eta)} left")
        if self.status.get("warning"):
            parts.append(str(self.status["warning"]))
        return ", ".join(parts)

    def panel(self) -> RenderableType:
        """The live display."""
        eta = self.eta_s()
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(width=10, style="bold")
        bar.add_column(ratio=1)
        bar.add_column(justify="right")
        left = "" if eta is None or self.labels >= self.budget else f"  {_duration(eta)} left"
        bar.add_row(
            "labels",
            ProgressBar(total=max(1, self.budget), completed=self.labels, pulse=not self.labels),
            f"{self.labels:,} of {self.budget:,}{left}",
        )
        facts = Table.grid(padding=(0, 1))
        facts.add_column(width=10, style="bold")
        facts.add_column()
        facts.add_row("win rate", f"{self.win_rate()}  {sparkline(self.win_rates)}")
        if self.seconds:
            total = sum(self.seconds.values())
            stages = sorted(self.seconds.items(), key=lambda item: -item[1])
            shares = ", ".join(f"{stage} {value:.2f}" for stage, value in stages if value >= 0.01 * total)
            facts.add_row("batch", f"{total:.2f} s  [dim]({shares})[/dim]")
        learner = {k: v for k, v in self.status.items() if k.startswith("learner/") and v is not None}
        if learner:
            known = [
                f"{n} {learner[f'learner/{n}']:.4g}"
                for n in ("loss", "accuracy", "margin")
                if f"learner/{n}" in learner
            ]
            known += [
                f"{name.removeprefix('learner/seconds/')} {value:.2f} s"
                for name, value in learner.items()
                if name.startswith("learner/seconds/")
            ]
            facts.add_row("learner", "  ".join(known) or f"{len(learner)} numbers")
        if "staleness" in self.status:
            facts.add_row(
                "staleness", f"{self.status['staleness']} batches  [dim](version {self.status.get('version')})[/dim]"
            )
        facts.add_row("phase", Text(self.phase))
        if self.status.get("queue"):
            facts.add_row("queue", Text(str(self.status["queue"])))
        if self.status.get("warning"):
            facts.add_row("warning", Text(str(self.status["warning"]), style="yellow"))
        elapsed = _duration(self._now - self._started)
        return Panel(
            Group(bar, facts), title=Text(self.title, style="bold"), subtitle=Text(f"{self.run_dir}  {elapsed}")
        )


def summary_table(result: Result) -> Table:
    """Win rate before and after, labels spent, labels to target, and where things are."""
    table = Table(title="Result", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in summary_rows(result):
        table.add_row(name, Text(value))
    return table


def summary_rows(result: Result) -> list[tuple[str, str]]:
    """The rows of `summary_table`, plain."""
    rows = [("win rate before", _rate(result.initial_win_rate)), ("win rate after", _rate(result.win_rate))]
    if result.win_rate is not None and result.win_rate_stderr is not None:
        rows[-1] = (
            "win rate after",
            f"{result.win_rate:.3f} ±{result.win_rate_stderr:.3f} (standard error over prompts)",
        )
    bought = f"{result.labels_spent:,}"
    if result.labels_spent_on_evaluation:
        bought += f" (and {result.labels_spent_on_evaluation:,} for evaluation)"
    rows.append(("labels spent", bought))
    if result.labels_replayed:
        rows.append(("labels replayed", f"{result.labels_replayed:,}"))
    if result.online:
        regret = result.online.get("cumulative_regret")
        known = "" if regret is None else f", cumulative regret {regret:,.2f}"
        rows.append(("questions", f"{result.online['questions']:,} of users{known}"))
    if result.win_rate is not None:
        targets = shown_targets(result.initial_win_rate or 0.0, result.win_rate)[-4:]
        rows += [(f"labels to {target:.2f}", _labels(result.labels_to(target))) for target in targets]
    rows.append(("policy", str(result.checkpoint)))
    rows.append(("preferences", str(result.path / "preferences")))
    if (result.path / "report.html").exists():
        rows.append(("report", str(result.path / "report.html")))
    rows.append(("run", str(result.path)))
    if result.warning:
        rows.append(("warning", result.warning))
    return rows


def sparkline(values: list[float]) -> str:
    """The last 32 values as small bars, lowest to highest.

    >>> sparkline([0.0, 0.5, 1.0])
    '▁▅█'
    """
    shown = values[-32:]
    if len(shown) < 2 or max(shown) == min(shown):
        return ""
    low, span = min(shown), max(shown) - min(shown)
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in shown)


def _rate(value: float | None) -> str:
    return "not evaluated" if value is None else f"{value:.3f}"


def _labels(value: float | None) -> str:
    return "not reached" if value is None else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
