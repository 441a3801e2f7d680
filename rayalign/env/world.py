"""What is behind a dueling bandit: where prompts come from and, where it is known, what is true.

A world knows no policy, no tokenizer and no oracle service. It is picklable and cheap to copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayalign.types import Prompt


class World:
    """Base class. A subclass without a known truth overrides only the prompts."""

    id: str = ""
    """Registered name, for messages."""

    # -- prompts: `token_ids` stays empty here, `rollout.encode` fills it in with the policy's tokenizer -------
    def prompt(self, index: int) -> Prompt:
        """Training prompt number `index >= 0` of an endless stream (a finite data set repeats in a new order)."""
        raise NotImplementedError

    def heldout(self, n: int) -> Sequence[Prompt]:
        """`n` evaluation prompts, never among the training prompts; fewer if there are not as many."""
        raise NotImplementedError

    def check_prompts(self) -> Sequence[Prompt]:
        """Every prompt that a run may draw, to be validated before a label is bought; empty if endless."""
        return ()

    def find(self, text: str) -> Prompt | None:
        """The prompt of this world that reads `text`, whoever asks it; None: there is none, or nobody can tell."""
        return None

    # -- truth ---------------------------------------------------------------------------------------------------
    @property
    def has_truth(self) -> bool:
        """Whether `reward` and `best_reward` are known."""
        return False

    def reward(self, prompt: Prompt, response: str) -> float:
        """`r*(x, y)`: the hidden reward, exact. Never shown to an agent."""
        raise NotImplementedError(f"{self.id or type(self).__name__} has no known reward")

    def best_reward(self, prompt: Prompt) -> float:
        """`max_y r*(x, y)`, exact."""
        raise NotImplementedError(f"{self.id or type(self).__name__} has no known best reward")

    @property
    def reward_scale(self) -> float:
        """Bradley-Terry: `P(y > y') = sigmoid(reward_scale * (r*(y) - r*(y')))`."""
        return 1.0

    # -- what a run needs beside the prompts -----------------------------------------------------------------
    def default_policy(self) -> str | None:
        """Hugging Face directory of an initial policy that suits this world; None: the user has to name one."""
        return None

    def defaults(self) -> Mapping[str, Any]:
        """Dotted settings that suit this world, e.g. `{"rollout.max_tokens": 14}`; the user's own win over them."""
        return {}
