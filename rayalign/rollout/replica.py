"""One engine, and the Ray actor that runs it."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from rayalign.errors import ConfigError
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.engine import Engine, Sampling
from rayalign.rollout.weights import Weights
from rayalign.types import Candidate, Prompt


def engine_name(config: RolloutConfig) -> str:
    """`transformers` or `vllm`: what `config.engine` means on this machine."""
    installed = importlib.util.find_spec("vllm") is not None
    if config.engine == "auto":
        return "vllm" if installed and config.gpus_per_replica > 0 else "transformers"
    if config.engine == "vllm" and not installed:
        raise ConfigError(
            "rollout.engine='vllm', but vLLM is not installed here. Install rayalign[vllm], or set "
            "rollout.engine='transformers'."
        )
    return config.engine


def engine_environment(config: RolloutConfig) -> dict[str, str]:
    """Environment variables that an engine's process needs before it imports anything."""
    environment = {
        "OMP_NUM_THREADS": str(config.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the actor's own process, and dies with it
    }
    if config.gpus_per_replica == 0:
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(config.vllm.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # replicas that bind themselves all take the same cores
        }
    return environment


def make_engine(config: RolloutConfig, policy_dir: str | Path) -> Engine:
    """The engine that `config` asks for, with the initial policy loaded."""
    device = "cuda" if config.gpus_per_replica > 0 else "cpu"
    if engine_name(config) == "vllm":
        from rayalign.rollout.vllm_engine import VllmEngine

        return VllmEngine(policy_dir, config, device=device)
    from rayalign.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(policy_dir, dtype=config.dtype, device=device, max_batch_tokens=config.max_batch_tokens)


class Replica:
    """The actor. Requests run one at a time; `ping` answers while one is running."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._engine: Engine | None = None

    def __repr__(self) -> str:
        return self.name

    def start(self, config: RolloutConfig, policy_dir: str, weights: Weights | None) -> tuple[int, str]:
        """Load the initial policy, then `weights`. Not in the constructor, so that its errors arrive whole."""
        import torch

        torch.set_num_threads(config.threads)
        self._engine = make_engine(config, policy_dir)
        return (self._engine.version, "") if weights is None else self.load(weights)

    def load(self, weights: Weights) -> tuple[int, str]:
        """Run other weights; returns the version and checksum read back from the engine."""
        found = self.engine.load(weights)
        return self.engine.version, found

    def adopt(self, weights: Weights) -> tuple[int, str]:
        """Count as `weights` what vLLM's own transfer has brought; returns the version and checksum read back."""
        found = self._transferable().adopt(weights)
        return self.engine.version, found

    def weight_transfer(self, step: str, payload: dict[str, Any]) -> None:
        """One step of vLLM's own weight transfer; see `native_transfer`."""
        self._transferable().weight_transfer(step, payload)

    def _transferable(self) -> Any:
        if not hasattr(self.engine, "weight_transfer"):
            raise ConfigError("native weight transfer is vLLM's; set rollout.engine='vllm', or use RolloutPool.sync.")
        return self.engine

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, positions: Sequence[int]
    ) -> list[list[Candidate]]:
        """See `Engine.generate`."""
        return self.engine.generate(prompts, sampling, seed, positions)

    def sleep(self) -> None:
        """See `Engine.sleep`."""
        self.engine.sleep()

    def wake(self) -> None:
        """See `Engine.wake`."""
        self.engine.wake()

    @ray.method(concurrency_group="health")
    def ping(self) -> dict[str, str | int]:
        """That it lives, and where."""
        return {"name": self.name, "host": socket.gethostname(), "pid": os.getpid()}

    @property
    def engine(self) -> Engine:
        """The engine, once started."""
        assert self._engine is not None, f"{self.name} was asked before it was started"
        return self._engine
