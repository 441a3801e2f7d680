"""One batch of preferences into one optimizer step (or several). Knows no Ray and no algorithm.

Shapes: B duels, R = 2 B rows (the first responses, then the second ones).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayalign.agents.agent import Agent
from rayalign.agents.losses import PairLogProbs
from rayalign.errors import NonFiniteLossError
from rayalign.learner.config import LearnerConfig
from rayalign.learner.microbatch import micro_batches
from rayalign.learner.strategies import Strategy
from rayalign.types import Preference, TrainBatch

References = Mapping[str, tuple[float, float]]


def learning_rate(config: LearnerConfig, batch: int, progress: float) -> float:
    """AdamW's learning rate for `batch`: linear warm-up, then constant, or a cosine over the label budget.

    `progress` is the share of the budget that is spent, in [0, 1].

    >>> c = LearnerConfig(learning_rate=1.0, warmup_batches=4, schedule="cosine")
    >>> learning_rate(c, 1, 0.0), learning_rate(c, 9, 0.5), learning_rate(c, 9, 1.0)
    (0.5, 0.5, 0.0)
    """
    warm = min(1.0, (batch + 1) / config.warmup_batches) if config.warmup_batches else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0
    return config.learning_rate * warm * round(cosine, 12)


@dataclass(frozen=True, slots=True)
class _Row:
    """What a worker tells the others about one duel of its share."""

    duel: str
    loss: float
    margin: float
    winner: float
    loser: float
    winner_length: int
    loser_length: int
    tie: bool
    auxiliary: bool
    """It only carries a term of the agent's loss (`Agent.training_duels`), and is no duel to be described."""


def update(
    strategy: Strategy, agent: Agent, batch: TrainBatch, references: References, config: LearnerConfig, rate: float
) -> dict[str, float]:
    """One optimizer step on the mean of the batch's losses, whatever the micro-batches and the number of workers.

    Returns the numbers of the step, the same on every worker; empty for an empty batch, which changes nothing.
    Raises `NonFiniteLossError` on every worker, before the weights are changed.
    """
    preferences = batch.preferences
    if not preferences:
        return {}
    everything = range(len(preferences))
    parts = micro_batches(preferences, everything, strategy.rank, strategy.world_size, config.micro_batch_tokens)
    mine: list[_Row] = []
    for number, part in enumerate(parts):
        logprob_R = strategy.logprobs(part, last=number == len(parts) - 1)
        if part.indices:
            pairs = pair_logprobs([preferences[i] for i in part.indices], logprob_R, references)
            loss_B = duel_losses(agent, pairs)
            mine += _rows(pairs, loss_B)
            # A bad loss is found out together, below; until then its gradient must not stop the others.
            share = loss_B.sum() / len(preferences)
        else:
            share = logprob_R.sum() * 0.0
        strategy.backward(share)
    rows = [row for theirs in strategy.gather(mine) for row in theirs]
    bad = sorted(row.duel for row in rows if not math.isfinite(row.loss))
    if bad:
        raise NonFiniteLossError(
            f"batch {batch.index}: the loss is not finite for duel {_some(bad)}. The weights are those of version "
            f"{batch.index}. A lower learner.learning_rate, learner.dtype=float32 or learner.max_grad_norm=1 may help."
        )
    norm = strategy.step(rate)
    if not math.isfinite(norm):
        raise NonFiniteLossError(
            f"batch {batch.index}: the gradient is not finite (norm {norm}), from one or more of the duels "
            f"{_some([p.duel.id for p in preferences])}. The weights are those of version {batch.index}. A lower "
            "learner.learning_rate or learner.dtype=float32 may help."
        )
    return _numbers(rows, agent, norm, rate)


def pair_logprobs(preferences: Sequence[Preference], logprob_R: Tensor, references: References) -> PairLogProbs:
    """What a loss sees of a micro-batch, whose rows are the first responses, then the second ones.

    The winner of a tie is the first response (see `duel_losses`).
    """
    first_B, second_B = logprob_R.chunk(2)
    first_wins_B = torch.tensor([p.label >= 0.5 for p in preferences], device=logprob_R.device)

    def sides(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(first_wins_B, first, second), torch.where(first_wins_B, second, first)

    winner_B, loser_B = sides(first_B, second_B)
    length_2B = logprob_R.new_tensor(
        [[len(p.duel.first.token_ids) for p in preferences], [len(p.duel.second.token_ids) for p in preferences]]
    )
    winner_length_B, loser_length_B = sides(length_2B[0], length_2B[1])
    reference: dict[str, Any] = {}
    if references:
        known_B2 = logprob_R.new_tensor([references[p.duel.id] for p in preferences])
        reference["reference_winner_B"], reference["reference_loser_B"] = sides(known_B2[:, 0], known_B2[:, 1])
    return PairLogProbs(
        winner_B=winner_B,
        loser_B=loser_B,
        winner_length_B=winner_length_B,
        loser_length_B=loser_length_B,
        preferences=preferences,
        **reference,
    )


def duel_losses(agent: Agent, pairs: PairLogProbs) -> Tensor:
    """The agent's loss of each duel, `B`; a tie is the mean over both orders."""
    loss_B = agent.loss(pairs)
    tie_B = torch.tensor([p.label == 0.5 for p in pairs.preferences], device=loss_B.device)
    if not tie_B.any():
        return loss_B
    return torch.where(tie_B, 0.5 * (loss_B + agent.loss(pairs.swapped())), loss_B)


def _rows(pairs: PairLogProbs, loss_B: Tensor) -> list[_Row]:
    """The facts about a micro-batch, as numbers. The margin is nats; without a reference, nats per token."""
    if pairs.reference_winner_B is not None and pairs.reference_loser_B is not None:
        margin_B = (pairs.winner_B - pairs.reference_winner_B) - (pairs.loser_B - pairs.reference_loser_B)
    else:
        margin_B = pairs.winner_B / pairs.winner_length_B - pairs.loser_B / pairs.loser_length_B
    columns = (loss_B, margin_B, pairs.winner_B, pairs.loser_B, pairs.winner_length_B, pairs.loser_length_B)
    table_BC = torch.stack([c.detach().float() for c in columns], dim=1).tolist()
    return [
        _Row(
            duel=p.duel.id,
            loss=loss,
            margin=margin,
            winner=winner,
            loser=loser,
            winner_length=int(winner_length),
            loser_length=int(loser_length),
            tie=p.label == 0.5,
            auxiliary=bool(p.duel.meta.get("auxiliary")),
        )
        for p, (loss, margin, winner, loser, winner_length, loser_length) in zip(
            pairs.preferences, table_BC, strict=True
        )
    ]


def _numbers(rows: Sequence[_Row], agent: Agent, norm: float, rate: float) -> dict[str, float]:
    """Means over the batch, under the names that reports know; auxiliary duels count in the loss alone."""

    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values) if values else math.nan

    rows = sorted(rows, key=lambda row: row.duel)  # sums don't depend on who computed what
    loss = mean([row.loss for row in rows])
    rows = [row for row in rows if not row.auxiliary]
    margin = mean([row.margin for row in rows])
    numbers = {
        "loss": loss,
        "accuracy": mean([float(row.margin > 0) for row in rows if not row.tie]),
        "margin": margin,
        "reward_margin": agent.config.beta * margin,
        "chosen_logprob": mean([row.winner for row in rows]),
        "rejected_logprob": mean([row.loser for row in rows]),
        "chosen_length": mean([row.winner_length for row in rows]),
        "rejected_length": mean([row.loser_length for row in rows]),
        "grad_norm": norm,
        "learning_rate": rate,
        "duels": float(len(rows)),
    }
    return {name: value for name, value in numbers.items() if not math.isnan(value)}  # accuracy, where all are ties


def _some(ids: Sequence[str], most: int = 32) -> str:
    """The ids, the first `most` of them where there are many."""
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def batch_tokens(preferences: Sequence[Preference]) -> int:
    """Tokens of prompts and responses, without padding, of both sides."""
    return sum(
        2 * len(p.duel.prompt.token_ids) + len(p.duel.first.token_ids) + len(p.duel.second.token_ids)
        for p in preferences
    )
