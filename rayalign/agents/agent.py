"""The base agent: what every way of spending labels has in common. The default of every hook is passive online DPO.

Hooks in the order in which the loop calls them; an algorithm overrides only those where it differs:

    proposals -> select -> (oracle) -> observe          in the collector, once per batch
    training_duels -> loss                              in the learner, once per batch and once per micro-batch
    best_of                                             at evaluation and after the run

Shapes: B duels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from rayalign.agents.losses import LOSSES, PairLogProbs
from rayalign.agents.scorer import Scorer
from rayalign.errors import ConfigError, did_you_mean
from rayalign.types import Candidate, Preference, Prompt


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Settings that every agent has."""

    loss: str = "dpo"
    """Direct-alignment loss: dpo, ipo, slic or simpo."""
    beta: float = 0.1
    """Strength of the pull towards the reference; larger stays closer. SimPO: the inverse temperature."""
    gamma_over_beta: float = 0.3
    """SimPO only: target margin as a multiple of beta."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels, in [0, 0.5); 0 trusts every label."""
    pair_sampling: str = "distinct"
    """What to do with a pair of identical texts: `distinct` takes another candidate if there is one and skips
    the prompt, uncharged, if there is none; `keep` asks all the same."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ConfigError(f"agent.loss={self.loss!r} is not a known loss. {did_you_mean(self.loss, LOSSES)}")
        if self.beta <= 0:
            raise ConfigError(f"agent.beta={self.beta} must be positive: it divides in IPO and scales every margin.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"agent.label_smoothing={self.label_smoothing} must be in [0, 0.5).")
        if self.pair_sampling not in ("distinct", "keep"):
            raise ConfigError(f"agent.pair_sampling={self.pair_sampling!r} must be 'distinct' or 'keep'.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A request for `n` samples per prompt."""

    n: int
    """Responses per prompt."""
    source: str = "policy"
    """`policy`: the weights that the staleness gate allows; `reference`: version 0, always; `data`: the prompt's own
    pair, `n` must be 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One pair picked by `Agent.select`: indices into the prompts and their candidates."""

    prompt: int
    first: int
    second: int
    label: float | None = None
    """None: buy a label. A number (1.0: first wins, 0.0: second wins): the agent's own, never shown to the oracle."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able facts about the choice (acquisition value, member, ...); stored in the ledger."""


class Chooser(Protocol):
    """Whoever has an opinion about answers; an `Agent`, mostly."""

    def best_of(self, prompt: Prompt, candidates: Sequence[Candidate]) -> int | None:
        """Index of the best candidate, or None where there is no opinion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentContext:
    """What the collector lends an agent at `setup`."""

    policy: Path
    """Hugging Face directory of the initial policy, tokenizer included."""
    seed: int
    """The run's seed."""
    batch_size: int
    """Duels per batch."""
    device: str = "cpu"
    """Where the agent's own models (a reward posterior, say) live."""
    sample_prompts: Sequence[Prompt] = ()
    """A few unlabelled training prompts, for calibrations that cost no label."""
    scorer: Scorer | None = None
    """The model that is being trained; None unless `Agent.needs_scorer`."""


class Agent:
    """Passive online DPO: two samples of the current policy per prompt, all sent to the oracle.

    An agent is made of a frozen config and, in the collector only, whatever `setup` builds. The learner
    holds a second instance that is never set up and only computes `loss`.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type[AgentConfig]] = AgentConfig

    def __init__(self, config: AgentConfig | None = None) -> None:
        self.config: Any = config if config is not None else self.Config()

    # -- in the collector, in loop order -------------------------------------------------------------------
    def setup(self, context: AgentContext) -> None:
        """Build what the agent needs beside its config (a reward posterior, ...). Called once, before `load`."""

    def needs_scorer(self) -> bool:
        """Whether `select` asks the model itself: log-probabilities, dropout moments, gradients."""
        return False

    def samples_reference(self) -> bool:
        """Whether engines that stay at the initial policy are needed beside those of the current one."""
        return any(proposal.source == "reference" for proposal in self.proposals())

    def prompts_per_batch(self, batch_size: int) -> int:
        """Prompts drawn for a batch of `batch_size` duels: more than that where prompts are selected too, fewer where
        a prompt has several duels.
        """
        return batch_size

    def expected_batches(self, budget: int, batch_size: int) -> int:
        """Batches that `budget` labels are likely to take, for estimates: more where the agent labels pairs itself."""
        return -(-budget // batch_size)

    def sampling_window(self, batch: int, max_staleness: int) -> tuple[int, int | None]:
        """Oldest and newest weights version that may generate batch `batch`; None: whatever is newest."""
        return max(0, batch - max_staleness), None

    def proposals(self) -> tuple[Proposal, ...]:
        """What to sample for each prompt; the candidates reach `select` concatenated in this order."""
        return (Proposal(n=2),)

    def select(
        self, batch: int, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Candidate]], rng: np.random.Generator
    ) -> list[Choice]:
        """Pick the duels. `rng` depends on the run's seed and `batch` alone, so that a redone batch is the same."""
        return [
            Choice(prompt=p, first=0, second=second)
            for p, group in enumerate(candidates)
            if (second := self.distinct_from(group, 0)) is not None
        ]

    def observe(self, batch: int, preferences: Sequence[Preference], rng: np.random.Generator) -> dict[str, float]:
        """Learn from stream batch `batch`, oracle-labelled and synthetic. Returns numbers worth logging.

        Its duels are those that `select` picked for the batch of the same index, except with an oracle that takes its
        time (see `rayalign.ledger.ledger`): then they are of several, as `duel.batch` says.
        Must be a function of the state that `observe` left, the arguments and `rng` alone, whatever the order of
        `preferences`: after a crash the batches since the last `save` are observed again, and `select` is not.
        """
        return {}

    def best_of(self, prompt: Prompt, candidates: Sequence[Candidate]) -> int | None:
        """Index of the candidate to answer with (best-of-n), or None where the agent has no opinion."""
        return None

    def save(self, folder: Path) -> None:
        """Write the state that `observe` changes into the empty `folder`."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""

    # -- in the learner --------------------------------------------------------------------------------------
    def needs_reference(self) -> bool:
        """Whether `loss` reads the reference's log-probabilities."""
        return self.config.loss != "simpo"

    def reference_version(self, batch: int) -> int:
        """Weights version that is the reference of batch `batch`: 0, the initial policy, unless overridden.

        An override may only name versions at or before `batch`, and must not decrease.
        """
        return 0

    def learning_rate_factor(self, batch: int) -> float:
        """What the learning rate of batch `batch` is multiplied by, beside the learner's own schedule."""
        return 1.0

    def training_duels(self, preferences: Sequence[Preference]) -> Sequence[Preference]:
        """What the learner takes of a batch: all of it, unless overridden.

        An override may drop preferences, and change or add `duel.meta` for `loss`; it must be a function of its
        argument alone. An empty result skips the step. A duel that nobody asked about, added to carry a term of the
        loss, has an id of its own and `meta["auxiliary"]`: the learner's numbers do not describe it.
        """
        return preferences

    def loss(self, pairs: PairLogProbs) -> Tensor:
        """One number per duel, `B`; the learner averages. Ties are averaged over both orders by the learner."""
        return LOSSES[self.config.loss](pairs, self.config)

    # -- for subclasses --------------------------------------------------------------------------------------
    def distinct_from(self, group: Sequence[Candidate], first: int) -> int | None:
        """The lowest index of a candidate whose text differs from `first`'s; None if all are the same."""
        for i, candidate in enumerate(group):
            if i != first and (self.config.pair_sampling == "keep" or candidate.text != group[first].text):
                return i
        return None
