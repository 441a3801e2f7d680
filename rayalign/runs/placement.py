"""Ready-made placements of a run's roles on the GPUs of one machine: settings, to be used as any others.

    rayalign.run("sea", ..., **placement.collocated(8, oracle=True, posterior=True))

    collocated    every role on every GPU; whoever works has it, so max_staleness is 0 and engines sleep meanwhile
    split         learner on one half of the GPUs, everybody else on every GPU of the other half
    laptop        no GPU at all, everything small: to try the wiring

They are the two configurations of SEA's benchmark (Liu et al. 2024, appendix H), and none.

Ray puts a fraction of a GPU on the fullest GPU that still has room for it. So that one GPU never holds two of a kind
while another holds none, each role asks for just more than its part of what is left by those that start before it:
oracle, collector, engines, scorers, learner. The fractions are places, not memory; what vLLM takes of the memory is
`rollout.vllm.gpu_memory_utilization`. Verified by what Ray assigns, without GPUs: tests/runs/test_placement.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayalign.agents import make_agent
from rayalign.errors import ConfigError, did_you_mean

POSTERIOR_SHARE = 0.03
"""Of the one GPU that the collector shares, where the agent has a posterior of its own."""
STEP = 0.01
"""Shares are multiples of this."""


def place(name: str, gpus: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The placement `collocated`, `split` or `laptop` for what a run of these settings starts.

    `settings` has `agent`, the registered name, and perhaps `agent.*` and `oracle.kind`.
    """
    if name == "laptop":
        return laptop()
    known = {"collocated": collocated, "split": split}
    if name not in known:
        raise ConfigError(f"placement={name!r} is unknown. {did_you_mean(name, [*known, 'laptop'])}")
    own = {key.removeprefix("agent."): value for key, value in settings.items() if key.startswith("agent.")}
    agent = make_agent(settings["agent"], **own)
    return known[name](
        gpus,
        oracle=_has_a_model(settings),
        posterior=hasattr(agent.config, "features"),
        reference=agent.samples_reference(),
        scorer=agent.needs_scorer(),
    )


def _has_a_model(settings: Mapping[str, Any]) -> bool:
    """Whether the oracle's replicas compute: an endpoint, people and data need no GPU."""
    kind, local = settings.get("oracle.kind"), settings.get("oracle.judge.base_url") == "local"
    return kind in ("reward_model", "pairwise") or (kind == "judge" and local)


def collocated(
    gpus: int = 8, *, oracle: bool = True, posterior: bool = False, reference: bool = False, scorer: bool = False
) -> dict[str, Any]:
    """One of everything on each GPU; the learner is sharded over all of them (ZeRO-2).

    Args:
        gpus: of the machine.
        oracle: whether it needs GPUs (a reward model), or not (a judge behind an endpoint, people, data).
        posterior: whether the agent has a model of its own (SEA).
        reference: whether it samples the reference, too, with engines of its own (XPO, AE-Borda-DPO).
        scorer: whether it asks the policy itself (APL, AE-Borda-DPO, AE-DPO, ActiveDPO).
    """
    _check(gpus, least=1)
    settings, left = _actors(gpus, oracle=oracle, posterior=posterior, reference=reference, scorer=scorer)
    engines = 1 + reference
    return {
        **settings,
        **_learner(gpus, _floor(left)),
        "loop.max_staleness": 0,
        "loop.sleep_engines": True,
        "rollout.vllm.gpu_memory_utilization": round((0.3 if oracle or scorer else 0.5) / engines, 2),
    }


def split(
    gpus: int = 8, *, oracle: bool = True, posterior: bool = False, reference: bool = False, scorer: bool = False
) -> dict[str, Any]:
    """Half of the GPUs for the learner alone, the other half for all others, as in `collocated`.

    With `loop.max_staleness=1` both halves work at the same time; 0, as here, is strictly on-policy.
    """
    _check(gpus, least=2)
    settings, _ = _actors(gpus // 2, oracle=oracle, posterior=posterior, reference=reference, scorer=scorer)
    engines = 1 + reference
    return {
        **settings,
        **_learner(gpus - gpus // 2, 1.0),
        "loop.max_staleness": 0,
        "rollout.vllm.gpu_memory_utilization": round((0.5 if oracle or scorer else 0.85) / engines, 2),
    }


def laptop() -> dict[str, Any]:
    """Everything on CPUs, engines and scorers inside the collector: fewest processes. Overrules a GPU placement."""
    return {
        "loop.max_staleness": 0,
        "loop.sleep_engines": False,
        "loop.collector_gpus": 0.0,
        "loop.agent_device": "cpu",
        "rollout.engine": "transformers",
        "rollout.num_replicas": 0,
        "rollout.gpus_per_replica": 0.0,
        "rollout.dtype": "float32",
        "scorer.num_replicas": 0,
        "scorer.gpus_per_replica": 0.0,
        "scorer.dtype": "float32",
        "learner.strategy": "plain",
        "learner.num_workers": 1,
        "learner.gpus_per_worker": 0.0,
        "learner.dtype": "float32",
        "oracle.num_replicas": 1,
        "oracle.gpus_per_replica": 0.0,
    }


def _actors(gpus: int, *, oracle: bool, posterior: bool, reference: bool, scorer: bool) -> tuple[dict[str, Any], float]:
    """Settings of all roles but the learner, one of each per GPU (of engines one per pool), and what they leave."""
    least = most = 1.0  # left on the GPU that the collector shares, and on the others
    settings: dict[str, Any] = {"rollout.engine": "vllm", "rollout.dtype": "bfloat16", "scorer.dtype": "bfloat16"}
    if oracle:
        share = _over(most, 1)
        settings |= {"oracle.num_replicas": gpus, "oracle.gpus_per_replica": share, "oracle.dtype": "bfloat16"}
        least, most = least - share, most - share
    if posterior:
        settings |= {"loop.collector_gpus": POSTERIOR_SHARE, "loop.agent_device": "cuda"}
        least -= POSTERIOR_SHARE
    engines = 1 + reference
    share = _over(most, engines)
    settings |= {"rollout.num_replicas": gpus, "rollout.gpus_per_replica": share}
    least, most = least - engines * share, most - engines * share
    if scorer:
        share = _over(most, 1)
        settings |= {"scorer.num_replicas": gpus, "scorer.gpus_per_replica": share}
        least, most = least - share, most - share
    return settings, least


def _learner(workers: int, share: float) -> dict[str, Any]:
    return {
        "learner.strategy": "zero2" if workers > 1 else "plain",
        "learner.num_workers": workers,
        "learner.gpus_per_worker": share,
        "learner.dtype": "bfloat16",
    }


def _over(left: float, copies: int) -> float:
    """The least share of which `copies` fit into `left`, and not one more."""
    return round(_floor(left / (copies + 1)) + STEP, 2)


def _floor(share: float) -> float:
    return round(int(round(share / STEP, 6)) * STEP, 2)


def _check(gpus: int, least: int) -> None:
    if gpus < least:
        raise ConfigError(f"this placement needs at least {least} GPU{'s' if least > 1 else ''}, not gpus={gpus}.")
