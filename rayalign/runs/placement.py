"""Ready-made placements of a run's roles on the GPUs of one machine: settings, to be used as any others.

    rayalign.run("sea", ..., **placement.collocated(8, oracle=True, posterior=True))

    collocated    every role on every GPU; whoever works has it, so max_staleness is 0 and engines sleep meanwhile
    split         learner on one half of the GPUs, everybody else on every GPU of the other half
    laptop        no GPU at all, everything small: to try the wiring

They are the two configurations of SEA's benchmark (Liu et al. 2024, appendix H), and none.

Ray puts a fraction of a GPU on the fullest GPU that still has room for it. So that one GPU never holds two of a kind
while another holds none, each role asks for just more than its part of what is left by those that start before it:
oracle, the evaluation's oracle, collector, engines, scorers, learner. The fractions are places, not memory; what vLLM
takes of the memory is `vllm`, and whether a model fits into it, and everybody else beside it, `rayalign estimate` says.
Verified by what Ray assigns, without GPUs: tests/runs/test_placement.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayalign.agents import make_agent
from rayalign.errors import ConfigError, did_you_mean
from rayalign.serve.config import has_model

POSTERIOR_SHARE = 0.005
"""Of the one GPU that the collector shares, where the agent has a posterior of its own."""
STEP = 0.001
"""Shares are multiples of this; Ray counts in tenths of it."""
VLLM = {"collocated": (0.5, 0.3), "split": (0.85, 0.5)}
"""Of a GPU's memory for its engines together: with none but the learner beside them, and with oracles or a scorer."""


def place(name: str, gpus: int, settings: Mapping[str, Any], *, vllm: float = 0.0) -> dict[str, Any]:
    """The placement `collocated`, `split` or `laptop` for what a run of these settings starts.

    Args:
        name: of the placement.
        gpus: of the machine.
        settings: `agent`, the registered name, and perhaps `agent.*`, `oracle.*` and `evaluation.oracle.*`.
        vllm: as for `collocated`.
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
        oracle=_has_a_model("oracle", settings),
        judge=_has_a_model("evaluation.oracle", settings),
        posterior=hasattr(agent.config, "features"),
        reference=agent.samples_reference(),
        scorer=agent.needs_scorer(),
        vllm=vllm,
    )


def _has_a_model(oracle: str, settings: Mapping[str, Any]) -> bool:
    """Whether replicas of `oracle` or `evaluation.oracle` compute: an endpoint, people and data need no GPU."""
    return has_model(settings.get(f"{oracle}.kind", ""), settings.get(f"{oracle}.judge.base_url", ""))


def collocated(
    gpus: int = 8,
    *,
    oracle: bool = True,
    judge: bool = False,
    posterior: bool = False,
    reference: bool = False,
    scorer: bool = False,
    vllm: float = 0.0,
) -> dict[str, Any]:
    """One of everything on each GPU; the learner is sharded over all of them (ZeRO-2).

    Args:
        gpus: of the machine.
        oracle: whether it needs GPUs (a reward model), or not (a judge behind an endpoint, people, data).
        judge: whether the evaluation has an oracle of its own that needs GPUs.
        posterior: whether the agent has a model of its own (SEA).
        reference: whether it samples the reference, too, with engines of its own (XPO, AE-Borda-DPO).
        scorer: whether it asks the policy itself (APL, AE-Borda-DPO, AE-DPO, ActiveDPO).
        vllm: share of each GPU's memory for its engines, which have equal parts of it; 0 is the usual share (`VLLM`),
            which suits no model in particular. The weights and a few answers' KV cache have to fit into each part.

    `ConfigError` for a share that is none, and for fewer GPUs than the placement needs.
    """
    _check(gpus, least=1)
    settings, left = _actors(
        gpus, oracle=oracle, judge=judge, posterior=posterior, reference=reference, scorer=scorer
    )
    return {
        **settings,
        **_learner(gpus, _floor(left)),
        "loop.max_staleness": 0,
        "loop.sleep_engines": True,
        "rollout.vllm.gpu_memory_utilization": _vllm("collocated", vllm, oracle or judge or scorer, 1 + reference),
    }


def split(
    gpus: int = 8,
    *,
    oracle: bool = True,
    judge: bool = False,
    posterior: bool = False,
    reference: bool = False,
    scorer: bool = False,
    vllm: float = 0.0,
) -> dict[str, Any]:
    """Half of the GPUs for the learner alone, the other half for all others, as in `collocated`.

    With `loop.max_staleness=1` both halves work at the same time; 0, as here, is strictly on-policy.
    """
    _check(gpus, least=2)
    settings, _ = _actors(
        gpus // 2, oracle=oracle, judge=judge, posterior=posterior, reference=reference, scorer=scorer
    )
    return {
        **settings,
        **_learner(gpus - gpus // 2, 1.0),
        "loop.max_staleness": 0,
        "rollout.vllm.gpu_memory_utilization": _vllm("split", vllm, oracle or judge or scorer, 1 + reference),
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


def _actors(
    gpus: int, *, oracle: bool, judge: bool, posterior: bool, reference: bool, scorer: bool
) -> tuple[dict[str, Any], float]:
    """Settings of all roles but the learner, one of each per GPU (of engines one per pool), and what they leave."""
    least = most = 1.0  # left on the GPU that the collector shares, and on the others
    settings: dict[str, Any] = {"rollout.engine": "vllm", "rollout.dtype": "bfloat16", "scorer.dtype": "bfloat16"}
    for name in ["oracle"] * oracle + ["evaluation.oracle"] * judge:
        share = _over(most, 1)
        settings |= {f"{name}.num_replicas": gpus, f"{name}.gpus_per_replica": share, f"{name}.dtype": "bfloat16"}
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


def _vllm(placement: str, asked: float, others: bool, engines: int) -> float:
    """What one engine takes of a GPU's memory."""
    if not 0.0 <= asked <= 1.0:
        raise ConfigError(f"vllm={asked:g} is a share of a GPU's memory; give one from 0 (the usual one) to 1.")
    return round((asked or VLLM[placement][others]) / engines, 3)


def _over(left: float, copies: int) -> float:
    """The least share of which `copies` fit into `left`, and not one more."""
    return round(_floor(left / (copies + 1)) + STEP, 3)


def _floor(share: float) -> float:
    return round(int(round(share / STEP, 6)) * STEP, 3)


def _check(gpus: int, least: int) -> None:
    if gpus < least:
        raise ConfigError(f"this placement needs at least {least} GPU{'s' if least > 1 else ''}, not gpus={gpus}.")
