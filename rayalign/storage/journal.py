"""The answers of an oracle's replicas in a bucket: an object for each call, there before the reply leaves."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import Path

from rayalign.ledger.purchase import AnswerJournal
from rayalign.storage.objects import Bucket
from rayalign.storage.uri import in_bucket

ANSWERS = "answers"


class BucketJournal(AnswerJournal):
    """An `AnswerJournal` in the bucket folder `uri`."""

    def __init__(self, uri: str) -> None:
        self.bucket = Bucket(uri)
        self._seen: set[str] = set()
        self._writer, self._number = uuid.uuid4().hex, 0
        self._start()

    def _append(self, lines: bytes) -> None:
        name = f"{self._writer}-{self._number:08d}"
        self._number += 1  # whatever becomes of it: a name is used once
        self.bucket.put_sealed(f"{ANSWERS}/{name}", lines)
        self._seen.add(name)

    def _new(self) -> Iterable[bytes]:
        """Whole objects that were not read yet; a torn one was acknowledged by nobody."""
        names = [name for name in self.bucket.names(ANSWERS) if name not in self._seen]
        found = self.bucket.read_all(f"{ANSWERS}/{name}" for name in names)
        self._seen.update(name for name, lines in zip(names, found, strict=True) if lines is not None)
        return [lines for lines in found if lines is not None]


def open_journal(place: str | Path) -> AnswerJournal:
    """The journal at `place`, a folder or a URI."""
    return BucketJournal(str(place)) if in_bucket(place) else AnswerJournal(place)
