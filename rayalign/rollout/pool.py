"""The rollout pool: engines that sample, in Ray actors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayalign.errors import ConfigError, WeightSyncError
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.engine import Sampling
from rayalign.rollout.model_pool import ModelPool
from rayalign.rollout.native_transfer import ReplicaClient
from rayalign.rollout.replica import engine_name, make_engine
from rayalign.rollout.weights import Weights
from rayalign.types import Candidate, Prompt


class RolloutPool(ModelPool):
    """`num_replicas` engines behind one `generate`. With `num_replicas=0` one engine inside this process, no Ray."""

    config: RolloutConfig

    def __init__(
        self,
        config: RolloutConfig,
        policy_dir: str | Path,
        *,
        name: str = "rollout",
        actor_options: Mapping[str, Any] | None = None,
        wait: bool = True,
    ) -> None:
        engine_name(config)  # an engine that is not installed is an error here, not in an actor
        self._tokens = self._responses = 0
        super().__init__(make_engine, config, policy_dir, name=name, actor_options=actor_options, wait=wait)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, timeout_s: float | None = None
    ) -> list[list[Candidate]]:
        """`sampling.n` candidates for each prompt, in prompt order, all sampled by weights version `version`.

        What is sampled for a prompt depends on the seed and its position. Raises what `map` raises.
        """
        groups: list[list[Candidate]] = self.map(
            "generate",
            prompts,
            columns={"positions": range(len(prompts))},
            arguments={"sampling": sampling, "seed": seed},
            timeout_s=timeout_s,
        )
        for prompt, group in zip(prompts, groups, strict=True):
            for candidate in group:
                if candidate.policy_version != self.version:
                    raise WeightSyncError(
                        f"pool {self.name!r}: prompt {prompt.id!r} was answered by weights version "
                        f"{candidate.policy_version} instead of {self.version}."
                    )
        self._responses += sum(map(len, groups))
        self._tokens += sum(len(candidate.token_ids) for group in groups for candidate in group)
        return groups

    def stats(self) -> dict[str, float]:
        """Totals since the start: tokens, responses, seconds sampling, syncs, seconds syncing, replicas replaced."""
        totals = super().stats()
        seconds = totals["seconds"]
        return {
            "tokens": self._tokens,
            "responses": self._responses,
            "tokens_per_second": self._tokens / seconds if seconds else 0.0,
            **totals,
        }

    # -- vLLM's own weight transfer ------------------------------------------------------------------------------
    def confirm(self, weights: Weights) -> None:
        """Like `sync`, for weights that have reached the engines by `native_client` already: only read them back."""
        if self.config.num_replicas == 0:
            raise ConfigError("native weight transfer goes to replicas, but rollout.num_replicas=0; use `sync`.")
        self._renew(weights, "adopt")

    def native_client(self) -> ReplicaClient:
        """What vLLM's trainer-side transfer engines talk to; good until a replica is replaced."""
        actors = [(slot.actor, slot.name) for slot in self._slots if slot.actor is not None]
        ranks = self.config.vllm.tensor_parallel
        return ReplicaClient([a for a, _ in actors], [n for _, n in actors], ranks, self.config.sync_timeout_s)
