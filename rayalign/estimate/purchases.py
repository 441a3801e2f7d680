"""What is bought: labels, calls of judges, and what they cost by the prices in the settings."""

from __future__ import annotations

from dataclasses import dataclass

from rayalign.runs.config import RunConfig
from rayalign.serve.config import OracleConfig


@dataclass(frozen=True, kw_only=True)
class Purchases:
    """What is asked of oracles. Evaluation counts apart from the budget."""

    labels: int
    evaluations: int
    evaluation_labels: int
    """At most: identical answers are not asked about, and nobody is asked twice about the same."""
    calls: float
    """Of LLM judges, for labels and evaluation; questions asked again after errors come on top."""
    money: float
    """For labels and evaluation, in the currency of the prices."""
    judges: tuple[JudgeCost, ...] = ()
    """Each LLM judge, by its section."""


@dataclass(frozen=True, kw_only=True)
class JudgeCost:
    """What an LLM judge is going to cost, by its own settings."""

    section: str
    """`oracle`, or `evaluation.oracle`."""
    price: float
    """Of a call; 0: nobody set it."""
    money: float
    cap: float
    """`max_spend`; 0: none."""

    def verdict(self) -> str:
        """In words."""
        if not self.price:
            return f"{self.section}.judge.price is not set: what it costs is not counted"
        if not self.cap:
            return f"no cap; {self.section}.judge.max_spend sets one"
        enough = "is enough" if self.cap >= self.money else "is LESS than that: the run will stop before its budget"
        return f"{self.section}.judge.max_spend={self.cap:g} {enough}"


def num_evaluations(config: RunConfig) -> int:
    """At the start if asked for, when a multiple of `evaluation.every` is passed, and at the end.

    At most: where generation runs ahead of learning, the last two can be one.
    """
    every, budget = config.evaluation.every, config.loop.budget
    between = min((budget - 1) // every, (budget - 1) // config.loop.batch_size) if every else 0
    return int(config.evaluation.at_start) + between + 1


def purchases_of(config: RunConfig, heldout: int) -> Purchases:
    """Labels are exact; calls and money leave out what is asked again after errors."""
    judge = config.evaluation.oracle or config.oracle
    evaluations = num_evaluations(config)
    evaluation_labels = evaluations * heldout * (2 if config.evaluation.best_of_n > 1 else 1)
    bought = [(config.oracle, config.loop.budget), (judge, evaluation_labels)]
    sections = {"oracle": config.oracle, "evaluation.oracle": config.evaluation.oracle}
    return Purchases(
        labels=config.loop.budget,
        evaluations=evaluations,
        evaluation_labels=evaluation_labels,
        calls=sum(labels * calls_per_label(oracle) for oracle, labels in bought),
        money=sum(labels * price_per_label(oracle) for oracle, labels in bought),
        judges=tuple(
            JudgeCost(
                section=section,
                price=asked.judge.price,
                money=sum(labels * price_per_label(oracle) for oracle, labels in bought if oracle is asked),
                cap=asked.judge.max_spend,
            )
            for section, asked in sections.items()
            if asked is not None and asked.kind == "judge"
        ),
    )


def calls_per_label(oracle: OracleConfig) -> float:
    """Of an LLM judge: one for each order, and the share that is asked again to measure self-agreement."""
    if oracle.kind != "judge":
        return 0.0
    return (2 if oracle.judge.order == "both" else 1) + oracle.judge.recheck


def price_per_label(oracle: OracleConfig) -> float:
    """Money: a judge's calls, or `oracle.price`; a verdict that brings its own price keeps that."""
    calls = calls_per_label(oracle) * oracle.judge.price
    return calls if calls else oracle.price
