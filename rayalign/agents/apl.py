"""APL: active preference learning (Muldrew et al. 2024; SEA, appendix E).

    propose  S prompts, and N responses y_1..y_N ~ pi(.|x) for each
    select   prompts  H(x) = -1/N sum_n log pi(y_n|x), the highest kept: 128 of 1,024        # predictive entropy
             pairs    argmax_{i,j} |r(y_i) - r(y_j)|,  r(y) = beta (log pi(y|x) - log ref(y|x))   # certainty
    loss     DPO

`prompts_per_duel=1` is the variant with the second technique alone.

Differs from the paper:
1. The responses that estimate the entropy are those that are paired; SEA's description samples them anew.
2. Log-probabilities are of the model itself (temperature 1), whatever temperature sampled the responses.
3. Implicit rewards are rounded to 0.001 nats times beta: the initial policy is its own reference, whose margins are
   exactly 0 and not rounding errors. Then the first two different responses are asked about, as the passive agent does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayalign.agents.agent import Choice, Proposal
from rayalign.agents.prompt_pool import PromptPool, PromptPoolConfig
from rayalign.errors import ConfigError
from rayalign.types import Candidate, Prompt


@dataclass(frozen=True, kw_only=True)
class APLConfig(PromptPoolConfig):
    """Settings of `APL`."""

    prompts_per_duel: int = 8
    """Prompts drawn for each that is kept (1,024 for a batch of 128); 1 keeps all: the certainty-only variant."""
    num_candidates: int = 8
    """N: responses sampled for each prompt drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "simpo":
            raise ConfigError("agent.loss='simpo' has no reference, and APL's margins are DPO's; use dpo, ipo or slic.")
        if self.num_candidates < 2:
            raise ConfigError(
                f"agent.num_candidates={self.num_candidates} must be at least 2: a duel needs two responses."
            )


class APL(PromptPool):
    """Uncertain prompts, and of each the pair whose winner the policy is most certain of."""

    name = "apl"
    Config = APLConfig
    config: Any

    def needs_scorer(self) -> bool:
        """Entropies and margins are the model's."""
        return True

    def proposals(self) -> tuple[Proposal, ...]:
        """N responses of the policy."""
        return (Proposal(n=self.config.num_candidates),)

    def select(
        self, batch: int, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]], rng: np.random.Generator
    ) -> list[Choice]:
        """The reference is asked about the kept prompts only. A prompt whose responses are all the same can't be."""
        usable = [p for p, group in enumerate(candidates) if self.distinct_from(group, 0) is not None]
        policy = self.scorer.logprobs([prompts[p] for p in usable], [candidates[p] for p in usable])
        entropy = {p: predictive_entropy(logprobs_N) for p, logprobs_N in zip(usable, policy, strict=True)}
        kept = sorted(sorted(usable, key=lambda p: (-entropy[p], p))[: self.batch_size])
        reference = self.scorer.logprobs([prompts[p] for p in kept], [candidates[p] for p in kept], of="reference")
        policy_of = dict(zip(usable, policy, strict=True))
        choices = []
        for p, reference_N in zip(kept, reference, strict=True):
            rewards_N = implicit_rewards(policy_of[p], reference_N, self.config.beta)
            first, second, margin = largest_margin(rewards_N, [c.text for c in candidates[p]])
            choices.append(Choice(prompt=p, first=first, second=second, meta={"entropy": entropy[p], "margin": margin}))
        return choices


def predictive_entropy(logprobs_N: np.ndarray) -> float:
    """`-1/N sum_n log pi(y_n|x)`, nats, of summed log-probabilities of samples: a Monte-Carlo estimate of H(y|x).

    Not an entropy per token: a prompt with long answers has more of it. 0 where the model can only say one thing.

    >>> predictive_entropy(np.array([-1.0, -3.0]))
    2.0
    """
    return float(-np.mean(logprobs_N, dtype=np.float64))


def implicit_rewards(logprobs_N: np.ndarray, reference_N: np.ndarray, beta: float) -> np.ndarray:
    """`beta (log pi - log ref)`, `N`, the log-ratio rounded to 0.001 nats (Rafailov et al. 2023, eq. 5, without Z)."""
    return beta * np.round(np.asarray(logprobs_N, np.float64) - np.asarray(reference_N, np.float64), 3)


def largest_margin(rewards_N: np.ndarray, texts: Sequence[str]) -> tuple[int, int, float]:
    """The pair with the largest `|r_i - r_j|` among different texts, the better one first, and that margin.

    Of a repeated text the first counts. Equal margins go to the lowest indices; where all texts are the same, the
    first two are left.

    >>> largest_margin(np.array([0.5, -1.0, 2.0, 9.0, 2.0]), ["a", "b", "c", "a", "d"])
    (2, 1, 3.0)
    """
    different = [i for i, text in enumerate(texts) if text not in texts[:i]]
    different = different if len(different) > 1 else [0, 1]
    best = max(different, key=lambda i: (rewards_N[i], -i))
    worst = min((i for i in different if i != best), key=lambda i: (rewards_N[i], i))
    return best, worst, float(rewards_N[best] - rewards_N[worst])
