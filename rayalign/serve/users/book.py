"""What users were shown and what they said of it, on disk before anybody is told. No Ray and no web in here.

    single      a question, answered once                                     regret
    synthetic   the same, and a pair that the agent labelled itself           regret, duel, label
    offer       a question, answered twice: a comparison                      regret, duel, owner, which came first
    choice      of the owner of an open comparison                            first, second, tie or skip

    offered --choice---> chosen --committed to the ledger--> a duel that was paid for
       +-----skip------> skipped
       +-----too late--> expired                   these two cost nothing, and nobody waits for them

The state is what the events add up to, as in the ledger. Whether a comparison has expired is a matter of the clock and
needs no event; what was chosen stays chosen.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import pyarrow as pa

from rayalign.ledger.arrow_log import ArrowLog
from rayalign.ledger.rows import CONTENT, content_columns, duels_of, rows_of
from rayalign.types import Duel, LabelSource, Preference

LABELS = {"first": 1.0, "second": 0.0, "tie": 0.5}
"""What a choice says of a duel, as a label."""
CHOICES = (*LABELS, "skip")
"""What a user may say of two answers."""
SWAPPED = {"first": "second", "second": "first"}

SCHEMA = pa.schema(
    [
        pa.field("time", pa.float64(), nullable=False),
        pa.field("event", pa.string(), nullable=False),
        pa.field("duel_id", pa.string()),
        pa.field("batch", pa.int32()),
        pa.field("regret", pa.float64()),
        pa.field("owner", pa.string()),
        pa.field("swapped", pa.bool_()),
        pa.field("choice", pa.string()),
        pa.field("label", pa.float64()),
        *CONTENT,
    ],
    metadata={"rayalign.users": "1"},
)
"""`choice` and `label` are of the duel's own first and second, whatever its user was shown first."""


class Told(StrEnum):
    """What came of a choice."""

    RECORDED = "recorded"
    DIFFERENT = "different"
    """The comparison has another choice already."""
    EXPIRED = "expired"
    UNKNOWN = "unknown"
    """No such comparison, or another user's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One question, and what its user is about to see."""

    regret: float | None
    """Best reward minus that of the answer, or of both on average; None where the truth is not known."""
    duel: Duel | None = None
    """A comparison that is offered, or a pair that the agent has labelled itself."""
    label: float | None = None
    """The agent's own."""
    owner: str = ""
    """Whose question it is; empty where users have no names."""


@dataclass(slots=True)
class _Pair:
    """Where a duel is in the file, and what has become of it."""

    offset: int
    row: int
    owner: str
    swapped: bool
    offered_at: float
    choice: str | None = None
    label: float | None = None


class Book:
    """The book at `path`, made if it is not there. Thread-safe; one process at a time.

    Args:
        choose_within_s: seconds after which a comparison that was offered is void.
        clock: seconds since the epoch.
    """

    def __init__(
        self, path: str | Path, *, choose_within_s: float = 900.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.choose_within_s, self._clock = choose_within_s, clock
        self._mutex = threading.RLock()
        self._news = threading.Condition(self._mutex)
        self._pairs: dict[str, _Pair] = {}
        self._open: dict[str, None] = {}  # offered, not answered, and not known to be expired; oldest first
        self._chosen: dict[str, None] = {}  # and not in the ledger, in the order of the choices
        self._synthetic: dict[str, None] = {}  # and not in the ledger
        self._questions = self._known = self._offered = self._skipped = self._ties = self._preferred = 0
        self._expired = 0
        self._regret = 0.0
        self._log = ArrowLog(Path(path), SCHEMA, self._apply)

    def close(self) -> None:
        """Let go of the file; everything is on disk already."""
        with self._mutex:
            self._log.close()

    # -- what users do --------------------------------------------------------------------------------------------
    def show(self, shown: Sequence[Shown]) -> None:
        """Record what users are about to be shown; on disk when this returns, all of it or nothing.

        Raises `LedgerError` if the disk refuses: then nothing may be shown.
        """
        if not shown:
            return
        with self._mutex:
            duels = [one.duel for one in shown]
            columns = content_columns(duels)
            columns |= {
                "time": [self._clock()] * len(shown),
                "event": [_event(one) for one in shown],
                "batch": [duel and duel.batch for duel in duels],
                "regret": [one.regret for one in shown],
                "owner": [one.owner for one in shown],
                "swapped": [_event(one) == "offer" and is_swapped(one.duel.id) if one.duel else None for one in shown],
                "label": [one.label for one in shown],
            }
            rows = rows_of(SCHEMA, columns, len(shown))
            self._apply(rows, self._log.append(rows))

    def choose(self, name: str, choice: str, owner: str = "") -> Told:
        """Record what the `owner` of comparison `name` says, in the order in which its answers were shown.

        On disk when this returns. Saying the same again changes nothing.
        """
        assert choice in CHOICES, choice
        with self._mutex:
            pair = self._pairs.get(name)
            if pair is None or pair.label is not None or pair.owner != owner:
                return Told.UNKNOWN
            own = SWAPPED.get(choice, choice) if pair.swapped else choice
            if pair.choice is not None:
                return Told.RECORDED if pair.choice == own else Told.DIFFERENT
            self._expire()
            if name not in self._open:
                return Told.EXPIRED
            columns = {"time": [self._clock()], "event": ["choice"], "duel_id": [name], "choice": [own]}
            rows = rows_of(SCHEMA, columns, 1)
            self._apply(rows, self._log.append(rows))
            self._news.notify_all()
            return Told.RECORDED

    # -- what becomes of it ---------------------------------------------------------------------------------------
    def committed(self, names: Iterable[str]) -> None:
        """These are in the ledger now."""
        with self._mutex:
            for name in names:
                self._chosen.pop(name, None)
                self._synthetic.pop(name, None)

    def settle(self, in_ledger: Callable[[str], bool]) -> None:
        """Strike out what is in the ledger already: how a restarted run finds its place."""
        with self._mutex:
            self.committed([name for name in (*self._chosen, *self._synthetic) if in_ledger(name)])

    def wait_for(self, chosen: int, timeout_s: float) -> bool:
        """Whether, after at most `timeout_s`, so many comparisons have been chosen that are not in the ledger."""
        with self._news:
            return self._news.wait_for(lambda: len(self._chosen) >= chosen, timeout_s)

    def chosen(self, most: int, batch: int) -> list[Duel]:
        """The duels that were chosen and are not in the ledger, oldest choice first, as duels of batch `batch`."""
        with self._mutex:
            return [replace(self._duel(name), batch=batch) for name in [*self._chosen][:most]]

    def synthetic(self, most: int, batch: int) -> list[Preference]:
        """The pairs that the agent labelled itself and that are not in the ledger, oldest first."""
        with self._mutex:
            return [
                Preference(duel=replace(self._duel(name), batch=batch), label=label, source=LabelSource.SYNTHETIC)
                for name in [*self._synthetic][:most]
                if (label := self._pairs[name].label) is not None
            ]

    def choices(self, names: Iterable[str]) -> list[str | None]:
        """What was said of each duel, of its own first and second; None where nothing was, or it is unknown here."""
        with self._mutex:
            return [pair.choice if (pair := self._pairs.get(name)) else None for name in names]

    def is_swapped(self, name: str) -> bool:
        """Whether the user of a comparison was shown its second answer first."""
        with self._mutex:
            return self._pairs[name].swapped

    # -- numbers --------------------------------------------------------------------------------------------------
    @property
    def num_questions(self) -> int:
        """Questions that were answered, one way or the other."""
        return self._questions

    @property
    def num_open(self) -> int:
        """Comparisons that may still be chosen."""
        with self._mutex:
            self._expire()
            return len(self._open)

    @property
    def num_claims(self) -> int:
        """Comparisons that are not in the ledger and may get there: chosen ones, and those that may still be."""
        with self._mutex:
            return self.num_open + self.num_chosen

    @property
    def num_chosen(self) -> int:
        """Comparisons that were chosen and are not in the ledger."""
        return len(self._chosen)

    @property
    def num_synthetic(self) -> int:
        """Pairs that the agent labelled itself and that are not in the ledger."""
        return len(self._synthetic)

    def numbers(self) -> dict[str, float]:
        """Counts since the start of the run; `cumulative_regret` over the `known` questions, if there are any."""
        with self._mutex:
            self._expire()
            numbers: dict[str, float] = {
                "questions": self._questions,
                "offered": self._offered,
                "chosen": self._preferred + self._ties,
                "skipped": self._skipped,
                "expired": self._expired,
                "open": len(self._open),
            }
            if self._preferred + self._ties:
                numbers["preferred_share"] = self._preferred / (self._preferred + self._ties)
            if self._known:
                numbers |= {"known": self._known, "cumulative_regret": self._regret}
            return numbers

    # -- inside ---------------------------------------------------------------------------------------------------
    def _expire(self) -> None:
        """Comparisons are offered in the order of time, so those that are too old come first."""
        limit = self._clock() - self.choose_within_s
        for name in [*self._open]:
            if self._pairs[name].offered_at > limit:
                return
            del self._open[name]
            self._expired += 1

    def _duel(self, name: str) -> Duel:
        pair = self._pairs[name]
        (duel,) = duels_of(self._log.read(pair.offset).slice(pair.row, 1))
        return duel

    def _apply(self, rows: pa.RecordBatch, offset: int) -> None:
        names = ("time", "event", "duel_id", "regret", "owner", "swapped", "choice", "label")
        columns = [rows.column(name).to_pylist() for name in names]
        for row, (when, event, name, regret, owner, swapped, choice, label) in enumerate(zip(*columns, strict=True)):
            if event == "choice":
                self._add_choice(name, choice)
                continue
            self._questions += 1
            if regret is not None:
                self._known += 1
                self._regret += regret
            if event == "single":
                continue
            self._pairs[name] = _Pair(offset, row, owner, bool(swapped), when, label=label)
            if event == "offer":
                self._offered += 1
                self._open[name] = None
            else:
                self._synthetic[name] = None

    def _add_choice(self, name: str, choice: str) -> None:
        self._pairs[name].choice = choice
        self._open.pop(name, None)
        if choice == "skip":
            self._skipped += 1
            return
        self._chosen[name] = None
        if choice == "tie":
            self._ties += 1
        else:
            self._preferred += 1


def is_swapped(name: str) -> bool:
    """Whether the second answer of comparison `name` is shown first: a coin that the id decides."""
    return hashlib.blake2b(f"shown:{name}".encode(), digest_size=1).digest()[0] % 2 == 1


def _event(one: Shown) -> str:
    if one.duel is None:
        return "single"
    return "offer" if one.label is None else "synthetic"
