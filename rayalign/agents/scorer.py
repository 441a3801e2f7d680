"""What an agent may ask of the model that is being trained: the protocol; `rayalign.scoring` has the model.

An agent gets one at `setup` (`AgentContext.scorer`) if its `needs_scorer` says so. It runs the weights version that
sampled the candidates which `select` is looking at.

Shapes: N candidates of one prompt    D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rayalign.types import Candidate, Prompt

Groups = Sequence[Sequence[Candidate]]
"""The candidates of each prompt, token ids included; as many entries as there are prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DropoutMoments:
    """Per-token moments of a prompt's candidates over dropout masks, summed over each response's tokens; nats."""

    mean_N: np.ndarray
    """Sum over tokens of the mean log-probability."""
    std_N: np.ndarray
    """Sum over tokens of the centred sample standard deviation (ddof 1)."""
    variance_N: np.ndarray
    """Sum over tokens of the sample variance (ddof 1)."""


class Scorer(Protocol):
    """The current policy and the initial one (the reference), to be asked for numbers that sampling does not give.

    Every method has an answer per prompt, in order. `of` is `policy` or `reference`. Temperature 1 throughout.
    """

    def logprobs(self, prompts: Sequence[Prompt], groups: Groups, of: str = "policy") -> list[np.ndarray]:
        """`N`: log-probability of each candidate, nats, summed over its tokens, end-of-sequence counted."""

    def dropout_logprobs(
        self, prompts: Sequence[Prompt], groups: Groups, *, rate: float, masks: int, seed: int, of: str = "policy"
    ) -> list[DropoutMoments]:
        """Moments of the log-probabilities under `masks` dropout masks before the language-model head.

        `rate` is the share of dropped features; the same seed gives the same masks for every prompt and candidate.
        """

    def gradients(self, prompts: Sequence[Prompt], groups: Groups, *, dim: int, seed: int) -> list[np.ndarray]:
        """`N x dim` float32: gradient of each candidate's summed log-probability with respect to the LoRA
        parameters, projected to `dim` dimensions by a random matrix that `seed` names. Not normalised.
        """
