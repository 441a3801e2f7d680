"""A folder of a bucket as a run uses it: whole objects that are put, listed, read and deleted.

S3 and GCS show an object when its upload is complete, and list it from then on. A client that dies inside an upload may
still complete it with what it has: objects that must be whole are *sealed*, their digest behind their content.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs

from rayalign.errors import ConfigError, StorageError
from rayalign.storage.uri import Uri

RETRY_AFTER_S = (0.5, 2.0, 5.0)
"""Pauses between attempts; the client itself has tried several times in each."""
_CHUNK = 8 << 20
_DIGEST = 32
_THREADS = 8

T = TypeVar("T")


class Bucket:
    """The objects under `uri`, by names relative to it. Picklable; thread-safe. Raises `StorageError`."""

    def __init__(self, uri: str | Uri) -> None:
        self.uri = uri if isinstance(uri, Uri) else Uri.parse(uri)

    # -- whole objects ------------------------------------------------------------------------------------------
    def put(self, name: str, data: bytes) -> None:
        """Write an object, replacing what is there; on return it is durable and everybody sees it.

        After an error it may be there or not, whole or torn.
        """
        self._again(lambda: self._write(name, [data]), f"write {name}")

    def get(self, name: str) -> bytes | None:
        """Read an object; None if it is not there."""
        return self._again(lambda: self._read(name), f"read {name}")

    def put_sealed(self, name: str, data: bytes) -> None:
        """`put`, so that `get_sealed` can tell a torn one."""
        self.put(name, data + _digest(data))

    def get_sealed(self, name: str) -> bytes | None:
        """What `put_sealed` wrote; None if it is not there or not whole."""
        data = self.get(name)
        if data is None or len(data) < _DIGEST or _digest(data[:-_DIGEST]) != data[-_DIGEST:]:
            return None
        return data[:-_DIGEST]

    # -- files --------------------------------------------------------------------------------------------------
    def put_file(self, name: str, path: Path) -> str:
        """Write a file as an object; returns the digest of what was written."""
        with path.open("rb") as file:

            def write() -> str:
                digest = hashlib.blake2b(digest_size=_DIGEST)
                file.seek(0)

                def chunks() -> Iterable[bytes]:
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
                        yield chunk

                self._write(name, chunks())
                return digest.hexdigest()

            return self._again(write, f"write {name}")

    def get_file(self, name: str, path: Path, digest: str | None = None) -> bool:
        """Write an object to a file; False if it is not there, or is not the one with `digest`."""

        def read() -> bool:
            found = hashlib.blake2b(digest_size=_DIGEST)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self._fs.open_input_stream(self._at(name)) as source, path.open("wb") as file:
                    while chunk := source.read(_CHUNK):
                        found.update(chunk)
                        file.write(chunk)
            except FileNotFoundError:
                return False
            return digest is None or found.hexdigest() == digest

        return self._again(read, f"read {name}")

    def put_files(self, names: Mapping[str, Path]) -> dict[str, str]:
        """`put_file` of many; returns their digests."""
        return dict(zip(names, self._each(lambda item: self.put_file(*item), names.items()), strict=True))

    # -- names --------------------------------------------------------------------------------------------------
    def names(self, folder: str) -> list[str]:
        """Objects under `folder` however deep, relative to it, in order; none if there is no such folder."""
        where = self._at(folder)

        def listed() -> list[str]:
            selector = pyarrow.fs.FileSelector(where, allow_not_found=True, recursive=True)
            found = [info.path for info in self._fs.get_file_info(selector) if info.is_file]
            return sorted(path[len(where) + 1 :] for path in found)

        return self._again(listed, f"list {folder}")

    def read_all(self, names: Iterable[str]) -> list[bytes | None]:
        """`get_sealed` of many."""
        return self._each(self.get_sealed, names)

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; those that are not there count as deleted."""

        def one(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.delete_file(self._at(name))

        self._each(lambda name: self._again(lambda: one(name), f"delete {name}"), names)

    def modified(self, name: str) -> float | None:
        """When an object was last written, by the store's clock in unix seconds; None if it is not there."""
        info = self._again(lambda: self._fs.get_file_info(self._at(name)), f"look at {name}")
        return info.mtime.timestamp() if info.is_file and info.mtime else None

    # -- before anything is bought ------------------------------------------------------------------------------
    def check(self) -> None:
        """Write and delete an object. Raises `ConfigError` where the bucket does not let us."""
        name = f"live/check-{uuid.uuid4().hex}"
        try:
            self._write(name, [b"."])
            self._fs.delete_file(self._at(name))
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"run_dir={self.uri.shown!r} can't be written. {self._explained(error)}") from None

    # -- inside -------------------------------------------------------------------------------------------------
    @property
    def _fs(self) -> Any:
        return self.uri.filesystem()

    def _at(self, name: str) -> str:
        return f"{self.uri.root}/{name}" if name else self.uri.root

    def _write(self, name: str, chunks: Iterable[bytes]) -> None:
        stream = self._fs.open_output_stream(self._at(name))
        for chunk in chunks:
            stream.write(chunk)
        stream.close()

    def _read(self, name: str) -> bytes | None:
        try:
            with self._fs.open_input_stream(self._at(name)) as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def _each(self, call: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        items = list(items)
        if len(items) < 2:
            return [call(item) for item in items]
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(call, items))

    def _again(self, call: Callable[[], T], what: str) -> T:
        """`call`, several times if the store does not answer."""
        for pause in (*RETRY_AFTER_S, None):
            try:
                return call()
            except (OSError, pa.ArrowException) as error:
                if pause is None or _is_refusal(error):
                    raise StorageError(f"{self.uri.shown}: can't {what}. {self._explained(error)}") from None
                time.sleep(pause)
        raise AssertionError

    def _explained(self, error: Exception) -> str:
        text = str(error).partition("(Request ID")[0].strip()[:500]
        if any(word in text for word in _NO_BUCKET):
            return f"There is no bucket {self.uri.bucket!r} at that address: create it, or correct the URI."
        if any(word in text.upper() for word in _NO_ACCESS):
            return (
                f"The store refuses access ({_code(text)}): set credentials that may read, list, write and delete "
                "there, in the environment of the driver and of every node (AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS)."
            )
        if any(word in text for word in ("NETWORK_CONNECTION", "Could not connect", "resolve host")):
            return f"The store does not answer at this address; is endpoint_override right? ({text})"
        return text


_NO_BUCKET = ("NO_SUCH_BUCKET", "NoSuchBucket", "Bucket not found", "bucket does not exist")
_NO_ACCESS = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY",
    "SIGNATURE_DOES_NOT_MATCH",
    "STATUS 403",
    "FORBIDDEN",
    "CREDENTIAL",
)


def _code(text: str) -> str:
    """The store's own word in an error message, without what else is in it."""
    words = [word.strip("():,") for word in text.split()]
    return next((word for word in words if "_" in word and word.isupper()), "access denied")


def _is_refusal(error: Exception) -> bool:
    """Whether asking again can't help."""
    text = str(error)
    return any(word in text for word in _NO_BUCKET) or any(word in text.upper() for word in _NO_ACCESS)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()
