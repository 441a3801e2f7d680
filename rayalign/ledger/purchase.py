"""The purchase desk: the only place where a label is paid for.

    commit   budget checked, composition written down       -> every duel has an id on disk before anybody is asked
    label    outstanding duels asked, verdicts checked,     -> asked again, an answered duel costs nothing
             labels drawn and written down, then returned
    poll     a late oracle (people) is asked after what is outstanding, and not waited for
    recover  what a crash left outstanding is asked again, with the same ids

On the oracle's side an `AnswerJournal` remembers what was answered, so that asking again returns the answer
that was already paid for, even if the reply was lost with the process that gave it.

                 commit          ask              answer (journal)     reply         record
    desk      ---[ledger]-->  ---------> oracle ---[journal]---------> ------> ------[ledger]--> labels
    a crash here:  recover asks,         recover asks, nothing         recover asks, the journal answers
                   first time            was paid                      free of charge
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rayalign.env.labels import LABEL_MODES, LateOracle, Oracle, draw_label
from rayalign.errors import BudgetError, ConfigError, LedgerError, OracleError
from rayalign.ledger.ledger import Ledger
from rayalign.ledger.shared_budget import SharedBudget
from rayalign.types import Duel, Preference, Verdict

REFUSED = "Nothing of the reply was recorded or charged; the duels can be asked again."


class Purchaser:
    """Buys labels from `oracle` within `budget` (None: no limit) and writes everything down in `ledger`.

    A `Labeler`: an environment may ask it for the duels of a committed batch. Thread-safe; calls are one at a time,
    except that nobody waits for a `poll`.

    Args:
        late: the oracle is a `LateOracle`, and nobody waits for its answers: `label` hands the duels over and returns
            what is there, `poll` asks after the rest.
        shared: a cap on the labels of this and other runs, beside `budget`.
    """

    def __init__(
        self,
        ledger: Ledger,
        oracle: Oracle,
        mode: str = "bernoulli",
        seed: int = 0,
        budget: int | None = None,
        *,
        late: bool = False,
        shared: SharedBudget | None = None,
    ) -> None:
        if mode not in LABEL_MODES:
            raise ConfigError(f"oracle.labels={mode!r} must be one of {', '.join(LABEL_MODES)}.")
        if budget is not None and budget < 1:
            raise ConfigError(f"budget={budget} must be at least 1; None is no limit.")
        self.ledger, self.oracle, self.mode, self.seed, self.budget = ledger, oracle, mode, seed, budget
        self.late, self.shared = late, shared
        self._desk = threading.RLock()
        self._polling = threading.Lock()  # two polls at a time would both record the same answer
        self._waited_for: dict[str, Duel] = {}

    @property
    def remaining(self) -> int | None:
        """Labels that may still be committed; None without a limit. Other runs may take those of a shared budget."""
        own = None if self.budget is None else max(0, self.budget - self.ledger.committed)
        if self.shared is None or own == 0:
            return own
        room = self.shared.room(self.ledger.committed)
        return room if own is None else min(own, room)

    def reserve(self, wanted: int) -> int:
        """How many of `wanted` labels may be committed next; those of a shared budget are set aside for it."""
        own = None if self.budget is None else max(0, self.budget - self.ledger.committed)
        wanted = wanted if own is None else min(wanted, own)
        return wanted if self.shared is None else self.shared.reserve(self.ledger.committed, wanted)

    @property
    def shut_out(self) -> bool:
        """Whether a shared budget has nothing left, although this run's own has."""
        return self.shared is not None and self.remaining == 0 and self.budget != self.ledger.committed

    def commit(
        self,
        batch: int | None,
        duels: Sequence[Duel],
        synthetic: Sequence[Preference] = (),
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Reserve budget for `duels` and write the batch down, before the oracle hears of it.

        `batch=None` is for duels outside the training batches (evaluation): there, a duel that is already in the
        ledger, or twice in the list, is the same question and reserves nothing. Raises `BudgetError` if the duels
        don't all fit; then nothing was recorded.
        """
        with self._desk:
            if batch is None:
                duels = list({duel.id: duel for duel in duels if duel.id not in self.ledger}.values())
            remaining = len(duels) if self.shared is None and self.budget is None else self.reserve(len(duels))
            if len(duels) > remaining:
                raise BudgetError(
                    f"batch {batch} asks for {len(duels)} labels, but of budget={self.budget} only {remaining} are "
                    f"left ({self.ledger.spent} spent, {self.ledger.committed - self.ledger.spent} on order). "
                    "Nothing was asked; ask for fewer, or raise the budget."
                )
            self.ledger.commit(batch, duels, synthetic, meta)

    def label(self, duels: Sequence[Duel]) -> list[Preference | None]:
        """A preference per duel, None where the verdict failed or is late. Only duels without an outcome are asked.

        Raises `OracleError` if the oracle raises or answers nonsense. The sound verdicts of the call are recorded
        all the same; the other duels stay outstanding, uncharged, and can be asked again.
        """
        with self._desk:
            ask = {duel.id: duel for duel in duels if self._is_outstanding(duel)}
            if ask and not self.late:
                self._check_budget(len(ask))
                self._record(list(ask.values()), self.oracle.judge(list(ask.values())))
            self._waited_for |= ask if self.late else {}
        if ask and self.late:
            self.poll()
        return [self._outcome(duel) for duel in duels]

    def poll(self) -> int:
        """Ask a late oracle after everything outstanding; returns how many duels got an outcome.

        Raises as `label` does.
        """
        with self._polling:
            with self._desk:
                asked = dict(self._waited_for)
                self._check_budget(len(asked))
            if not asked:
                return 0
            verdicts = cast(LateOracle, self.oracle).poll(list(asked.values()))  # others may use the desk meanwhile
            answered = {verdict.duel_id: asked.get(verdict.duel_id) for verdict in verdicts}
            if len(answered) < len(verdicts) or None in answered.values():
                raise OracleError(
                    f"oracle {self.oracle.id} was asked after {len(asked)} duels and answered one twice, or one that "
                    f"is none of them: {[verdict.duel_id for verdict in verdicts][:20]}. {REFUSED}"
                )
            with self._desk:
                try:
                    self._record([asked[name] for name in answered], verdicts)
                finally:
                    for name in answered:
                        if self.ledger.outcome(name) is not None:
                            del self._waited_for[name]
            return len(verdicts)

    def recover(self) -> int:
        """Ask again what was asked and has no outcome (a crash in between); returns how many duels that were."""
        outstanding = self.ledger.outstanding()
        self.label(outstanding)
        return len(outstanding)

    # -- inside -------------------------------------------------------------------------------------------------
    def _is_outstanding(self, duel: Duel) -> bool:
        if duel.id not in self.ledger:
            raise LedgerError(
                f"duel {duel.id} of batch {duel.batch} was never committed; commit its batch before asking."
            )
        return self.ledger.outcome(duel.id) is None

    def _check_budget(self, on_order: int) -> None:
        if self.budget is not None and self.ledger.spent + on_order > self.budget:  # a resume with a smaller one
            raise BudgetError(
                f"{on_order} labels are on order and {self.ledger.spent} are spent, which is more than "
                f"budget={self.budget}. Nothing was asked; raise the budget to go on."
            )

    def _record(self, duels: Sequence[Duel], verdicts: Sequence[Verdict]) -> None:
        """Labels from verdicts, into the ledger; what is not usable is refused, the rest recorded."""
        self._check_ids(duels, verdicts)
        wrong = {v.duel_id: why for v in verdicts if (why := _what_is_wrong(v)) is not None}
        sound = [v for v in verdicts if v.duel_id not in wrong]
        labels = [
            None if v.probability is None else draw_label(v.probability, v.duel_id, self.mode, self.seed) for v in sound
        ]
        self.ledger.answer(sound, labels, oracle=self.oracle.id)
        if wrong:
            name, why = next(iter(wrong.items()))
            raise OracleError(
                f"oracle {self.oracle.id} answered duel {name} with {why} ({len(wrong)} of {len(duels)} verdicts are "
                "not usable). They were not charged and can be asked again; the others are recorded."
            )

    def _check_ids(self, duels: Sequence[Duel], verdicts: Sequence[Verdict]) -> None:
        """Who muddles up the ids can't be believed in anything: the whole reply is refused."""
        if len(verdicts) != len(duels):
            raise OracleError(
                f"oracle {self.oracle.id} gave {len(verdicts)} verdicts for {len(duels)} duels, the first of which is "
                f"{duels[0].id}. {REFUSED}"
            )
        for duel, verdict in zip(duels, verdicts, strict=True):
            if verdict.duel_id != duel.id:
                raise OracleError(
                    f"oracle {self.oracle.id} was asked duel {duel.id} and answered {verdict.duel_id}. {REFUSED}"
                )

    def _outcome(self, duel: Duel) -> Preference | None:
        outcome = self.ledger.outcome(duel.id)
        assert outcome is not None or self.late, f"duel {duel.id} has no outcome after it was asked"
        label, verdict = outcome or (None, None)
        if label is None or verdict is None:
            return None
        return Preference(duel=duel, label=label, probability=verdict.probability)


def _what_is_wrong(verdict: Verdict) -> str | None:
    if (verdict.probability is None) == (verdict.failure is None):
        return f"probability={verdict.probability} and failure={verdict.failure!r}, of which exactly one must be set"
    if verdict.probability is not None and not 0 <= verdict.probability <= 1:  # false for NaN, too
        return f"probability={verdict.probability}, which is not in [0, 1]"
    if not (math.isfinite(verdict.price) and verdict.price >= 0):
        return f"price={verdict.price}, which is not a price"
    return None


class AnswerJournal:
    """What the replicas of an oracle have answered, durable, so that a retry with the same id is not paid again.

    A folder with one JSON Lines file per writer: each appends to its own and reads all. Failed verdicts are not
    kept: they were not paid, and asking again may succeed. Where two replicas answered the same duel, the earlier
    answer holds for everybody who sees both.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._read_up_to: dict[Path, int] = {}
        self._own = self._new_file()  # never an old one: its tail may be torn
        self._start()

    def _start(self) -> None:
        self._mutex = threading.Lock()
        self._answers: dict[str, tuple[float, Verdict]] = {}  # duel id -> when, what

    def lookup(self, ids: Iterable[str]) -> dict[str, Verdict]:
        """The answers among `ids` that anybody recorded, with the price that was paid then."""
        with self._mutex:
            for lines in self._new():
                for line in lines.splitlines():
                    row = json.loads(line)
                    verdict = Verdict(duel_id=row["duel_id"], probability=row["probability"], price=row["price"])
                    self._take(verdict, row["time"])
            return {name: self._answers[name][1] for name in ids if name in self._answers}

    def record(self, verdicts: Iterable[Verdict]) -> None:
        """Append answers, durable on return; call it before the reply leaves."""
        now = time.time()
        kept = [verdict for verdict in verdicts if verdict.probability is not None]
        if not kept:
            return
        lines = [
            json.dumps({"duel_id": v.duel_id, "probability": v.probability, "price": v.price, "time": now}) + "\n"
            for v in kept
        ]
        with self._mutex:
            self._append("".join(lines).encode())
            for verdict in kept:
                self._take(verdict, now)

    def _append(self, written: bytes) -> None:
        """Write lines and flush them to disk."""
        new = not self._own.exists()
        try:
            with self._own.open("ab") as file:
                file.write(written)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self._own = self._new_file()  # never append to a line that may be torn
            raise
        self._read_up_to[self._own] = self._read_up_to.get(self._own, 0) + len(written)  # known without reading
        if new:
            folder = os.open(self.folder, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def _new_file(self) -> Path:
        return self.folder / f"answers-{uuid.uuid4().hex}.jsonl"

    def _new(self) -> Iterable[bytes]:
        """What is new in all files, up to the last complete line: the rest is torn, or still being written."""
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            start = self._read_up_to.get(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            self._read_up_to[path] = start + len(new)
            yield new

    def _take(self, verdict: Verdict, when: float) -> None:
        known = self._answers.get(verdict.duel_id)
        if known is None or when < known[0]:
            self._answers[verdict.duel_id] = (when, verdict)
