"""The nouns of the loop, in the order in which a label comes to be: Prompt, Candidate, Duel, Preference.

A duel and a preference are two types on purpose: before the label there is a `first` and a `second`
response, after it a winner and a loser.

Shape letters, used as suffixes of tensor names in the whole package:
    E ensemble members    P prompts    N candidates per prompt    B duels
    T tokens              D features   V vocabulary
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A context of the bandit, already rendered and tokenised exactly as the policy reads it."""

    id: str
    """Stable across runs: the same prompt has the same id."""
    text: str
    """What a person or a judge reads."""
    token_ids: tuple[int, ...]
    """What the policy reads: chat template applied, generation prompt included, no padding."""
    reference: str | None = None
    """A reference response to compare with in evaluation; None where the data has none."""
    pair: tuple[str, str] | None = None
    """Two given responses (offline pools, SELM); None where the data has none."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the data carries; small and picklable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One sampled response. `token_ids` is what was sampled, end-of-sequence included when it was sampled."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Per token, nats, of the distribution it was sampled from (temperature applied); same length as `token_ids`."""
    policy_version: int
    """Weights version that sampled it; 0 is the initial policy. -1: not sampled (given by the data)."""
    finished: bool = True
    """Ended with end-of-sequence rather than by the length limit."""
    source: str = "policy"
    """`policy`, `reference` or `data`: who wrote it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Duel:
    """Two responses to one prompt, about to be compared. The id exists before anybody is asked."""

    id: str
    batch: int
    """Index of the training batch it belongs to; evaluation duels have the batch of their policy version."""
    prompt: Prompt
    first: Candidate
    second: Candidate
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What the agent wants to remember of its choice (acquisition value, ensemble member, ...); JSON-able."""

    @staticmethod
    def make_id(run: str, batch: int, slot: int, prompt: Prompt, first: Candidate, second: Candidate) -> str:
        """Content address: the same comparison in the same slot of the same batch of the same run has the same id."""
        content = repr((run, batch, slot, prompt.id, first.token_ids or first.text, second.token_ids or second.text))
        return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


class LabelSource(StrEnum):
    """Who said which response is better."""

    ORACLE = "oracle"
    """Paid for."""
    SYNTHETIC = "synthetic"
    """The agent itself: costs nothing, never reached the oracle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the oracle says of one duel. Exactly one of `probability` and `failure` is set."""

    duel_id: str
    probability: float | None = None
    """That the first response is the better one, in [0, 1]; 0.5 is a tie."""
    failure: str | None = None
    """Why there is no verdict (unparsable, refused, timed out); a failure is recorded and not charged."""
    price: float = 0.0
    """In the run's currency."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """A labelled duel."""

    duel: Duel
    label: float
    """1.0: first wins, 0.0: second wins, 0.5: a tie."""
    source: LabelSource = LabelSource.ORACLE
    probability: float | None = None
    """The oracle's probability that the first wins, where it gave one."""

    @property
    def winner(self) -> Candidate:
        """The preferred response; the first one in a tie."""
        return self.duel.first if self.label >= 0.5 else self.duel.second

    @property
    def loser(self) -> Candidate:
        """The other response."""
        return self.duel.second if self.label >= 0.5 else self.duel.first


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """What the learner gets as batch `index`: it makes weights version `index + 1` of it."""

    index: int
    preferences: tuple[Preference, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
