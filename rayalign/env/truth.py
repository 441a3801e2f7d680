"""The oracle that knows: a world's own hidden reward, seen through Bradley-Terry."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rayalign.env.world import World
from rayalign.errors import ConfigError
from rayalign.types import Duel, Prompt, Verdict


class TruthOracle:
    """Answers `P(first wins) = sigmoid(reward_scale * (r*(first) - r*(second)))`, at `price` a label."""

    def __init__(self, world: World, price: float = 0.0) -> None:
        if not world.has_truth:
            raise ConfigError(
                f"{world.id or type(world).__name__} has no known reward to take labels from. Give the environment a "
                "labeler (`labeler=`), or the run an oracle."
            )
        self.world, self.price = world, price

    @property
    def id(self) -> str:
        """Names the world."""
        return f"truth:{self.world.id or type(self.world).__name__}"

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """One verdict per duel."""
        return [Verdict(duel_id=duel.id, probability=self._probability(duel), price=self.price) for duel in duels]

    def _probability(self, duel: Duel) -> float:
        reward = self.world.reward
        return preference_probability(
            self.world, reward(duel.prompt, duel.first.text), reward(duel.prompt, duel.second.text)
        )


def preference_probability(world: World, first: float, second: float) -> float:
    """Bradley-Terry: the probability that a response of reward `first` beats one of reward `second`."""
    logit = world.reward_scale * (first - second)
    if logit < 0:
        return math.exp(logit) / (1 + math.exp(logit))  # this way round it can't overflow
    return 1 / (1 + math.exp(-logit))


def regrets(world: World, prompt: Prompt, first: str, second: str) -> tuple[float, float]:
    """What the user of `first` and `second` missed: the reward form and the preference form, both 0 for the best pair.

    Reward form `r* - (r + r') / 2`. Preference form `P(a* > a) + P(a* > a') - 1` (SEA, Liu et al. 2024). They are
    different numbers; never mix them in one curve.
    """
    best, a, b = world.best_reward(prompt), world.reward(prompt, first), world.reward(prompt, second)
    preference = preference_probability(world, best, a) + preference_probability(world, best, b) - 1
    return best - (a + b) / 2, preference
