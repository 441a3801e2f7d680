"""A label budget as a wrapper that truncates, like Gymnasium's `TimeLimit`.

For environments on their own. In a run the budget is also held by the purchase desk, which survives crashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from rayalign.env.dueling_bandit import Action
from rayalign.errors import BudgetError, ConfigError


def _check(budget: int, spent: int) -> None:
    if budget < 1:
        raise ConfigError(f"budget={budget} must be at least 1 label.")
    if spent < 0:
        raise ConfigError(f"spent={spent} must not be negative.")


class LabelBudget(gym.Wrapper[str, Action, str, Action], gym.utils.RecordConstructorArgs):
    """Truncates when `budget` labels are spent; a step after that is refused before anybody is asked.

    A failed verdict costs nothing. Money is not refunded by a reset: the count goes on, from `spent` at the start.
    """

    def __init__(self, env: gym.Env[str, Action], budget: int, spent: int = 0) -> None:
        _check(budget, spent)
        gym.utils.RecordConstructorArgs.__init__(self, budget=budget, spent=spent)
        gym.Wrapper.__init__(self, env)
        self.budget, self.spent = budget, spent

    @property
    def remaining(self) -> int:
        """Labels that may still be bought."""
        return max(0, self.budget - self.spent)

    def step(self, action: Action) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        """Step if there is a label left. Raises `BudgetError` if not."""
        if not self.remaining:
            raise BudgetError(
                f"the budget of {self.budget} labels is spent. Raise it, or stop when a step says truncated."
            )
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.spent += bool(info["labelled"])
        return observation, reward, terminated, truncated or not self.remaining, info


class LabelBudgetVector(gym.vector.VectorWrapper, gym.utils.RecordConstructorArgs):
    """The same for the vector environment: actions beyond the budget become None, the last ones first.

    All environments are truncated together, by the step that spends the last label and by every one after it.
    """

    def __init__(self, env: gym.vector.VectorEnv, budget: int, spent: int = 0) -> None:
        _check(budget, spent)
        gym.utils.RecordConstructorArgs.__init__(self, budget=budget, spent=spent)
        gym.vector.VectorWrapper.__init__(self, env)
        self.budget, self.spent = budget, spent

    @property
    def remaining(self) -> int:
        """Labels that may still be bought."""
        return max(0, self.budget - self.spent)

    def step(
        self, actions: Sequence[Action | None]
    ) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step with as many actions as there are labels left, the first ones."""
        allowed: list[Action | None] = []
        left = self.remaining
        for action in actions:
            allowed.append(action if left > 0 else None)
            left -= action is not None
        observations, rewards, terminations, truncations, info = self.env.step(allowed)
        self.spent += int(info["labelled"].sum())
        return observations, rewards, terminations, truncations | (self.remaining == 0), info
