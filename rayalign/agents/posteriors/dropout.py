"""Confidence bounds of log-probabilities from MC dropout (Mehta et al. 2023, section 5.1), shared by three agents.

The scorer has the moments (`Scorer.dropout_logprobs`); here is what becomes of them.

Shapes: P prompts    N candidates of one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayalign.agents.scorer import DropoutMoments
from rayalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    """How the policy's uncertainty is measured."""

    rate: float = 0.05
    """p: share of the last hidden state's features that a mask drops; 0 makes every policy sure of itself."""
    masks: int = 10
    """m: masks, each one more run of the last layer."""
    width: float = 4.0
    """The paper's beta: bounds are this many standard deviations from the mean; 0 leaves the mean alone. Not the
    strength of DPO, which is `agent.beta`."""

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ConfigError(
                f"agent.dropout.rate={self.rate} must be in (0, 1): without dropped features all pairs score the same."
            )
        if self.masks < 2:
            raise ConfigError(f"agent.dropout.masks={self.masks} must be at least 2: one mask has no spread.")
        if self.width < 0:
            raise ConfigError(f"agent.dropout.width={self.width} must not be negative.")


def confidence_bounds(moments: DropoutMoments, width: float) -> tuple[np.ndarray, np.ndarray]:
    r"""Lower and upper bound of each candidate's log-probability, `N` each, nats: `sum_t mu_t -+ width * sigma_t`.

    Sums over tokens, as in the display before eq. 33: the widths of all tokens add up, as if they erred together.

    >>> three_tokens = DropoutMoments(mean_N=np.array([-9.0]), std_N=np.array([0.5]), variance_N=np.array([0.1]))
    >>> confidence_bounds(three_tokens, width=4.0)
    (array([-11.]), array([-7.]))
    """
    slack_N = width * moments.std_N
    return moments.mean_N - slack_N, moments.mean_N + slack_N


def top(scores_P: np.ndarray, count: int) -> list[int]:
    """Indices of the `count` largest finite scores, largest first; ties to the lowest index.

    >>> top(np.array([1.0, 3.0, -np.inf, 3.0]), 3)
    [1, 3, 0]
    """
    order = np.argsort(-scores_P, kind="stable")[:count]
    return [int(i) for i in order if np.isfinite(scores_P[i])]
