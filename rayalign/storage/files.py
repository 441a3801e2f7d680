"""What a collector writes beside the ledgers, as snapshots of its folder in the bucket.

    live/files/<writer>/000002/metrics.jsonl     a file, as it was at snapshot 2
    live/files/<writer>/manifest-000002          which files snapshot 2 consists of, put after all of them

A snapshot is there whole or not at all. Each writer has names of its own, so that an old one overwrites nothing of the
last one's. What no manifest needs any more is deleted.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from pathlib import Path
from typing import Any

from rayalign.errors import StorageError
from rayalign.storage.log import Writer
from rayalign.storage.objects import Bucket

FILES = "live/files"
LEFT_OUT = re.compile(r"(^|/)(wandb/|[^/]*\.arrow$|[^/]*\.partial(/|$)|\.)")
"""Ledgers have objects of their own, what is half written is nobody's yet, and Weights & Biases has its own store."""
_MANIFEST = re.compile(r"manifest-(\d{6})")
_TRIES = 5


class Snapshots:
    """Snapshots of `folder`, by `writer`. Thread-safe."""

    def __init__(self, writer: Writer, folder: Path) -> None:
        self.writer, self.folder = writer, folder
        self._mutex = threading.Lock()
        self._number = 0
        self._known: dict[str, tuple[Any, dict[str, str]]] = {}

    def save(self) -> None:
        """Put what has changed, then the manifest, then delete what nobody needs. Raises `StorageError`."""
        for _ in range(_TRIES - 1):
            with contextlib.suppress(FileNotFoundError):  # another thread replaced one of them just now
                return self._save()
        self._save()

    def _save(self) -> None:
        with self._mutex:
            bucket = self.writer.bucket
            self._number += 1
            now = self._files()
            changed = [name for name, stamp in now.items() if self._known.get(name, (None,))[0] != stamp]
            places = {name: f"{FILES}/{self.writer.name}/{self._number:06d}/{name}" for name in changed}
            digests = bucket.put_files({places[name]: self.folder / name for name in changed})
            new = {name: (now[name], {"at": places[name], "digest": digests[places[name]]}) for name in changed}
            known = {name: entry for name, entry in (self._known | new).items() if name in now}
            manifest = {name: facts for name, (_, facts) in known.items()}
            manifest_at = f"{FILES}/{self.writer.name}/manifest-{self._number:06d}"
            bucket.put_sealed(manifest_at, json.dumps(manifest).encode())
            self._known = known
            needed = {manifest_at, *(facts["at"] for facts in manifest.values())}
            every = [name for name in bucket.names(FILES) if name.partition("/")[0] <= self.writer.name]
            bucket.delete(name for name in (f"{FILES}/{name}" for name in every) if name not in needed)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Name -> what changes when the file does."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and not LEFT_OUT.search(name):
                facts = path.stat()
                found[name] = (facts.st_size, facts.st_mtime_ns)
        return found


def restore(bucket: Bucket, folder: Path, before: str = "") -> None:
    """Write the last snapshot to `folder`, of the writers earlier than `before` or of all. Nothing if there is none."""
    for _ in range(_TRIES):
        manifest = _last_manifest(bucket, before)
        fetched = [bucket.get_file(facts["at"], folder / name, facts["digest"]) for name, facts in manifest.items()]
        if all(fetched):
            return
    raise StorageError(
        f"{bucket.uri.shown}/{FILES}: files of the last snapshot are missing or damaged. Is somebody writing there? If "
        "not, the store lost them, or somebody deleted them."
    )


def _last_manifest(bucket: Bucket, before: str) -> dict[str, dict[str, str]]:
    found = []
    for path in bucket.names(FILES):
        writer, _, rest = path.partition("/")
        if _MANIFEST.fullmatch(rest) and (not before or writer < before):
            found.append((writer, rest))
    for writer, name in sorted(found, reverse=True):
        manifest = bucket.get_sealed(f"{FILES}/{writer}/{name}")
        if manifest is not None:
            return dict(json.loads(manifest))
    return {}
