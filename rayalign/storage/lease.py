"""One driver at a time in a bucket, and the order in which drivers came.

    live/drivers/000003-5f2c91ab    the third driver's turn: who it is, a beat now and then, whether it has ended

A driver takes the next turn when the last one's holder has ended, is dead, or has been silent for `LEASE_S`. There is
no lock to hold in a bucket, so this keeps people from mistakes and nothing more: that nobody buys beside the last
driver is held by `log`, which orders all writers by the turn of their driver.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from rayalign.errors import ConfigError, StorageError
from rayalign.storage.objects import Bucket

log = logging.getLogger(__name__)

DRIVERS = "live/drivers"
BEAT_S = 10.0
LEASE_S = 45.0
"""Silence after which a driver counts as dead."""
CERTAINLY_OVER_S = 600.0
"""A beat that is so much older than this machine's clock is not waited for, whoever's clock is wrong."""
POLL_S = 1.0


class Lease:
    """A driver's turn. Made by `Lease.take`, which starts its heartbeat; `release` ends both."""

    def __init__(self, bucket: Bucket, turn: str) -> None:
        self.bucket, self.turn = bucket, turn
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @classmethod
    def take(cls, bucket: Bucket) -> Lease:
        """Take the next turn. Raises `ConfigError` if another driver has the run."""
        turns = bucket.names(DRIVERS)
        if turns:
            _wait_until_over(bucket, turns[-1])
        number = int(turns[-1].partition("-")[0]) + 1 if turns else 1
        lease = cls(bucket, f"{number:06d}-{uuid.uuid4().hex[:8]}")
        lease._write(ended=False)
        if set(bucket.names(DRIVERS)) - {lease.turn, *turns}:  # which of us was the first, nobody can tell
            bucket.delete([f"{DRIVERS}/{lease.turn}"])
            raise ConfigError(
                f"run_dir={bucket.uri.shown!r} was taken by another driver at the same moment. Nothing was started; "
                "resume it when that one has ended."
            )
        lease._thread.start()
        return lease

    def is_last(self) -> bool:
        """Whether no other driver has come after this one."""
        return self.bucket.names(DRIVERS)[-1:] == [self.turn]

    def release(self) -> None:
        """Say that this driver has ended, so that the next one need not wait."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(StorageError):  # the next driver waits a little, that is all
            self._write(ended=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._write(ended=False)
            except StorageError as error:
                log.warning("no sign of life could be left: %s", error)

    def _write(self, *, ended: bool) -> None:
        self._beats += 1
        facts = {**_this_process(), "beats": self._beats, "ended": ended}
        self.bucket.put(f"{DRIVERS}/{self.turn}", json.dumps(facts).encode())


def _wait_until_over(bucket: Bucket, turn: str) -> None:
    """Return when the holder of `turn` is certainly gone; `ConfigError` at its first sign of life."""
    seen = _facts(bucket, turn)
    beat = bucket.modified(f"{DRIVERS}/{turn}") or 0.0
    if seen.get("ended") or _died_here(seen) or time.time() - beat > CERTAINLY_OVER_S:
        return
    deadline = time.monotonic() + LEASE_S
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        now = _facts(bucket, turn)
        if not now or now.get("ended") or _died_here(now):
            return
        if now != seen:
            raise ConfigError(
                f"run_dir={bucket.uri.shown!r} is being run by process {now.get('pid')} on {now.get('host')}. A run "
                f"directory belongs to one driver: stop that one, or wait {LEASE_S:.0f} s after it has died, then "
                "`rayalign resume`; or choose another run_dir."
            )


def _facts(bucket: Bucket, turn: str) -> dict[str, Any]:
    try:
        return dict(json.loads(bucket.get(f"{DRIVERS}/{turn}") or b"{}"))
    except ValueError:
        return {}


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "version": 1,
    }


def _died_here(facts: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that is no more."""
    mine = bool(facts.get("machine")) and facts["machine"] == _machine() and facts.get("started") is not None
    return mine and _started(int(facts["pid"])) != facts["started"]


def _machine() -> str:
    """Boot and process namespace: where a process id means the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When the process was started, in ticks since boot; None if there is none (a zombie is none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
