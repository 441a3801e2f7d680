"""Double Thompson sampling: SEA's posterior with other papers' pairs. Three agents, one line each.

    dts         y, y' = the best responses of two members, k' drawn again until y' != y   (Dwaracherla et al. 2024)
    drts        y the best of one member, y' the worst of another             (Melikidze et al. 2026: double reverse)
    delta_ucb   (y, y') = argmax (mu(y) + w sigma(y)) - (mu(y') - w sigma(y'))    (Melikidze et al. 2026: DeltaUCB)

The rest is SEA's: a frozen transformer with an ensemble of reward heads, M samples of the policy, DPO. Every pair goes
to the oracle.

    dts with `fixed_policy=true` and evaluation.best_of_n=20 is Dwaracherla et al.'s agent (SEA's variant 7): labels
    teach the reward alone, and the answer is the best of n samples of a policy that never learns.

Differs from the papers:
1. The posterior is SEA's, with SEA's regulariser and bootstrap, not their epistemic networks; a draw of the posterior
   is one of its members.
2. drts: Melikidze et al. draw each response's reward from an interval around its mean; here all of a prompt's rewards
   come from one member, so that what members agree on stays together.
3. drts and delta_ucb: candidates are samples of the policy that learns, not of many other models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rayalign.agents.acquisition import Pick, pick_delta_ucb
from rayalign.agents.sea import SEA, SEAConfig
from rayalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DTSConfig(SEAConfig):
    """Settings of `DTS`: SEA's, with other defaults."""

    exploration: str = "dts"
    """How a pair is picked; SEA's choices, of which this agent is one."""
    gamma_after: float = 1.0
    """Share of pairs that the oracle labels after the burn-in; 1 is the oracle alone."""
    fixed_policy: bool = False
    """Train the reward posterior alone: the learning rate is 0. Judge it with evaluation.best_of_n above 1."""


class DTS(SEA):
    """Double Thompson sampling, with a policy that learns or a fixed one."""

    name = "dts"
    Config = DTSConfig
    config: Any

    def learning_rate_factor(self, batch: int) -> float:
        """0 keeps the initial policy."""
        return 0.0 if self.config.fixed_policy else 1.0


@dataclass(frozen=True, kw_only=True)
class DRTSConfig(DTSConfig):
    """Settings of `DRTS`: those of `DTS`, with another picker."""

    exploration: str = "drts"
    """How a pair is picked; SEA's choices, of which this agent is one."""


class DRTS(DTS):
    """Double reverse Thompson sampling: pairs with a large gap, uncertain at both ends."""

    name = "drts"
    Config = DRTSConfig


@dataclass(frozen=True, kw_only=True)
class DeltaUCBConfig(DTSConfig):
    """Settings of `DeltaUCB`: those of `DTS`, with another picker."""

    exploration: str = "delta_ucb"
    """How a pair is picked; this agent has but one way."""
    width: float = 1.0
    """w: half the width of the confidence bounds, in standard deviations of the members; 0 is the gap of the means."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exploration != "delta_ucb":
            raise ConfigError(f"agent.exploration={self.exploration!r}: agent delta_ucb picks by delta_ucb alone.")
        if self.width < 0:
            raise ConfigError(f"agent.width={self.width} must not be negative.")


class DeltaUCB(DTS):
    """The pair that may differ most."""

    name = "delta_ucb"
    Config = DeltaUCBConfig

    def _pick(self, rewards_EN: Tensor, rng: np.random.Generator) -> Pick:
        return pick_delta_ucb(rewards_EN, rng, width=self.config.width)
