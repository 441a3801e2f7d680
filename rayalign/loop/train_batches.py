"""Batches as the learner and the agent get them, out of the ledger's stream."""

from __future__ import annotations

import threading
from collections import OrderedDict

from rayalign.ledger.ledger import Ledger
from rayalign.loop.staleness import Window
from rayalign.random_streams import SHUFFLE, stream
from rayalign.runs.config import LoopConfig
from rayalign.types import Preference, TrainBatch


def place_in_epoch(seed: int, index: int, num_batches: int) -> tuple[int, int]:
    """Epoch of training batch `index`, and which stream batch it is: in the stream's order first, then shuffled.

    >>> [place_in_epoch(0, i, 3) for i in range(3)], sorted(place_in_epoch(0, i, 3) for i in range(3, 6))
    ([(0, 0), (0, 1), (0, 2)], [(1, 0), (1, 1), (1, 2)])
    """
    epoch, position = divmod(index, num_batches)
    if epoch > 0:
        position = int(stream(seed, epoch, SHUFFLE).permutation(num_batches)[position])
    return epoch, position


class TrainBatches:
    """The stream's batches, a new order each epoch. The last few are kept: all workers of the learner ask for them."""

    def __init__(self, config: LoopConfig, ledger: Ledger, lock: threading.Lock, window: Window) -> None:
        """`lock` guards `ledger`; `window` knows what there is to train on."""
        self._config, self._ledger, self._lock, self._window = config, ledger, lock, window
        self._kept: OrderedDict[int, TrainBatch] = OrderedDict()

    def __getitem__(self, index: int) -> TrainBatch:
        with self._lock:
            if (batch := self._kept.get(index)) is not None:
                return batch
            streamed = self._window.streamed
            whole_epochs = self._window.end is not None
            epoch, position = place_in_epoch(self._config.seed, index, streamed) if whole_epochs else (0, index)
            # progress knows no shuffling
            spent = epoch * self._config.budget + self._ledger.labels_before(index - epoch * streamed + 1)
            return self._keep(index, tuple(self._ledger.stream_batch(position)), spent)

    def put(self, index: int, preferences: tuple[Preference, ...]) -> None:
        """Batch `index`, which was committed last, is at hand: spare the ledger the reading."""
        with self._lock:
            self._keep(index, preferences, self._ledger.spent)

    def _keep(self, index: int, preferences: tuple[Preference, ...], spent: int) -> TrainBatch:
        progress = min(1.0, spent / (self._config.budget * self._config.epochs))
        self._kept[index] = TrainBatch(index=index, preferences=preferences, meta={"progress": progress})
        while len(self._kept) > self._config.max_staleness + 4:
            self._kept.popitem(last=False)
        return self._kept[index]
