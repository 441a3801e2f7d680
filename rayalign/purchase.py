"""The purchase desk: the only place where a label is paid for.

    commit   budget checked, composition written down       -> every duel has an id on disk before anybody is asked
    label    outstanding duels asked, verdicts checked,     -> asked again, an answered duel costs nothing
             labels drawn and written down, then returned
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
from typing import Any

from rayalign.env.labels import LABEL_MODES, Oracle, draw_label
from rayalign.errors import BudgetError, ConfigError, LedgerError, OracleError
from rayalign.ledger import Ledger
from rayalign.types import Duel, Preference, Verdict


class Purchaser:
    """Buys labels from `oracle` within `budget` (None: no limit) and writes everything down in `ledger`.

    A `Labeler`: an environment may ask it for the duels of a committed batch. Thread-safe; calls are one at a time.
    """

    def __init__(
        self, ledger: Ledger, oracle: Oracle, mode: str = "bernoulli", seed: int = 0, budget: int | None = None
    ) -> None:
        if mode not in LABEL_MODES:
            raise ConfigError(f"oracle.labels={mode!r} must be one of {', '.join(LABEL_MODES)}.")
        if budget is not None and budget < 1:
            raise ConfigError(f"budget={budget} must be at least 1; None is no limit.")
        self.ledger, self.oracle, self.mode, self.seed, self.budget = ledger, oracle, mode, seed, budget
        self._desk = threading.RLock()

    @property
    def remaining(self) -> int | None:
        """Labels that may still be committed; None without a limit."""
        return None if self.budget is None else max(0, self.budget - self.ledger.committed)

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
            remaining = self.remaining
            if remaining is not None and len(duels) > remaining:
                raise BudgetError(
                    f"batch {batch} asks for {len(duels)} labels, but of budget={self.budget} only {remaining} are "
                    f"left ({self.ledger.spent} spent, {self.ledger.committed - self.ledger.spent} on order). "
                    "Nothing was asked; ask for fewer, or raise the budget."
                )
            self.ledger.commit(batch, duels, synthetic, meta)

    def label(self, duels: Sequence[Duel]) -> list[Preference | None]:
        """A preference per duel, None where the verdict failed. Only duels without an outcome are asked.

        Raises `OracleError` if the oracle raises or answers nonsense. The sound verdicts of the call are recorded
        all the same; the other duels stay outstanding, uncharged, and can be asked again.
        """
        with self._desk:
            ask = {duel.id: duel for duel in duels if self._is_outstanding(duel)}
            if ask:
                self._ask(list(ask.values()))
            return [self._outcome(duel) for duel in duels]

    def recover(self) -> int:
        """Ask again what was asked and has no outcome (a crash in between); returns how many duels that were."""
        with self._desk:
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

    def _ask(self, duels: Sequence[Duel]) -> None:
        if self.budget is not None and self.ledger.spent + len(duels) > self.budget:  # a resume with a smaller one
            raise BudgetError(
                f"{len(duels)} labels are on order and {self.ledger.spent} are spent, which is more than "
                f"budget={self.budget}. Nothing was asked; raise the budget to go on."
            )
        verdicts = self.oracle.judge(duels)
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
        refused = "Nothing of the reply was recorded or charged; the duels can be asked again."
        if len(verdicts) != len(duels):
            raise OracleError(
                f"oracle {self.oracle.id} gave {len(verdicts)} verdicts for {len(duels)} duels, the first of which is "
                f"{duels[0].id}. {refused}"
            )
        for duel, verdict in zip(duels, verdicts, strict=True):
            if verdict.duel_id != duel.id:
                raise OracleError(
                    f"oracle {self.oracle.id} was asked duel {duel.id} and answered {verdict.duel_id}. {refused}"
                )

    def _outcome(self, duel: Duel) -> Preference | None:
        outcome = self.ledger.outcome(duel.id)
        assert outcome is not None, f"duel {duel.id} has no outcome after it was asked"
        label, verdict = outcome
        return None if label is None else Preference(duel=duel, label=label, probability=verdict.probability)


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
        self._mutex = threading.Lock()
        self._answers: dict[str, tuple[float, Verdict]] = {}  # duel id -> when, what
        self._read_up_to: dict[Path, int] = {}
        self._own = self._new_file()  # never an old one: its tail may be torn

    def lookup(self, ids: Iterable[str]) -> dict[str, Verdict]:
        """The answers among `ids` that anybody recorded, with the price that was paid then."""
        with self._mutex:
            self._refresh()
            return {name: self._answers[name][1] for name in ids if name in self._answers}

    def record(self, verdicts: Iterable[Verdict]) -> None:
        """Append answers and flush them to disk; call it before the reply leaves."""
        now = time.time()
        lines = [
            json.dumps({"duel_id": v.duel_id, "probability": v.probability, "price": v.price, "time": now}) + "\n"
            for v in verdicts
            if v.probability is not None
        ]
        if not lines:
            return
        with self._mutex:
            new = not self._own.exists()
            try:
                with self._own.open("ab") as file:
                    file.write("".join(lines).encode())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                self._own = self._new_file()  # never append to a line that may be torn
                raise
            if new:
                folder = os.open(self.folder, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)

    def _new_file(self) -> Path:
        return self.folder / f"answers-{uuid.uuid4().hex}.jsonl"

    def _refresh(self) -> None:
        """Read what is new in all files, up to the last complete line: the rest is torn, or still being written."""
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            start = self._read_up_to.get(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            self._read_up_to[path] = start + len(new)
            for line in new.splitlines():
                row = json.loads(line)
                known = self._answers.get(row["duel_id"])
                if known is None or row["time"] < known[0]:
                    verdict = Verdict(duel_id=row["duel_id"], probability=row["probability"], price=row["price"])
                    self._answers[row["duel_id"]] = (row["time"], verdict)
