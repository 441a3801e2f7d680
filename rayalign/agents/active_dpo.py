"""ActiveDPO: labels for the pairs that the policy's own implicit reward is least certain of (2025, section 3).

    propose  y_1..y_3 ~ pi_t(.|x) for each x of a large batch
    select   phi(x, y, y') = grad r_t(x, y) - grad r_t(x, y'),   r_t = beta log pi_t / ref    # Prop. 1
             each gradient by LoRA, projected to d dimensions, at unit length                 # section 3.3
             B times:  argmax |phi|_{V^-1} out of all pairs not yet picked                    # eq. 3
                       V <- V + phi phi^T                                                     # eq. 4
    observe  remember the duels: the next V starts from all of them
    loss     DPO

Differs from the paper:
1. V starts as reg I; the paper's starts as 0, which has no inverse, and its theory has lambda / kappa I.
2. Unless the learner trains LoRA, and before its first step if it does, the adapters are LoRA's initialisation on the
   current weights (`scorer.lora_rank`, scale 1): B is 0, so A's gradient vanishes and B's alone is the feature.
   Gradients are of log pi, without beta, which at unit length changes nothing.
3. The projection is a sparse Johnson-Lindenstrauss matrix, not a dense one. The paper does not say which it uses.
4. V has the duels that were labelled; a verdict that failed leaves no trace.
5. Training is the learner's: by default one step on each batch, where the paper takes 4 epochs.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.agents.agent import AgentConfig, AgentContext
from rayalign.agents.pair_pool import PairPool, PairPoolConfig, Pool
from rayalign.agents.posteriors.gradient_features import NORMALIZE, greedy_batch, pair_features
from rayalign.errors import ConfigError, did_you_mean
from rayalign.types import Candidate, Preference, Prompt

EARLIER = ("recompute", "keep", "reset")


@dataclass(frozen=True, kw_only=True)
class ActiveDPOConfig(PairPoolConfig):
    """Settings of `ActiveDPO`."""

    dim: int = 8192
    """d: dimensions that gradients are projected to."""
    normalize: str = "response"
    """What is brought to unit length: each `response`'s gradient before they are subtracted, the `pair`'s difference,
    or `none`."""
    reg: float = 1.0
    """V starts as this times the identity: how much is known of every direction before the first label. Features have
    length 2 at most; the smaller it is, the more a new direction counts beside a large difference."""
    earlier: str = "recompute"
    """Duels of earlier batches in V: `recompute` their features under the current model (app. A.3; 2 responses a label
    and batch); `keep` those they were picked by (2.7 d bytes a label in the ledger); or `reset` V every batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim < 1:
            raise ConfigError(f"agent.dim={self.dim} must be at least 1.")
        if self.reg <= 0:
            raise ConfigError(f"agent.reg={self.reg} must be positive: V has no inverse without it.")
        for name, known in (("normalize", NORMALIZE), ("earlier", EARLIER)):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"agent.{name}={value!r} is unknown. {did_you_mean(value, known)}")


class ActiveDPO(PairPool):
    """The most uncertain pairs under the gradient features of the model that is trained."""

    name = "active_dpo"
    Config = ActiveDPOConfig

    def __init__(self, config: AgentConfig | None = None) -> None:
        super().__init__(config)
        self._duels: list[tuple[Prompt, list[Candidate]]] = []
        self._kept: list[str] = []

    def needs_scorer(self) -> bool:
        """For gradients of the current model."""
        return True

    def setup(self, context: AgentContext) -> None:
        """One projection for the whole run."""
        super().setup(context)
        self.seed = context.seed

    def pick(self, pool: Pool, count: int, rng: np.random.Generator) -> list[tuple[int, Mapping[str, Any]]]:
        """Greedily, V growing with each pick (eqs. 3 and 4)."""
        features_PD = self._features(pool.prompts, pool.groups, pool.first_P, pool.second_P)
        picks, values = greedy_batch(features_PD, self._asked(), self.config.reg, count)
        keep = self.config.earlier == "keep"
        return [
            (i, {"uncertainty": value} | ({"phi": pack(features_PD[i])} if keep else {}))
            for i, value in zip(picks, values, strict=True)
        ]

    def observe(self, batch: int, preferences: Sequence[Preference], rng: np.random.Generator) -> dict[str, float]:
        """Remember what was asked; V does not depend on the answers."""
        duels = [preference.duel for preference in sorted(preferences, key=lambda preference: preference.duel.id)]
        if self.config.earlier == "recompute":
            self._duels += [(duel.prompt, [duel.first, duel.second]) for duel in duels]
        elif self.config.earlier == "keep":
            self._kept += [duel.meta["phi"] for duel in duels]
        return {"uncertainty": float(np.mean([duel.meta["uncertainty"] for duel in duels]))} if duels else {}

    def save(self, folder: Path) -> None:
        """Token ids of the duels, or their features."""
        duels = [(prompt.id, prompt.token_ids, *(side.token_ids for side in pair)) for prompt, pair in self._duels]
        (folder / "active_dpo.json").write_text(json.dumps({"duels": duels, "kept": self._kept}), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """See `save`."""
        state = json.loads((folder / "active_dpo.json").read_text(encoding="utf-8"))
        self._kept = state["kept"]
        self._duels = [
            (Prompt(id=name, text="", token_ids=tuple(ids)), [_response(side) for side in pair])
            for name, ids, *pair in state["duels"]
        ]

    # -- parts -----------------------------------------------------------------------------------------------
    def _features(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[Sequence[Candidate]],
        first_P: Sequence[int],
        second_P: Sequence[int],
    ) -> np.ndarray:
        gradients = self.scorer.gradients(prompts, groups, dim=self.config.dim, seed=self.seed)
        return pair_features(np.concatenate(gradients), first_P, second_P, self.config.normalize)

    def _asked(self) -> np.ndarray:
        """Features of the earlier duels, `M x D`."""
        if self._kept:
            return np.stack([unpack(phi) for phi in self._kept])
        if not self._duels:
            return np.zeros((0, self.config.dim), dtype=np.float32)
        prompts, pairs = zip(*self._duels, strict=True)
        rows = range(0, 2 * len(pairs), 2)
        return self._features(prompts, pairs, rows, [row + 1 for row in rows])


def pack(phi_D: np.ndarray) -> str:
    """Features as text for the ledger, in float16: what an earlier model made of a pair can't be computed again."""
    return base64.b64encode(phi_D.astype("<f2").tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """What `pack` packed, in float32.

    >>> unpack(pack(np.array([0.5, -2.0])))
    array([ 0.5, -2. ], dtype=float32)
    """
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float32)


def _response(ids: Sequence[int]) -> Candidate:
    return Candidate(text="", token_ids=tuple(ids), logprobs=(), policy_version=-1)
