"""A run in a thread of this process, for those who run many: let go from evaluation to evaluation, or broken off.

    guided = GuidedRun(plan, allowed=1)      the run starts, makes its first evaluation, and waits
    guided.allow(2)                          it goes on to the second one
    guided.stop("not promising")             or it ends here: nothing that was bought is lost, `resume` goes on

How far it may go is a file in the run directory: a collector that is restarted finds it there.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

from ray.exceptions import ActorUnavailableError, RayActorError

from rayalign.errors import RayalignError, WaitError
from rayalign.loop.collector import ALLOWED, HELD
from rayalign.loop.collector_client import CollectorClient
from rayalign.loop.loop import execute
from rayalign.loop.preparation import Plan
from rayalign.runs.logs import read_evaluations
from rayalign.runs.result import Result

STOP_TIMEOUT_S = 120.0
HELD_TIMEOUT_S = 24 * 3600.0
"""An evaluation may be many batches away, and each wait on the way has a timeout of its own."""
STATUS_TIMEOUT_S = 5.0
POLL_S = 0.2


class GuidedRun:
    """Executes `plan` in a thread."""

    def __init__(self, plan: Plan, allowed: int | None = None) -> None:
        """`allowed`: evaluations that it may make before it waits; None: as many as it likes."""
        self.run_dir = Path(plan.config.run_dir)
        self.allow(allowed)
        self.result: Result | None = None
        self.error: BaseException | None = None
        self._plan = plan
        self._client: CollectorClient | None = None
        self._stop_reason = ""
        self._thread = threading.Thread(target=self._execute, name="run", daemon=True)
        self._thread.start()

    def allow(self, evaluations: int | None) -> None:
        """Let it go on to evaluation number `evaluations`, counted from the start of the run."""
        self._allowed = evaluations
        file = self.run_dir / ALLOWED
        if evaluations is None:
            file.unlink(missing_ok=True)
            return
        partial = file.with_suffix(".partial")
        partial.write_text(str(evaluations))
        os.replace(partial, file)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended, within `timeout_s`; raises what ended it, unless that was `stop`."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        if self.error is not None and not self._stop_reason:
            raise self.error
        return True

    def wait_until_held(self, timeout_s: float = HELD_TIMEOUT_S) -> bool:
        """Wait until it is at its next evaluation; returns whether it has ended there, else it waits to be let on.

        Raises what ended it, as `wait` does, and `WaitError` after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.wait(POLL_S):
                return True
            if self._allowed is not None and len(read_evaluations(self.run_dir)) >= self._allowed and self._is_held():
                return False
        raise WaitError(f"waited {timeout_s:.0f} s for the run in {self.run_dir} to come to its next evaluation.")

    def _is_held(self) -> bool:
        """Whether the collector waits. The evaluations are counted first: let on, it says so for one batch more."""
        with contextlib.suppress(WaitError, RayActorError, ActorUnavailableError):  # it is restarted, or ending
            return self._client is not None and self._client.status(STATUS_TIMEOUT_S)["phase"] == HELD
        return False

    def stop(self, reason: str, timeout_s: float = STOP_TIMEOUT_S) -> bool:
        """Break it off; returns whether everything of it has ended within `timeout_s`."""
        self._stop_reason = reason
        if self._client is not None:
            with contextlib.suppress(Exception):  # it may be ending by itself
                self._client.interrupt(reason)
        return self.wait(timeout_s)

    def _execute(self) -> None:
        try:
            self.result = execute(self._plan, on_start=self._started)
        except BaseException as error:
            self.error = error

    def _started(self, client: CollectorClient) -> None:
        self._client = client
        if self._stop_reason:
            raise RayalignError(self._stop_reason)
