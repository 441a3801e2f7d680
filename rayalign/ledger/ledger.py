"""The ledger: what was asked, what was answered, what was paid. Append-only, one Arrow IPC stream file.

    commit(batch) --> [header, requested..., synthetic...]   one message, one fsync: all of a batch or nothing of it
    answer(...)   --> [answered..., failed...]               one message, one fsync: before anybody hears of a label

Two kinds of batches come out of it. A *collected batch* is what was committed together. A *stream batch* is what is
trained on together: the outcomes in the order in which they are in the file, cut at the sizes of the collected batches,
and with each slice what the agent labelled itself in the collected batch of the same index.

    collected, duels asked      0: a b c d      1: e f g h
    outcomes, as they come      b a e d | c f(failed) h g           an oracle that answers at once: a b c d | e f g h
    stream batches              0: a b d e      1: c g h

Stream batch t is closed, hence never changes again, when as many outcomes are in the file as batches 0 to t asked
duels. So it is never closed before collected batch t is there, all of them are when nothing is outstanding, and an
oracle that answers at once makes the two the same.

The file alone says where a run stands; the index kept in memory is a fold over it, and the same code folds what
is appended and what is read back. The content of duels stays on disk and is read through a memory map on demand.
Thread-safe. One writer at a time, readers as many as you like.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayalign.errors import LedgerError
from rayalign.ledger.arrow_log import ArrowLog
from rayalign.ledger.preference_table import Between, preference_batches, table_schema, write_preferences
from rayalign.ledger.rows import SCHEMA, Event, content_columns, duels_of, from_json, record_batch, to_json
from rayalign.types import Duel, LabelSource, Preference, Verdict

_REQUESTED, _SYNTHETIC, _ANSWERED, _FAILED = range(4)


@dataclass(kw_only=True)
class Index:
    """The state that the events add up to: per duel its label, per collected and stream batch where its duels are."""

    rows: dict[str, int] = field(default_factory=dict)
    """Duel id -> row number, in the order of the requests."""
    state: bytearray = field(default_factory=bytearray)
    labels: array = field(default_factory=lambda: array("d"))
    """NaN while there is none."""
    probabilities: array = field(default_factory=lambda: array("d"))
    reasons: dict[int, str] = field(default_factory=dict)
    """Row -> why its verdict failed."""
    message_offsets: list[int] = field(default_factory=list)
    """File offsets of the messages with content."""
    message_rows: list[int] = field(default_factory=list)
    """Row number of the first duel in each."""
    batch_messages: list[int] = field(default_factory=list)
    """Collected batch -> position in the two lists above."""
    batch_ends: array = field(default_factory=lambda: array("q", [0]))
    """Duels asked in the collected batches before the index, so that outcomes `[t]` to `[t + 1]` are stream batch t."""
    collected: bytearray = field(default_factory=bytearray)
    """Row -> 1 if it belongs to a collected batch, 0 if it was asked aside (evaluation)."""
    outcomes: array = field(default_factory=lambda: array("q"))
    """Rows of collected batches, in the order in which their outcomes came."""
    stream_labels: array = field(default_factory=lambda: array("q", [0]))
    """Oracle labels in the stream batches before the index; one number more than there are closed ones."""
    spent: int = 0
    """Oracle labels that were answered, hence paid."""
    trained: int = 0
    """Those of them that belong to collected batches."""
    outstanding: int = 0
    """Requested, neither answered nor failed."""
    price: float = 0.0
    """Sum of what the answers cost, in the run's currency."""
    seq: int = 0
    """Number of events."""

    def add(self, events: pa.RecordBatch, offset: int = 0) -> None:
        """Fold one message in. Raises `LedgerError` where it contradicts the ones before it."""
        kinds, ids = events.column("event").to_pylist(), events.column("duel_id").to_pylist()
        if kinds and kinds[0] in (Event.ANSWERED, Event.FAILED):
            self._add_outcomes(events, kinds, ids)
        elif kinds:
            self._add_composition(events, kinds, ids, offset)
        self.seq += len(kinds)

    def _add_composition(self, events: pa.RecordBatch, kinds: list[str], ids: list[str], offset: int) -> None:
        header = kinds[0] == Event.BATCH
        if header:
            index = events.column("batch")[0].as_py()
            if index != len(self.batch_messages):
                raise LedgerError(f"batch {index} is recorded after batch {len(self.batch_messages) - 1}.")
            self.batch_messages.append(len(self.message_offsets))
            self.batch_ends.append(self.batch_ends[-1] + kinds.count(Event.REQUESTED))
        self.message_offsets.append(offset)
        self.message_rows.append(len(self.state))
        kinds, ids = kinds[header:], ids[header:]
        num_before = len(self.rows)
        self.rows.update(zip(ids, range(num_before, num_before + len(ids)), strict=True))
        if len(self.rows) != num_before + len(ids):
            raise LedgerError(f"a duel of message {len(self.message_offsets) - 1} is recorded twice.")
        requested = kinds.count(Event.REQUESTED)
        if requested + kinds.count(Event.SYNTHETIC) != len(kinds):
            raise LedgerError(f"unknown events {sorted({*kinds} - {*Event})}; was it written by a newer version?")
        self.state.extend(bytes(_REQUESTED if kind == Event.REQUESTED else _SYNTHETIC for kind in kinds))
        self.collected.extend(bytes([header]) * len(kinds))
        self.outstanding += requested
        # labels of synthetic rows are given; those of requested rows are null, hence NaN
        self.labels.frombytes(_floats(events, "label")[int(header) :].tobytes())
        self.probabilities.frombytes(_floats(events, "probability")[int(header) :].tobytes())
        self._close()  # a batch that asks nobody waits for nobody

    def _add_outcomes(self, events: pa.RecordBatch, kinds: list[str], ids: list[str]) -> None:
        columns = (events.column(name).to_pylist() for name in ("label", "probability", "price", "reason"))
        for kind, name, label, probability, price, reason in zip(kinds, ids, *columns, strict=True):
            row = self.rows.get(name)
            if row is None or self.state[row] != _REQUESTED:
                raise LedgerError(f"duel {name} is {kind}, but was not outstanding.")
            if kind == Event.ANSWERED:
                self.state[row], self.labels[row] = _ANSWERED, label
                if probability is not None:
                    self.probabilities[row] = probability
                self.spent += 1
                self.trained += self.collected[row]
                self.price += price
            else:
                self.state[row], self.reasons[row] = _FAILED, reason
            if self.collected[row]:
                self.outcomes.append(row)
                if len(self.outcomes) == self.batch_ends[len(self.stream_labels)]:
                    self._close()
        self.outstanding -= len(kinds)

    def _close(self) -> None:
        """Count the stream batches that the outcomes up to here complete."""
        while (
            len(self.stream_labels) < len(self.batch_ends)
            and len(self.outcomes) == self.batch_ends[len(self.stream_labels)]
        ):
            self.stream_labels.append(self.trained)

    def stream_rows(self, index: int) -> list[int]:
        """Labelled rows of closed stream batch `index`, in the order of the rows."""
        rows = self.outcomes[self.batch_ends[index] : self.batch_ends[index + 1]].tolist()
        message = self.batch_messages[index]
        own = range(self.message_rows[message], self.message_end(message))
        answered = [row for row in rows if self.state[row] == _ANSWERED]
        return sorted(answered + [row for row in own if self.state[row] == _SYNTHETIC])

    def message_end(self, message: int) -> int:
        """Row number after the last duel of a message."""
        return self.message_rows[message + 1] if message + 1 < len(self.message_rows) else len(self.state)


def _floats(events: pa.RecordBatch, name: str) -> np.ndarray:
    """A column of numbers, NaN where it is null."""
    return events.column(name).to_numpy(zero_copy_only=False)


def fold(events: Iterable[pa.RecordBatch]) -> Index:
    """The state that a sequence of messages adds up to: spend, labels, what is outstanding."""
    index = Index()
    for batch in events:
        index.add(batch)
    return index


class Ledger:
    """The ledger file at `path`, made if it is not there.

    A torn tail (a crash in the middle of an append: nobody was told of it) is cut off. Anything else that can't
    be read is a `LedgerError`, as is a second writer. `read_only` takes no lock and changes nothing. `open_log` opens
    the file, with the arguments of `ArrowLog`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        read_only: bool = False,
        lock_timeout_s: float = 10.0,
        open_log: Callable[..., ArrowLog] = ArrowLog,
    ) -> None:
        self.path = Path(path)
        self._mutex = threading.RLock()
        self._index = Index()
        self._log = open_log(self.path, SCHEMA, self._index.add, read_only=read_only, lock_timeout_s=lock_timeout_s)

    # -- writing ------------------------------------------------------------------------------------------------
    def commit(
        self,
        batch: int | None,
        duels: Sequence[Duel],
        synthetic: Sequence[Preference] = (),
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Record the composition of collected batch `batch`: duels to be asked, and pairs that the agent labelled.

        Batches come in order, 0, 1, 2, ...; `batch=None` records duels that belong to no training batch
        (evaluation). All of it is durable on return or none of it. Raises `LedgerError` for a batch out of order
        or a duel that is already there.
        """
        with self._mutex:
            if batch is not None and batch != self.num_collected:
                raise LedgerError(
                    f"batch={batch} can't be recorded: the next one is {self.num_collected} ({self.path})."
                )
            every = [*duels, *(preference.duel for preference in synthetic)]
            for name, count in Counter(duel.id for duel in every).items():
                if count > 1 or name in self._index.rows:
                    raise LedgerError(
                        f"duel {name} is already in the ledger. A duel is asked once: drop it, or give it its own id."
                    )
            if batch is None and not every:
                return
            header = [] if batch is None else [None]
            num_rows = len(header) + len(every)
            columns = content_columns([*header, *every])
            columns["event"] = (
                [Event.BATCH.value] * len(header)  # Arrow takes 20 times as long over members of the enum
                + [Event.REQUESTED.value] * len(duels)
                + [Event.SYNTHETIC.value] * len(synthetic)
            )
            columns["batch"] = [batch] * len(header) + [duel.batch for duel in every]
            unlabelled = [None] * (len(header) + len(duels))
            columns["label"] = unlabelled + [preference.label for preference in synthetic]
            columns["probability"] = unlabelled + [preference.probability for preference in synthetic]
            if header:
                facts = {
                    "duels": len(duels),
                    "synthetic": len(synthetic),
                    "labels_before": self.committed,
                    "policy_versions": sorted({c.policy_version for duel in every for c in (duel.first, duel.second)}),
                    **(meta or {}),
                }
                columns["meta"][0] = to_json(facts, f"batch {batch}")
            self._append(columns, num_rows)

    def answer(self, verdicts: Sequence[Verdict], labels: Sequence[float | None], oracle: str) -> None:
        """Record verdicts with the labels drawn from them (None for a failed one); durable on return.

        Raises `LedgerError` for a duel that is not outstanding: nobody pays twice.
        """
        with self._mutex:
            for verdict, label in zip(verdicts, labels, strict=True):
                row = self._index.rows.get(verdict.duel_id)
                if row is None or self._index.state[row] != _REQUESTED:
                    raise LedgerError(
                        f"duel {verdict.duel_id} can't be answered: it is not outstanding in {self.path}."
                    )
                assert (label is None) == (verdict.failure is not None), f"{verdict} with label {label}"
            if len({verdict.duel_id for verdict in verdicts}) != len(verdicts):
                raise LedgerError("a duel can't be answered twice in one call.")
            if not verdicts:
                return
            columns = {
                "event": [Event.FAILED.value if label is None else Event.ANSWERED.value for label in labels],
                "duel_id": [verdict.duel_id for verdict in verdicts],
                "label": list(labels),
                "probability": [verdict.probability for verdict in verdicts],
                "oracle": [oracle] * len(verdicts),
                "price": [0.0 if label is None else v.price for v, label in zip(verdicts, labels, strict=True)],
                "reason": [verdict.failure for verdict in verdicts],
            }
            self._append(columns, len(verdicts))

    def close(self) -> None:
        """Let go of the file and its lock; everything is already on disk."""
        with self._mutex:
            self._log.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- reading ------------------------------------------------------------------------------------------------
    @property
    def spent(self) -> int:
        """Oracle labels that were answered, hence paid."""
        return self._index.spent

    @property
    def committed(self) -> int:
        """`spent` and what is outstanding: what the budget has to cover."""
        return self._index.spent + self._index.outstanding

    @property
    def price(self) -> float:
        """Sum of the answers' prices, in the run's currency."""
        return self._index.price

    @property
    def num_outstanding(self) -> int:
        """Duels that were requested and have no outcome yet."""
        return self._index.outstanding

    @property
    def num_collected(self) -> int:
        """Collected batches; the next one to commit has this index."""
        return len(self._index.batch_messages)

    @property
    def num_streamed(self) -> int:
        """Closed stream batches: what can be trained on. As many as `num_collected` when nothing is outstanding."""
        return len(self._index.stream_labels) - 1

    def __contains__(self, duel_id: str) -> bool:
        return duel_id in self._index.rows

    def __len__(self) -> int:
        """Number of duels, whatever became of them."""
        return len(self._index.state)

    def outcome(self, duel_id: str) -> tuple[float | None, Verdict] | None:
        """Label and verdict of a duel, a None label if the verdict failed; None where there is no outcome (yet).

        Reads nothing from disk. The verdict's price is not kept in memory and reads 0.
        """
        with self._mutex:
            row = self._index.rows.get(duel_id)
            if row is None or self._index.state[row] == _REQUESTED:
                return None
            if self._index.state[row] == _FAILED:
                return None, Verdict(duel_id=duel_id, failure=self._index.reasons[row])
            return self._index.labels[row], Verdict(duel_id=duel_id, probability=self._probability(row))

    def known(self, duel_id: str) -> Preference | Verdict | None:
        """What became of a duel: a preference, a failed verdict, or None if unknown or still outstanding."""
        with self._mutex:
            outcome = self.outcome(duel_id)
            if outcome is None or outcome[0] is None:
                return outcome and outcome[1]
            row = self._index.rows[duel_id]
            message = bisect_right(self._index.message_rows, row) - 1
            return self._preferences_in(message, only=[row])[0]

    def stream_batch(self, index: int) -> list[Preference]:
        """What is trained on as batch `index`, in the order of the commits; failed duels are absent.

        The same whenever it is asked for: see the head of this file for what is in it. `LedgerError` if it is not
        closed yet.
        """
        with self._mutex:
            if not 0 <= index < self.num_streamed:
                raise LedgerError(f"there is no stream batch {index} in {self.path}: {self.num_streamed} are closed.")
            rows = self._index.stream_rows(index)
            found: list[Preference] = []
            while rows:
                message = bisect_right(self._index.message_rows, rows[0]) - 1
                split = bisect_left(rows, self._index.message_end(message))
                found += self._preferences_in(message, only=rows[:split])
                rows = rows[split:]
            return found

    def header(self, index: int) -> dict[str, Any]:
        """What `commit` was told of collected batch `index`, and counts, policy versions and `labels_before`."""
        with self._mutex:
            offset = self._index.message_offsets[self._index.batch_messages[index]]
            return from_json(self._log.read(offset).column("meta")[0].as_py())

    def preferences(self) -> Iterator[Preference]:
        """All labelled duels in the order in which they were committed, read batch by batch."""
        for message in range(len(self._index.message_offsets)):
            yield from self._preferences_in(message)

    def outstanding(self) -> list[Duel]:
        """Duels that were requested and neither answered nor failed: what a crash left to be asked again."""
        with self._mutex:
            duels: list[Duel] = []
            for message in range(len(self._index.message_offsets)) if self._index.outstanding else ():
                rows = [row for row in self._rows_of(message) if self._index.state[row] == _REQUESTED]
                if rows:
                    duels.extend(duels_of(self._content(message, rows)))
            return duels

    def labels_before(self, index: int) -> int:
        """Oracle labels in stream batches before `index`, or all of them if not so many are closed.

        That is what weights version `index` was trained on (in the first epoch).
        """
        with self._mutex:
            return self._index.stream_labels[index] if index <= self.num_streamed else self._index.trained

    def bought(self, index: int) -> list[bool]:
        """For each preference of stream batch `index` whether the oracle was paid for it. Reads nothing from disk."""
        with self._mutex:
            return [self._index.state[row] == _ANSWERED for row in self._index.stream_rows(index)]

    def events(self) -> Iterator[pa.RecordBatch]:
        """Every message as it was written, in order; `pyarrow.ipc.open_stream(path)` reads the same."""
        for _, batch, _ in self._log.scan():
            yield batch

    # -- the training set ---------------------------------------------------------------------------------------
    def labelled_rows(
        self, batches: int | None = None, synthetic: bool = True
    ) -> Iterator[tuple[pa.RecordBatch, np.ndarray, np.ndarray, np.ndarray]]:
        """Per message: labelled rows as stored, labels, probabilities (NaN: none), whether synthetic.

        `batches`: those of the first stream batches alone. `synthetic`: also what agents labelled themselves.
        """
        wanted = None
        if batches is not None:
            with self._mutex:
                wanted = {row for index in range(batches) for row in self._index.stream_rows(index)}
        for message in range(len(self._index.message_offsets)):
            with self._mutex:
                rows = self._rows_of(message)
                state = np.array(self._index.state[rows.start : rows.stop])
                labels = np.array(self._index.labels[rows.start : rows.stop])
                probabilities = np.array(self._index.probabilities[rows.start : rows.stop])
                keep = np.flatnonzero((state == _ANSWERED) | ((state == _SYNTHETIC) & synthetic))
                if wanted is not None:
                    keep = keep[[rows.start + int(k) in wanted for k in keep]]
                content = self._content(message, [rows.start + int(k) for k in keep])
            yield content, labels[keep], probabilities[keep], state[keep] == _SYNTHETIC

    def to_preference_table(self, conversational: bool = False) -> pa.Table:
        """All labels but ties as prompt, chosen, rejected and facts; see `preference_table`."""
        return pa.Table.from_batches(
            preference_batches(self.labelled_rows(), conversational), table_schema(conversational)
        )

    def export(
        self,
        folder: str | Path,
        conversational: bool = False,
        between: Between | None = None,
        *,
        batches: int | None = None,
        synthetic: bool = True,
    ) -> Path:
        """The same as a Parquet file in `folder`, which `datasets.load_dataset(folder)` reads. Returns `folder`.

        For `between` see `preference_table`, for which rows `labelled_rows`.
        """
        rows = self.labelled_rows(batches, synthetic)
        return write_preferences(rows, Path(folder), conversational, between)

    # -- inside -------------------------------------------------------------------------------------------------
    def _append(self, columns: Mapping[str, Any], num_rows: int) -> None:
        events = record_batch(columns, num_rows, seq=self._index.seq, time_us=time.time_ns() // 1000)
        self._index.add(events, self._log.append(events))

    def _rows_of(self, message: int) -> range:
        return range(self._index.message_rows[message], self._index.message_end(message))

    def _content(self, message: int, rows: Sequence[int]) -> pa.RecordBatch:
        """The stored rows of some duels of a message."""
        events = self._log.read(self._index.message_offsets[message])
        every = self._rows_of(message)
        first = events.num_rows - len(every)  # a header comes before the duels
        if len(rows) == len(every):
            return events.slice(first)
        return events.take(pa.array([first + row - every.start for row in rows], pa.int64()))

    def _preferences_in(self, message: int, only: Sequence[int] | None = None) -> list[Preference]:
        with self._mutex:
            index = self._index
            every = self._rows_of(message) if only is None else only
            rows = [r for r in every if index.state[r] in (_ANSWERED, _SYNTHETIC)]
            return [
                Preference(
                    duel=duel,
                    label=index.labels[row],
                    source=LabelSource.SYNTHETIC if index.state[row] == _SYNTHETIC else LabelSource.ORACLE,
                    probability=self._probability(row),
                )
                for row, duel in zip(rows, duels_of(self._content(message, rows)), strict=True)
            ]

    def _probability(self, row: int) -> float | None:
        probability = self._index.probabilities[row]
        return None if math.isnan(probability) else probability
