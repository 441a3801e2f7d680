"""The learner's only view of the rest of the world: batches come in, weights go out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rayalign.rollout.weights import Weights
from rayalign.types import TrainBatch

Span = tuple[str, float, float]
"""A stage of the learner's work, its start and its end in unix seconds."""


@dataclass(frozen=True, slots=True)
class EndOfStream:
    """There is no further batch: the budget is spent and everything bought has been trained on."""


@dataclass(frozen=True, slots=True)
class PleasePublish:
    """The source lost the weights of the asking version (it was restarted); publish them, then ask again."""


class BatchSource(Protocol):
    """Picklable; every learner worker holds a copy. Idempotent: batch `index` is the same whoever asks, and when."""

    def next_batch(self, index: int, timeout_s: float) -> TrainBatch | EndOfStream | PleasePublish:
        """Batch number `index`; blocks until it is there. Asked by a learner whose weights are version `index`.

        Raises `WaitError`, which says what was waited for, after `timeout_s`.
        """

    def publish(self, weights: Weights, metrics: Mapping[str, float], spans: Sequence[Span] = ()) -> None:
        """Offer weights to the rollout pool, with numbers and times of the update that made them. Called by rank 0."""


class ListSource:
    """Batches from a list, weights into another: offline training and tests."""

    def __init__(self, batches: Sequence[TrainBatch]) -> None:
        self.batches = list(batches)
        self.published: list[tuple[Weights, Mapping[str, float]]] = []

    def next_batch(self, index: int, timeout_s: float) -> TrainBatch | EndOfStream | PleasePublish:
        """The batch from the list, or the end; never waits."""
        return self.batches[index] if index < len(self.batches) else EndOfStream()

    def publish(self, weights: Weights, metrics: Mapping[str, float], spans: Sequence[Span] = ()) -> None:
        """Keep what was published in `published` (of this process's copy)."""
        self.published.append((weights, metrics))
