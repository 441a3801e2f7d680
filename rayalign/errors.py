"""One picklable family of errors. Each message names the field, the value, the reason and the way out.

Every class takes exactly one message argument, so that it survives the pickling that Ray does to it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayalign.types import Verdict


class RayalignError(Exception):
    """Root of everything that rayalign raises on purpose."""


class ConfigError(RayalignError, ValueError):
    """A setting is wrong; nothing was started and nothing was bought."""


class DataError(RayalignError, ValueError):
    """A prompt file, model directory or other input can't be used as it is."""


class BudgetError(RayalignError):
    """A purchase would exceed the label budget; it was refused before the oracle was asked."""


class OracleError(RayalignError):
    """The oracle is unreachable, or answered something that is not a probability."""


class UnfinishedError(OracleError):
    """The oracle broke in the middle of a batch; what it had answered by then was paid."""

    answered: Sequence[Verdict] = ()
    """Verdicts on some of the duels, in their order."""


class LabellingError(RayalignError, ValueError):
    """What an annotator asked for can't be done (any more); nothing was recorded."""


class LedgerError(RayalignError):
    """The ledger on disk contradicts what it is asked to record."""


class StorageError(RayalignError):
    """The bucket of a run can't be read or written, or another driver has taken the run over."""


class WeightSyncError(RayalignError):
    """An engine does not run the weights that it was sent."""


class RolloutError(RayalignError):
    """Rollout replicas keep dying, or one can't be started."""


class WaitError(RayalignError, TimeoutError):
    """Something did not answer in time; the message says what was waited for."""


class NonFiniteLossError(RayalignError):
    """The loss is NaN or infinite; the message names the duels of the batch."""


class ResourceError(RayalignError, ValueError):
    """The cluster does not have what the run's placement asks for."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that helps after an unknown `name`: the closest known names, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known: {', '.join(known)}."
