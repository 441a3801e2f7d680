"""The seam to vLLM's own weight-transfer engines (NCCL, CUDA IPC): weights go from GPU to GPU, the pool checks them.

    learner, rank 0                               replicas                         pool
    trainer.send_weights() -- ReplicaClient -->   start, update, finish
                           ================== GPU memory ==============>
    publish(weights)       ------------------------------------------------------> confirm(weights): read back

    client = pool.native_client()
    trainer = WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=ModuleSource(model))

Needs `rollout.vllm.transport` to be `nccl` or `ipc`. The weights still go to the object store once, for the read-back
and for replacements of dead replicas. Not run on a GPU yet, and the loop does not use it by itself: it syncs through
the object store whatever the transport. `confirm` is tested on CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from rayalign.errors import WaitError


class ReplicaClient:
    """vLLM's `VLLMWeightSyncClient` for the replicas of a pool; picklable, so that a learner can hold it."""

    def __init__(self, actors: Sequence[Any], names: Sequence[str], ranks_each: int, timeout_s: float) -> None:
        self._actors, self._names, self._ranks_each, self._timeout_s = list(actors), list(names), ranks_each, timeout_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each replica with the ranks that follow those of the replica before it."""
        payloads = []
        for i in range(len(self._actors)):
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] += i * self._ranks_each
            payloads.append({"init_info": info})
        self._ask("init_weight_transfer_engine", payloads)

    def start_weight_update(self) -> None:
        """Prepare all replicas for new weights."""
        self._ask("start_weight_update", [{}] * len(self._actors))

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Have all replicas receive one part of the weights."""
        self._ask("update_weights", [{"update_info": update_info}] * len(self._actors))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Have all replicas put the weights into force; the pool counts them once it has confirmed them."""
        self._ask("finish_weight_update", [{}] * len(self._actors))

    def _ask(self, step: str, payloads: Sequence[dict[str, Any]]) -> None:
        refs = [actor.weight_transfer.remote(step, p) for actor, p in zip(self._actors, payloads, strict=True)]
        done, late = ray.wait(refs, num_returns=len(refs), timeout=self._timeout_s)
        if late:
            names = ", ".join(name for name, ref in zip(self._names, refs, strict=True) if ref in late)
            raise WaitError(f"replica {names}: {step} took more than rollout.sync_timeout_s={self._timeout_s:g}.")
        ray.get(done, timeout=self._timeout_s)
