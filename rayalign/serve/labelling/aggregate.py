"""What several people say of one duel, and how far they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

VOTES = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""Vote -> probability that the first response is the better one."""


def majority(votes: Iterable[str]) -> float:
    """The label that most votes name; 0.5, a tie, if most say so or if no side has more votes than every other.

    >>> majority(["first", "first", "second"]), majority(["first", "second"]), majority(["tie", "second", "tie"])
    (1.0, 0.5, 0.5)
    """
    counts = Counter(votes).most_common()
    assert counts, "no votes to aggregate"
    drawn = len(counts) > 1 and counts[0][1] == counts[1][1]
    return 0.5 if drawn else VOTES[counts[0][0]]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often two annotators said the same of what both judged."""

    annotators: tuple[str, str]
    shared: int
    """Duels that both voted on."""
    agreed: int
    """Of these, how many got the same vote; by chance alone it is about a half, so read it beside 0.5."""


def agreement(votes: Iterable[Mapping[str, str]]) -> list[Agreement]:
    """Raw agreement of every two annotators with a duel in common; `votes` has annotator -> vote for each duel.

    >>> [(a.shared, a.agreed) for a in agreement([{"ann": "first", "bob": "first"}, {"ann": "tie", "bob": "second"}])]
    [(2, 1)]
    """
    shared: Counter[tuple[str, str]] = Counter()
    agreed: Counter[tuple[str, str]] = Counter()
    for by_annotator in votes:
        for one, other in combinations(sorted(by_annotator), 2):
            shared[one, other] += 1
            agreed[one, other] += by_annotator[one] == by_annotator[other]
    return [Agreement(annotators=pair, shared=n, agreed=agreed[pair]) for pair, n in sorted(shared.items())]
