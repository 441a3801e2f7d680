"""How much memory each role of a run needs, worked out from the policy's config: no weights are loaded.

    per process:  weights + gradients + optimizer + reference + activations      the learner
                  weights + KV cache                                             an engine
                  two copies of the weights                                      a scorer

What ZeRO shards is divided by the number of workers (Rajbhandari et al. 2020, section 5): the optimizer's state (1),
the gradients too (2), the weights too (3). Parameters are counted exactly; activations are what decoders like Llama
keep for the backward pass, for others a guess. Fragmentation and libraries come on top.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayalign.agents.agent import Agent
from rayalign.learner.config import LearnerConfig
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.replica import engine_name
from rayalign.runs.config import RunConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MASTER, MOMENTS = 4, 8
"""Bytes a trained parameter: a float32 master copy where one is kept, and AdamW's two moments."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What memory depends on."""

    parameters: int
    """All of them, tied ones once."""
    adapted: tuple[tuple[int, int], ...]
    """Inputs and outputs of every linear layer that LoRA's `all-linear` adapts: all but the head."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dtype: str = "float32"
    """Of the checkpoint."""

    @classmethod
    def of(cls, policy_dir: str | Path) -> ModelShape:
        """Of a Hugging Face directory: the model is built without memory for its weights, and counted."""
        import torch
        from torch import nn

        from rayalign.system.hf import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(str(policy_dir))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        text = config.get_text_config()
        stored = json.loads((Path(policy_dir) / "config.json").read_text())
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            adapted=tuple((m.in_features, m.out_features) for m in linear),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocabulary=text.vocab_size,
            dtype=str(stored.get("dtype") or stored.get("torch_dtype") or "float32"),
        )

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters of `rank` on every adapted layer: `rank x (in + out)` each."""
        return rank * sum(inputs + outputs for inputs, outputs in self.adapted)

    def kv_bytes(self, dtype: str) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES[dtype]

    def activation_values(self, checkpointing: bool) -> int:
        """Numbers that the backward pass needs of one token: per layer the inputs of both norms (and their float32
        copies), of all projections, rotated queries and keys, the attention's output, and four of the MLP's width.
        """
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 6 * self.hidden + 3 * query + 3 * key + 4 * self.intermediate
        return self.layers * self.hidden + layer if checkpointing else self.layers * layer


@dataclass(frozen=True, kw_only=True)
class RoleMemory:
    """One role's processes, which are alike."""

    role: str
    processes: int
    device: str
    """Where `parts` are: gpu or cpu."""
    parts: dict[str, int]
    """Bytes in each process."""
    host: dict[str, int] = field(default_factory=dict)
    """Bytes that were offloaded to the CPU, in each process."""

    @property
    def total(self) -> int:
        """Bytes of one process on its device."""
        return sum(self.parts.values())


def memory_of(
    config: RunConfig, agent: Agent, shape: ModelShape, prompt_tokens: int, batch_prompts: int
) -> list[RoleMemory]:
    """Every role of a run that holds the policy; `prompt_tokens` are those of the longest prompt that was seen."""
    roles = [
        learner_memory(config.learner, agent, shape, prompt_tokens + config.rollout.max_tokens, config.loop.batch_size)
    ]
    samples = max(p.n for p in agent.proposals()) if agent.proposals() else 1
    engine = engine_memory(config.rollout, shape, prompt_tokens, samples, batch_prompts)
    roles.append(engine)
    if agent.samples_reference():
        roles.append(
            RoleMemory(role="reference engine", processes=engine.processes, device=engine.device, parts=engine.parts)
        )
    if agent.needs_scorer():
        weights = shape.parameters * BYTES[config.scorer.dtype]
        tokens = config.scorer.max_batch_tokens
        parts = {
            "weights": 2 * weights,  # the current policy and the initial one
            "activations": 8 * shape.hidden * tokens * BYTES[config.scorer.dtype],
            "logits": config.scorer.logprob_chunk_tokens * shape.vocabulary * 4,
        }
        device = "gpu" if config.scorer.gpus_per_replica > 0 else "cpu"
        roles.append(RoleMemory(role="scorer", processes=config.scorer.num_replicas, device=device, parts=parts))
    return roles


def learner_memory(config: LearnerConfig, agent: Agent, shape: ModelShape, longest: int, batch_size: int) -> RoleMemory:
    """One learner worker. `longest`: tokens of the longest sequence, prompt and response."""
    size, rank = BYTES[config.dtype], config.lora.rank
    zero = int(config.strategy.removeprefix("zero")) if config.strategy.startswith("zero") else 0
    shards = [config.num_workers if zero >= stage else 1 for stage in (1, 2, 3)]
    adapters = shape.adapters(rank)
    trained = adapters if rank else shape.parameters
    adapter_size = size if zero else 4  # elsewhere adapters are float32
    trained_size = adapter_size if rank else size
    keeps_master = zero > 0 or trained_size < 4  # DeepSpeed keeps its own, whatever the weights are
    parts = {
        "weights": (shape.parameters * size + adapters * adapter_size) // shards[2],
        "gradients": trained * trained_size * (2 if config.strategy == "ddp" else 1) // shards[1],  # and DDP's buckets
        "optimizer": trained * (MOMENTS + (MASTER if keeps_master else 0)) // shards[0],
    }
    if agent.needs_reference() and not rank:
        parts["reference"] = shape.parameters * size // shards[2]
    tokens = min(
        max(config.micro_batch_tokens, 2 * longest),  # a single duel is always allowed
        2 * -(-batch_size // config.num_workers) * longest,
    )
    parts["activations"] = tokens * shape.activation_values(config.gradient_checkpointing) * size
    parts["logits"] = 2 * min(config.logprob_chunk_tokens, tokens) * shape.vocabulary * 4
    host: dict[str, int] = {}
    if config.offload:
        host = {"optimizer": parts.pop("optimizer")}
        if zero == 3:
            host["weights"] = parts.pop("weights")
    device = "gpu" if config.gpus_per_worker > 0 else "cpu"
    return RoleMemory(role="learner", processes=config.num_workers, device=device, parts=parts, host=host)


def engine_memory(
    config: RolloutConfig, shape: ModelShape, prompt_tokens: int, samples: int, batch_prompts: int
) -> RoleMemory:
    """One rollout engine. vLLM on a GPU takes the share of it that it is given, whatever it needs."""
    device = "gpu" if config.gpus_per_replica > 0 else "cpu"
    dtype = shape.dtype if config.dtype == "auto" else config.dtype
    dtype = "float32" if dtype == "float16" and device == "cpu" else dtype
    parts = {"weights": shape.parameters * BYTES[dtype] // (config.vllm.tensor_parallel if device == "gpu" else 1)}
    row = prompt_tokens + config.max_tokens
    rows = samples * -(-batch_prompts // max(1, config.num_replicas))
    if engine_name(config) == "vllm":
        if device == "cpu":
            parts["KV cache"] = config.vllm.kv_cache_gib * GIB
        else:
            parts["KV cache, at full speed"] = min(rows, config.vllm.max_sequences) * row * shape.kv_bytes(dtype)
    else:
        tokens = min(max(config.max_batch_tokens, samples * row), rows * row)
        parts["KV cache"] = tokens * shape.kv_bytes(dtype)
        parts["logits"] = min(rows, max(1, tokens // row)) * shape.vocabulary * 4
    return RoleMemory(role="engine", processes=max(1, config.num_replicas), device=device, parts=parts)


def total(roles: Sequence[RoleMemory], device: str) -> int:
    """Bytes of all processes on `device`, offloaded ones counted on the CPU."""
    on_device = sum(role.processes * role.total for role in roles if role.device == device)
    offloaded: Any = sum(role.processes * sum(role.host.values()) for role in roles) if device == "cpu" else 0
    return on_device + offloaded
