"""How far a judge can be trusted, and what it has cost: sums over its call book."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from rayalign.errors import DataError
from rayalign.serve.call_book import NAME, Answer, CallBook, Question


@dataclass(frozen=True, kw_only=True)
class JudgeStats:
    """Counts and shares; a share of nothing is None."""

    calls: int
    """Requests that left, those that failed included."""
    not_billed: int
    """Calls that ended in a rate limit, a server error or a refusal, and whose price was given back."""
    wasted: int
    """Calls that may have been billed and brought nothing: unreadable verdicts, timeouts, broken connections."""
    spent: float
    """Money, wasted calls included."""
    answers: int
    """Calls whose verdict was read."""
    ties: int
    """Answers that call both responses equally good."""
    abstentions: int
    """Answers that decline to judge."""
    both_orders: int
    """Duels that were answered in both orders."""
    order_disagreement: float | None
    """Share of these in which the two orders don't prefer the same response."""
    position_bias: float | None
    """Mean of P(shown first wins) - P(shown second wins); 0: none, 1: always the one shown first. Over duels asked in
    both orders; where there are none, over all answers, as the order of each was drawn at random."""
    position_bias_stderr: float | None
    """Its standard error over duels; None for fewer than two. A random order needs many more duels for the same one."""
    rechecked: int
    """Questions that were answered twice."""
    self_agreement: float | None
    """Share of these in which both answers prefer the same response."""


def judge_stats(folder: str | Path) -> JudgeStats:
    """Of the judge whose call book is in `folder`: `RUN_DIR/oracle`, or `RUN_DIR/oracle-evaluation`."""
    if not (Path(folder) / NAME).exists():
        raise DataError(f"{folder} has no {NAME}: no judge was asked there.")
    return stats_of(CallBook.copy_of(folder))


def stats_of(book: CallBook) -> JudgeStats:
    """Of a call book."""
    answers = book.answers
    once = {question: answer for question, answer in answers.items() if question.repeat == 0}
    orders = _pairs(answers, {q: q._replace(swapped=True) for q in once if not q.swapped})
    asked_once = [answer.probability for answer in once.values() if answer.probability is not None]
    bias = [given + swapped - 1 for given, swapped in orders] or [2 * first - 1 for first in asked_once]
    repeats = _pairs(answers, {q: q._replace(repeat=1) for q in once})
    return JudgeStats(
        calls=book.calls,
        not_billed=book.freed,
        wasted=book.wasted,
        spent=book.spent,
        answers=len(answers),
        ties=sum(answer.probability == 0.5 for answer in answers.values()),
        abstentions=sum(answer.probability is None for answer in answers.values()),
        both_orders=len(orders),
        order_disagreement=_mean([_side(given) != -_side(swapped) for given, swapped in orders]),
        position_bias=_mean(bias),
        position_bias_stderr=stdev(bias) / math.sqrt(len(bias)) if len(bias) > 1 else None,
        rechecked=len(repeats),
        self_agreement=_mean([_side(p) == _side(again) for p, again in repeats]),
    )


def _pairs(answers: Mapping[Question, Answer], partners: Mapping[Question, Question]) -> list[tuple[float, float]]:
    """Probabilities that the response shown first wins, of questions and their partners; no abstentions."""
    found = []
    for question, other in partners.items():
        here, there = answers[question].probability, answers.get(other, Answer(None)).probability
        if here is not None and there is not None:
            found.append((here, there))
    return found


def _side(probability: float) -> int:
    return (probability > 0.5) - (probability < 0.5)


def _mean(values: list[bool] | list[float]) -> float | None:
    return sum(values) / len(values) if values else None
