"""Placement: which role reserves what, checked against the cluster before anything is started.

Nothing in the loop knows where things run. On a machine with few CPUs the shares that nobody set by hand are
scaled down, so that everything fits side by side; GPUs are never scaled, because memory is not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayalign.agents.agent import Agent
from rayalign.config import apply
from rayalign.errors import ResourceError
from rayalign.system.nodes import matches
from rayalign.runs.config import RunConfig

SMALLEST_CPU_SHARE = 0.05
OUTSIDE = ("learner.", "oracle.", "evaluation.oracle.")
"""Roles that Ray places outside of the run's own placement group."""
OUTSIDE_CPUS = 0.001
"""What each learner worker reserves there all the same: a bundle can't be empty."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one role asks of the cluster."""

    setting: str
    """Dotted name of the setting that holds CPUs per process."""
    processes: int
    cpus: float
    """Per process."""
    gpus: float
    """Per process."""
    nodes: Mapping[str, str]
    """Labels of the nodes it may run on."""


def shares(config: RunConfig, agent: Agent) -> list[Share]:
    """Every role of a run of `agent`. Train's and Serve's controllers reserve nothing."""
    loop, rollout, learner, oracle, scorer = config.loop, config.rollout, config.learner, config.oracle, config.scorer
    engines = rollout.num_replicas * (1 + agent.samples_reference())
    scorers = scorer.num_replicas if agent.needs_scorer() else 0
    judge = config.evaluation.oracle or oracle
    judges = judge.most_replicas if config.evaluation.oracle else 0
    return [
        Share("loop.collector_cpus", 1, loop.collector_cpus, loop.collector_gpus, loop.collector_nodes),
        Share("rollout.cpus_per_replica", engines, rollout.cpus_per_replica, rollout.gpus_of_replica, rollout.nodes),
        Share("scorer.cpus_per_replica", scorers, scorer.cpus_per_replica, scorer.gpus_of_replica, scorer.nodes),
        Share(
            "learner.cpus_per_worker",
            learner.num_workers,
            learner.cpus_per_worker,
            learner.gpus_per_worker,
            learner.nodes,
        ),
        *(
            Share(f"{name}.cpus_per_replica", replicas, asked.cpus_per_replica, asked.gpus_per_replica, asked.nodes)
            for name, replicas, asked in (
                ("oracle", oracle.most_replicas, oracle),
                ("evaluation.oracle", judges, judge),
            )
        ),
    ]


def bundles(
    config: RunConfig, agent: Agent, cluster: Mapping[str, float], set_by_user: Collection[str] = ()
) -> list[dict[str, float]]:
    """Bundles of a placement group that holds one run of `agent` (see `rayalign.system.share`): the driver's, which is empty,
    one for each process, and room for the learner's and the oracle's CPUs; their GPUs are reserved beside the group.
    """
    planned = plan(config, agent, cluster, set_by_user)
    found: list[dict[str, float]] = [{}]
    room = 0.0
    for share in shares(planned, agent):
        if share.setting.startswith(OUTSIDE):
            room += share.processes * share.cpus
        elif share.cpus or share.gpus:
            bundle = {"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {})
            found += [bundle] * share.processes
    return [*found, *([{"CPU": round(room, 3)}] if room else [])]


def beside_group(config: RunConfig) -> RunConfig:
    """`config` of a run in a placement group: what Ray places outside of it reserves no CPUs a second time."""
    learner = replace(
        config.learner,
        threads_per_worker=config.learner.threads_per_worker or max(1, int(config.learner.cpus_per_worker)),
        cpus_per_worker=OUTSIDE_CPUS,
    )
    config = replace(config, learner=learner, oracle=replace(config.oracle, cpus_per_replica=0.0))
    return apply(config, {"evaluation.oracle.cpus_per_replica": 0.0}) if config.evaluation.oracle else config


def check_nodes(config: RunConfig, agent: Agent, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ResourceError` if roles that are bound to nodes by their labels don't fit there (`nodes`: `ray.nodes()`).

    Ray itself would wait for such a node for ever.
    """
    alive = [node for node in nodes if node["Alive"]]
    asked = [share for share in shares(config, agent) if share.processes and share.nodes]
    for selector in {tuple(sorted(share.nodes.items())) for share in asked}:
        there = [node for node in alive if matches(dict(selector), node["Labels"])]
        bound = [share for share in asked if tuple(sorted(share.nodes.items())) == selector]
        table = "; ".join(f"{s.processes} x {s.setting.split('.')[0]} ({s.cpus:g} CPU, {s.gpus:g} GPU)" for s in bound)
        for kind, each in (("CPU", "cpus"), ("GPU", "gpus")):
            have = sum(node["Resources"].get(kind, 0.0) for node in there)
            wanted = sum(share.processes * getattr(share, each) for share in bound)
            if not there or wanted > have + 1e-9:
                raise ResourceError(
                    f"{table} may run only on nodes with {dict(selector)}: {len(there)} of the {len(alive)} nodes have "
                    f"these labels, and together {have:g} {kind}, of which {wanted:g} are asked for. Label more nodes "
                    "(`ray start --labels name=value`), or change the `nodes` settings."
                )


def plan(config: RunConfig, agent: Agent, cluster: Mapping[str, float], set_by_user: Collection[str] = ()) -> RunConfig:
    """`config` with CPU shares that fit `cluster` (Ray's total resources).

    Raises `ResourceError` where it can't fit: the message has the whole plan.
    """
    asked = [share for share in shares(config, agent) if share.processes]
    table = "; ".join(f"{s.processes} x {s.setting.rpartition('.')[0]} ({s.cpus:g} CPU, {s.gpus:g} GPU)" for s in asked)
    gpus, have_gpus = sum(s.processes * s.gpus for s in asked), cluster.get("GPU", 0.0)
    if gpus > have_gpus + 1e-9:
        raise ResourceError(
            f"the run asks for {gpus:g} GPUs, but the cluster has {have_gpus:g}: {table}. Lower the gpus_per_... "
            "settings (fractions collocate roles on one GPU), or add nodes."
        )
    have = cluster.get("CPU", 0.0)
    fixed = sum(s.processes * s.cpus for s in asked if s.setting in set_by_user)
    free = [s for s in asked if s.setting not in set_by_user]
    wanted = sum(s.processes * s.cpus for s in free)
    if fixed + wanted <= have + 1e-9:
        return config
    factor = (have - fixed) / wanted if wanted else 0.0
    if any(s.cpus * factor < SMALLEST_CPU_SHARE for s in free) or fixed > have:
        raise ResourceError(
            f"the run asks for {fixed + wanted:g} CPUs, but the cluster has {have:g}: {table}. Use fewer replicas or "
            "workers, lower the cpus_per_... settings, or add nodes."
        )
    for share in free:
        scaled = int(share.cpus * factor * 1000) / 1000  # rounded down: the sum must not exceed what there is
        config = apply(config, {share.setting: scaled})
    return config
