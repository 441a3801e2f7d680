"""What a comparison is going to buy, in one line, before its first run starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rayalign.estimate.purchases import Purchases, price_per_label, purchases_of
from rayalign.ledger.ledger import Ledger
from rayalign.loop.preparation import Plan
from rayalign.runs.config import RunConfig
from rayalign.studies.many import Job


def bill(jobs: Mapping[str, Sequence[Job]], plans: Mapping[str, Plan]) -> str:
    """Labels and money that all runs take, and what of it is paid already.

    Args:
        jobs: row -> its runs, one a seed. Equal directories are one run.
        plans: row -> the checked plan of its first run. What rows of a fair comparison share is read from the first.

    Finished runs count with what they bought, the others with their budget; so what is left is never more than it says.
    """
    runs = {job.folder: job for own in jobs.values() for job in own}
    seeds = len(next(iter(jobs.values())))
    many = f"{len(jobs)} rows x {seeds} seeds" if len(runs) == len(jobs) * seeds else f"{len(runs)} runs"
    one = next(iter(plans.values()))
    each = purchases_of(one.config, len(one.world.heldout(one.config.evaluation.num_prompts)))
    if all(job.finished for job in runs.values()):
        return f"{many}: all finished, nothing is left to buy"
    labels = _Count.of(runs.values(), each.labels, "ledger.arrow")
    evaluation = _Count.of(runs.values(), each.evaluation_labels, "evaluation.arrow")
    said = f"{many} x {each.labels:,} labels = {len(runs) * each.labels:,}{labels.paid()}"
    said += f"; for evaluation at most {len(runs) * each.evaluation_labels:,} more{evaluation.paid()}"
    return said + _money(one.config, each, labels.left, evaluation.left)


class _Count(NamedTuple):
    """Labels of one kind, in all runs."""

    bought: int
    left: int

    @classmethod
    def of(cls, runs: Collection[Job], each: int, ledger: str) -> _Count:
        spent = {job.folder: _spent(job.folder / ledger) for job in runs}
        left = sum(max(0, each - spent[job.folder]) for job in runs if not job.finished)
        return cls(sum(spent.values()), left)

    def paid(self) -> str:
        return f", of which {self.bought:,} bought already" if self.bought else ""


def _spent(ledger: Path) -> int:
    if not ledger.exists():
        return 0
    with Ledger(ledger, read_only=True) as opened:
        return opened.spent


def _money(config: RunConfig, each: Purchases, labels: int, evaluation: int) -> str:
    """What is left to pay by the prices in the settings; nothing where none is set and nobody is known to take one."""
    judge = config.evaluation.oracle or config.oracle
    money = labels * price_per_label(config.oracle) + evaluation * price_per_label(judge)
    said = f"; left to pay at most {money:,.2f} by the prices in the settings" if money else ""
    for asked in each.judges:
        if not asked.price:
            said += f"; {asked.section}.judge.price is not set, so what it costs is not counted"
        if asked.cap:
            said += f"; {asked.section}.judge.max_spend={asked.cap:g} holds for each run"
    return said
