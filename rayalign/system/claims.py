"""Who is asking about what right now: a claim per name, held by one process of all that share a folder.

A claim is a lock on one byte of the file `claims`; which byte, the name decides. Nothing is written, so nothing is left
to clean up, and the kernel takes the claims of a process back the moment it dies, however it died.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from rayalign.errors import LedgerError

BYTES = 2**62
"""Bytes that names are spread over; the file itself stays empty."""
HELD_BY_OTHERS = (errno.EACCES, errno.EAGAIN)


class Claims:
    """The claims of this process in `folder`. Thread-safe; make one per process and folder.

    Raises `LedgerError` where the folder is on a file system without locks.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "claims"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._held: set[str] = set()
        self._mutex = threading.Lock()

    def claim(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that nobody held and that are this process's now; waits for none."""
        with self._mutex:
            mine = [name for name in dict.fromkeys(names) if name not in self._held and self._lock(name)]
            self._held.update(mine)
            return mine

    def release(self, names: Iterable[str]) -> None:
        """Give claims back."""
        with self._mutex:
            names = self._held.intersection(names)
            self._held -= names
            if not self._held:
                fcntl.lockf(self._file, fcntl.LOCK_UN)  # all of them in one call
                return
            for name in names:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _byte(name))

    def close(self) -> None:
        """Give all claims back."""
        with self._mutex:
            os.close(self._file)
            self._held.clear()

    def _lock(self, name: str) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte(name))
        except OSError as error:
            if error.errno in HELD_BY_OTHERS:
                return False
            raise LedgerError(
                f"{self.path} can't be locked ({error.strerror}), so that two replicas might pay for the same label. "
                "Keep the run directory on a file system with locks."
            ) from error
        return True


def _byte(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % BYTES
