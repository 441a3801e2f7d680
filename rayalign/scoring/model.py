"""The model behind a scorer: the current policy, beside it the initial one, and forwards over padded batches.

Shapes: P prompts    R rows (responses of all prompts)    T tokens    N candidates of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayalign.agents.scorer import DropoutMoments, Groups
from rayalign.errors import ConfigError, DataError
from rayalign.learner.logprobs import PolicyModule
from rayalign.learner.microbatch import pad_rows
from rayalign.rollout.live_model import LiveModel
from rayalign.rollout.weights import Weights
from rayalign.scoring.config import ScorerConfig
from rayalign.scoring.dropout import HeadDropout
from rayalign.scoring.gradients import LoraGradients
from rayalign.types import Prompt

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of a response to it."""


class ScorerModel:
    """Implements `rayalign.agents.scorer.Scorer` and `rayalign.rollout.engine.Model`."""

    def __init__(self, config: ScorerConfig, policy_dir: str) -> None:
        self.config, self.policy_dir = config, policy_dir
        self.device = torch.device("cuda" if config.gpus_per_replica > 0 else "cpu")
        self.live = LiveModel(self._load(), self.device)

    # -- what a pool asks ----------------------------------------------------------------------------------------
    @property
    def version(self) -> int:
        """Weights version that it holds; 0 is the initial policy."""
        return self.live.version

    def load(self, weights: Weights) -> str:
        """See `Model.load`."""
        return self.live.load(weights)

    def sleep(self) -> None:
        """See `Model.sleep`."""
        self.live.sleep()

    def wake(self) -> None:
        """See `Model.wake`."""
        self.live.wake()

    # -- what an agent asks --------------------------------------------------------------------------------------
    def logprobs(self, prompts: Sequence[Prompt], groups: Groups, of: str = "policy") -> list[np.ndarray]:
        """See `Scorer.logprobs`."""
        with self.module(of) as model, torch.no_grad():
            policy = PolicyModule(model, self.config.logprob_chunk_tokens)
            return self.by_prompt(prompts, groups, lambda ids, mask, response: policy(ids, mask, response))

    def dropout_logprobs(
        self, prompts: Sequence[Prompt], groups: Groups, *, rate: float, masks: int, seed: int, of: str = "policy"
    ) -> list[DropoutMoments]:
        """See `Scorer.dropout_logprobs`."""
        with self.module(of) as model:
            policy = PolicyModule(model, self.config.logprob_chunk_tokens)
            found = self.by_prompt(prompts, groups, HeadDropout(policy, rate=rate, masks=masks, seed=seed))
        columns = (np.reshape(moments_N3, (-1, 3)).T for moments_N3 in found)  # an empty group has no second axis
        return [DropoutMoments(mean_N=mean, std_N=std, variance_N=variance) for mean, std, variance in columns]

    def gradients(self, prompts: Sequence[Prompt], groups: Groups, *, dim: int, seed: int) -> list[np.ndarray]:
        """See `Scorer.gradients`."""
        rank, chunk = self.config.lora_rank, self.config.logprob_chunk_tokens
        with self.module("policy") as model:
            taken = LoraGradients(model, rank=rank, dim=dim, seed=seed, chunk_tokens=chunk)
            found = self.by_prompt(prompts, groups, taken, self.config.max_gradient_tokens)
        return [gradients.reshape(-1, dim) for gradients in found]  # an empty group has no second axis

    # -- for the methods ------------------------------------------------------------------------------------------
    @contextmanager
    def module(self, of: str) -> Iterator[Any]:
        """The Hugging Face model of the current policy or of the reference."""
        if of == "policy":
            yield self.live.model
        elif of != "reference":
            raise ConfigError(f"of={of!r} must be 'policy' or 'reference'.")
        elif self.live.peft is not None:  # adapters: the reference is the model without them
            with self.live.peft.disable_adapter():
                yield self.live.model
        else:
            yield self.live.model if self.version == 0 else self._reference

    def by_prompt(
        self,
        prompts: Sequence[Prompt],
        groups: Groups,
        forward: Callable[[Tensor, Tensor, Tensor], Tensor],
        max_tokens: int | None = None,
    ) -> list[np.ndarray]:
        """`forward(ids_RT, mask_RT, response_mask_RT)` gives a value (of any shape) per row; collected by prompt.

        Rows go through in batches of similar length, at most `max_tokens` (`max_batch_tokens`) tokens each.
        """
        rows = [(p.token_ids, c.token_ids) for p, group in zip(prompts, groups, strict=True) for c in group]
        for p, group in zip(prompts, groups, strict=True):
            if not p.token_ids or any(not c.token_ids for c in group):
                raise DataError(f"prompt {p.id!r} or one of its responses has no token ids; encode them first.")
        found: dict[int, np.ndarray] = {}
        for part in self._batches(rows, max_tokens or self.config.max_batch_tokens):
            values = forward(*(tensor.to(self.device) for tensor in pad_rows([rows[i] for i in part])))
            for i, value in zip(part, values.float().cpu().numpy(), strict=True):
                found[i] = value
        starts = np.cumsum([0, *map(len, groups)])
        return [np.array([found[i] for i in range(*span)], dtype=np.float32) for span in pairwise(starts)]

    def _batches(self, rows: Sequence[Row], max_tokens: int) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]) - len(rows[i][1]), i)):
            longest = sum(map(len, rows[batch[0] if batch else i]))
            if batch and (len(batch) + 1) * longest > max_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _load(self) -> Any:
        from rayalign.system.hf import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(self.policy_dir, dtype=getattr(torch, self.config.dtype))
        except (OSError, ValueError) as error:
            raise DataError(
                f"policy={self.policy_dir!r} can't be loaded as a causal language model: {error}"
            ) from error
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def _reference(self) -> Any:
        return self._load()
