"""That the ready-made placements put one of everything on each GPU: by Ray's rule, and by Ray itself."""

from itertools import product

import pytest
import ray
from ray.util.placement_group import placement_group

from rayalign.agents.agent import Agent, Proposal
from rayalign.config import apply
from rayalign.errors import ConfigError, ResourceError
from rayalign.runs.placement import collocated, laptop, place, split
from rayalign.runs.resources import plan, shares
from rayalign.runs.config import RunConfig

NAMES = ("oracle", "judge", "posterior", "reference", "scorer")
NEEDS = [dict(zip(NAMES, n, strict=True)) for n in product([0, 1], repeat=len(NAMES))]
ORDER = ("oracle", "evaluation", "loop", "rollout", "scorer", "learner")
"""In which roles are started; the pool of engines at the reference comes right after the other one."""


class Needy(Agent):
    """An agent that needs what it is told to need."""

    def __init__(self, needs):
        super().__init__()
        self.needs = needs

    def needs_scorer(self):
        return bool(self.needs.get("scorer"))

    def proposals(self):
        return tuple(Proposal(n=1, source=s) for s in ("policy", "reference")[: 1 + self.needs.get("reference", 0)])


def started(settings, needs):
    """Role and GPUs of each process, in the order of starting."""
    found = {share.setting.split(".")[0]: share for share in shares(apply(RunConfig(), settings), Needy(needs))}
    return [(role, found[role].gpus) for role in ORDER for _ in range(found[role].processes) if found[role].gpus]


def fullest_first(wanted, gpus):
    """Ray's rule for fractions: the fullest GPU with room for it; a whole GPU takes an empty one."""
    left = [10_000] * gpus  # as Ray counts: sums of floats are not what they seem
    for role, share in wanted:
        share = round(10_000 * share)
        fitting = [i for i in range(gpus) if left[i] >= share]
        assert fitting, f"no GPU has room for {role} any more: {left}"
        best = min(fitting, key=lambda i: (left[i], i))
        left[best] -= share
        yield role, best


def counts(assigned, role, gpus):
    return [sum(r == role and g == i for r, g in assigned) for i in range(gpus)]


@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: "+".join(n for n in needs if needs[n]) or "nothing")
@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_collocated_puts_one_of_everything_on_each_gpu(needs, gpus):
    wanted = started(collocated(gpus, **needs), needs)
    assigned = list(fullest_first(wanted, gpus))
    for role in {role for role, _ in wanted} - {"loop"}:
        assert counts(assigned, role, gpus) == [2 if role == "rollout" and needs["reference"] else 1] * gpus


@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: "+".join(n for n in needs if needs[n]) or "nothing")
@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_split_leaves_half_of_the_gpus_to_the_learner_alone(needs, gpus):
    wanted = started(split(gpus, **needs), needs)
    assigned = list(fullest_first(wanted, gpus))
    acting = gpus // 2
    assert counts(assigned, "learner", gpus) == [0] * acting + [1] * (gpus - acting)
    for role in {role for role, _ in wanted} - {"loop", "learner"}:
        each = 2 if role == "rollout" and needs["reference"] else 1
        assert counts(assigned, role, gpus) == [each] * acting + [0] * (gpus - acting)


@ray.remote(num_cpus=0)
class Probe:
    def gpus(self):
        return ray.get_gpu_ids()


def test_ray_assigns_gpus_as_the_placement_counts_on():
    needs = {"oracle": 1, "judge": 1, "posterior": 1, "reference": 0, "scorer": 1}
    wanted = started(collocated(2, **needs), needs)
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False)  # GPUs in name only: nobody looks at them
    try:
        assigned, probes = [], []
        for role, share in [w for w in wanted if w[0] != "learner"]:
            probes.append(Probe.options(num_gpus=share).remote())
            assigned.append((role, int(ray.get(probes[-1].gpus.remote(), timeout=60)[0])))
        workers = [share for role, share in wanted if role == "learner"]  # Ray Train reserves them as one group
        group = placement_group([{"GPU": share} for share in workers])
        ray.get(group.ready(), timeout=60)
        for bundle, share in enumerate(workers):
            where = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, bundle)
            probes.append(Probe.options(num_gpus=share, scheduling_strategy=where).remote())
            assigned.append(("learner", int(ray.get(probes[-1].gpus.remote(), timeout=60)[0])))
    finally:
        ray.shutdown()
    for role in ("oracle", "evaluation", "rollout", "scorer", "learner"):
        assert counts(assigned, role, 2) == [1, 1], assigned


def test_a_placement_fits_the_machine_that_it_is_for_and_no_smaller_one():
    config = apply(RunConfig(), collocated(8, oracle=True, posterior=True))
    assert plan(config, Agent(), {"CPU": 96.0, "GPU": 8.0}).learner.num_workers == 8
    with pytest.raises(ResourceError, match=r"but the cluster has 4: .*8 x learner \(1 CPU, 0.244 GPU\)"):
        plan(config, Agent(), {"CPU": 96.0, "GPU": 4.0})
    with pytest.raises(ConfigError, match="at least 2 GPUs, not gpus=1"):
        split(1)


def test_the_laptop_overrules_a_gpu_placement_entirely():
    config = apply(RunConfig(), {**collocated(8, posterior=True, scorer=True), **laptop()})
    assert all(share.gpus == 0 for share in shares(config, Needy({"scorer": 1})))


def test_an_oracle_of_the_evaluation_with_a_model_has_gpus_too_and_one_without_has_none():
    asked = {"agent": "passive", "oracle.kind": "data", "evaluation.oracle.kind": "reward_model"}
    found = apply(RunConfig(), place("split", 8, asked))
    judge = found.evaluation.oracle
    assert (judge.num_replicas, judge.gpus_per_replica, judge.dtype) == (4, 0.501, "bfloat16")
    assert found.oracle.gpus_per_replica == 0
    for other in ({"evaluation.oracle.kind": "judge"}, {"evaluation.oracle.kind": "data"}, {}):
        assert not any(name.startswith("evaluation.") for name in place("split", 8, {"agent": "passive", **other}))
    local = {"evaluation.oracle.kind": "judge", "evaluation.oracle.judge.base_url": "local"}
    assert place("collocated", 1, {"agent": "passive", **local})["evaluation.oracle.gpus_per_replica"] == 0.501


def test_the_engines_of_a_gpu_share_what_vllm_may_take():
    name = "rollout.vllm.gpu_memory_utilization"
    assert collocated(8)[name] == 0.3 and collocated(8, vllm=0.4)[name] == 0.4
    assert split(8, reference=True, vllm=0.4)[name] == 0.2
    assert place("split", 2, {"agent": "xpo"}, vllm=0.6)[name] == 0.3, "XPO samples the reference, too"
    with pytest.raises(ConfigError, match=r"vllm=1\.2 is a share of a GPU's memory"):
        collocated(8, vllm=1.2)
