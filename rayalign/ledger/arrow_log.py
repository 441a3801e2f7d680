"""An append-only file of Arrow record batches that survives a crash in the middle of an append.

The file is an ordinary Arrow IPC stream without its (optional) end marker: the schema, then one message per
append, each flushed to disk before `append` returns. So whatever was acknowledged is complete, and only the last
message of a file can be torn.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from rayalign.errors import LedgerError

log = logging.getLogger(__name__)

_CONTINUATION = b"\xff\xff\xff\xff"
_WINDOW_BYTES = 64 << 20
"""A memory map is renewed after so much was read: its touched pages count as resident memory until it is closed."""


class _Torn(Exception):
    """The file ends inside a message."""


class ArrowLog:
    """The log at `path`, made if it is not there; `replay(batch, offset)` is called for each message found in it.

    A torn last message is cut off. Damage before it, another schema, or a second writer is a `LedgerError`.
    `read_only` takes no lock, changes nothing, and sees what was complete when it was opened. Not thread-safe.
    """

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        replay: Callable[[pa.RecordBatch, int], None],
        *,
        read_only: bool = False,
        lock_timeout_s: float = 10.0,
    ) -> None:
        self.path, self.schema = path, schema
        self._file: int | None = None
        self._map: pa.MemoryMappedFile | None = None
        self._bytes_read = 0
        if not read_only:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        elif not path.exists():
            raise LedgerError(f"there is no ledger at {path}.")
        try:
            if self._file is not None:
                self._lock(lock_timeout_s)
            self._start = self._end = self._open_schema()
            for offset, batch, end in self.scan(path.stat().st_size):
                try:
                    replay(batch, offset)
                except LedgerError as error:
                    raise self._damaged(offset, str(error)) from error
                self._end = end
            self._cut_tail()
        except BaseException:
            self.close()
            raise

    # -- writing ------------------------------------------------------------------------------------------------
    def append(self, batch: pa.RecordBatch) -> int:
        """Write one message, flush it to disk, return its offset. On an error nothing of it stays in the file."""
        if self._file is None:
            raise LedgerError(f"{self.path} is closed or was opened for reading only; nothing was recorded.")
        offset = self._end
        try:
            self._write(batch.serialize())
        except OSError as error:
            os.ftruncate(self._file, offset)
            raise LedgerError(f"{self.path} can't be written: {error}. Nothing was recorded.") from error
        return offset

    def _write(self, message: pa.Buffer) -> None:
        assert self._file is not None
        view = memoryview(message)
        while view:
            view = view[os.write(self._file, view) :]
        os.fsync(self._file)
        self._end += message.size

    def close(self) -> None:
        """Let go of the file and its lock; everything is already on disk."""
        self._map = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    # -- reading ------------------------------------------------------------------------------------------------
    def read(self, offset: int) -> pa.RecordBatch:
        """The message at `offset`, its buffers backed by the memory-mapped file."""
        if self._map is None or offset >= self._map.size() or self._bytes_read > _WINDOW_BYTES:
            self._map, self._bytes_read = pa.memory_map(str(self.path)), 0
        self._map.seek(offset)
        message = pa.ipc.read_message(self._map)
        self._bytes_read += self._map.tell() - offset
        return pa.ipc.read_record_batch(message, self.schema)

    def scan(self, size: int | None = None) -> Iterator[tuple[int, pa.RecordBatch, int]]:
        """Offset, message and the offset after it, for every complete message among the first `size` bytes."""
        size = self._end if size is None else size
        offset = mapped_at = self._start
        source = pa.memory_map(str(self.path))
        while offset < size:
            if offset - mapped_at > _WINDOW_BYTES:
                mapped_at, source = offset, pa.memory_map(str(self.path))
            try:
                end, message = _read_message(source, offset, size)
            except _Torn:
                if self._whole_message_after(offset, size):
                    raise self._damaged(offset, "whole messages follow it") from None
                return
            except pa.ArrowException as error:
                raise self._damaged(offset, str(error)) from error
            try:
                batch = pa.ipc.read_record_batch(message, self.schema)
                if end == size:
                    batch.validate(full=True)  # the last one alone may have been half on disk when the power went
            except (pa.ArrowException, OSError) as error:
                raise self._damaged(offset, str(error)) from error
            yield offset, batch, end
            offset = end

    # -- opening ------------------------------------------------------------------------------------------------
    def _lock(self, timeout_s: float) -> None:
        assert self._file is not None
        deadline = time.monotonic() + timeout_s  # a killed writer's lock goes when its process has quite gone
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise LedgerError(
                        f"{self.path} is being written by another process (waited {timeout_s:g} s). A run directory "
                        "belongs to one run: stop the other one, or choose another run_dir."
                    ) from None
            time.sleep(0.05)

    def _open_schema(self) -> int:
        """Check the schema at the head of the file, or write it to a new one; returns where the messages begin."""
        head = self.schema.serialize()
        found = self.path.read_bytes() if self.path.stat().st_size < head.size else b""
        if self.path.stat().st_size >= head.size:
            with self.path.open("rb") as file:
                found = file.read(head.size)
        if found == head.to_pybytes():
            return head.size
        if not head.to_pybytes().startswith(found):
            raise LedgerError(f"{self.path} is not a ledger of this version of rayalign: its schema differs.")
        if self._file is None:
            raise LedgerError(f"{self.path} is empty: its writer died before it recorded anything.")
        os.ftruncate(self._file, 0)
        self._end = 0
        self._write(head)
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)  # the file's name, too, has to survive
        os.close(folder)
        return head.size

    def _cut_tail(self) -> None:
        torn = self.path.stat().st_size - self._end
        if torn and self._file is not None:
            log.warning("%s: cut a torn append of %d bytes at its end; nobody was told of it", self.path, torn)
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)

    def _whole_message_after(self, offset: int, size: int) -> bool:
        """Whether a complete message begins somewhere after the one at `offset`: then that one is not the last."""
        with self.path.open("rb") as file:
            file.seek(offset)
            tail = file.read(size - offset)
        source, at = pa.BufferReader(tail), 8
        while (at := tail.find(_CONTINUATION, at)) >= 0:
            try:
                pa.ipc.read_record_batch(_read_message(source, at, len(tail))[1], self.schema).validate(full=True)
                return True
            except (_Torn, pa.ArrowException, OSError):
                at += 4
        return False

    def _damaged(self, offset: int, why: str) -> LedgerError:
        return LedgerError(
            f"{self.path} is damaged at byte {offset}: {why}. This is no torn append, so nothing was cut off. Restore "
            "the file from a copy; the labels before that byte are intact."
        )


def _read_message(source: pa.NativeFile, offset: int, size: int) -> tuple[int, pa.Message]:
    """The message at `offset` and the offset after it; `_Torn` if the first `size` bytes end before it does."""
    if size - offset < 8:
        raise _Torn
    source.seek(offset)
    marker, metadata_bytes = struct.unpack("<4si", source.read(8))
    if marker != _CONTINUATION:
        source.seek(offset)
        if not any(source.read(size - offset)):
            raise _Torn  # a file system that had made room, but not written yet
        raise pa.ArrowInvalid("no message begins there")
    if metadata_bytes <= 0:
        raise pa.ArrowInvalid(f"a message begins there with {metadata_bytes} bytes of metadata")
    if metadata_bytes > size - offset - 8:
        raise _Torn
    source.seek(offset)
    try:
        message = pa.ipc.read_message(source)
    except OSError as error:  # Arrow's word for a body that is shorter than its metadata says
        raise _Torn from error
    end = source.tell()
    if end > size:
        raise _Torn
    return end, message
