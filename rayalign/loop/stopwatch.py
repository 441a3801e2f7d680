"""Where the time of a batch goes."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds by stage of one batch, with their start and end for the timeline."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float]] = []

    def __call__(self, stage: str) -> _Span:
        """`with stopwatch("generate"): ...`."""
        return _Span(self, stage)

    def seconds(self) -> dict[str, float]:
        """Seconds by stage."""
        total: dict[str, float] = {}
        for stage, start, end in self.spans:
            total[stage] = total.get(stage, 0.0) + end - start
        return total


class _Span:
    def __init__(self, stopwatch: Stopwatch, stage: str) -> None:
        self._stopwatch, self._stage = stopwatch, stage

    def __enter__(self) -> None:
        self._start = time.time()

    def __exit__(self, *_: object) -> None:
        self._stopwatch.spans.append((self._stage, self._start, time.time()))
