"""Agents that draw more prompts than they buy labels: what APL, AE-Borda, AE-DPO and ActiveDPO have in common.

propose  responses for `prompts_per_duel` prompts a label        select   a batch of them, by the agent's own rule
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayalign.agents.agent import Agent, AgentConfig, AgentContext
from rayalign.agents.scorer import Scorer
from rayalign.errors import ConfigError
from rayalign.types import Candidate


@dataclass(frozen=True, kw_only=True)
class PromptPoolConfig(AgentConfig):
    """Settings of every agent that selects prompts."""

    prompts_per_duel: int = 1
    """Prompts drawn for each duel that is asked; 1 asks about all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts_per_duel < 1:
            raise ConfigError(f"agent.prompts_per_duel={self.prompts_per_duel} must be at least 1.")


class PromptPool(Agent):
    """Keeps how many duels a batch may have and whom to ask; subclasses say which prompts are worth one."""

    Config = PromptPoolConfig
    config: Any

    def setup(self, context: AgentContext) -> None:
        """Keep the size of a batch, and the scorer where the agent needs one."""
        self.batch_size = context.batch_size
        if self.needs_scorer():
            assert context.scorer is not None, f"{self.name} is set up with a scorer"
            self.scorer: Scorer = context.scorer

    def prompts_per_batch(self, batch_size: int) -> int:
        """A large batch of contexts, of which `batch_size` duels are made."""
        return batch_size * self.config.prompts_per_duel

    def may_duel(self, first: Candidate, second: Candidate) -> bool:
        """Two equal texts would teach nothing; `pair_sampling=keep` asks all the same."""
        return self.config.pair_sampling == "keep" or first.text != second.text
