"""One model, an engine mostly, and the Ray actor that runs it."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from rayalign.errors import ConfigError
from rayalign.rollout.config import PoolConfig, RolloutConfig
from rayalign.rollout.engine import Engine, Model
from rayalign.rollout.weights import Weights
from rayalign.types import Prompt


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


def make_engine(config: RolloutConfig, policy_dir: str | Path) -> Engine:
    """The engine that `config` asks for, with the initial policy loaded."""
    device = "cuda" if config.gpus_per_replica > 0 else "cpu"
    if engine_name(config) == "vllm":
        from rayalign.rollout.vllm_engine import VllmEngine

        return VllmEngine(policy_dir, config, device=device)
    from rayalign.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(policy_dir, dtype=config.dtype, device=device, max_batch_tokens=config.max_batch_tokens)


Make = Callable[[Any, str], Model]
"""`make(config, policy_dir)`: a model with the initial policy loaded; picklable."""


class Replica:
    """The actor. Requests run one at a time; `ping` answers while one is running."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._model: Any = None

    def __repr__(self) -> str:
        return self.name

    def start(self, make: Make, config: PoolConfig, policy_dir: str, weights: Weights | None) -> tuple[int, str]:
        """Load the initial policy, then `weights`. Not in the constructor, so that its errors arrive whole."""
        import torch

        torch.set_num_threads(config.threads)
        self._model = make(config, policy_dir)
        return (self._model.version, "") if weights is None else self.load(weights)

    def load(self, weights: Weights) -> tuple[int, str]:
        """Run other weights; returns the version and checksum read back from the model."""
        found = self.model.load(weights)
        return self.model.version, found

    def ask(
        self, method: str, prompts: Sequence[Prompt], columns: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> list[Any]:
        """See `ModelPool.map`."""
        return getattr(self.model, method)(prompts, **columns, **arguments)

    def sleep(self) -> None:
        """See `Model.sleep`."""
        self.model.sleep()

    def wake(self) -> None:
        """See `Model.wake`."""
        self.model.wake()

    # -- vLLM's own weight transfer ------------------------------------------------------------------------------
    def adopt(self, weights: Weights) -> tuple[int, str]:
        """Count as `weights` what vLLM's own transfer has brought; returns the version and checksum read back."""
        found = self._transferable().adopt(weights)
        return self.model.version, found

    def weight_transfer(self, step: str, payload: dict[str, Any]) -> None:
        """One step of vLLM's own weight transfer; see `native_transfer`."""
        self._transferable().weight_transfer(step, payload)

    def _transferable(self) -> Any:
        if not hasattr(self.model, "weight_transfer"):
            raise ConfigError("native weight transfer is vLLM's; set rollout.engine='vllm', or use RolloutPool.sync.")
        return self.model

    @ray.method(concurrency_group="health")
    def ping(self) -> dict[str, str | int]:
        """That it lives, and where."""
        return {"name": self.name, "host": socket.gethostname(), "pid": os.getpid()}

    @property
    def model(self) -> Any:
        """The model, once started."""
        assert self._model is not None, f"{self.name} was asked before it was started"
        return self._model
