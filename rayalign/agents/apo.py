"""APO: active preference optimisation under a linear reward (Das et al. 2024, as ActiveDPO's baseline, section 4).

    propose  y_1..y_3 ~ ref(.|x): the initial policy's, never sampled anew
    select   z = phi(x, y) - phi(x, y') with fixed features phi; the B largest |z|_{V^-1}, all under one V
    observe  V <- V + sum z z^T
    loss     DPO

Differs from the paper:
1. phi is the frozen initial policy's last hidden states, pooled and at unit length; the paper assumes features.
2. What is trained is the policy, by DPO, as in ActiveDPO's comparison, rather than a reward and then a policy.
3. The pool is a stream of fresh prompts, each with fresh responses of the initial policy, rather than one fixed set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.agents.agent import AgentConfig, AgentContext
from rayalign.agents.pair_pool import PairPool, PairPoolConfig, Pool
from rayalign.agents.posteriors.features import FeatureConfig, Features
from rayalign.agents.posteriors.gradient_features import pair_features, uncertainty
from rayalign.errors import ConfigError
from rayalign.types import Candidate, Preference, Prompt


@dataclass(frozen=True, kw_only=True)
class APOConfig(PairPoolConfig):
    """Settings of `APO`."""

    reg: float = 1.0
    """lambda: V starts as this times the identity. Features have length 2 at most."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """The frozen transformer whose hidden states are phi."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reg <= 0:
            raise ConfigError(f"agent.reg={self.reg} must be positive: V has no inverse without it.")


class APO(PairPool):
    """The most uncertain pairs under fixed features."""

    name = "apo"
    Config = APOConfig

    def __init__(self, config: AgentConfig | None = None) -> None:
        super().__init__(config)
        self._asked_MD: np.ndarray | None = None

    def setup(self, context: AgentContext) -> None:
        """Load the frozen transformer."""
        super().setup(context)
        self.features = Features(self.config.features, context.policy, context.device)
        self._asked_MD = np.zeros((0, self.features.dim), dtype=np.float32)

    def sampling_window(self, batch: int, max_staleness: int) -> tuple[int, int | None]:
        """The initial policy samples every batch."""
        return 0, 0

    def pick(self, pool: Pool, count: int, rng: np.random.Generator) -> list[tuple[int, Mapping[str, Any]]]:
        """The top of one ranking: V does not change inside the batch."""
        z_PD = self._differences(pool.prompts, pool.groups, pool.first_P, pool.second_P)
        assert self._asked_MD is not None
        values_P = np.sqrt(uncertainty(z_PD, self._asked_MD, self.config.reg))
        return [(int(i), {"uncertainty": float(values_P[i])}) for i in np.argsort(-values_P, kind="stable")[:count]]

    def observe(self, batch: int, preferences: Sequence[Preference], rng: np.random.Generator) -> dict[str, float]:
        """V gains what was labelled."""
        duels = [preference.duel for preference in sorted(preferences, key=lambda preference: preference.duel.id)]
        if not duels:
            return {}
        rows = range(0, 2 * len(duels), 2)
        pairs = [(duel.first, duel.second) for duel in duels]
        z_BD = self._differences([duel.prompt for duel in duels], pairs, rows, [row + 1 for row in rows])
        assert self._asked_MD is not None
        self._asked_MD = np.concatenate([self._asked_MD, z_BD])
        return {"uncertainty": float(np.mean([duel.meta["uncertainty"] for duel in duels]))}

    def save(self, folder: Path) -> None:
        """One vector a label."""
        np.save(folder / "apo.npy", self._asked_MD if self._asked_MD is not None else np.zeros((0, 0)))

    def load(self, folder: Path) -> None:
        """See `save`."""
        self._asked_MD = np.load(folder / "apo.npy")

    def _differences(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[Sequence[Candidate]],
        first_P: Sequence[int],
        second_P: Sequence[int],
    ) -> np.ndarray:
        owners = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
        embeddings_RD = self.features(owners, [candidate for group in groups for candidate in group])
        return pair_features(embeddings_RD.cpu().numpy(), first_P, second_P)
