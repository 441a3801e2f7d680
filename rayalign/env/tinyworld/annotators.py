"""The people of TinyWorld: those who wrote the demonstrations, and those who wrote the references.

A careful annotator keeps an item with probability 0.9 or 0.1, by its worth; any other keeps each with
probability 0.5. Both make slips: they shuffle, repeat, swap in another item, and are polite.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rayalign.env.tinyworld.language import ATTRIBUTES, ITEMS, MAX_ITEMS, MAX_WORDS, MIN_ITEMS, Listing
from rayalign.env.tinyworld.reward import best_places

CAREFUL_DEMONSTRATIONS, CAREFUL_REFERENCES = 0.1, 0.5
"""Share of careful annotators."""
SHUFFLED, REPEATS, SWAPS, POLITE = 0.12, 0.04, 0.05, 0.28
"""Probability of each slip; of a swap per named item, of the others per response."""
OPENINGS = (("please", "check", "the"), ("kindly", "note", "the"), ("please", "note"), ("also", "check"))


def draw_listing(rng: np.random.Generator) -> Listing:
    """A report: 4 to 8 different items, each with an attribute, all equally likely."""
    k = int(rng.integers(MIN_ITEMS, MAX_ITEMS + 1))
    items = rng.permutation(len(ITEMS))[:k].tolist()
    return tuple(zip(items, rng.integers(len(ATTRIBUTES), size=k).tolist(), strict=True))


def demonstrate(listing: Listing, weights: NDArray[np.float64], rng: np.random.Generator, careful: float) -> list[str]:
    """The words that one annotator writes; `careful` is the probability that it is a careful one.

    Never as long as to look cut off.
    """
    slips = rng.random(6)
    keep = np.full(len(listing), 0.5)
    if slips[0] < careful:
        keep[:] = 0.1
        keep[best_places(weights, listing)] = 0.9
    named = [item for (item, _), kept in zip(listing, rng.random(len(listing)) < keep, strict=True) if kept]
    named = named or [listing[int(keep.argmax())][0]]  # nobody hands in an empty page
    if slips[1] < SHUFFLED:
        named = rng.permutation(named).tolist()
    swapped = rng.random(len(named)) < SWAPS
    named = [int(rng.integers(len(ITEMS))) if swap else item for item, swap in zip(named, swapped, strict=True)]
    if slips[2] < REPEATS:
        named.insert(int(rng.integers(1, len(named) + 1)), named[int(rng.integers(len(named)))])
    response = [ITEMS[item] for item in named]
    if slips[3] < POLITE:
        if slips[4] < 0.7:
            response = [*OPENINGS[int(rng.integers(len(OPENINGS)))], *response]
        if slips[4] > 0.6:
            response = [*response, "thanks"]
        if slips[5] < 0.3 and len(named) > 1:
            place = len(response) - (2 if response[-1] == "thanks" else 1)
            response.insert(place, "and")
    return response[: MAX_WORDS - 1]
