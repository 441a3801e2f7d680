"""What travels between the endpoint and the run: questions and answers, as the collector's methods take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rayalign.errors import RayalignError
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.engine import Sampling
from rayalign.serve.users.book import Told
from rayalign.types import Candidate, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class UserQuestion:
    """What a user asks, and what they will take for an answer."""

    prompt: Prompt
    """Encoded; the run knows it by another id."""
    sampling: Sampling
    """`n` are the answers that are wanted."""
    owner: str = ""
    """Who asks; empty where users have no names."""
    comparable: bool = False
    """Whether two answers may be shown for the user to choose; needs the run's own sampling."""
    seed: int | None = None
    """Of the samples; None: the run's."""
    stops: tuple[str, ...] = ()
    """An answer is shown up to the first of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserAnswer:
    """What is shown, in this order."""

    choices: list[Candidate]
    sampled_tokens: int
    """Tokens of all samples, those that are not shown included."""
    comparison: str = ""
    """Id under which the user chooses between the two; empty: nothing is asked."""
    expires: float = 0.0
    """When that ends, seconds since the epoch."""


class Online(Protocol):
    """What the endpoint asks of a run."""

    def describe(self) -> tuple[str, RolloutConfig]:
        """Directory of the policy, and how it is sampled."""

    def answer(self, questions: Sequence[UserQuestion]) -> list[UserAnswer | RayalignError] | None:
        """An answer or an error per question; None: the run is not ready yet, ask again."""

    def choose(self, name: str, choice: str, owner: str) -> Told:
        """See `Book.choose`."""

    def choices(self, names: Sequence[str]) -> list[str | None]:
        """See `Book.choices`."""
