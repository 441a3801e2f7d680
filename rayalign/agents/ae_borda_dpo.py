"""AE-Borda-DPO: labels for the prompts whose best response is least known (Mehta et al. 2023, Algorithm 2).

    propose  a_1..a_m ~ pi_t(.|x), a'_1..a'_N ~ pi_ref(.|x)      for more prompts than there are labels
    select   log pi(a|x) +- beta * sigma by dropout before the last layer
             f(x, a) = mean_i sigmoid(gamma [log pi(a)/ref(a) - log pi(a'_i)/ref(a'_i)]), upper and lower   # Borda
             alpha(x) = max_a upper f - max_a lower f; the prompts with the b largest alphas
             duel (argmax_a upper f(x, a), a' uniformly out of a'_1..a'_N)
    observe  nothing                                             loss  DPO

The paper's gamma, the strength of DPO, is `agent.beta`; its beta, the width of the bounds, is `agent.dropout.width`.

Differs from the paper:
1. Standard deviations are centred (the formula in section 5.1 lacks the mean, the method needs it).
2. The policy was not fine-tuned with the dropout layer before it is asked with it (App. K does that in its SFT phase).
3. An opponent whose text is that of the response is not drawn: their duel would teach nothing. Prompts without
   another opponent are passed over, unless `pair_sampling=keep`.
4. Neither m, N nor the number of masks is given there; the defaults are ours. Prompts: 96 for 32 labels, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import expit

from rayalign.agents.agent import Choice, Proposal
from rayalign.agents.posteriors.dropout import DropoutConfig, confidence_bounds, top
from rayalign.agents.prompt_pool import PromptPool, PromptPoolConfig
from rayalign.errors import ConfigError
from rayalign.types import Candidate, Preference, Prompt


# -- formulas: M policy samples, N opponents (samples of the reference), one prompt -----------------------------------
def borda_bound(policy_M: np.ndarray, opponent_N: np.ndarray, gamma: float) -> np.ndarray:
    r"""Estimated probability that each sample beats one of the reference, `M`, in [0, 1] (eqs. 13 and 14):
    `mean_i 1 / (1 + exp(gamma * opponent_i - gamma * policy_a))`.

    Args:
        policy_M: bound of `log pi(a|x) - log ref(a|x)`, nats: the upper one for eq. 13, the lower one for eq. 14.
        opponent_N: the OTHER bound of the opponents' ratios: lower for eq. 13, upper for eq. 14.
        gamma: strength of DPO.

    Where nobody has moved away from the reference, everything is a coin flip:

    >>> borda_bound(np.zeros(2), np.zeros(3), gamma=0.1)
    array([0.5, 0.5])
    """
    return expit(gamma * (policy_M[:, None] - opponent_N)).mean(axis=1)


def value_gap(upper_M: np.ndarray, lower_M: np.ndarray) -> float:
    r"""What is unknown about the prompt's value: `max_a upper f - max_a lower f` (eq. 15). In [0, 1].

    Two separate maxima: a response that may be as good as it likes does not count where a better one is certain.

    >>> value_gap(np.array([0.75, 1.0]), np.array([0.25, 0.5]))
    0.5
    """
    return float(upper_M.max() - lower_M.max())


@dataclass(frozen=True, kw_only=True)
class AEBordaDPOConfig(PromptPoolConfig):
    """Settings of `AEBordaDPO`."""

    num_candidates: int = 8
    """m: responses of the policy per prompt, of which the most promising is asked about."""
    num_opponents: int = 8
    """N: responses of the reference per prompt; the Borda estimate is the mean over them."""
    prompts_per_duel: int = 3
    """Prompts drawn for each duel that is asked; 1 asks about all of them."""
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    """The policy's uncertainty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_candidates", "num_opponents"):
            if getattr(self, name) < 1:
                raise ConfigError(f"agent.{name}={getattr(self, name)} must be at least 1.")
        if self.loss == "simpo":
            raise ConfigError(
                "agent.loss='simpo' has no reference, but the Borda estimate is made of ratios to it (eq. 9). "
                "Use agent.loss=dpo."
            )


class AEBordaDPO(PromptPool):
    """Active exploration by the uncertainty of the Borda value function."""

    name = "ae_borda_dpo"
    Config = AEBordaDPOConfig
    config: Any

    def needs_scorer(self) -> bool:
        """For dropout log-probabilities, and for the reference's."""
        return True

    def proposals(self) -> tuple[Proposal, ...]:
        """Samples of the policy, m of them, then N of the reference."""
        return (Proposal(n=self.config.num_candidates), Proposal(n=self.config.num_opponents, source="reference"))

    def select(
        self, batch: int, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]], rng: np.random.Generator
    ) -> list[Choice]:
        """The top prompts by alpha, highest first; in each, the optimistic response against a random opponent."""
        m = self.config.num_candidates
        masks_seed = int(rng.integers(2**31))
        alphas_P = np.full(len(prompts), -np.inf)
        picks: dict[int, tuple[int, list[int], float]] = {}
        for p, (lower_M, upper_M) in enumerate(self.borda_bounds(prompts, candidates, masks_seed)):
            first = int(np.argmax(upper_M))
            opponents = [
                i for i in range(m, len(candidates[p])) if self.may_duel(candidates[p][first], candidates[p][i])
            ]
            if opponents:
                alphas_P[p] = value_gap(upper_M, lower_M)
                picks[p] = first, opponents, float(upper_M[first])
        choices = []
        for p in top(alphas_P, self.batch_size):
            first, opponents, upper = picks[p]
            second = opponents[int(rng.integers(len(opponents)))]
            meta = {"alpha": float(alphas_P[p]), "upper": upper}
            choices.append(Choice(prompt=p, first=first, second=second, meta=meta))
        return choices

    def observe(self, batch: int, preferences: Sequence[Preference], rng: np.random.Generator) -> dict[str, float]:
        """Nothing to learn here; what is logged is how unknown the chosen prompts were."""
        return {"alpha": float(np.mean([p.duel.meta["alpha"] for p in preferences]))} if preferences else {}

    # -- parts -----------------------------------------------------------------------------------------------
    def borda_bounds(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]], masks_seed: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Lower and upper Borda estimate of each prompt's policy samples (eqs. 13 and 14)."""
        dropout, gamma, m = self.config.dropout, self.config.beta, self.config.num_candidates
        moments = self.scorer.dropout_logprobs(
            prompts, candidates, rate=dropout.rate, masks=dropout.masks, seed=masks_seed
        )
        references = self.scorer.logprobs(prompts, candidates, of="reference")
        bounds = []
        for of_prompt, reference in zip(moments, references, strict=True):
            lower, upper = (bound - reference for bound in confidence_bounds(of_prompt, dropout.width))
            bounds.append((borda_bound(lower[:m], upper[m:], gamma), borda_bound(upper[:m], lower[m:], gamma)))
        return bounds
