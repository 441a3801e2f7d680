"""XPO: exploratory preference optimisation (Xie et al. 2024, Algorithm 1; SEA, eq. 22).

    propose  y ~ pi_t(.|x), the newest policy;  y', y_ref ~ pi_ref(.|x), always the initial one
    select   duel (y, y')                                            observe  nothing
    loss     mean of  -log sigmoid(beta * h) + alpha * log pi(y_ref | x)          # new to XPO: optimism

Differs from the paper:
1. y_ref is a sample of its own, as SEA writes it; with `optimism=duelled` it is y', which costs one sample and one
   forward less and has the same expectation.
2. Where y' has the text of y, y_ref takes its place in the duel (agent.pair_sampling=keep asks about the equal pair).
3. One optimizer step on each batch, not a minimisation over all that was collected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from rayalign.agents.agent import Agent, Choice, Proposal
from rayalign.agents.losses import PairLogProbs
from rayalign.agents.optimism import OptimismConfig, Terms, averaged_over_prompts, carrier, optimistic_dpo, with_terms
from rayalign.errors import ConfigError, did_you_mean
from rayalign.types import Candidate, Preference, Prompt

OPTIMISM = ("separate", "duelled")


@dataclass(frozen=True, kw_only=True)
class XPOConfig(OptimismConfig):
    """Settings of `XPO`."""

    optimism: str = "separate"
    """Which sample of the reference the optimism term is about: `separate`, one that is not judged, or `duelled`."""
    alpha_schedule: tuple[float, ...] = ()
    """Values of alpha, each for `stage_batches` batches, the last one to the end; empty: alpha throughout."""
    beta_schedule: tuple[float, ...] = ()
    """Values of beta, in the same way; empty: beta throughout."""
    stage_batches: int = 10
    """Batches for which a value of a schedule holds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimism not in OPTIMISM:
            raise ConfigError(f"agent.optimism={self.optimism!r} is unknown. {did_you_mean(self.optimism, OPTIMISM)}")
        if any(alpha < 0 for alpha in self.alpha_schedule):
            raise ConfigError(f"agent.alpha_schedule={self.alpha_schedule} must not have negative values.")
        if any(beta <= 0 for beta in self.beta_schedule):
            raise ConfigError(f"agent.beta_schedule={self.beta_schedule} must have positive values only.")
        if self.stage_batches < 1:
            raise ConfigError(f"agent.stage_batches={self.stage_batches} must be at least 1.")


class XPO(Agent):
    """Online DPO against the reference's own samples, which become less likely."""

    name = "xpo"
    Config = XPOConfig
    config: Any

    def proposals(self) -> tuple[Proposal, ...]:
        """One sample of the policy; of the reference the one to duel and, if it is another, the one to avoid."""
        return Proposal(n=1), Proposal(n=1 + (self.config.optimism == "separate"), source="reference")

    def select(
        self, batch: int, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]], rng: np.random.Generator
    ) -> list[Choice]:
        """The policy's response against the reference's; y_ref goes to the learner in the duel's `meta`."""
        choices = super().select(batch, prompts, candidates, rng)
        if self.config.optimism == "duelled":
            return choices
        return [replace(choice, meta={"y_ref": _noted(candidates[choice.prompt][-1])}) for choice in choices]

    def training_duels(self, preferences: Sequence[Preference]) -> list[Preference]:
        """The duels and, where y_ref is a sample of its own, a carrier for each."""
        if self.config.optimism == "duelled":
            return [with_terms(preference, Terms(dpo=1.0, second=1.0)) for preference in preferences]
        duels = [with_terms(preference, Terms(dpo=1.0)) for preference in preferences]
        carriers = [carrier(preference, _recalled(preference.duel.meta["y_ref"])) for preference in preferences]
        return averaged_over_prompts([*duels, *carriers], prompts=len(preferences))

    def loss(self, pairs: PairLogProbs) -> Tensor:
        """Equation 22, term by term."""
        batch = pairs.preferences[0].duel.batch
        alpha = self.scheduled(self.config.alpha_schedule, batch, self.config.alpha)
        beta = self.scheduled(self.config.beta_schedule, batch, self.config.beta)
        return optimistic_dpo(pairs, replace(self.config, beta=beta), alpha)

    def scheduled(self, values: Sequence[float], batch: int, otherwise: float) -> float:
        """The value that holds for `batch`."""
        return values[min(batch // self.config.stage_batches, len(values) - 1)] if values else otherwise


def _noted(candidate: Candidate) -> dict[str, Any]:
    return {"text": candidate.text, "token_ids": list(candidate.token_ids)}


def _recalled(noted: dict[str, Any]) -> Candidate:
    return Candidate(
        text=noted["text"],
        token_ids=tuple(noted["token_ids"]),
        logprobs=(),
        policy_version=0,
        source="reference",
    )
