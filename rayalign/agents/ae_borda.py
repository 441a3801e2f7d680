"""AE-Borda for language: labels for the prompts whose value is least known (Mehta et al., Algorithm 1).

    propose  a_1..a_N ~ pi_t(.|x)                                 for more prompts than there are labels
    select   f(x, a): chance that response a beats a random one; mu -/+ beta sigma by kernel ridge regression
             prompts with the largest  max_a upper - max_a lower                          eq. 3
             duel (argmax_a upper, a' uniformly out of the others)                        eq. 4
    observe  one point a label: features of the first response, did it win?
    loss     DPO, IPO, SLiC or SimPO
    best_of  argmax_a of the greatest lower bound so far                                  eq. 5

The paper's beta, the width of the bounds, is `agent.borda.width`; the strength of DPO is `agent.beta`.
The algorithm on numbers, with the same formulas, is `rayalign.agents.borda`.

Differs from the paper:
1. A context is a prompt, an action one of its distinct samples, and a kernel compares features of a frozen transformer.
   Uniform opponents are samples, too: of the policy, so that what is estimated moves with it, or (`opponents`) of the
   reference, which stays (eq. 10). They never have the same text.
2. Labels come in batches. Within a batch sigma shrinks around each pick as any label would make it; `batch_rule=top`
   takes the largest gaps under one posterior, as Algorithm 2 does. Eq. 5 looks at the posteriors between batches.
3. The greatest information gain of any t points (theorem's schedule) is that of the t points at hand.
4. A policy is trained on the labels as well; eq. 5 chooses among its samples.

Shapes: P prompts    N candidates    R responses    D features    B labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayalign.agents.agent import AgentContext, Choice, Proposal
from rayalign.agents.borda import BordaConfig, value_gap, width_after
from rayalign.agents.posteriors.ensemble import Standardizer, agreement
from rayalign.agents.posteriors.features import FeatureConfig, Features
from rayalign.agents.posteriors.kernel import KernelConfig, KernelRidge
from rayalign.agents.prompt_pool import PromptPool, PromptPoolConfig
from rayalign.errors import ConfigError, NonFiniteLossError, did_you_mean
from rayalign.types import Candidate, LabelSource, Preference, Prompt

OPPONENTS = ("policy", "reference")
BATCH_RULES = ("believe", "top")


@dataclass(frozen=True, kw_only=True)
class AEBordaConfig(PromptPoolConfig):
    """Settings of `AEBorda`."""

    num_candidates: int = 10
    """N: responses of the policy per prompt, among which the best is sought."""
    prompts_per_duel: int = 3
    """Prompts drawn for each duel that is asked; 1 asks about all of them."""
    opponents: str = "policy"
    """Who the random opponent is: another of the prompt's candidates, or one sample of the reference."""
    batch_rule: str = "believe"
    """How a batch is filled: one pick after the other with sigma up to date (`believe`), or the `top` gaps at once."""
    calibration_responses: int = 256
    """Features are standardised by the statistics of the first so many responses, then the statistics stay fixed."""
    borda: BordaConfig = field(default_factory=BordaConfig)
    """Strategy (ae, ucb, uniform), initial labels, width of the bounds."""
    kernel: KernelConfig = field(default_factory=KernelConfig)
    """Kernel ridge regression, on standardised features divided by sqrt(D): two responses are about sqrt(2) apart."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """The frozen transformer that reads the responses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("opponents", OPPONENTS), ("batch_rule", BATCH_RULES)):
            if getattr(self, name) not in known:
                hint = did_you_mean(getattr(self, name), known)
                raise ConfigError(f"agent.{name}={getattr(self, name)!r} is unknown. {hint}")
        least = {"num_candidates": 2 if self.opponents == "policy" else 1, "calibration_responses": 2}
        for name in ("num_candidates", "calibration_responses"):
            if getattr(self, name) < least.get(name, 1):
                raise ConfigError(f"agent.{name}={getattr(self, name)} must be at least {least.get(name, 1)}.")


class AEBorda(PromptPool):
    """Active exploration by kernel ridge regression on the contextual Borda function."""

    name = "ae_borda"
    Config = AEBordaConfig
    config: Any

    def setup(self, context: AgentContext) -> None:
        """Load the backbone; nothing is known yet."""
        super().setup(context)
        self.features = Features(self.config.features, context.policy, context.device)
        self.standardize = Standardizer(self.features.dim, self.config.calibration_responses)
        self.posterior = KernelRidge(self.config.kernel, self.features.dim)
        self._raw_BD = torch.empty(0, self.features.dim)
        """Features of the first responses, before standardising: with the labels all that the posterior is made of."""
        self._labels: list[float] = []
        self._sizes: list[int] = []
        """Labels after each batch."""

    def prompts_per_batch(self, batch_size: int) -> int:
        """More contexts than duels, where contexts are chosen."""
        return super().prompts_per_batch(batch_size) if self.config.borda.strategy == "ae" else batch_size

    def proposals(self) -> tuple[Proposal, ...]:
        """The actions, and the opponent where it is the reference's."""
        actions = Proposal(n=self.config.num_candidates)
        return (actions,) if self.config.opponents == "policy" else (actions, Proposal(n=1, source="reference"))

    def select(
        self, batch: int, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]], rng: np.random.Generator
    ) -> list[Choice]:
        """Prompts by eq. 3, the optimistic response by eq. 4, against a random one; before n_0 labels all at random."""
        actions = [self._actions(group) for group in candidates]
        contexts = [p for p, own in enumerate(actions) if own]
        strategy = self.config.borda.strategy
        picks: list[tuple[int, int, dict[str, float]]]
        if strategy == "uniform" or len(self._labels) < self.config.borda.initial_labels:
            picks = [(p, int(rng.choice(actions[p])), {}) for p in self._random(contexts, rng)]
        else:
            order = self._random(contexts, rng) if strategy == "ucb" else None
            picks = self._optimistic(prompts, candidates, {p: actions[p] for p in contexts}, order)
        return [
            Choice(prompt=p, first=a, second=int(rng.choice(self._opponents(candidates[p], a))), meta=meta)
            for p, a, meta in picks
        ]

    def observe(self, batch: int, preferences: Sequence[Preference], rng: np.random.Generator) -> dict[str, float]:
        """Whether the mean names the winners of new labels, which is an honest test; then learn from them."""
        # The order of arrival is not part of the state: a replay may know another one.
        bought = sorted((p for p in preferences if p.source is LabelSource.ORACLE), key=lambda p: p.duel.id)
        if not bought:
            return {}
        duels = [preference.duel for preference in bought]
        prompts, labels = [duel.prompt for duel in duels], [preference.label for preference in bought]
        first_BD, second_BD = (self.features(prompts, [getattr(d, who) for d in duels]) for who in ("first", "second"))
        means = [self.posterior.predict(self._points(raw_BD))[0] for raw_BD in (first_BD, second_BD)]
        margins_1B = torch.from_numpy(means[0] - means[1])[None]
        self._learn(first_BD, second_BD, labels)
        return {
            "borda_accuracy": agreement(margins_1B, torch.tensor(labels, dtype=torch.float64)),
            "borda_width": width_after(self.posterior.size, self.config.borda, self.posterior),
            "borda_information": self.posterior.information_gain(),
            "borda_gap": float(np.mean([duel.meta.get("gap", np.nan) for duel in duels])),
        }

    def best_of(self, prompt: Prompt, candidates: Sequence[Candidate]) -> int | None:
        """The pessimistic policy (eq. 5), the last posterior included; no opinion before n_0 labels."""
        sizes = [size for size in self._sizes if size >= self.config.borda.initial_labels]
        if not sizes or not candidates:
            return None
        sizes = sizes if self.config.borda.pessimism == "ever" else sizes[-1:]
        points_ND = self._points(self.features([prompt] * len(candidates), candidates))
        widths = [width_after(size, self.config.borda, self.posterior) for size in sizes]
        return int(self.posterior.lower_envelope(points_ND, sizes, widths).argmax())

    def save(self, folder: Path) -> None:
        """One file; a feature vector and a label each."""
        state = {"raw_BD": self._raw_BD, "labels": self._labels, "sizes": self._sizes}
        torch.save({**state, "standardize": self.standardize.state_dict()}, folder / "ae_borda.pt")

    def load(self, folder: Path) -> None:
        """Learn all labels again: the same posterior, bit for bit."""
        state = torch.load(folder / "ae_borda.pt", map_location="cpu", weights_only=True)
        self._raw_BD, self._labels, self._sizes = state["raw_BD"], state["labels"], state["sizes"]
        self.standardize.load_state_dict(state["standardize"])
        self._rebuild()

    # -- parts -----------------------------------------------------------------------------------------------
    def _optimistic(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Sequence[Candidate]],
        actions: dict[int, list[int]],
        order: Sequence[int] | None,
    ) -> list[tuple[int, int, dict[str, float]]]:
        """`(prompt, action, facts)` of the picks in turn: prompts in the given order, or by eq. 3; actions by eq. 4."""
        rows = [(p, i) for p, own in actions.items() for i in own]
        raw_RD = self.features([prompts[p] for p, _ in rows], [candidates[p][i] for p, i in rows])
        view = self.posterior.view(self._points(raw_RD))
        width = width_after(self.posterior.size, self.config.borda, self.posterior)
        owner_R = np.array([p for p, _ in rows])
        open_rows = {p: np.flatnonzero(owner_R == p) for p in actions}
        picks: list[tuple[int, int, dict[str, float]]] = []
        while open_rows and len(picks) < self.batch_size:
            if not picks or self.config.batch_rule == "believe":
                lower_R, upper_R = view.bounds(width)
                gaps = {p: float(value_gap(lower_R[own], upper_R[own])) for p, own in open_rows.items()}
            p = order[len(picks)] if order is not None else max(open_rows, key=gaps.__getitem__)
            own = open_rows.pop(p)
            row = int(own[upper_R[own].argmax()])
            picks.append((p, rows[row][1], {"gap": gaps[p], "upper": float(upper_R[row])}))
            if self.config.batch_rule == "believe":
                view.believe(row)
        return picks

    def _random(self, contexts: Sequence[int], rng: np.random.Generator) -> list[int]:
        """As many prompts as a batch has duels, at random, in a random order."""
        return [contexts[i] for i in rng.permutation(len(contexts))[: self.batch_size]]

    def _actions(self, group: Sequence[Candidate]) -> list[int]:
        """The first index of each text that has an opponent."""
        first_of: dict[str, int] = {}
        for i, candidate in enumerate(group[: self.config.num_candidates]):
            first_of.setdefault(candidate.text, i)
        return [i for i in first_of.values() if self._opponents(group, i)]

    def _opponents(self, group: Sequence[Candidate], first: int) -> list[int]:
        """Who may be drawn against `first`: every other sample, so that what is said often is met often."""
        n = self.config.num_candidates
        pool = range(n) if self.config.opponents == "policy" else range(n, len(group))
        return [i for i in pool if i != first and self.may_duel(group[first], group[i])]

    def _points(self, raw_RD: torch.Tensor) -> np.ndarray:
        """Standardised features over sqrt(D), `R x D` float64: the posterior's points."""
        if not torch.isfinite(raw_RD).all():
            raise NonFiniteLossError(
                f"agent.features.backbone={self.config.features.backbone!r} gives non-finite features. Use another "
                "backbone, or agent.features.dtype=float32."
            )
        return self.standardize(raw_RD).cpu().numpy().astype(np.float64) / np.sqrt(self.features.dim)

    def _learn(self, first_BD: torch.Tensor, second_BD: torch.Tensor, labels: Sequence[float]) -> None:
        self._raw_BD = torch.cat([self._raw_BD, first_BD.cpu()])
        self._labels += labels
        self._sizes.append(len(self._labels))
        if self.standardize.done:
            self.posterior.add(self._points(first_BD), labels)
        else:
            self.standardize.add(torch.cat([first_BD, second_BD]))
            self._rebuild()

    def _rebuild(self) -> None:
        self.posterior = KernelRidge(self.config.kernel, self.features.dim)
        self.posterior.add(self._points(self._raw_BD), self._labels)
