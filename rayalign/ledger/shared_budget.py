"""One cap on the labels of many runs: a file in which each run reserves labels before it commits to buying them.

    {"cap": 5000}                          the first line; a later one raises the cap
    {"run": "trial_a/run-0", "labels": 256}    this run may buy up to 256 labels in all: its mark
    {"run": "trial_b/run-0", "labels": 256}

The sum of all marks never exceeds the cap, and no run commits beyond its mark, so that whatever happens at the same
time, or crashes in between, no more than the cap is ever bought. A crash between a reservation and its purchase leaves
a mark that is too high. It is brought down to what the run's ledger says as soon as somebody else needs the labels: the
holder of a reservation holds the lock of its ledger, so a ledger that nobody holds is one that nobody buys for.

Labels that a run inherited (a copy of another run that goes on with other settings) were paid by the run it is a copy
of, and count in that one's mark alone.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from rayalign.errors import BudgetError, ConfigError, LedgerError
from rayalign.ledger.ledger import Ledger

INHERITED = "inherited.json"
"""In the directory of a run that began as a copy of another: how many labels were paid there."""


def inherited_labels(run_dir: str | Path, of: str = "labels") -> int:
    """Labels in the run's ledger that another run paid for; 0 for a run of its own.

    `of="evaluation_labels"`: in the ledger of its evaluations.
    """
    file = Path(run_dir) / INHERITED
    return int(json.loads(file.read_text()).get(of, 0)) if file.exists() else 0


@dataclass
class _Marks:
    """What the file adds up to."""

    cap: int = 0
    by_run: dict[str, int] = field(default_factory=dict)

    @property
    def room(self) -> int:
        return self.cap - sum(self.by_run.values())


class SharedBudget:
    """The file at `path`, as run `run_dir` uses it, which holds the lock of its own ledger meanwhile.

    Everything happens under the file's lock, in one process at a time; every change is on disk before it counts.
    """

    def __init__(self, path: str | Path, run_dir: str | Path) -> None:
        self.path, self.run_dir = Path(path), Path(run_dir)
        self.run = os.path.relpath(self.run_dir, self.path.parent)
        self.inherited = inherited_labels(run_dir)
        if not self.path.exists():
            raise ConfigError(
                f"loop.shared_budget={str(path)!r} is not there. Make it with "
                "rayalign.ledger.shared_budget.create(path, cap), or leave the setting empty."
            )

    def room(self, committed: int) -> int:
        """Labels that the run may commit beyond `committed`, what its ledger holds; others may take them first."""
        with _locked(self.path) as file:
            marks = _read(self.path, file)
            self._reclaim(marks, file, committed + 1)
            return self._own(marks) - self._paid(committed) + max(0, marks.room)

    def reserve(self, committed: int, wanted: int) -> int:
        """Reserve `wanted` labels beyond `committed`; returns how many of them the run may now commit."""
        with _locked(self.path) as file:
            marks = _read(self.path, file)
            self._reclaim(marks, file, committed + wanted)
            own, target = self._own(marks), self._paid(committed) + wanted
            granted = min(target, own + max(0, marks.room))
            if granted > own:
                _append(file, {"run": self.run, "labels": granted})
            return max(0, granted - self._paid(committed))

    def settle(self, committed: int) -> None:
        """Give back what was reserved and not committed; the run buys nothing more for now."""
        with _locked(self.path) as file:
            if self._own(_read(self.path, file)) > self._paid(committed):
                _append(file, {"run": self.run, "labels": self._paid(committed)})

    def _paid(self, committed: int) -> int:
        return committed - self.inherited

    def _own(self, marks: _Marks) -> int:
        return marks.by_run.get(self.run, 0)

    def _reclaim(self, marks: _Marks, file: BinaryIO, committed: int) -> None:
        """Where there is too little room for `committed` in all: bring down the marks of runs that nobody runs."""
        if self._own(marks) + marks.room >= self._paid(committed):
            return
        for run, mark in marks.by_run.items():
            if run != self.run and (bought := _bought_by_nobody(self.path.parent / run)) is not None and bought < mark:
                marks.by_run[run] = bought
                _append(file, {"run": run, "labels": bought})


def create(path: str | Path, cap: int) -> None:
    """Make the file of a cap on the labels of many runs, or raise the cap of one that is there.

    Raises `ConfigError` if `cap` is lower than that of the file: runs may have been promised the difference.
    """
    if cap < 1:
        raise ConfigError(f"max_labels={cap} must be at least 1.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, make=True) as file:
        known = _read(path, file).cap
        if known > cap:
            raise ConfigError(
                f"max_labels={cap} is less than {known}, which {str(path)!r} promises already; it can only be raised."
            )
        if known < cap:
            _append(file, {"cap": cap})


def reserved(path: str | Path) -> dict[str, int]:
    """Run -> labels that it may buy in all; their sum is what can have been bought."""
    with _locked(Path(path)) as file:
        return _read(Path(path), file).by_run


def _bought_by_nobody(run_dir: Path) -> int | None:
    """Labels that the run has committed to; None while somebody runs it, or where there is no ledger to tell."""
    ledger = run_dir / "ledger.arrow"
    if not ledger.exists():
        return None
    try:
        with Ledger(ledger, lock_timeout_s=0.0) as opened:
            return opened.committed - inherited_labels(run_dir)
    except LedgerError:
        return None


@contextmanager
def _locked(path: Path, *, make: bool = False) -> Iterator[BinaryIO]:
    """The file, open for reading and appending, and nobody else's meanwhile."""
    with path.open("a+b" if make else "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # held for milliseconds, and let go by the kernel with its process
        yield file


def _read(path: Path, file: BinaryIO) -> _Marks:
    """Fold the lines. A torn last one (a crash while it was written, nobody was told of it) is cut off."""
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        file.truncate(len(whole))
    marks = _Marks()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            if "cap" in row:
                marks.cap = int(row["cap"])
            else:
                marks.by_run[str(row["run"])] = int(row["labels"])
        except (ValueError, KeyError, TypeError):
            raise BudgetError(f"line {number} of {path} is damaged, so that nothing more can be reserved.") from None
    return marks


def _append(file: BinaryIO, row: dict[str, Any]) -> None:
    file.seek(0, os.SEEK_END)
    file.write(json.dumps(row).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
