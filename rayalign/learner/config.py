"""Settings of the learner."""

from __future__ import annotations

from dataclasses import dataclass, field

from rayalign.errors import ConfigError, did_you_mean
from rayalign.system.nodes import check_selector

STRATEGIES = ("plain", "ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters (PEFT)."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = 32.0
    """Scale: adapters are multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapters' input; 0 is off."""
    target_modules: str = "all-linear"
    """PEFT's target_modules: `all-linear` or comma-separated module names."""


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How preferences become weights."""

    strategy: str = "plain"
    """plain (one worker), ddp, or DeepSpeed zero1, zero2, zero3."""
    num_workers: int = 1
    """Ray Train workers; plain needs exactly 1."""
    offload: bool = False
    """DeepSpeed only: optimizer state (and, with zero3, parameters) on the CPU."""
    cpus_per_worker: float = 1.0
    """Ray CPUs each worker reserves."""
    gpus_per_worker: float = 0.0
    """Ray GPUs each worker reserves; fractions collocate it with rollout replicas."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that workers may run on, e.g. {"role": "learner"} (`rayalign.system.nodes`); empty: any."""
    threads_per_worker: int = 0
    """Torch threads of each worker on a CPU; 0 takes the whole CPUs it reserves, at least 1."""
    learning_rate: float = 5e-7
    """AdamW's peak learning rate. 0 computes losses and changes nothing."""
    schedule: str = "constant"
    """constant or cosine (to 0 at the end of the label budget)."""
    warmup_batches: int = 0
    """Batches of linear warm-up; 0 starts at the peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    max_grad_norm: float = 1.0
    """Gradient norm is clipped to this; 0 never clips."""
    dtype: str = "float32"
    """float32 or bfloat16 weights and activations (log-probabilities are always summed in float32)."""
    micro_batch_tokens: int = 16_384
    """Most tokens (padding counted, prompts included) per forward and worker; gradients accumulate beyond that."""
    logprob_chunk_tokens: int = 256
    """Tokens whose logits exist in float32 at the same time."""
    updates_per_batch: int = 1
    """Optimizer steps per batch."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Low-rank adapters; rank 0 trains all weights."""
    checkpoint_every: int = 10
    """Batches between checkpoints of weights and optimizer; a restart repeats at most so many, without new labels."""
    max_failures: int = 3
    """Worker restarts before the run gives up; -1 never gives up."""
    batch_timeout_s: float = 1800.0
    """Longest wait for a batch from the collector before the learner reports what it waits for."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(
                f"learner.strategy={self.strategy!r} is unknown. {did_you_mean(self.strategy, STRATEGIES)}"
            )
        if self.strategy == "plain" and self.num_workers != 1:
            raise ConfigError(
                f"learner.num_workers={self.num_workers} needs a strategy that shares work; "
                "set learner.strategy=ddp (or zero1, zero2, zero3), or learner.num_workers=1."
            )
        if self.offload and not self.strategy.startswith("zero"):
            raise ConfigError(
                f"learner.offload needs DeepSpeed, but learner.strategy={self.strategy!r}; use zero2 or zero3."
            )
        for name in (
            "num_workers",
            "micro_batch_tokens",
            "logprob_chunk_tokens",
            "updates_per_batch",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"learner.{name}={getattr(self, name)} must be at least 1.")
        if self.learning_rate < 0:
            raise ConfigError(f"learner.learning_rate={self.learning_rate} must not be negative.")
        if self.schedule not in ("constant", "cosine"):
            raise ConfigError(f"learner.schedule={self.schedule!r} must be 'constant' or 'cosine'.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"learner.dtype={self.dtype!r} must be 'float32' or 'bfloat16'.")
        check_selector("learner.nodes", self.nodes)
