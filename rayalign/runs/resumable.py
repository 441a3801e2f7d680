"""What `resume` may change about a run, and what it may not."""

from __future__ import annotations

from rayalign import config as settings
from rayalign.errors import ConfigError
from rayalign.ledger.ledger import Ledger
from rayalign.runs.config import RunConfig

_POOL = (
    "num_replicas", "cpus_per_replica", "gpus_per_replica", "nodes", "threads_per_replica", "chunk_prompts",
    "start_timeout_s", "request_timeout_s", "sync_timeout_s", "max_restarts", "max_batch_tokens",
)  # fmt: skip
_VLLM = (  # not enable_lora: what was written down to come back to is of the one kind or the other
    "gpu_memory_utilization", "kv_cache_gib", "enforce_eager", "tensor_parallel", "max_sequences", "transport",
)  # fmt: skip
_LOOP = (
    "budget", "shared_budget", "max_stalled_batches", "gate_timeout_s", "agent_checkpoint_every", "agent_device",
    "agent_threads", "sleep_engines", "collector_cpus", "collector_gpus", "collector_nodes",
)  # fmt: skip
_LEARNER = (
    "strategy", "num_workers", "offload", "cpus_per_worker", "gpus_per_worker", "nodes", "threads_per_worker",
    "micro_batch_tokens", "logprob_chunk_tokens", "gradient_checkpointing", "checkpoint_every", "max_failures",
    "batch_timeout_s",
)  # fmt: skip
_ORACLE = (
    "price", "num_replicas", "max_replicas", "target_ongoing", "cpus_per_replica", "gpus_per_replica", "nodes",
    "max_batch_size", "batch_wait_s", "request_timeout_s", "retries", "start_timeout_s", "health_check_period_s",
    "device", "micro_batch_tokens", "cache_size", "trust_remote_code", "judge.base_url", "judge.api_key_env",
    "judge.concurrency", "judge.calls_per_minute", "judge.timeout_s", "judge.retries", "judge.backoff_s",
    "judge.longest_pause_s", "judge.price", "judge.max_spend", "http.", "human.", "users.",
)  # fmt: skip
FREE_TO_CHANGE = (
    "run_dir", "logging.", "evaluation.every", "scorer.logprob_chunk_tokens", "scorer.max_gradient_tokens",
    *(f"rollout.vllm.{name}" for name in _VLLM),
    *(f"loop.{name}" for name in _LOOP),
    *(f"{section}.{name}" for section in ("rollout", "scorer") for name in _POOL),
    *(f"learner.{name}" for name in _LEARNER),
    *(f"{section}.{name}" for section in ("oracle", "evaluation.oracle") for name in _ORACLE),
)  # fmt: skip
"""Settings, or beginnings of their names, that may change between two parts of a run: where it computes, how long it
waits, how much it may spend. None changes what was already bought means, or, but for rounding, what is learned from
it."""


def check_changes(before: RunConfig, after: RunConfig, where: str) -> None:
    """Raises `ConfigError` if a run in `where` that was started with `before` can't go on with `after`."""
    # A service may have moved; any other target is another oracle.
    free = (*FREE_TO_CHANGE, "oracle.target") if before.oracle.kind == "http" else FREE_TO_CHANGE
    forbidden = [line for line in settings.diff(before, after) if not line.startswith(free)]
    if not forbidden:
        return
    for_learning = all(line.startswith(("learner.", "agent.")) for line in forbidden)
    way_out = f"`rayalign replay {where}` trains on its labels with other settings; or r" if for_learning else "R"
    raise ConfigError(
        f"resume can't change what the labels in {where} were bought for: {'; '.join(forbidden)}. {way_out}esume "
        "without these settings, or start a new run in another run_dir."
    )


def check_budget(before: RunConfig, after: RunConfig, ledger: Ledger, where: str) -> None:
    """Raises `ConfigError` if more labels would come after passes over the old ones that have already begun."""
    if after.loop.epochs > 1 and after.loop.budget > before.loop.budget <= ledger.spent:
        raise ConfigError(
            f"loop.budget={after.loop.budget}: the run in {where} has spent its {before.loop.budget} labels and makes "
            f"loop.epochs={after.loop.epochs} passes over them; labels bought after that would not be of the policy "
            "that they train. Start a new run with the larger budget, or one with loop.epochs=1, and make more passes "
            "with `rayalign replay`."
        )
