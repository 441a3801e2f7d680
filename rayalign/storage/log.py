"""A ledger in a bucket, and who may add to it.

    live/writers/<writer>                        a claim; writers are ordered by their names
    live/ledger.arrow/<writer>/base              all that the writer found, put before it adds anything
    live/ledger.arrow/<writer>/00000000, ...     one object per append

    writer = <its driver's turn>.<number>-<random>       turns grow from driver to driver, numbers within one

The ledger is the base of the last writer that has one, and that writer's own appends. An append counts, and is
acknowledged, if no later claim is there *after* its object is:

    old writer    put append s        look at the claims: a later one?  -> give up, s was not acknowledged
    new writer    put claim      list and read the appends of the writers before      put base

Either the old writer sees the claim, or its append was there before the claim, hence before the listing, and is in the
new base. What comes later under an old writer's name is read by nobody. That needs a store that shows an object to
everybody from its completion on, as S3 and GCS do, and neither locks nor clocks.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayalign.errors import LedgerError, StorageError
from rayalign.ledger.arrow_log import ArrowLog
from rayalign.storage.objects import Bucket

WRITERS = "live/writers"
BASE = "base"
_SEGMENT = re.compile(r"\d{8}")


class Writer:
    """The claim of one process to write in a bucket, on behalf of the driver whose turn is `turn`."""

    def __init__(self, bucket: Bucket, turn: str) -> None:
        own = [name for name in bucket.names(WRITERS) if name.startswith(f"{turn}.")]
        number = int(own[-1][len(turn) + 1 :].partition("-")[0]) + 1 if own else 1
        self.bucket, self.name = bucket, f"{turn}.{number:06d}-{uuid.uuid4().hex[:8]}"
        bucket.put(f"{WRITERS}/{self.name}", b".")
        self.check()

    def check(self) -> None:
        """Raise `StorageError` if a later writer has come."""
        last = self.bucket.names(WRITERS)[-1]
        if last != self.name:
            raise StorageError(
                f"{self.bucket.uri.shown} was taken over by another process (writer {last}), after `rayalign resume` "
                "on another machine, or because this one was taken for dead. Nothing that was acknowledged is lost."
            )


class BucketLog(ArrowLog):
    """An `ArrowLog` whose appends are in the bucket before they are acknowledged.

    The file at `path` is this process's own copy: what the bucket holds, whatever was at `path` before.
    """

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        replay: Callable[[pa.RecordBatch, int], None],
        *,
        writer: Writer,
        name: str,
        **options: Any,
    ) -> None:
        self._writer, self._folder = writer, f"live/{name}/{writer.name}"
        self._appends, self._broken = 0, ""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(recorded(writer.bucket, name, before=writer.name) or b"")
        super().__init__(path, schema, replay, **options)
        try:
            writer.bucket.put_sealed(f"{self._folder}/{BASE}", path.read_bytes())
            writer.check()
        except BaseException:
            self.close()
            raise

    def append(self, batch: pa.RecordBatch) -> int:
        """As `ArrowLog.append`. After an error nothing more is taken: only who opens it anew can know what is there."""
        if self._broken:
            raise LedgerError(f"{self.path.name} takes nothing more: {self._broken} `rayalign resume` goes on.")
        try:
            bucket = self._writer.bucket
            bucket.put_sealed(f"{self._folder}/{self._appends:08d}", batch.serialize().to_pybytes())
            self._writer.check()
            offset = super().append(batch)
        except BaseException as error:
            self._broken = f"an append failed. {error}"
            raise
        self._appends += 1
        return offset


def recorded(bucket: Bucket, name: str, before: str = "") -> bytes | None:
    """The bytes of ledger `name`; of the writers earlier than `before`, or of all. None if nobody has written any."""
    found: dict[str, set[str]] = {}
    for path in bucket.names(f"live/{name}"):
        writer, _, file = path.partition("/")
        if not before or writer < before:
            found.setdefault(writer, set()).add(file)
    for writer in sorted(found, reverse=True):
        folder = f"live/{name}/{writer}"
        base = bucket.get_sealed(f"{folder}/{BASE}") if BASE in found[writer] else None
        if base is not None:
            return base + _appends(bucket, folder, {file for file in found[writer] if _SEGMENT.fullmatch(file)})
    return None


def _appends(bucket: Bucket, folder: str, there: set[str]) -> bytes:
    """A writer's appends, up to the first that is not there or torn: its writer was told of no later one."""
    numbers = sorted(int(file) for file in there)
    parts = bucket.read_all(f"{folder}/{number:08d}" for number in numbers)
    whole = [number for number, part in zip(numbers, parts, strict=True) if part is not None]
    if whole != list(range(len(whole))):
        missing = next(i for i, number in enumerate(whole) if i != number)
        raise LedgerError(
            f"{bucket.uri.shown}/{folder} lacks append {missing}, which has whole ones after it. Restore the object: "
            "the store lost it, or somebody deleted it."
        )
    return b"".join(part for part in parts if part is not None)
