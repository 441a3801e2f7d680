"""AE-DPO: labels for the given pairs whose better reward is least known (Mehta et al. 2023, App. E, Algorithm 3).

    propose  the prompt's own two responses, out of the data      for more prompts than there are labels
    select   r(x, a) = log pi(a|x) +- beta * sigma - log ref(a|x), by dropout before the last layer
             alpha(x) = max_a upper r - max_a lower r; the pairs with the b largest alphas
    observe  nothing                                              loss  DPO

The paper's gamma, the strength of DPO, is `agent.beta`; its beta, the width of the bounds, is `agent.dropout.width`.

Differs from the paper:
1. Standard deviations are centred, and the policy was not fine-tuned with the dropout layer (as in AE-Borda-DPO).
2. The unlabelled batch is the next `prompts_per_duel` x batch size pairs of the world's stream: a random order,
   each pair once an epoch, where the paper draws anew. A pair that was not chosen comes back in the next epoch.
3. A pool that is too big to be read for that is first cut by `rayalign.scoring.offline_pool.top_of_pool`, which
   streams all of it once, under one policy.
4. Labels are bought: what the data says of which response was chosen is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayalign.agents.agent import Choice, Proposal
from rayalign.agents.posteriors.dropout import DropoutConfig, confidence_bounds, top
from rayalign.agents.prompt_pool import PromptPool, PromptPoolConfig
from rayalign.agents.scorer import DropoutMoments, Groups, Scorer
from rayalign.types import Candidate, Preference, Prompt


def reward_gap(moments: DropoutMoments, reference_N: np.ndarray, width: float) -> float:
    r"""What is unknown about the prompt's value: `max_a upper r - max_a lower r`, nats, >= 0 (eq. 33).

    `r(x, a)` is the log-ratio of policy and reference, without DPO's factor, so that alphas are not comparable with
    those of AE-Borda-DPO. Rewards a pair whose better response is uncertain; a bad response that is just as uncertain
    counts for nothing.

    >>> moments = DropoutMoments(mean_N=np.array([-4.0, -9.0]), std_N=np.array([0.5, 0.5]), variance_N=np.zeros(2))
    >>> reward_gap(moments, reference_N=np.array([-5.0, -5.0]), width=4.0)
    4.0
    """
    lower_N, upper_N = (bound_N - reference_N for bound_N in confidence_bounds(moments, width))
    return float(upper_N.max() - lower_N.max())


@dataclass(frozen=True, kw_only=True)
class AEDPOConfig(PromptPoolConfig):
    """Settings of `AEDPO` and `USDPO`."""

    prompts_per_duel: int = 4
    """Given pairs that are scored for each duel that is asked; 1 asks about all of them."""
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    """The policy's uncertainty."""


class AEDPO(PromptPool):
    """Active exploration of given pairs by the uncertainty of the implicit reward."""

    name = "ae_dpo"
    Config = AEDPOConfig
    config: Any

    def needs_scorer(self) -> bool:
        """For dropout log-probabilities, and for the reference's."""
        return True

    def proposals(self) -> tuple[Proposal, ...]:
        """Nothing is sampled."""
        return (Proposal(n=2, source="data"),)

    def select(
        self, batch: int, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]], rng: np.random.Generator
    ) -> list[Choice]:
        """The top pairs by score, highest first."""
        scores_P = self.pair_scores(self.scorer, prompts, candidates, seed=int(rng.integers(2**31)))
        return [
            Choice(prompt=p, first=0, second=1, meta={"score": float(scores_P[p])})
            for p in top(scores_P, self.batch_size)
        ]

    def observe(self, batch: int, preferences: Sequence[Preference], rng: np.random.Generator) -> dict[str, float]:
        """Nothing to learn here; what is logged is how high the chosen pairs scored."""
        return {"score": float(np.mean([p.duel.meta["score"] for p in preferences]))} if preferences else {}

    # -- shared with whoever scores a pool outside a run --------------------------------------------------------
    def pair_scores(self, scorer: Scorer, prompts: Sequence[Prompt], groups: Groups, *, seed: int) -> np.ndarray:
        """Score of each prompt's pair, `P`; -inf where it must not be asked because both texts are the same."""
        scores_P = self._scores(scorer, prompts, groups, seed)
        return np.where([self.may_duel(*pair) for pair in groups], scores_P, -np.inf)

    def _scores(self, scorer: Scorer, prompts: Sequence[Prompt], groups: Groups, seed: int) -> np.ndarray:
        """Eq. 33 of each prompt, `P`."""
        moments = self._moments(scorer, prompts, groups, seed)
        references = scorer.logprobs(prompts, groups, of="reference")
        width = self.config.dropout.width
        return np.array([reward_gap(m, reference_N, width) for m, reference_N in zip(moments, references, strict=True)])

    def _moments(self, scorer: Scorer, prompts: Sequence[Prompt], groups: Groups, seed: int) -> list[DropoutMoments]:
        dropout = self.config.dropout
        return scorer.dropout_logprobs(prompts, groups, rate=dropout.rate, masks=dropout.masks, seed=seed)
