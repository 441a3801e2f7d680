"""The duels that wait for people: a queue that is on disk before it says so. No Ray and no web in here.

    put ------> waiting --take--> leased to an annotator --answer--> voted --enough votes, none revocable--> settled
                   ^                       |                           |
                   +---- lease expired ----+ <---------- undo ---------+

Everything is an event in an append-only log, flushed before the call returns; the state is what the events add up
to, so a restarted queue is the queue that was stopped. An answer can be undone until its annotator gives the next
one or `undo_s` seconds are over, and only then it counts: a verdict that was handed out is never taken back.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayalign.errors import LabellingError
from rayalign.ledger.arrow_log import ArrowLog
from rayalign.serve.labelling.aggregate import (
    VOTES,
    Agreement,
    Votes,
    agreement,
    by_majority,
    krippendorff_alpha,
)
from rayalign.types import Duel, Verdict

CHOICES = (*VOTES, "skip")
"""What an annotator may say of a duel."""

HISTORY = 1000
"""Duels from which annotators' reliability is estimated; more say hardly more, and take their time."""

SCHEMA = pa.schema(
    [pa.field("time", pa.float64(), False), pa.field("event", pa.string(), False), pa.field("duel", pa.string(), False)]
    + [pa.field(name, pa.string()) for name in ("annotator", "choice", "left", "prompt", "first", "second", "failure")]
    + [pa.field("probability", pa.float64())]
)
"""A row per event: put (texts), take (annotator, which response is left), answer, undo, settle (the verdict)."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One duel as one annotator sees it."""

    duel: str
    prompt: str
    left: str
    right: str


@dataclass(frozen=True, kw_only=True)
class AnnotatorProgress:
    """How far an annotator, and the queue, have come."""

    answered: int
    """Duels this annotator voted on."""
    skipped: int
    """Duels this annotator passed on to somebody else."""
    open: int
    """Duels that still wait for votes, whoever gives them."""
    settled: int
    """Duels with a verdict."""


@dataclass
class _Item:
    texts: tuple[str, str, str]
    """Prompt, first and second response."""
    answers: dict[str, str] = field(default_factory=dict)
    leases: dict[str, float] = field(default_factory=dict)
    """Annotator -> when it was handed out last; who has answered holds none."""
    left: dict[str, str] = field(default_factory=dict)
    """Annotator -> `first` or `second`: what is on the left of this annotator's screen."""
    verdict: Verdict | None = None

    @property
    def votes(self) -> dict[str, str]:
        return {who: choice for who, choice in self.answers.items() if choice in VOTES}


class DuelQueue:
    """The queue logged at `path`, for the people named `annotators`. Thread-safe; one process at a time.

    Args:
        annotators_per_duel: votes that a duel needs. Where too many skip it, fewer do; where all skip it, it fails.
        lease_s: seconds after which a duel that was handed out and not answered goes to somebody else.
        undo_s: seconds for which an annotator's last answer can be undone, and does not count yet.
        aggregate: what makes the labels of some duels of all votes (see `aggregate.AGGREGATES`); it knows the last
            `HISTORY` duels with votes.
        seed: of which response is shown left, by annotator and duel.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        path: str | Path,
        annotators: Iterable[str],
        *,
        annotators_per_duel: int = 1,
        lease_s: float = 900.0,
        undo_s: float = 20.0,
        aggregate: Callable[[Votes, Collection[str]], dict[str, float]] = by_majority,
        seed: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.annotators = frozenset(annotators)
        self.annotators_per_duel, self.lease_s, self.undo_s, self.seed = annotators_per_duel, lease_s, undo_s, seed
        self._aggregate, self._clock = aggregate, clock
        self._settling = threading.Lock()
        self._mutex = threading.RLock()
        self._items: dict[str, _Item] = {}  # in the order in which they are asked
        self._open: dict[str, None] = {}  # ids without a verdict, same order
        self._last_answer: dict[str, tuple[str, float]] = {}  # annotator -> duel and time of what may be undone
        self._log = ArrowLog(Path(path), SCHEMA, lambda batch, _: self._apply_all(batch.to_pylist()))

    def close(self) -> None:
        """Let go of the log; everything is on disk already."""
        with self._mutex:
            self._log.close()

    # -- the oracle's side ----------------------------------------------------------------------------------------
    def put(self, duels: Sequence[Duel]) -> dict[str, Verdict]:
        """Line up the duels that are new; returns what is settled already. The same id is the same question."""
        with self._mutex:
            new: dict[str, dict[str, Any]] = {}
            for duel in duels:
                texts = (_clean(duel.prompt.text), _clean(duel.first.text), _clean(duel.second.text))
                known = self._items.get(duel.id)
                if known is None:
                    new[duel.id] = dict(zip(("prompt", "first", "second"), texts, strict=True))
                elif known.texts != texts:
                    raise LabellingError(f"duel {duel.id} was put before with other texts; one id is one comparison.")
            self._record([{"event": "put", "duel": name, **row} for name, row in new.items()])
        return self.verdicts([duel.id for duel in duels])

    def verdicts(self, ids: Iterable[str]) -> dict[str, Verdict]:
        """Those among `ids` that are settled. What is ripe is settled here, on disk first, and stays as it is."""
        with self._settling:
            with self._mutex:
                ids = [name for name in ids if name in self._items]
                ripe = [name for name in ids if self._is_ripe(name)]
                votes = self._votes(ripe)
            # What is ripe gets no more votes, so that annotators need not wait while labels are made.
            voted = [name for name in ripe if name in votes]
            labels = self._aggregate(votes, voted) if voted else {}
            with self._mutex:
                failed = {name: "skipped by every annotator" for name in ripe if name not in labels}
                self._record(
                    [
                        {"event": "settle", "duel": name, "probability": labels.get(name), "failure": failed.get(name)}
                        for name in ripe
                    ]
                )
                return {name: verdict for name in ids if (verdict := self._items[name].verdict) is not None}

    def _votes(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """The votes on `names` and on the last duels that have some."""
        votes = {name: self._items[name].votes for name in names}
        for name, item in reversed(self._items.items()):
            if len(votes) >= HISTORY:
                break
            votes.setdefault(name, item.votes)
        return {name: by_annotator for name, by_annotator in votes.items() if by_annotator}

    # -- an annotator's side --------------------------------------------------------------------------------------
    def take(self, annotator: str) -> Task | None:
        """What `annotator` shall judge next: the duel at hand if there is one, else the oldest that needs a vote."""
        with self._mutex:
            self._check(annotator)
            own = [
                (self._items[name].leases[annotator], name) for name in self._open if self._is_leased(name, annotator)
            ]
            if own:
                return self._task(annotator, max(own)[1])
            name = next((name for name in self._open if self._may_take(name, annotator)), None)
            if name is None:
                return None
            left = self._items[name].left.get(annotator) or self._draw_left(annotator, name)
            self._record([{"event": "take", "duel": name, "annotator": annotator, "left": left}])
            return self._task(annotator, name)

    def answer(self, annotator: str, duel: str, choice: str) -> None:
        """Record one of `CHOICES`; on disk when this returns. Saying the same again changes nothing.

        Raises `LabellingError` if the duel was not handed to this annotator, has another answer of theirs, or was
        given to somebody else after its lease expired.
        """
        with self._mutex:
            self._check(annotator)
            if choice not in CHOICES:
                raise LabellingError(f"choice {choice!r} must be one of {', '.join(CHOICES)}.")
            item = self._items.get(duel)
            if item is not None and item.answers.get(annotator) == choice:
                return
            if item is None or annotator not in item.leases:
                why = "has your answer; undo it first" if item and annotator in item.answers else "was not given to you"
                raise LabellingError(f"duel {duel} {why}.")
            late = item.verdict is not None or not self._is_leased(duel, annotator)
            if late and (item.verdict is not None or not self._has_room(duel)):
                raise LabellingError(f"duel {duel} took too long and was given to somebody else.")
            self._record([{"event": "answer", "duel": duel, "annotator": annotator, "choice": choice}])

    def undo(self, annotator: str, duel: str) -> None:
        """Take back the last answer, which must be on `duel`, and get that duel again. Undoing twice is undoing once.

        Raises `LabellingError` if it counts already (see `undoable`), or was skipped and is with somebody else now.
        """
        with self._mutex:
            self._check(annotator)
            item = self._items.get(duel)
            if item is not None and annotator not in item.answers and self._is_leased(duel, annotator):
                return
            if item is None or self.undoable(annotator) != duel:
                raise LabellingError(f"the answer on duel {duel} can't be undone any more.")
            if item.answers[annotator] == "skip" and not self._has_room(duel):
                raise LabellingError(f"duel {duel} was skipped and is with somebody else now.")
            self._record([{"event": "undo", "duel": duel, "annotator": annotator}])

    def undoable(self, annotator: str) -> str | None:
        """The duel whose answer `annotator` may undo now."""
        with self._mutex:
            duel, answered_at = self._last_answer.get(annotator, ("", 0.0))
            if not duel or self._clock() - answered_at >= self.undo_s:
                return None
            return duel if self._items[duel].verdict is None else None

    def choice_of(self, annotator: str, duel: str, side: str) -> str:
        """What `left` or `right` on the annotator's screen means; other choices are what they are."""
        with self._mutex:
            if side not in ("left", "right"):
                return side
            left = self._items[duel].left.get(annotator) if duel in self._items else None
            if left is None:
                raise LabellingError(f"duel {duel} was not given to you.")
            return left if side == "left" else ("second" if left == "first" else "first")

    # -- numbers --------------------------------------------------------------------------------------------------
    def progress(self, annotator: str) -> AnnotatorProgress:
        """Counts for an annotator's page."""
        with self._mutex:
            choices = [item.answers[annotator] for item in self._items.values() if annotator in item.answers]
            skipped = choices.count("skip")
            return AnnotatorProgress(
                answered=len(choices) - skipped,
                skipped=skipped,
                open=len(self._open),
                settled=len(self._items) - len(self._open),
            )

    def agreement(self) -> tuple[list[Agreement], float | None]:
        """How far every two annotators agree on what both voted on, and all of them: Krippendorff's alpha."""
        with self._mutex:
            votes = {name: item.votes for name, item in self._items.items()}
        return agreement(votes.values()), krippendorff_alpha(votes)

    # -- rules ----------------------------------------------------------------------------------------------------
    def _check(self, annotator: str) -> None:
        if annotator not in self.annotators:
            raise LabellingError(f"{annotator!r} is not an annotator of this queue.")

    def _is_leased(self, name: str, annotator: str) -> bool:
        since = self._items[name].leases.get(annotator)
        return since is not None and self._clock() - since < self.lease_s

    def _has_room(self, name: str) -> bool:
        """Whether one more annotator may be asked: votes and running leases are fewer than the votes needed."""
        item = self._items[name]
        leased = sum(self._is_leased(name, who) for who in item.leases)
        return len(item.votes) + leased < self.annotators_per_duel

    def _may_take(self, name: str, annotator: str) -> bool:
        return annotator not in self._items[name].answers and self._has_room(name)

    def _is_ripe(self, name: str) -> bool:
        """Whether an open duel has all the votes it will get, none of which can be undone."""
        item = self._items[name]
        if item.verdict is not None or any(self.undoable(who) == name for who in item.answers):
            return False
        return len(item.votes) >= self.annotators_per_duel or not self.annotators - item.answers.keys()

    def _draw_left(self, annotator: str, duel: str) -> str:
        digest = hashlib.blake2b(f"{self.seed}:{annotator}:{duel}".encode(), digest_size=1).digest()
        return ("first", "second")[digest[0] % 2]

    def _task(self, annotator: str, name: str) -> Task:
        item = self._items[name]
        prompt, first, second = item.texts
        left, right = (first, second) if item.left[annotator] == "first" else (second, first)
        return Task(duel=name, prompt=prompt, left=left, right=right)

    # -- events ---------------------------------------------------------------------------------------------------
    def _record(self, events: Sequence[dict[str, Any]]) -> None:
        """To disk, then to memory: if the disk refuses, nothing has happened."""
        if events:
            now = self._clock()
            rows = [{"time": now, **event} for event in events]
            self._log.append(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
            self._apply_all(rows)

    def _apply_all(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self._apply(row, row["duel"], row.get("annotator") or "")

    def _apply(self, row: dict[str, Any], name: str, annotator: str) -> None:
        if row["event"] == "put":
            self._items[name] = _Item(texts=(row["prompt"], row["first"], row["second"]))
            self._open[name] = None
            return
        item = self._items[name]
        if row["event"] == "take":
            item.leases[annotator], item.left[annotator] = row["time"], row["left"]
        elif row["event"] == "answer":
            item.leases.pop(annotator, None)
            item.answers[annotator] = row["choice"]
            self._last_answer[annotator] = (name, row["time"])
        elif row["event"] == "undo":
            del item.answers[annotator]
            item.leases[annotator] = row["time"]
            del self._last_answer[annotator]
        else:
            item.verdict = Verdict(duel_id=name, probability=row.get("probability"), failure=row.get("failure"))
            self._open.pop(name, None)


def _clean(text: str) -> str:
    """`text` as UTF-8 can hold it: lone surrogates become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
