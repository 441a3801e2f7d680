"""The window of work in flight between collector and learner: one gate, one knob.

Batch `b` may be generated with weights version `v` only if `b - v <= max_staleness`. The collector passes
the gate before it generates, hence before it buys; a label, once bought, is kept and used whatever its age.

    collector                     window                      learner
    wait_for_version(b - s) ----> published v  <------------- publish(v)   (version t+1 is made of stream batch t)
    extend(streamed) -----------> stream batch t -----------> wait_for_batch(t)

Stream batches (see `ledger`) are never more than collected ones, and as many once everybody has answered: so at most
`max_staleness + 1` batches are with an oracle that takes its time, and no wait is for something that can't come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rayalign.errors import RayalignError, WaitError
from rayalign.rollout.weights import Weights


class Window:
    """Thread-safe counters of what can be trained on and what is published, and the newest weights themselves."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._streamed = 0
        self._end: int | None = None
        self._weights: Weights | None = None
        self._error: BaseException | None = None

    # -- the learner's side ---------------------------------------------------------------------------------
    def publish(self, weights: Weights) -> None:
        """Offer weights. An older version than the newest (a learner that replays after a restart) changes nothing."""
        with self._changed:
            if self._weights is None or weights.version > self.published:
                self._weights = weights
                self._changed.notify_all()

    def wait_for_batch(self, index: int, timeout_s: float) -> bool | None:
        """True: stream batch `index` is closed. False: there will be none. None: not yet, after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._known(index) is not None, timeout_s)
            return False if self._error else self._known(index)

    # -- the collector's side -------------------------------------------------------------------------------
    def wait_for_version(
        self, oldest: int, timeout_s: float, waited_for: Callable[[], str] = str, *, seen: int | None = None
    ) -> int | None:
        """Block until weights of version `oldest` or newer are published; returns the newest version.

        Returns None, sooner, when more than `seen` stream batches are closed: there is something else to do. Raises
        `WaitError` when no new version came for `timeout_s`, and whatever `fail` was given.
        """

        def news() -> bool:
            return seen is not None and self._streamed > seen

        def is_over() -> bool:
            return self._error is not None or self.published >= oldest or news()

        with self._changed:
            newest, deadline = self.published, time.monotonic() + timeout_s
            while not is_over() and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
                if self.published > newest:  # a learner that goes on, however far behind, is waited for
                    newest, deadline = self.published, time.monotonic() + timeout_s
            if self._error:
                raise RayalignError(f"the run is being stopped: {self._error}")
            if news():
                return None
            if self.published < oldest:
                raise WaitError(
                    f"waited {timeout_s:.0f} s for the learner to publish weights version {oldest}; the newest is "
                    f"{self.published}. {waited_for()}Look at the learner's log, or raise loop.gate_timeout_s."
                )
            return self.published

    def extend(self, streamed: int) -> None:
        """So many stream batches are closed; fewer than were known change nothing."""
        with self._changed:
            self._streamed = max(streamed, self._streamed)
            self._changed.notify_all()

    def finish(self, end: int) -> None:
        """No batch has an index of `end` or more."""
        with self._changed:
            self._end = end
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Wake everybody: the learner gets no further batch, the collector's waits raise."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    # -- what is known -----------------------------------------------------------------------------------------
    @property
    def published(self) -> int:
        """Newest published version; 0, the initial policy, needs no publishing."""
        return self._weights.version if self._weights else 0

    @property
    def streamed(self) -> int:
        """Number of closed stream batches."""
        return self._streamed

    @property
    def end(self) -> int | None:
        """Number of training batches of the whole run, epochs included; None while it is open."""
        return self._end

    @property
    def weights(self) -> Weights | None:
        """The newest published weights; None while they are those of the initial policy."""
        return self._weights

    def _known(self, index: int) -> bool | None:
        if self._end is not None:
            return index < self._end
        return True if index < self._streamed else None
