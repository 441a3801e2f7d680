"""Settings of the scorer pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rayalign.errors import ConfigError
from rayalign.rollout.config import PoolConfig


@dataclass(frozen=True, kw_only=True)
class ScorerConfig(PoolConfig):
    """Workers that hold the current policy for agents that ask it; started only for those."""

    section: ClassVar[str] = "scorer"

    dtype: str = "float32"
    """Weights and activations: float32 or bfloat16; log-probabilities and features are summed in float32."""
    max_batch_tokens: int = 16_384
    """Most tokens (prompt, response and padding of all rows) in one forward."""
    logprob_chunk_tokens: int = 256
    """Tokens whose logits exist in float32 at the same time."""
    lora_rank: int = 8
    """Rank of the adapters whose gradients are the features (ActiveDPO), where the learner trains none itself."""
    max_gradient_tokens: int = 2048
    """Most tokens in one forward and backward (ActiveDPO). Activations are kept for the way back: about 1.6 MB a token
    in float32 where the model has 135M parameters in 30 layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"scorer.dtype={self.dtype!r} must be 'float32' or 'bfloat16'.")
        for name in ("max_batch_tokens", "logprob_chunk_tokens", "lora_rank", "max_gradient_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"scorer.{name}={getattr(self, name)} must be at least 1.")
