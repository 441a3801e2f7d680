"""The window of work in flight between collector and learner: one gate, one knob.

Batch `b` may be generated with weights version `v` only if `b - v <= max_staleness`. The collector passes
the gate before it generates, hence before it buys; a label, once bought, is kept and used whatever its age.

    collector                     window                      learner
    wait_for_version(b - s) ----> published v  <------------- publish(v)   (version b+1 is made of batch b)
    add(b) ---------------------> collected b  -------------> wait_for_batch(b)
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from rayalign.errors import RayalignError, WaitError
from rayalign.rollout.weights import Weights


class Window:
    """Thread-safe counters of what is collected and what is published, and the newest weights themselves."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._collected = 0
        self._end: int | None = None
        self._weights: Weights | None = None
        self._error: BaseException | None = None

    # -- the learner's side ---------------------------------------------------------------------------------
    def publish(self, weights: Weights) -> None:
        """Offer weights. An older version than the newest (a learner that replays after a restart) changes nothing."""
        with self._changed:
            if weights.version > self.published:
                self._weights = weights
                self._changed.notify_all()

    def wait_for_batch(self, index: int, timeout_s: float) -> bool | None:
        """True: batch `index` is collected. False: there will be none. None: not yet, after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._known(index) is not None, timeout_s)
            return False if self._error else self._known(index)

    # -- the collector's side -------------------------------------------------------------------------------
    def wait_for_version(self, oldest: int, timeout_s: float, waited_for: Callable[[], str] = str) -> int:
        """Block until weights of version `oldest` or newer are published; returns the newest version.

        Raises `WaitError` after `timeout_s`, and whatever `fail` was given.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error or self.published >= oldest, timeout_s)
            if self._error:
                raise RayalignError(f"the run is being stopped: {self._error}")
            if self.published < oldest:
                raise WaitError(
                    f"waited {timeout_s:.0f} s for the learner to publish weights version {oldest}; the newest is "
                    f"{self.published}. {waited_for()}Look at the learner's log, or raise loop.gate_timeout_s."
                )
            return self.published

    def restart(self, collected: int) -> None:
        """`collected` batches were found in the ledger at the start."""
        with self._changed:
            self._collected = collected
            self._changed.notify_all()

    def add(self, index: int) -> None:
        """Batch `index` is in the ledger."""
        with self._changed:
            assert index == self._collected, f"batch {index} after {self._collected - 1}"
            self._collected = index + 1
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
    def collected(self) -> int:
        """Number of batches in the ledger."""
        return self._collected

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
        return True if index < self._collected else None
