"""A judge's call book in a bucket: rows as objects that are there before a call is made, and after it was answered.

    live/writers/<writer>      a claim, as in `log`; the last one may call, earlier ones may only say what they know
    calls/<writer>/base        all rows that the writer found, put before what it found them in is deleted
    calls/<writer>/00000000    rows; one object per `put`
    calls/<writer>/00000255+   the rows of the last 256 of these, put before they are deleted, so that a later writer
                               has few to read

    old writer    put a reservation      look at the claims: a later one?  -> the call is not made
    new writer    put claim      list and read all      put base      look at the claims      delete what was read

Either the old writer sees the claim, or its reservation was there before the claim, hence in what the new one read:
every call that was made is counted by whoever decides on the next one. Who deletes has seen no later claim after its
base was there, so a later writer finds the base; the same holds where a writer folds its own rows. Rows may be found
twice (base, and what it was made of), never not at all. A reservation that was given up may stay counted: too much
rather than too little.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from dataclasses import replace

from rayalign.errors import StorageError
from rayalign.storage.log import BASE, WRITERS, Writer
from rayalign.storage.objects import Bucket
from rayalign.storage.uri import Uri

CALLS = "calls"
FOLD_AT = 256


class BucketCalls:
    """The rows (JSON Lines) of the call book in the bucket folder `uri`, and this process's claim to make calls.

    Thread-safe. Raises `StorageError` where the bucket does not answer, or another process has come.
    """

    def __init__(self, uri: str) -> None:
        where = Uri.parse(uri)
        self.bucket = Bucket(replace(where, turn=""))
        self.writer = Writer(self.bucket, where.turn)
        self._folder = f"{CALLS}/{self.writer.name}"
        self._numbers = itertools.count()  # its `next` is atomic
        self._own: dict[str, bytes] = {}
        """Rows put since the last fold, by their object."""
        self._folding = threading.Lock()
        read = [f"{CALLS}/{name}" for name in self.bucket.names(CALLS)]
        self.found = b"".join(lines for lines in self.bucket.read_all(read) if lines is not None)
        """What was there when it was opened."""
        self.bucket.put_sealed(f"{self._folder}/{BASE}", self.found)
        self.check()
        self.bucket.delete(read)
        self._earlier = [name for name in self.bucket.names(WRITERS) if name < self.writer.name]
        self._seen: set[str] = set()

    def check(self) -> None:
        """Raise `StorageError` if another process may make calls now, and this one no longer."""
        self.writer.check()

    def put(self, lines: bytes) -> None:
        """Add rows, durable on return. Several threads may, at the same time."""
        name = f"{self._folder}/{next(self._numbers):08d}"
        self.bucket.put_sealed(name, lines)
        self._own[name] = lines
        if len(self._own) >= FOLD_AT and self._folding.acquire(blocking=False):
            try:
                self._fold()
            finally:
                self._folding.release()

    def _fold(self) -> None:
        """Many objects become one. What is not deleted now is found twice, which is no harm."""
        rows = dict(list(self._own.items()))
        with contextlib.suppress(StorageError):
            self.bucket.put_sealed(f"{max(rows)}+", b"".join(rows.values()))
            self.check()
            self.bucket.delete(rows)
        for name in rows:
            del self._own[name]

    def late(self) -> bytes:
        """Rows that earlier writers have added since: answers to calls that were under way when this one came."""
        names = [
            f"{CALLS}/{writer}/{name}" for writer in self._earlier for name in self.bucket.names(f"{CALLS}/{writer}")
        ]
        new = [name for name in names if name not in self._seen]
        found = self.bucket.read_all(new)
        self._seen.update(name for name, lines in zip(new, found, strict=True) if lines is not None)
        return b"".join(lines for lines in found if lines is not None)


def recorded_calls(bucket: Bucket, folder: str) -> bytes:
    """The rows of the call book in `folder`, some perhaps twice; empty if there is none."""
    names = [f"{folder}/{CALLS}/{name}" for name in bucket.names(f"{folder}/{CALLS}")]
    return b"".join(lines for lines in bucket.read_all(names) if lines is not None)
