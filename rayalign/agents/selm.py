"""SELM: self-exploring language models (Zhang et al. 2024, Algorithm 1).

    for iteration t = 1 .. T, `batches_per_iteration` batches each
        propose  y ~ pi_ref(.|x) for the prompts of the t-th portion; the dataset brings y_w and y_l       # line 2
        select   rank {y, y_w, y_l}: the oracle judges all three pairs                                     # line 3
        train    on best against worst:  -log sigmoid(beta * h) + alpha * log pi(y | x)                    # line 4
                 pi_ref := pi_t at the iteration's end; a lower learning rate for the next

The strength is Algorithm 1's: eq. 4.2 writes alpha * beta, so alpha here = alpha of eq. 4.2 times beta.

Differs from the paper:
1. A ranking is three duels, three labels of the budget, as our oracles compare two; its ranker scored responses.
   Labels may contradict each other: `best_and_worst` says what becomes of ties and cycles.
2. With `fresh=2` or 3 all responses are samples of pi_ref and no dataset is needed (the online form, after
   Algorithm 2): y is the first of them, and the optimism term is still about that one.
3. Iterations are counted in batches, each batch is one optimizer step, and the optimizer's moments and the learner's
   own warm-up go on from one iteration to the next.
4. Where y was to be ranked but no verdict about it came back, its prompt has no optimism term.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

from rayalign.agents.agent import Agent, Choice, Proposal
from rayalign.agents.losses import PairLogProbs
from rayalign.agents.optimism import OptimismConfig, Terms, averaged_over_prompts, carrier, optimistic_dpo, with_terms
from rayalign.errors import ConfigError, did_you_mean
from rayalign.types import Candidate, LabelSource, Preference, Prompt

Comparison = tuple[int, int, float]
"""Two responses of a prompt and the label: 1.0, the first is better; 0.0, the second; 0.5, a tie."""


@dataclass(frozen=True, kw_only=True)
class SELMConfig(OptimismConfig):
    """Settings of `SELM`."""

    alpha: float = 1e-3
    """Strength of the optimism term, per nat; 0 is iterative DPO. Algorithm 1's: that of eq. 4.2 times beta."""
    fresh: int = 1
    """Responses sampled per prompt: 1 is ranked with the dataset's pair; 2 or 3 are the online form, without one."""
    iterations: int = 3
    """T: times that sampling policy and reference are renewed, the start included; the last lasts to the end."""
    batches_per_iteration: int = 10
    """Batches in an iteration; about the budget / (iterations * loop.batch_size)."""
    final_learning_rate: float = 0.2
    """Learning rate of the last iteration as a share of the first's; 1 never decays."""
    decay: str = "linear"
    """How it gets there: `linear`, in equal steps; `last`, at the last iteration alone."""
    warmup: float = 0.0
    """Share of each iteration's batches over which its learning rate rises linearly to its peak; 0 starts there."""
    cycle: str = "constant"
    """After that, within each iteration: `constant`, or `cosine` down to 0 at its end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fresh not in (1, 2, 3):
            raise ConfigError(f"agent.fresh={self.fresh} must be 1 (ranked with the dataset's pair), 2 or 3.")
        for name in ("iterations", "batches_per_iteration"):
            if getattr(self, name) < 1:
                raise ConfigError(f"agent.{name}={getattr(self, name)} must be at least 1.")
        if not 0 < self.final_learning_rate <= 1:
            raise ConfigError(f"agent.final_learning_rate={self.final_learning_rate} must be in (0, 1].")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"agent.warmup={self.warmup} must be in [0, 1): it is a share of an iteration.")
        for name, known in (("decay", ("linear", "last")), ("cycle", ("constant", "cosine"))):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"agent.{name}={value!r} is unknown. {did_you_mean(value, known)}")


class SELM(Agent):
    """Iterative DPO on the best and the worst of three, with optimism about what the reference writes."""

    name = "selm"
    Config = SELMConfig
    config: Any

    def iteration(self, batch: int) -> int:
        """Index of the iteration, from 0: t - 1."""
        return min(batch // self.config.batches_per_iteration, self.config.iterations - 1)

    def prompts_per_batch(self, batch_size: int) -> int:
        """A prompt has three duels where three responses are ranked, else one."""
        return batch_size if self.config.fresh == 2 else max(1, batch_size // 3)

    def sampling_window(self, batch: int, max_staleness: int) -> tuple[int, int | None]:
        """The reference of the iteration samples, whatever `loop.max_staleness` allows."""
        return (self.reference_version(batch),) * 2

    def proposals(self) -> tuple[Proposal, ...]:
        """The fresh response y first; then the dataset's pair, or other samples."""
        data = (Proposal(n=2, source="data"),) if self.config.fresh == 1 else ()
        return (Proposal(n=self.config.fresh), *data)

    def select(
        self, batch: int, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]], rng: np.random.Generator
    ) -> list[Choice]:
        """All pairs of the different responses of each prompt, those with y first."""
        keep = self.config.pair_sampling == "keep"
        choices = []
        for p, group in enumerate(candidates):
            first_of = {candidate.text: i for i, candidate in reversed(list(enumerate(group)))}
            different = range(len(group)) if keep else sorted(first_of.values())
            for i, j in combinations(different, 2):
                choices.append(Choice(prompt=p, first=i, second=j, meta={"prompt": p, "ranks": [i, j]}))
        return choices

    def training_duels(self, preferences: Sequence[Preference]) -> list[Preference]:
        """Best against worst of each prompt; where y is neither, a carrier for its log-probability."""
        by_prompt: dict[tuple[int, int], list[Preference]] = {}  # a late oracle's answers are of several batches
        for preference in sorted(preferences, key=lambda preference: preference.duel.meta["ranks"]):
            duel = preference.duel
            by_prompt.setdefault((duel.batch, duel.meta["prompt"]), []).append(preference)
        duels = [duel for _, known in sorted(by_prompt.items()) for duel in _ranked(known)]
        return averaged_over_prompts(duels, prompts=len(by_prompt))

    def reference_version(self, batch: int) -> int:
        """The policy at the start of the iteration."""
        return self.iteration(batch) * self.config.batches_per_iteration

    def learning_rate_factor(self, batch: int) -> float:
        """The peak of the iteration, from 1 down to `final_learning_rate`, times where the batch is in its cycle."""
        config, t = self.config, self.iteration(batch)
        last = max(1, config.iterations - 1)
        fallen = t / last if config.decay == "linear" else float(t == last)
        return (1 - (1 - config.final_learning_rate) * fallen) * self._cycle(batch - t * config.batches_per_iteration)

    def _cycle(self, place: int) -> float:
        """Warm-up and cosine, in [0, 1], at batch number `place` of an iteration."""
        n = self.config.batches_per_iteration
        rising = round(self.config.warmup * n)
        if place < rising:
            return (place + 1) / rising
        done = min(1.0, (place - rising) / (n - rising))
        return 0.5 * (1 + math.cos(math.pi * done)) if self.config.cycle == "cosine" else 1.0

    def loss(self, pairs: PairLogProbs) -> Tensor:
        """Line 4, term by term."""
        return optimistic_dpo(pairs, self.config, self.config.alpha)


def best_and_worst(verdicts: Iterable[Comparison]) -> tuple[int, int, float]:
    """The responses with most and fewest wins less losses, and the label of the best against the worst.

    Of several best ones the lowest index is taken; of several worst ones the one that the best has beaten, then the
    lowest index. The label is 1 (the ranking's word) unless the ranking does not tell them apart; then it is that of
    their own duel, a tie if there was none. So a cycle 0 > 1 > 2 > 0 keeps one of the duels that made it:

    >>> best_and_worst([(0, 1, 1.0), (0, 2, 1.0), (1, 2, 0.0)])
    (0, 1, 1.0)
    >>> best_and_worst([(0, 1, 1.0), (0, 2, 0.0), (1, 2, 1.0)])
    (0, 1, 1.0)
    """
    against = {pair: label for i, j, label in verdicts for pair, label in (((i, j), label), ((j, i), 1 - label))}
    score = {i: sum(2 * label - 1 for (one, _), label in against.items() if one == i) for i, _ in against}
    best = min(score, key=lambda i: (-score[i], i))
    worst = min((i for i in score if i != best), key=lambda i: (score[i], -against.get((best, i), 0.5), i))
    return best, worst, 1.0 if score[best] > score[worst] else against.get((best, worst), 0.5)


def _ranked(known: Sequence[Preference]) -> list[Preference]:
    """What the learner makes of the verdicts about one prompt; y is response 0."""
    verdicts = [(*preference.duel.meta["ranks"], preference.label) for preference in known]
    responses: dict[int, Candidate] = {}
    for preference, (i, j, _) in zip(known, verdicts, strict=True):
        responses |= {i: preference.duel.first, j: preference.duel.second}
    best, worst, label = best_and_worst(verdicts)
    about_y = Terms(dpo=1.0, first=float(best == 0), second=float(worst == 0))
    duel = replace(known[0].duel, id=f"{known[0].duel.id}-ranked", first=responses[best], second=responses[worst])
    ranked = with_terms(Preference(duel=duel, label=label, source=LabelSource.SYNTHETIC), about_y)
    return [ranked, carrier(ranked, responses[0])] if 0 in responses and 0 not in (best, worst) else [ranked]
