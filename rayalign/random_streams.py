"""Random numbers of a run: a stream for each batch and purpose, so that a resumed run draws what it would have drawn.

>>> [stream(3, 7, SELECT).random() == stream(3, 7, purpose).random() for purpose in (SELECT, GENERATE)]
[True, False]
"""

from __future__ import annotations

import numpy as np

GENERATE, SELECT, OBSERVE, SHUFFLE, QUESTIONS = range(5)
"""Purposes. Their numbers are part of what a seed means."""


def stream(seed: int, *words: int) -> np.random.Generator:
    """The generator that `words` name in a run with `seed`."""
    return np.random.default_rng([seed, *words])
