"""Every call to an endpoint that bills, on disk before it is made: the spending cap, and no question paid twice.

    reserve   within the cap? -> a line on disk -> only then the request leaves
    answer    billed: what was said, for whoever asks the same again, in this process or in one after a crash
    waste     billed, but nothing could be read of it (or nobody knows: a timeout may have been billed)
    free      not billed: the reservation is given back
    a crash in between: the reservation stays counted, since the provider may have billed it

CallBook         one file per folder, JSON Lines, shared by all replicas under a file lock; each reads what the others
                 wrote before it decides. A line that was torn by a crash is a call that never left, or an answer that
                 is asked again.
BucketCallBook   objects in a bucket, of one replica at a time (`rayalign.storage.calls`)
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NamedTuple

from rayalign.errors import OracleError
from rayalign.storage import BucketCalls

NAME = "calls.jsonl"


class Question(NamedTuple):
    """What is asked: equal questions get the answer that was already paid for."""

    judge: str
    """Id of the oracle: another model, template or form of answer is another question."""
    duel: str
    swapped: bool
    """The duel's second response was shown first."""
    repeat: int
    """0; 1 for the repetition that measures self-agreement."""


class Answer(NamedTuple):
    """What was answered; no probability is an abstention."""

    probability: float | None
    """That the response shown first is better."""


class CallBook:
    """The calls of all replicas that share `folder`; None keeps them in memory alone. Thread-safe."""

    def __init__(self, folder: str | Path | None = None, cap: float = 0.0) -> None:
        self.path = None if folder is None else Path(folder) / NAME
        self.cap = Decimal(str(cap))
        self.answers: dict[Question, Answer] = {}
        self.calls = self.wasted = self.freed = 0
        self._open: dict[str, tuple[str, Decimal]] = {}
        self._taken: set[tuple[str, str]] = set()
        """Kinds and calls of the rows that were read: a copy out of a bucket may have some twice, in any order."""
        self._spent_on: dict[str, Decimal] = {}
        self._spent = Decimal(0)
        self._mutex = threading.RLock()
        self._read_up_to = 0
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.refresh()

    @classmethod
    def copy_of(cls, folder: str | Path) -> CallBook:
        """What the book in `folder` says now, in memory: touches nothing, and may be read-only."""
        book = cls()
        for line in (Path(folder) / NAME).read_bytes().splitlines():
            book._take(_parsed(line))
        return book

    @property
    def spent(self) -> float:
        """Money spent or reserved, as far as this process has seen."""
        return float(self._spent)

    def spent_on(self, duel: str) -> float:
        """Money spent on a duel: all its calls, those that could not be read included."""
        return float(self._spent_on.get(duel, 0))

    def refresh(self) -> None:
        """Read what other replicas wrote."""
        with self._locked():
            pass

    def lookup(self, question: Question) -> Answer | None:
        """The answer that was already paid for, as far as this process has seen."""
        with self._mutex:
            return self.answers.get(question)

    def reserve(self, duel: str, price: float) -> str:
        """Book a call before it is made; returns its name. Raises `OracleError` if it would exceed the cap."""
        cost, name = Decimal(str(price)), uuid.uuid4().hex
        with self._locked() as file:
            self._check_cap(cost)
            self._write(
                file, {"reserve": name, "duel": duel, "price": str(cost), "time": time.time()}, durable=cost > 0
            )
        return name

    def answer(self, call: str, question: Question, answer: Answer) -> None:
        """What a call brought."""
        with self._locked() as file:
            row = {"answer": call, **question._asdict(), **answer._asdict()}
            self._write(file, row, durable=self._open[call][1] > 0)

    def waste(self, call: str, why: str) -> None:
        """A call that is, or may be, billed brought nothing."""
        with self._locked() as file:
            self._write(file, {"waste": call, "why": why}, durable=False)

    def free(self, call: str, why: str) -> None:
        """A call was not billed."""
        with self._locked() as file:
            self._write(file, {"free": call, "why": why}, durable=False)

    def flush(self) -> None:
        """What was noted is durable on return, as far as it is worth a write."""

    # -- inside -------------------------------------------------------------------------------------------------
    def _check_cap(self, cost: Decimal) -> None:
        if self.cap and self._spent + cost > self.cap:
            raise OracleError(
                f"the judge has cost {self._spent} and another call costs {cost}, which is more than "
                f"oracle.judge.max_spend={self.cap}. It was not made, and every answer so far is kept. To go on: "
                "rayalign resume RUN_DIR --set oracle.judge.max_spend=MORE (0: no cap); with evaluation. in front "
                "if it is the evaluation's judge."
            )

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes] | None]:
        """Alone with the file, and up to date with it."""
        with self._mutex:
            if self.path is None:
                yield None
                return
            with self.path.open("a+b") as file:  # closing it gives the lock back
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(self._read_up_to)
                new = file.read()
                if new and not new.endswith(b"\n"):  # whoever wrote that is dead: it held the lock
                    file.write(b"\n")
                self._read_up_to += len(new) + (not new.endswith(b"\n") and bool(new))
                for line in new.splitlines():
                    self._take(_parsed(line))
                yield file

    def _write(self, file: IO[bytes] | None, row: dict[str, Any], *, durable: bool) -> None:
        if file is not None:
            line = (json.dumps(row) + "\n").encode()
            file.write(line)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            self._read_up_to += len(line)
        self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        key = next(((kind, row[kind]) for kind in ("reserve", "answer", "waste", "free") if kind in row), None)
        if key is None or key in self._taken:
            return
        self._taken.add(key)
        if "reserve" in row:
            call = row["reserve"]
            self.calls += 1
            self._count(row["duel"], Decimal(row["price"]))
            self._open[call] = row["duel"], Decimal(row["price"])
            if ("free", call) in self._taken:
                self._give_back(call)
        elif "answer" in row:
            self._open.pop(row["answer"], None)
            question = Question(**{name: row[name] for name in Question._fields})
            self.answers.setdefault(question, Answer(row["probability"]))
        elif "waste" in row:
            self._open.pop(row["waste"], None)
            self.wasted += 1
        elif "free" in row:
            self._give_back(row["free"])

    def _give_back(self, call: str) -> None:
        reserved = self._open.pop(call, None)
        if reserved is not None:  # else the reservation's line was torn, or is still to come
            duel, cost = reserved
            self._count(duel, -cost)
            self.freed += 1

    def _count(self, duel: str, cost: Decimal) -> None:
        self._spent += cost
        self._spent_on[duel] = self._spent_on.get(duel, Decimal(0)) + cost


class BucketCallBook(CallBook):
    """The calls of one replica in the bucket folder `uri`; the replicas before it can make none any more. Thread-safe.

    A call is made only when its reservation is in the bucket and no later replica was seen after that. An answer that
    could not be written is kept here, and goes with the next one.
    """

    def __init__(self, uri: str, cap: float = 0.0) -> None:
        super().__init__(None, cap)
        self._calls = BucketCalls(uri)
        self._unwritten: list[bytes] = []
        self._read(self._calls.found)

    def refresh(self) -> None:
        """Read what calls that were under way at an earlier replica have brought."""
        self._read(self._calls.late())

    def reserve(self, duel: str, price: float) -> str:
        """As `CallBook.reserve`. Raises `StorageError` if the bucket does not take it, or another replica has come."""
        cost, name = Decimal(str(price)), uuid.uuid4().hex
        row = {"reserve": name, "duel": duel, "price": str(cost), "time": time.time()}
        with self._mutex:
            self._check_cap(cost)
            self._take(row)  # at once, so that no other thread takes the same money
        if not cost:
            self._later(row)
            return name
        try:
            self._put(row)
            self._calls.check()
        except BaseException:
            self.free(name, "was not made")
            raise
        return name

    def answer(self, call: str, question: Question, answer: Answer) -> None:
        """What a call brought; known here in any case, and in the bucket unless it raises `StorageError`."""
        row = {"answer": call, **question._asdict(), **answer._asdict()}
        with self._mutex:
            self._take(row)
        self._put(row)

    def flush(self) -> None:
        """What was noted is in the bucket on return."""
        if self._unwritten:
            self._put()

    def _write(self, file: IO[bytes] | None, row: dict[str, Any], *, durable: bool) -> None:
        self._later(row)
        self._take(row)

    def _later(self, *rows: dict[str, Any]) -> None:
        with self._mutex:
            self._unwritten += [(json.dumps(row) + "\n").encode() for row in rows]

    def _put(self, *rows: dict[str, Any]) -> None:
        """Write `rows` and what waits; not under the mutex, as other threads' calls need not wait for the store."""
        with self._mutex:
            self._later(*rows)
            lines, self._unwritten = self._unwritten, []
        try:
            self._calls.put(b"".join(lines))
        except BaseException:
            with self._mutex:
                self._unwritten = lines + self._unwritten
            raise

    def _read(self, lines: bytes) -> None:
        with self._mutex:
            for line in lines.splitlines():
                self._take(_parsed(line))


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
