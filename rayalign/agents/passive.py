"""Passive direct alignment: two samples a prompt, all sent to the oracle (online DAP, Guo et al. 2024).

    propose  y, y' ~ pi_v(.|x)      select  duel (y, y')      observe  nothing      loss  DPO, IPO, SLiC or SimPO

The schedule says which weights version v samples batch b:

    offline     v = 0: every pair is the reference policy's own and could be bought up front
    iterative   v = first batch of b's round: sampled once a round, trained on in the round's batches
    online      the newest that `loop.max_staleness` allows
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayalign.agents.agent import Agent, AgentConfig
from rayalign.errors import ConfigError, did_you_mean

SCHEDULES = ("offline", "iterative", "online")


@dataclass(frozen=True, kw_only=True)
class PassiveConfig(AgentConfig):
    """Settings of `Passive`."""

    schedule: str = "online"
    """offline, iterative or online: how often the sampling policy is renewed."""
    batches_per_round: int = 10
    """iterative only: batches sampled by the same weights; 1 is strictly on-policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"agent.schedule={self.schedule!r} is unknown. {did_you_mean(self.schedule, SCHEDULES)}")
        if self.batches_per_round < 1:
            raise ConfigError(f"agent.batches_per_round={self.batches_per_round} must be at least 1.")


class Passive(Agent):
    """The base agent, with a choice of schedule."""

    name = "passive"
    Config = PassiveConfig
    config: Any

    def sampling_window(self, batch: int, max_staleness: int) -> tuple[int, int | None]:
        """The one version that the schedule names; `loop.max_staleness` rules the online schedule alone."""
        if self.config.schedule == "offline":
            return 0, 0
        if self.config.schedule == "iterative":
            start = batch - batch % self.config.batches_per_round
            return start, start
        return super().sampling_window(batch, max_staleness)
