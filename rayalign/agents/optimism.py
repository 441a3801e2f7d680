"""What XPO and SELM share: DPO plus an optimism term on one response of a prompt.

    loss   mean over prompts of   -log sigmoid(beta * h) + alpha * log pi(y | x)

It is minimised, so it takes likelihood away from `y`, a sample of the reference: the policy is pushed to where the
reference does not go. `y` may be one of the two duelled responses, or neither; then a second duel, which nobody
asked about, carries it to the learner. `Terms` says what each duel contributes.

Shapes: B duels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from rayalign.agents.agent import AgentConfig
from rayalign.agents.losses import PairLogProbs, dpo
from rayalign.errors import ConfigError
from rayalign.types import Candidate, LabelSource, Preference


@dataclass(frozen=True, kw_only=True)
class OptimismConfig(AgentConfig):
    """Settings of agents with an optimism term."""

    alpha: float = 5e-6
    """Strength of the optimism term, per nat; 0 is plain DPO."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "dpo":
            raise ConfigError(f"agent.loss={self.loss!r}: the optimism term is derived for DPO; set agent.loss=dpo.")
        if self.alpha < 0:
            raise ConfigError(f"agent.alpha={self.alpha} must not be negative; 0 switches the optimism term off.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What a duel contributes to the loss: multiples of its DPO loss and of its responses' log-probabilities."""

    dpo: float = 0.0
    first: float = 0.0
    second: float = 0.0


def optimistic_dpo(pairs: PairLogProbs, config: Any, alpha: float) -> Tensor:
    """`dpo_terms * dpo + alpha * (first_terms * log pi(first) + second_terms * log pi(second))`, `B`.

    Terms are read from `meta["terms"]` of the duels (see `with_terms`). Nats; linear in the log-probability, hence
    not bounded below.
    """
    first_B, second_B = pairs.sides()
    terms = [Terms(**preference.duel.meta["terms"]) for preference in pairs.preferences]
    dpo_B, on_first_B, on_second_B = (
        first_B.new_tensor([getattr(term, name) for term in terms]) for name in ("dpo", "first", "second")
    )
    return dpo_B * dpo(pairs, config) + alpha * (on_first_B * first_B + on_second_B * second_B)


def with_terms(preference: Preference, terms: Terms) -> Preference:
    """The preference with `terms` in its duel's `meta`."""
    return replace(preference, duel=replace(preference.duel, meta={**preference.duel.meta, "terms": asdict(terms)}))


def carrier(preference: Preference, response: Candidate) -> Preference:
    """A duel of `response` with itself, for the prompt of `preference`: a tie that only brings its log-probability.

    `meta["auxiliary"]` tells the learner to leave it out of the numbers that describe duels.
    """
    duel = replace(
        preference.duel,
        id=f"{preference.duel.id}-optimism",
        first=response,
        second=response,
        meta={"auxiliary": True, "terms": asdict(Terms(first=1.0))},
    )
    return Preference(duel=duel, label=0.5, source=LabelSource.SYNTHETIC)


def averaged_over_prompts(duels: Sequence[Preference], prompts: int) -> list[Preference]:
    """The duels with terms scaled so that the learner's mean over duels is the sum of all terms over `prompts`."""
    scale = len(duels) / max(1, prompts)
    scaled = [{name: scale * value for name, value in duel.duel.meta["terms"].items()} for duel in duels]
    return [with_terms(duel, Terms(**terms)) for duel, terms in zip(duels, scaled, strict=True)]
