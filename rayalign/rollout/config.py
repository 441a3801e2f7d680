"""Settings of the pools of models, of the rollout pool, and of the engines that it runs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rayalign.errors import ConfigError, did_you_mean
from rayalign.system.nodes import check_selector

if TYPE_CHECKING:
    from rayalign.rollout.engine import Sampling

ENGINES = ("auto", "transformers", "vllm")
DTYPES = ("auto", "float32", "bfloat16", "float16")
CHAT = ("auto", "always", "never")
TRANSPORTS = ("object_store", "ipc", "nccl")


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """What only the vLLM engine reads."""

    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that vLLM may use; lower it where a learner lives on the same GPU."""
    kv_cache_gib: int = 1
    """CPU only: whole GiB reserved for the KV cache. On a GPU the cache takes what `gpu_memory_utilization` leaves."""
    enforce_eager: bool = True
    """Skip graph capture and compilation: starts faster; on GPUs long runs gain by setting it to False."""
    tensor_parallel: int = 1
    """GPUs per replica that share one model; above 1 the replica reserves as many GPUs."""
    max_sequences: int = 256
    """Responses decoded at the same time."""
    enable_lora: bool = False
    """Reserve room for one LoRA adapter, so that syncs send adapters only."""
    max_lora_rank: int = 64
    """Largest adapter rank accepted; vLLM reserves memory for it."""
    transport: str = "object_store"
    """object_store (shared memory on one node, a copy between nodes); `nccl` and `ipc` also start the receiving side
    of vLLM's own transfers, for learners that send with `RolloutPool.native_client`; see `rollout.native_transfer`."""

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"rollout.vllm.gpu_memory_utilization={self.gpu_memory_utilization} must be in (0, 1]: it is a share."
            )
        for name in ("kv_cache_gib", "tensor_parallel", "max_sequences", "max_lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.vllm.{name}={getattr(self, name)} must be at least 1.")
        if self.transport not in TRANSPORTS:
            raise ConfigError(
                f"rollout.vllm.transport={self.transport!r} is unknown. {did_you_mean(self.transport, TRANSPORTS)}"
            )


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How many copies of a model there are, what each reserves, and how long its callers wait."""

    section: ClassVar[str] = ""
    """Name of the settings' section, for messages."""

    num_replicas: int = 1
    """Ray actors that each run one model; 0 runs one inside the calling process."""
    cpus_per_replica: float = 1.0
    """Ray CPUs each replica reserves."""
    gpus_per_replica: float = 0.0
    """Ray GPUs each replica reserves; a fraction collocates it with others, 0 runs on the CPU."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that replicas may run on, e.g. {"role": "rollout"} (`rayalign.system.nodes`); empty: any."""
    threads_per_replica: int = 0
    """Threads each replica computes with; 0 takes the whole CPUs it reserves, at least 1."""
    chunk_prompts: int = 0
    """Prompts handed to a replica at a time; 0 makes two chunks per replica, or one chunk for a single replica."""
    start_timeout_s: float = 300.0
    """Longest wait for a replica to be placed and to load the model."""
    request_timeout_s: float = 900.0
    """Longest wait for one chunk; after it the replica counts as dead and the chunk is redone by another."""
    sync_timeout_s: float = 300.0
    """Longest wait for all replicas to load new weights."""
    max_restarts: int = 3
    """Replicas replaced within one request before it gives up; 0 never replaces."""

    def __post_init__(self) -> None:
        for name in (
            "num_replicas",
            "cpus_per_replica",
            "gpus_per_replica",
            "threads_per_replica",
            "chunk_prompts",
            "max_restarts",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{self.section}.{name}={getattr(self, name)} must not be negative.")
        for name in ("start_timeout_s", "request_timeout_s", "sync_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"{self.section}.{name}={getattr(self, name)} must be positive: it is a wait in seconds."
                )
        check_selector(f"{self.section}.nodes", self.nodes)

    @property
    def threads(self) -> int:
        """Threads each replica computes with."""
        return self.threads_per_replica or max(1, int(self.cpus_per_replica))

    @property
    def gpus_of_replica(self) -> float:
        """Ray GPUs of a whole replica."""
        return self.gpus_per_replica

    def environment(self) -> dict[str, str]:
        """Environment variables that a replica's process needs before it imports anything."""
        return {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(PoolConfig):
    """How prompts become candidates."""

    section: ClassVar[str] = "rollout"

    engine: str = "auto"
    """transformers, vllm, or auto: vllm where replicas have a GPU and vLLM is installed, else transformers."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus mass; 1 keeps the whole distribution."""
    max_tokens: int = 64
    """Longest response, in tokens, end-of-sequence counted."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens; a longer one is an error before anything is bought, never a silent cut."""
    chat: str = "auto"
    """Chat template: auto applies it where the tokenizer has one, always insists on it, never writes plain text."""
    dtype: str = "auto"
    """Weights and activations: float32, bfloat16, float16, or auto (what the checkpoint says; on a CPU,
    float16 is read as float32)."""
    max_batch_tokens: int = 65_536
    """Transformers only: most tokens (prompt, response and padding of all rows) decoded as one batch."""
    vllm: VllmSettings = field(default_factory=VllmSettings)
    """What only the vLLM engine reads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("engine", ENGINES), ("dtype", DTYPES), ("chat", CHAT)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"rollout.{name}={value!r} is unknown. {did_you_mean(str(value), known)}")
        if self.temperature < 0:
            raise ConfigError(f"rollout.temperature={self.temperature} must not be negative; 0 is greedy.")
        for name in ("max_tokens", "max_prompt_tokens", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name}={getattr(self, name)} must be at least 1.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"rollout.top_p={self.top_p} must be in (0, 1].")

    def sampling(self, n: int, **changes: Any) -> Sampling:
        """How `n` responses per prompt are drawn by these settings; `changes` override single fields."""
        from rayalign.rollout.engine import Sampling

        fields = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return Sampling(n=n, **(fields | changes))

    @property
    def gpus_of_replica(self) -> float:
        """Ray GPUs of a whole replica: of all that share its model."""
        return self.gpus_per_replica * self.vllm.tensor_parallel

    def environment(self) -> dict[str, str]:
        """Environment variables that an engine's process needs before it imports anything."""
        variables = super().environment() | {
            "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the actor's own process, and dies with it
        }
        if self.gpus_per_replica == 0:
            variables |= {
                "VLLM_CPU_KVCACHE_SPACE": str(self.vllm.kv_cache_gib),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # replicas that bind themselves all take the same cores
            }
        return variables
