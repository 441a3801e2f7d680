"""The scorer pool: the current policy in Ray actors, asked by agents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rayalign.agents.scorer import DropoutMoments, Groups
from rayalign.rollout.model_pool import ModelPool
from rayalign.scoring.config import ScorerConfig
from rayalign.scoring.model import ScorerModel
from rayalign.types import Candidate, Prompt


class ScorerPool(ModelPool):
    """Implements `rayalign.agents.scorer.Scorer` on `scorer.num_replicas` actors. `sync` gives it other weights."""

    def __init__(
        self, config: ScorerConfig, policy_dir: str | Path, *, name: str = "scorer", wait: bool = True
    ) -> None:
        super().__init__(ScorerModel, config, policy_dir, name=name, wait=wait)

    def logprobs(self, prompts: Sequence[Prompt], groups: Groups, of: str = "policy") -> list[np.ndarray]:
        """See `Scorer.logprobs`."""
        return self.map("logprobs", prompts, {"groups": _slim(groups)}, {"of": of})

    def dropout_logprobs(
        self, prompts: Sequence[Prompt], groups: Groups, *, rate: float, masks: int, seed: int, of: str = "policy"
    ) -> list[DropoutMoments]:
        """See `Scorer.dropout_logprobs`."""
        arguments = {"rate": rate, "masks": masks, "seed": seed, "of": of}
        return self.map("dropout_logprobs", prompts, {"groups": _slim(groups)}, arguments)

    def gradients(self, prompts: Sequence[Prompt], groups: Groups, *, dim: int, seed: int) -> list[np.ndarray]:
        """See `Scorer.gradients`."""
        return self.map("gradients", prompts, {"groups": _slim(groups)}, {"dim": dim, "seed": seed})


def _slim(groups: Groups) -> list[list[Candidate]]:
    """The candidates without what the model does not read."""
    return [
        [Candidate(text="", token_ids=c.token_ids, logprobs=(), policy_version=c.policy_version) for c in group]
        for group in groups
    ]
