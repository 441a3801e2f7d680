"""Memory of the roles that hold the policy: learner, engine, engine at the reference, scorer.

    per process:  weights + gradients + optimizer + reference + activations      the learner
                  weights + KV cache                                             an engine
                  two copies of the weights                                      a scorer

What ZeRO shards is divided by the number of workers (Rajbhandari et al. 2020, section 5): the optimizer's state (1),
the gradients too (2), the weights too (3). Parameters are counted exactly; activations are what decoders like Llama
keep for the backward pass, for others a guess. Fragmentation and libraries come on top.
"""

from __future__ import annotations

from rayalign.agents.agent import Agent
from rayalign.estimate.role import GIB, RoleMemory
from rayalign.estimate.shape import BYTES, ModelShape
from rayalign.learner.config import LearnerConfig
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.replica import engine_name
from rayalign.scoring.config import ScorerConfig

MASTER, MOMENTS = 4, 8
"""Bytes a trained parameter: a float32 master copy where one is kept, and AdamW's two moments."""


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
    return RoleMemory(
        role="learner",
        processes=config.num_workers,
        device=device,
        parts=parts,
        host=host,
        gpus=config.gpus_per_worker,
    )


def engine_memory(
    config: RolloutConfig, shape: ModelShape, prompt_tokens: int, samples: int, batch_prompts: int
) -> RoleMemory:
    """One rollout engine. vLLM on a GPU takes the share of it that it is given, whatever it needs."""
    device = "gpu" if config.gpus_per_replica > 0 else "cpu"
    dtype = shape.dtype if config.dtype == "auto" else config.dtype
    dtype = "float32" if dtype == "float16" and device == "cpu" else dtype
    vllm = engine_name(config) == "vllm"
    gpus = config.vllm.tensor_parallel if vllm and device == "gpu" else 1
    parts = {"weights": shape.weights(dtype) // gpus}
    row = prompt_tokens + config.max_tokens
    rows = samples * -(-batch_prompts // max(1, config.num_replicas))
    if vllm:
        if device == "cpu":
            parts["KV cache"] = config.vllm.kv_cache_gib * GIB
        else:  # keys and values are divided by heads
            cache = min(rows, config.vllm.max_sequences) * row * shape.kv_bytes(dtype)
            parts["KV cache, at full speed"] = cache // min(gpus, shape.kv_heads)
    else:
        tokens = min(max(config.max_batch_tokens, samples * row), rows * row)
        parts["KV cache"] = tokens * shape.kv_bytes(dtype)
        parts["logits"] = min(rows, max(1, tokens // row)) * shape.vocabulary * 4
    return RoleMemory(
        role="engine",
        processes=max(1, config.num_replicas),
        device=device,
        parts=parts,
        gpus=config.gpus_of_replica if config.num_replicas else 0.0,
        spread=gpus,
        asleep=0,
        claims=config.vllm.gpu_memory_utilization if vllm and device == "gpu" else 0.0,
    )


def scorer_memory(config: ScorerConfig, shape: ModelShape) -> RoleMemory:
    """One scorer: the current policy, and the initial one."""
    weights = shape.weights(config.dtype)
    parts = {
        "weights": 2 * weights,
        "activations": shape.forward_values * config.max_batch_tokens * BYTES[config.dtype],
        "logits": config.logprob_chunk_tokens * shape.vocabulary * 4,
    }
    return RoleMemory(
        role="scorer",
        processes=max(1, config.num_replicas),
        device="gpu" if config.gpus_per_replica > 0 else "cpu",
        parts=parts,
        gpus=config.gpus_per_replica if config.num_replicas else 0.0,
        asleep=weights,  # the initial policy stays
    )
