"""What the duels of a batch were worth to users who saw them: the explore-and-exploit setting's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayalign.env.world import World
from rayalign.types import Duel


def duel_statistics(world: World, duels: Sequence[Duel], info: Mapping[str, Any], *, late: bool) -> dict[str, float]:
    """Mean regrets and the win rate of what was shown, where the world knows them.

    Duels that failed were not seen by anybody; those that a late oracle has will be. `info` is what a step of the
    environment says of `duels`.
    """
    statistics: dict[str, float] = {}
    seen = np.asarray(info["labelled"], dtype=bool)
    if late:
        seen[: len(duels)] = True
    for name in ("regret_reward", "regret_preference"):
        if name in info and seen.any():
            statistics[name] = float(np.mean(np.asarray(info[name])[seen]))
    if world.has_truth:
        wins = [
            0.5 + 0.5 * np.sign(world.reward(duel.prompt, shown.text) - world.reward(duel.prompt, reference))
            for duel, was_seen in zip(duels, seen, strict=False)
            if was_seen and (reference := duel.prompt.reference) is not None
            for shown in (duel.first, duel.second)
        ]
        if wins:
            statistics["online_win_rate"] = float(np.mean(wins))
    return statistics
