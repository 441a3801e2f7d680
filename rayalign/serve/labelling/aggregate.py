"""What several people say of one duel, and how far they agree."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rayalign.errors import ConfigError

VOTES = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""Vote -> probability that the first response is the better one."""
ROUNDS = 100
"""Most rounds of expectation and maximisation; it is through earlier when nothing changes any more."""

Votes = Mapping[str, Mapping[str, str]]
"""Duel -> annotator -> vote."""


# -- labels -------------------------------------------------------------------------------------------------------
def majority(votes: Iterable[str]) -> float:
    """The label that most votes name; 0.5, a tie, if most say so or if no side has more votes than every other.

    >>> majority(["first", "first", "second"]), majority(["first", "second"]), majority(["tie", "second", "tie"])
    (1.0, 0.5, 0.5)
    """
    counts = Counter(votes).most_common()
    assert counts, "no votes to aggregate"
    drawn = len(counts) > 1 and counts[0][1] == counts[1][1]
    return 0.5 if drawn else VOTES[counts[0][0]]


def by_majority(votes: Votes, duels: Collection[str]) -> dict[str, float]:
    """`majority` of each of `duels`."""
    return {name: majority(votes[name].values()) for name in duels}


def by_dawid_skene(votes: Votes, duels: Collection[str]) -> dict[str, float]:
    """The likeliest label of each of `duels` where annotators err each in their own way (Dawid and Skene 1979).

    How reliable somebody is, and with which bias, is estimated from all of `votes`, by crowd-kit. 0.5 if a tie is the
    likeliest, or if no label is likelier than every other.
    """
    from crowdkit.aggregation.classification.dawid_skene import DawidSkene

    rows = _table(votes)
    likelihoods = DawidSkene(n_iter=ROUNDS).fit(rows).probas_
    labels = {}
    for name in duels:
        ranked = likelihoods.loc[name].sort_values(ascending=False)
        drawn = len(ranked) > 1 and math.isclose(ranked.iloc[0], ranked.iloc[1], rel_tol=1e-6)
        labels[name] = 0.5 if drawn else VOTES[ranked.index[0]]
    return labels


AGGREGATES: dict[str, Callable[[Votes, Collection[str]], dict[str, float]]] = {
    "majority": by_majority,
    "dawid_skene": by_dawid_skene,
}
"""Name -> what makes labels of votes."""


def has_crowdkit() -> bool:
    """Whether the library for Dawid-Skene and for agreement beyond chance is installed."""
    return importlib.util.find_spec("crowdkit") is not None


def check_aggregate(name: str, annotators_per_duel: int) -> None:
    """Raise `ConfigError` where votes can't be aggregated that way."""
    if name != "dawid_skene":
        return
    if annotators_per_duel < 2:
        raise ConfigError(
            "oracle.human.aggregate='dawid_skene' weighs annotators by how far they agree with others, and "
            "oracle.human.annotators_per_duel=1 asks no others. Set it to 2 or more, better 3."
        )
    if not has_crowdkit():
        raise ConfigError(
            "oracle.human.aggregate='dawid_skene' needs crowd-kit: pip install 'rayalign[labelling]', or set "
            "oracle.human.aggregate=majority."
        )


# -- agreement ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often two annotators said the same of what both judged."""

    annotators: tuple[str, str]
    shared: int
    """Duels that both voted on."""
    agreed: int
    """Of these, how many got the same vote; by chance alone it is about a half, so read it beside `kappa`."""
    kappa: float | None = None
    """Cohen's kappa: 0 is what chance brings, 1 is full agreement. None where it is not defined (all votes the same),
    or without crowd-kit."""


def agreement(votes: Iterable[Mapping[str, str]]) -> list[Agreement]:
    """Agreement of every two annotators with a duel in common; `votes` has annotator -> vote for each duel.

    >>> [(a.shared, a.agreed) for a in agreement([{"ann": "first", "bob": "first"}, {"ann": "tie", "bob": "second"}])]
    [(2, 1)]
    """
    shared: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for by_annotator in votes:
        for one, other in combinations(sorted(by_annotator), 2):
            shared.setdefault((one, other), []).append((by_annotator[one], by_annotator[other]))
    return [
        Agreement(annotators=who, shared=len(pairs), agreed=sum(a == b for a, b in pairs), kappa=_kappa(pairs))
        for who, pairs in sorted(shared.items())
    ]


def krippendorff_alpha(votes: Votes) -> float | None:
    """Krippendorff's alpha of all votes, the three kinds of vote as unordered categories; 0 is chance, 1 agreement.

    None where it is not defined: no duel with two votes, or all votes the same; or without crowd-kit.
    """
    several = {name: by_annotator for name, by_annotator in votes.items() if len(by_annotator) > 1}
    if not has_crowdkit() or len({vote for by in several.values() for vote in by.values()}) < 2:
        return None
    from crowdkit.metrics.data import alpha_krippendorff

    return float(alpha_krippendorff(_table(several)))


def _kappa(pairs: list[tuple[str, str]]) -> float | None:
    if not has_crowdkit():
        return None
    from sklearn.metrics import cohen_kappa_score  # crowd-kit needs it, too

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not defined
        kappa = float(cohen_kappa_score(*zip(*pairs, strict=True), labels=list(VOTES)))
    return None if math.isnan(kappa) else kappa


def _table(votes: Votes) -> Any:
    """As crowd-kit takes them."""
    import pandas

    rows = [(name, who, vote) for name, by_annotator in votes.items() for who, vote in by_annotator.items()]
    return pandas.DataFrame(rows, columns=["task", "worker", "label"])
