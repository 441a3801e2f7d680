"""What the policy is compared with: log-probabilities of the reference, computed once per duel.

The reference is the initial policy, or, where the agent says so (SELM), a later version: then the current weights
are copied when the batch comes that names them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayalign.agents.agent import Agent
from rayalign.errors import ConfigError
from rayalign.learner.config import LearnerConfig
from rayalign.learner.logprobs import PolicyModule
from rayalign.learner.microbatch import micro_batches
from rayalign.learner.policy import trainable
from rayalign.learner.strategies import Strategy
from rayalign.types import Preference


class Reference:
    """Knows the reference's log-probabilities of every duel it was asked for; saved with the checkpoint."""

    def __init__(self, agent: Agent, config: LearnerConfig, strategy: Strategy, frozen: Any) -> None:
        self.agent, self.config, self.strategy, self.frozen = agent, config, strategy, frozen
        self.version = 0
        self.known: dict[str, tuple[float, float]] = {}
        """Duel id -> log-probabilities of its first and second response, nats."""
        self._adapter: dict[str, Tensor] = {}  # of the reference, once it is not the initial policy any more

    @classmethod
    def of(cls, agent: Agent, config: LearnerConfig, policy: PolicyModule) -> Any:
        """What must be copied before the strategy takes `policy` over: a frozen copy, or nothing where adapters
        are trained (the reference is the model without them) or nobody asks for a reference.
        """
        if config.lora.rank or not agent.needs_reference():
            return None
        return copy.deepcopy(policy).requires_grad_(False).eval()

    # -- log-probabilities ------------------------------------------------------------------------------------------
    def logprobs(self, batch: int, preferences: Sequence[Preference]) -> dict[str, tuple[float, float]]:
        """Those of the batch's duels, first and second response; empty if the agent needs none."""
        if not self.agent.needs_reference():
            return {}
        self._move_to(self.agent.reference_version(batch), batch)
        wanted = [i for i, p in enumerate(preferences) if p.duel.id not in self.known]
        if wanted:
            for theirs in self.strategy.gather(self._compute(preferences, wanted)):
                self.known |= theirs
        return {p.duel.id: self.known[p.duel.id] for p in preferences}

    @torch.no_grad()
    def _compute(self, preferences: Sequence[Preference], wanted: Sequence[int]) -> dict[str, tuple[float, float]]:
        """This worker's share of the duels at the positions `wanted`."""
        strategy = self.strategy
        parts = micro_batches(preferences, wanted, strategy.rank, strategy.world_size, self.config.micro_batch_tokens)
        found: dict[str, tuple[float, float]] = {}
        with _Evaluating(self):
            for part in parts:
                logprob_R = self._forward(*strategy.on_device(part)).tolist()
                half = len(part.indices)
                for i, first, second in zip(part.indices, logprob_R[:half], logprob_R[half:], strict=False):
                    found[preferences[i].duel.id] = (first, second)
        return found

    def _forward(self, *tensors: Tensor) -> Tensor:
        if self.frozen is not None:
            return self.frozen(*tensors)
        # DDP's wrapper counts forwards; DeepSpeed's hooks sit on the modules but its engine has to know.
        return (self.strategy.policy if self.strategy.config.strategy == "ddp" else self.strategy.module)(*tensors)

    # -- a reference that moves ---------------------------------------------------------------------------------------
    def _move_to(self, version: int, current: int) -> None:
        if version == self.version:
            return
        if version != current:
            raise ConfigError(
                f"agent.reference_version({current})={version}, but the learner holds versions {self.version} and "
                f"{current} only. Move the reference when its version is the current one, and leave it there."
            )
        self.version, self.known = version, {}
        self._copy_policy()

    @torch.no_grad()
    def _copy_policy(self) -> None:
        strategy = self.strategy
        if self.frozen is None:
            parameters = trainable(strategy.policy)
            with strategy.gathered(list(parameters.values())):
                self._adapter = {name: p.detach().clone() for name, p in parameters.items()}
            return
        for ours, theirs in zip(self._parameters(), strategy.policy.parameters(), strict=True):
            with strategy.gathered([theirs]), strategy.gathered([ours], write=True):
                ours.copy_(theirs)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return list(self.frozen.parameters())

    # -- checkpoints ----------------------------------------------------------------------------------------------
    def save(self, folder: Path) -> None:
        """Write version, cache and, if it moved, weights; every worker calls it, rank 0 writes."""
        weights: dict[str, Tensor] = {}
        if self.version > 0 and self.frozen is None:
            weights = self._adapter
        elif self.version > 0:
            for i, parameter in enumerate(self._parameters()):
                with self.strategy.gathered([parameter]):
                    if self.strategy.rank == 0:
                        weights[str(i)] = parameter.detach().cpu().clone()
        if self.strategy.rank == 0:
            from safetensors.torch import save_file

            (folder / "reference.json").write_text(json.dumps({"version": self.version, "known": self.known}))
            if weights:
                save_file({k: v.cpu().contiguous() for k, v in weights.items()}, folder / "reference.safetensors")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        saved = json.loads((folder / "reference.json").read_text())
        self.version = saved["version"]
        self.known = {duel: (first, second) for duel, (first, second) in saved["known"].items()}
        if self.version == 0:
            return
        from safetensors.torch import load_file

        weights = load_file(folder / "reference.safetensors")
        if self.frozen is None:
            self._adapter = {k: v.to(self.strategy.device) for k, v in weights.items()}
            return
        for i, parameter in enumerate(self._parameters()):
            with self.strategy.gathered([parameter], write=True):
                parameter.copy_(weights[str(i)])


class _Evaluating:
    """The policy as the reference while entered: no dropout, and adapters off, or those of the reference in place."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.policy = reference.strategy.policy

    def __enter__(self) -> None:
        if self.reference.frozen is not None:
            return
        self.policy.eval()
        if self.reference._adapter:
            self._mine = self._exchange(self.reference._adapter)
        else:
            self._without: Any = self.policy.model.disable_adapter()  # type: ignore[operator,union-attr]
            self._without.__enter__()

    def __exit__(self, *exception: object) -> None:
        if self.reference.frozen is not None:
            return
        if self.reference._adapter:
            self._exchange(self._mine)
        else:
            self._without.__exit__(*exception)
        self.policy.train()

    @torch.no_grad()
    def _exchange(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put `values` into the adapters; returns what was there."""
        parameters = trainable(self.policy)
        with self.reference.strategy.gathered(list(parameters.values()), write=True):
            before = {name: p.detach().clone() for name, p in parameters.items()}
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
        return before
