"""The one protocol that every generator speaks, whatever runs underneath; and what all models in a pool have."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rayalign.errors import ConfigError
from rayalign.rollout.weights import Weights
from rayalign.types import Candidate, Prompt


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn."""

    n: int = 2
    """Responses per prompt."""
    temperature: float = 0.7
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus mass; 1 keeps the whole distribution."""
    max_tokens: int = 64
    """Longest response, in tokens, end-of-sequence counted."""
    min_tokens: int = 0
    """Tokens that come before end-of-sequence may be drawn; 0 allows a response of nothing else."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"rollout.n={self.n} must be at least 1.")
        if self.temperature < 0:
            raise ConfigError(f"rollout.temperature={self.temperature} must not be negative; 0 is greedy.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"rollout.top_p={self.top_p} must be in (0, 1].")
        if self.max_tokens < 1:
            raise ConfigError(f"rollout.max_tokens={self.max_tokens} must be at least 1.")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(f"min_tokens={self.min_tokens} must be from 0 to max_tokens={self.max_tokens}.")


def prompt_seed(seed: int, position: int) -> int:
    """The seed of one prompt of a request: 63 bits, unrelated to those of its neighbours."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest(), "big") >> 1


class Model(Protocol):
    """Anything that holds the policy in a pool. Not thread-safe: one request at a time."""

    @property
    def version(self) -> int:
        """Weights version that it runs; 0 is the initial policy."""

    def load(self, weights: Weights) -> str:
        """Run other weights from now on. Returns the checksum read back from what the model holds, for
        comparison with `weights.checksum`; on an error the old version stays in force or the model is unusable.
        """

    def sleep(self) -> None:
        """Give device memory back until `wake` (collocated learners); a no-op where it makes no sense."""

    def wake(self) -> None:
        """Undo `sleep`."""


class Engine(Model, Protocol):
    """A language model that samples."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, positions: Sequence[int] | None = None
    ) -> list[list[Candidate]]:
        """`sampling.n` candidates for each prompt, in order. The result depends on the arguments and weights alone.

        The randomness of a prompt comes from `(seed, position)`: `positions` (default 0, 1, ...) lets a request be
        cut into pieces without changing what is drawn.
        """
