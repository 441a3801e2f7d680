"""A pool of pairs to choose from, for ActiveDPO and its baselines (ActiveDPO, sections 3.1 and 4), and `random`.

    propose  y_1..y_n ~ pi_t(.|x), for many more prompts than there are labels      # 3 responses make 3 pairs
    select   a batch out of all pairs of all prompts; one prompt may be asked about in several pairs
    loss     DPO

Differs from the paper:
1. Training is the learner's: by default one step on each batch, where the paper takes 4 epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from rayalign.agents.agent import Choice, Proposal
from rayalign.agents.prompt_pool import PromptPool, PromptPoolConfig
from rayalign.errors import ConfigError
from rayalign.types import Candidate, Prompt


@dataclass(frozen=True, kw_only=True)
class PairPoolConfig(PromptPoolConfig):
    """Settings of every agent that chooses out of a pool of pairs."""

    num_candidates: int = 3
    """Responses sampled per prompt; n of them make n (n - 1) / 2 pairs."""
    prompts_per_duel: int = 20
    """Prompts drawn for each label: 1,000 for a batch of 50 in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_candidates < 2:
            raise ConfigError(
                f"agent.num_candidates={self.num_candidates} must be at least 2: a duel needs two responses."
            )


@dataclass(frozen=True, slots=True)
class Pool:
    """What a batch is chosen from: the prompts that have two different responses, and their pairs."""

    prompts: list[Prompt]
    groups: list[list[Candidate]]
    """The responses of each prompt; a row is a response's position when all groups are laid end to end."""
    first_P: list[int]
    """Row of each pair's first response."""
    second_P: list[int]
    choices: list[Choice]
    """Each pair as the loop knows it."""


class PairPool(PromptPool):
    """What the agents have in common; `pick` tells them apart."""

    Config = PairPoolConfig
    config: Any

    def proposals(self) -> tuple[Proposal, ...]:
        """Responses of the policy, n a prompt."""
        return (Proposal(n=self.config.num_candidates),)

    def select(
        self, batch: int, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]], rng: np.random.Generator
    ) -> list[Choice]:
        """`pick`'s pairs, in its order: where the budget ends within a batch, the first ones are bought."""
        pool = self._pool(prompts, candidates)
        if not pool.choices:
            return []
        picked = self.pick(pool, min(self.batch_size, len(pool.choices)), rng)
        return [
            Choice(prompt=choice.prompt, first=choice.first, second=choice.second, meta=meta)
            for choice, meta in ((pool.choices[i], meta) for i, meta in picked)
        ]

    def pick(self, pool: Pool, count: int, rng: np.random.Generator) -> list[tuple[int, Mapping[str, Any]]]:
        """`count` different indices of pairs, and what is worth remembering of each."""
        raise NotImplementedError

    def _pool(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]]) -> Pool:
        """Of a repeated text the first response stands for all, unless `pair_sampling=keep`."""
        pool = Pool([], [], [], [], [])
        rows = 0
        for p, group in enumerate(candidates):
            kept = list(range(len(group)))
            if self.config.pair_sampling == "distinct":
                kept = [i for i in kept if all(group[i].text != other.text for other in group[:i])]
            if len(kept) < 2:
                continue
            for i, j in combinations(range(len(kept)), 2):
                pool.first_P.append(rows + i)
                pool.second_P.append(rows + j)
                pool.choices.append(Choice(prompt=p, first=kept[i], second=kept[j]))
            pool.prompts.append(prompts[p])
            pool.groups.append([group[i] for i in kept])
            rows += len(kept)
        return pool


class Random(PairPool):
    """Pairs drawn uniformly out of the pool, without replacement: ActiveDPO's first baseline."""

    name = "random"

    def pick(self, pool: Pool, count: int, rng: np.random.Generator) -> list[tuple[int, Mapping[str, Any]]]:
        """Every pair is as likely as every other."""
        return [(int(i), {}) for i in rng.choice(len(pool.choices), size=count, replace=False)]
