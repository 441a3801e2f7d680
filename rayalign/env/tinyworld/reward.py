"""The hidden reward of TinyWorld, a program.

    r*(x, y) = sum over words t of y:  W[item, attribute]   the first mention of an item of the report
                                     - 0.8                   an item that is not in the report (invented)
                                     - 0.5                   an item that was named before (repeated)
                                     - 0.2                   a first mention of an item that the report lists before
                                                             the last one named (out of order)
                                     - 0.5                   any other word or punctuation mark (stray)
                                     - 0.05                  every word
               - 1 if y has MAX_WORDS words or more (it did not stop)

Every term belongs to one word and depends on the words before it alone. So naming exactly the items with
W > 0.05, in the order of the report, is optimal, and the best reward is the sum of their W - 0.05.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from rayalign.env.tinyworld.language import ATTRIBUTES, ITEM_INDEX, ITEMS, MAX_WORDS, Listing

INVENTED, REPEATED, DISORDER, STRAY, WORD, NO_STOP = 0.8, 0.5, 0.2, 0.5, 0.05, 1.0
"""Costs, in units of r*."""


@cache
def hidden_weights(seed: int) -> NDArray[np.float64]:
    """W of world `seed`, items x attributes, read-only: clip(0.25 + a_item + b_attribute, -1.5, 1.5).

    a ~ N(0, 1) and b ~ N(0, 0.2^2), both centred, so that every world has about as much to gain: a little over
    half of all pairs are worth naming, and it is mostly the item that decides.
    """
    rng = np.random.default_rng([seed, 0])
    a, b = rng.normal(0.0, 1.0, len(ITEMS)), rng.normal(0.0, 0.2, len(ATTRIBUTES))
    weights: NDArray[np.float64] = np.clip(0.25 + (a - a.mean())[:, None] + (b - b.mean())[None, :], -1.5, 1.5)
    weights.setflags(write=False)
    return weights


def word_terms(listing: Listing, response: Sequence[str]) -> list[tuple[int | None, float]]:
    """Per word of the response: the place in `listing` whose weight it earns (None: none), and its cost.

    The only place where the rules are; a weight table makes a reward of it.
    """
    place = {item: i for i, (item, _) in enumerate(listing)}
    terms: list[tuple[int | None, float]] = []
    named: set[str] = set()
    last = -1
    for count, word in enumerate(response, start=1):
        earned, cost = None, WORD
        item = ITEM_INDEX.get(word)
        if item is None:
            cost += STRAY
        elif item not in place:
            cost += INVENTED
        elif word in named:
            cost += REPEATED
        else:
            earned = place[item]
            cost += DISORDER if earned < last else 0.0
            last = earned
            named.add(word)
        terms.append((earned, cost + (NO_STOP if count == MAX_WORDS else 0.0)))
    return terms


def score(weights: NDArray[np.float64], listing: Listing, response: Sequence[str]) -> float:
    """r* of the words of a response.

    >>> W = np.zeros((48, 6)); W[24, 4] = 1.0
    >>> score(W, ((24, 4), (5, 2)), ["hinge"]), score(W, ((24, 4), (5, 2)), [])
    (0.95, 0.0)
    """
    return float(
        sum(
            (0.0 if earned is None else weights[listing[earned]]) - cost
            for earned, cost in word_terms(listing, response)
        )
    )


def best_places(weights: NDArray[np.float64], listing: Listing) -> list[int]:
    """Places of `listing` that the best response names, in order."""
    return [i for i, pair in enumerate(listing) if weights[pair] > WORD]
