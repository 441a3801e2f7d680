"""SEA: sample-efficient alignment by Thompson sampling (Liu et al. 2024, Algorithm 2).

    setup    ensemble of K reward heads r_1..r_K on a frozen transformer              # epistemic reward model
    propose  y_1..y_M ~ pi(.|x)                                                       # policy-guided search
    select   y = argmax_i r_k(x, y_i), k drawn for this prompt
             y' = argmax_i r_k'(x, y_i), k' drawn again until y' != y                 # ee_ts
             or y' = argmax_i Var_k sigmoid(r_k(x, y) - r_k(x, y_i))                  # bai_ts
             or (y, y') = argmax Var_k (r_k(x, y) - r_k(x, y'))                       # uncertainty
             g ~ U(0, 1): ask the oracle if g < gamma, else a drawn member labels     # mixed preference learning
    observe  m regularised steps on the oracle's labels, never on the members' own
    loss     DPO, IPO, SLiC or SimPO

Differs from the paper:
1. The regulariser is the squared distance with a plus sign (eq. 4 prints the norm with a minus), so lambda = 0.5 does
   not carry over.
2. Members see different data: a Poisson bootstrap and minibatches of their own (the paper does not say).
3. With `synthetic_pairs=extremes` a pair labelled by a member is the best and the worst candidate under another one;
   the default, `selected`, is the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayalign.agents import acquisition
from rayalign.agents.acquisition import PICKERS, Pick
from rayalign.agents.agent import Agent, AgentConfig, AgentContext, Choice, Proposal
from rayalign.agents.posteriors.ensemble import EnsembleConfig, RewardEnsemble, agreement, disagreement, spread
from rayalign.agents.posteriors.features import FeatureConfig, Features
from rayalign.errors import ConfigError, NonFiniteLossError, did_you_mean
from rayalign.types import Candidate, LabelSource, Preference, Prompt

EXPLORATIONS = (*PICKERS, "passive")
SYNTHETIC_PAIRS = ("selected", "extremes")


@dataclass(frozen=True, kw_only=True)
class SEAConfig(AgentConfig):
    """Settings of `SEA`."""

    exploration: str = "bai_ts"
    """bai_ts (spend few labels), ee_ts (show good answers while learning), uncertainty, or passive (first two); also
    those of other papers: dts, drts, delta_ucb."""
    num_candidates: int = 20
    """M: responses sampled per prompt to search among; a passive exploration samples 2."""
    max_redraws: int = 20
    """ee_ts, dts and drts: most extra draws of a member whose choice is not the first response; 0 draws once."""
    gamma_after: float = 0.7
    """Share of pairs that the oracle labels after the burn-in; members label the others. 1 is the oracle alone."""
    gamma_burn_in: int = 1000
    """Oracle labels before which every pair goes to the oracle; 0 starts at `gamma_after`."""
    synthetic_pairs: str = "selected"
    """Which pair a member labels: `selected` the one that was picked for the oracle; `extremes` the best and the
    worst candidate under another member."""
    posterior: EnsembleConfig = field(default_factory=EnsembleConfig)
    """The epistemic reward model."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """The frozen transformer under it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exploration not in EXPLORATIONS:
            hint = did_you_mean(self.exploration, EXPLORATIONS)
            raise ConfigError(f"agent.exploration={self.exploration!r} is unknown. {hint}")
        if self.synthetic_pairs not in SYNTHETIC_PAIRS:
            hint = did_you_mean(self.synthetic_pairs, SYNTHETIC_PAIRS)
            raise ConfigError(f"agent.synthetic_pairs={self.synthetic_pairs!r} is unknown. {hint}")
        if self.num_candidates < 2:
            raise ConfigError(
                f"agent.num_candidates={self.num_candidates} must be at least 2: a duel needs two responses."
            )
        if not 0 <= self.gamma_after <= 1:
            raise ConfigError(
                f"agent.gamma_after={self.gamma_after} must be in [0, 1]: it is the share of pairs the oracle labels."
            )
        for name in ("gamma_burn_in", "max_redraws"):
            if getattr(self, name) < 0:
                raise ConfigError(f"agent.{name}={getattr(self, name)} must not be negative.")
        if self.posterior.updates == 0 and (self.exploration != "passive" or self.gamma_after < 1):
            raise ConfigError(
                f"agent.posterior.updates=0 leaves the reward posterior untrained, but agent.exploration="
                f"{self.exploration!r} and agent.gamma_after={self.gamma_after} rely on it. Train it, or set "
                "agent.exploration=passive and agent.gamma_after=1."
            )


class SEA(Agent):
    """Thompson sampling with an epistemic reward model."""

    name = "sea"
    Config = SEAConfig
    config: Any

    def __init__(self, config: AgentConfig | None = None) -> None:
        super().__init__(config)
        self.features: Features | None = None
        self.posterior: RewardEnsemble | None = None
        self._counts = {"oracle": 0, "synthetic": 0}

    def setup(self, context: AgentContext) -> None:
        """Load the backbone and initialise the heads; nothing at all where the posterior does not learn."""
        if self.config.posterior.updates:
            self.features = Features(self.config.features, context.policy, context.device)
            self.posterior = RewardEnsemble(self.config.posterior, self.features.dim, context.seed, context.device)

    def expected_batches(self, budget: int, batch_size: int) -> int:
        """Every pair of the burn-in is asked, after it a share of `gamma_after`."""
        asked = min(budget, self.config.gamma_burn_in)
        share = max(self.config.gamma_after, 1 / batch_size)  # at 0 it would ask for ever
        return math.ceil(asked / batch_size + (budget - asked) / (share * batch_size))

    def proposals(self) -> tuple[Proposal, ...]:
        """M candidates of the current policy."""
        return (Proposal(n=2 if self.config.exploration == "passive" else self.config.num_candidates),)

    def select(
        self, batch: int, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]], rng: np.random.Generator
    ) -> list[Choice]:
        """One pair a prompt, and for each whether the oracle or a member labels it."""
        choices = []
        asked = self._counts["oracle"]
        groups = [self._distinct(group) for group in candidates]
        rewards = self._rewards(prompts, [[group[i] for i in d] for group, d in zip(candidates, groups, strict=True)])
        for p, distinct in enumerate(groups):
            if len(distinct) < 2:
                continue
            pick = self._pick(rewards[p], rng)
            label = None
            if rng.random() >= (1.0 if asked < self.config.gamma_burn_in else self.config.gamma_after):
                pick, label = self._synthetic(pick, rewards[p], rng)
            asked += label is None
            meta = {k: v for k, v in (("member", pick.member), ("value", pick.value)) if v is not None}
            choices.append(
                Choice(prompt=p, first=distinct[pick.first], second=distinct[pick.second], label=label, meta=meta)
            )
        return choices

    def observe(self, batch: int, preferences: Sequence[Preference], rng: np.random.Generator) -> dict[str, float]:
        """Score the new labels first, which is an honest test of the posterior; then learn from them."""
        # The order of arrival is not part of the state: a replay may know another one.
        preferences = sorted(preferences, key=lambda preference: preference.duel.id)
        bought = [preference for preference in preferences if preference.source is LabelSource.ORACLE]
        self._counts["oracle"] += len(bought)
        self._counts["synthetic"] += len(preferences) - len(bought)
        facts = {"synthetic_share": self._counts["synthetic"] / max(1, sum(self._counts.values()))}
        if self.posterior is None:
            return facts
        trained = self.posterior.steps > 0
        if not self.posterior.standardize.done:
            self.posterior.standardize.add(self._pair_features(preferences).flatten(0, 1))
        if bought:
            facts |= self._learn(bought, rng)
        return facts | {"posterior_trained": float(trained), "posterior_labels": float(self.posterior.num_labels)}

    def best_of(self, prompt: Prompt, candidates: Sequence[Candidate]) -> int | None:
        """The arg max of the members' mean reward; no opinion before the first update."""
        if self.posterior is None or not self.posterior.steps or not candidates:
            return None
        (rewards_EN,) = self._rewards([prompt], [candidates])
        return int(np.argmax(rewards_EN.mean(dim=0).numpy()))

    def save(self, folder: Path) -> None:
        """One file; its size is that of the data: two feature vectors a label."""
        state = {"counts": self._counts, "posterior": self.posterior and self.posterior.state_dict()}
        torch.save(state, folder / "sea.pt")

    def load(self, folder: Path) -> None:
        """Go on bit for bit; whatever the cache of features held is computed again when needed."""
        device = self.posterior.device if self.posterior else "cpu"
        state = torch.load(folder / "sea.pt", map_location=device, weights_only=True)
        self._counts = state["counts"]
        if self.posterior is not None:
            self.posterior.load_state_dict(state["posterior"])

    # -- parts -----------------------------------------------------------------------------------------------
    def _distinct(self, group: Sequence[Candidate]) -> list[int]:
        """The first index of each text; all indices where identical pairs may be asked."""
        first_of: dict[str, int] = {}
        for i, candidate in enumerate(group):
            first_of.setdefault(candidate.text, i)
        distinct = list(first_of.values())
        return distinct if len(distinct) > 1 or self.config.pair_sampling == "distinct" else list(range(len(group)))

    def _rewards(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]]) -> list[Tensor]:
        """`E x N` rewards a prompt, on the CPU, in one pass over all; empty ones where nothing asks for them."""
        if self.posterior is None or self.features is None:
            return [torch.empty(0, len(group)) for group in candidates]
        owners = [prompt for prompt, group in zip(prompts, candidates, strict=True) for _ in group]
        features_RD = self.features(owners, [candidate for group in candidates for candidate in group])
        rewards_ER = self.posterior.rewards(features_RD).cpu()
        if not torch.isfinite(rewards_ER).all():
            raise NonFiniteLossError(
                "the reward posterior gives non-finite rewards with agent.features.backbone="
                f"{self.config.features.backbone!r}. Use another backbone, or agent.features.dtype=float32."
            )
        return list(rewards_ER.split([len(group) for group in candidates], dim=1))

    def _pick(self, rewards_EN: Tensor, rng: np.random.Generator) -> Pick:
        if self.config.exploration == "passive":
            return Pick(first=0, second=1)
        return PICKERS[self.config.exploration](rewards_EN, rng, self.config.max_redraws)

    def _synthetic(self, pick: Pick, rewards_EN: Tensor, rng: np.random.Generator) -> tuple[Pick, float]:
        """A pair and the hard label that a freshly drawn member gives it; equal rewards go to the lower index."""
        if self.config.synthetic_pairs == "extremes":
            pick = acquisition.pick_extremes(rewards_EN, rng)
        judge_N = rewards_EN[int(rng.integers(len(rewards_EN)))]
        gap = float(judge_N[pick.first] - judge_N[pick.second])
        return pick, float(gap > 0 or (gap == 0 and pick.first < pick.second))

    def _pair_features(self, preferences: Sequence[Preference]) -> Tensor:
        """`B x 2 x D`, first and second."""
        assert self.features is not None
        prompts = [preference.duel.prompt for preference in preferences for _ in range(2)]
        responses = [side for preference in preferences for side in (preference.duel.first, preference.duel.second)]
        return self.features(prompts, responses).view(len(preferences), 2, self.features.dim)

    def _learn(self, bought: Sequence[Preference], rng: np.random.Generator) -> dict[str, float]:
        assert self.posterior is not None
        features_BSD = self._pair_features(bought)
        labels_B = torch.tensor([preference.label for preference in bought], device=features_BSD.device)
        before_EB = self.posterior.margins(features_BSD)
        self.posterior.add(features_BSD, labels_B, rng)
        try:
            nll = self.posterior.update(rng)
        except NonFiniteLossError as error:
            ids = ", ".join(preference.duel.id for preference in bought)
            raise NonFiniteLossError(f"{error} Duels: {ids}.") from error
        after_EB, start_EB = (self.posterior.margins(features_BSD, at_start=start) for start in (False, True))
        return {
            "posterior_nll": float("nan") if nll is None else nll,
            "posterior_accuracy": agreement(before_EB, labels_B),
            "posterior_disagreement": disagreement(before_EB),
            "posterior_diversity": spread(after_EB) / max(spread(start_EB), 1e-12),
        }


VARIANTS: dict[int, dict[str, Any]] = {
    1: {
        "agent.exploration": "passive",
        "agent.gamma_after": 1.0,
        "agent.posterior.updates": 0,
        "evaluation.best_of_n": 0,
    },
    2: {"agent.exploration": "bai_ts", "agent.gamma_after": 1.0, "evaluation.best_of_n": 0},
    3: {"agent.exploration": "bai_ts", "agent.gamma_after": 0.7, "evaluation.best_of_n": 0},
    4: {"agent.exploration": "passive", "agent.gamma_after": 1.0, "evaluation.best_of_n": 20},
    5: {"agent.exploration": "bai_ts", "agent.gamma_after": 1.0, "evaluation.best_of_n": 20},
    6: {"agent.exploration": "bai_ts", "agent.gamma_after": 0.7, "evaluation.best_of_n": 20},
    7: {
        "agent.exploration": "bai_ts",
        "agent.gamma_after": 1.0,
        "evaluation.best_of_n": 20,
        "learner.learning_rate": 0.0,
    },
}
"""Settings that make SEA the seven agents of the paper's ablation (table 2): online DAP; SEA without the posterior's
labels; SEA; then best-of-n inference with a passive, an active and the full agent; and a policy that never learns."""
