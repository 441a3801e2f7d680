"""Scores by content, so that equal texts are scored once: by this process, its neighbours, and those that come later.

    items -> known here? -> known in the folder? -> the rest is scored, together -> both remember it

The folder is a convenience, not a book: what it can't keep is scored again. What was paid for is in the journal.
"""

from __future__ import annotations

import hashlib
import logging
import math
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)

Item = TypeVar("Item")
NAME = "scores.sqlite"
AT_ONCE = 500
"""Keys in one question to the file."""


class ScoreCache:
    """Remembers up to `size` scores in memory, and all of them in a folder if it is given one; a size of 0: none."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._scores: OrderedDict[bytes, float] = OrderedDict()
        self._file: sqlite3.Connection | None = None
        self._owner = ""

    def keep_in(self, folder: str | Path, owner: str) -> None:
        """Share scores with all that use `folder` in the name of the same `owner`: a model, and how it is read."""
        if not self.size:
            return
        self._owner = owner
        try:
            self._file = sqlite3.connect(Path(folder) / NAME, timeout=10, check_same_thread=False, isolation_level=None)
        except sqlite3.Error as error:
            self._give_up(error)
        self._ask("PRAGMA synchronous=OFF")
        self._ask(
            "CREATE TABLE IF NOT EXISTS scores (owner TEXT, key BLOB, score REAL, PRIMARY KEY (owner, key)) "
            "WITHOUT ROWID"
        )

    def through(
        self, items: Mapping[bytes, Item], score: Callable[[list[Item]], Sequence[float | None]]
    ) -> dict[bytes, float | None]:
        """The score of each item by its key; `score` is asked once, for those that nobody knows."""
        known: dict[bytes, float | None] = {key: self._scores[key] for key in items if key in self._scores}
        known |= self._read([key for key in items if key not in known])
        new = [key for key in items if key not in known]
        if new:
            scored = dict(zip(new, score([items[key] for key in new]), strict=True))
            known |= scored
            self._write({key: value for key, value in scored.items() if value is not None and math.isfinite(value)})
        for key, value in known.items():
            if value is not None and math.isfinite(value):
                self._scores[key] = value
                self._scores.move_to_end(key)
        while len(self._scores) > self.size:
            self._scores.popitem(last=False)
        return known

    # -- the file -------------------------------------------------------------------------------------------------
    def _read(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        found: dict[bytes, float] = {}
        for start in range(0, len(keys), AT_ONCE):
            some = keys[start : start + AT_ONCE]
            places = ",".join("?" * len(some))
            found |= self._ask(f"SELECT key, score FROM scores WHERE owner=? AND key IN ({places})", self._owner, *some)
        return found

    def _write(self, scores: Mapping[bytes, float]) -> None:
        for start in range(0, len(scores), AT_ONCE):
            some = list(scores.items())[start : start + AT_ONCE]
            rows = [value for key, score in some for value in (self._owner, key, score)]
            self._ask(f"INSERT OR IGNORE INTO scores VALUES {','.join(['(?,?,?)'] * len(some))}", *rows)

    def _ask(self, statement: str, *values: Any) -> list[tuple[bytes, float]]:
        if self._file is None:
            return []
        try:
            return self._file.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return []

    def _give_up(self, error: sqlite3.Error) -> None:
        log.warning("scores are remembered in memory alone from now on: %s", error)
        self._file = None


def content_key(*content: Any) -> bytes:
    """A key of texts and lists of texts: equal for equal content."""
    return hashlib.blake2b(repr(content).encode("utf-8", "surrogatepass"), digest_size=16).digest()
