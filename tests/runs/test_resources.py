"""Placement: what does not fit is said before anything is started."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from rayalign.system import share
from rayalign.agents.agent import Agent, Proposal
from rayalign.config import apply
from rayalign.errors import ConfigError, ResourceError
from rayalign.runs.resources import beside_group, bundles, check_nodes, plan, shares
from rayalign.runs.config import RunConfig


def total(config):
    return sum(s.processes * s.cpus for s in shares(config, Agent()))


def test_a_plan_that_fits_is_left_alone():
    config = RunConfig()
    assert plan(config, Agent(), {"CPU": 64.0}) == config


def test_shares_nobody_set_are_scaled_down_to_a_laptop():
    config = plan(RunConfig(), Agent(), {"CPU": 2.0})
    assert 1.9 < total(config) <= 2.0


def test_a_share_set_by_hand_is_kept_and_the_others_make_room():
    config = RunConfig()
    config = replace(config, learner=replace(config.learner, cpus_per_worker=1.5))
    planned = plan(config, Agent(), {"CPU": 2.0}, set_by_user={"learner.cpus_per_worker"})
    assert planned.learner.cpus_per_worker == 1.5
    assert total(planned) <= 2.0


def test_shares_set_by_hand_beyond_the_cluster_are_refused_with_the_whole_plan():
    config = RunConfig()
    config = replace(config, learner=replace(config.learner, cpus_per_worker=3.0))
    with pytest.raises(ResourceError, match=r"the cluster has 2: .*1 x learner \(3 CPU, 0 GPU\)"):
        plan(config, Agent(), {"CPU": 2.0}, set_by_user={"learner.cpus_per_worker"})


def test_gpus_are_never_scaled():
    config = RunConfig()
    config = replace(config, rollout=replace(config.rollout, gpus_per_replica=1.0))
    with pytest.raises(ResourceError, match="asks for 1 GPUs, but the cluster has 0"):
        plan(config, Agent(), {"CPU": 2.0})


def test_two_roles_share_one_gpu_by_fractions():
    config = RunConfig()
    config = replace(config, rollout=replace(config.rollout, num_replicas=1, gpus_per_replica=0.5))
    config = replace(config, learner=replace(config.learner, gpus_per_worker=0.5))
    assert plan(config, Agent(), {"CPU": 64.0, "GPU": 1.0}) == config


class Demanding(Agent):
    """Samples the initial policy too, and asks the model itself."""

    def proposals(self):
        return (Proposal(n=1), Proposal(n=1, source="reference"))

    def needs_scorer(self):
        return True


def test_what_an_agent_needs_beside_one_pool_is_planned_for():
    cpus = {share.setting: share.processes for share in shares(RunConfig(), Demanding())}
    assert cpus["rollout.cpus_per_replica"] == 2 and cpus["scorer.cpus_per_replica"] == 1
    planned = plan(RunConfig(), Demanding(), {"CPU": 2.0})
    assert 1.9 < sum(s.processes * s.cpus for s in shares(planned, Demanding())) <= 2.0


def test_a_run_in_a_group_has_the_gpus_that_learner_and_oracle_reserve_beside_it(monkeypatch):
    config = apply(RunConfig(), {"rollout.gpus_per_replica": 1.0, "learner.gpus_per_worker": 1.0})
    cluster = {"CPU": 64.0, "GPU": 8.0}
    group = SimpleNamespace(bundle_specs=bundles(config, Agent(), cluster))
    monkeypatch.setattr(share, "in_group", lambda: True)
    monkeypatch.setattr(share, "get_current_placement_group", lambda: group)
    monkeypatch.setattr(share.ray, "cluster_resources", lambda: cluster)
    assert plan(config, Agent(), share.resources()) == config
    monkeypatch.setattr(share.ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 1.0})
    with pytest.raises(ResourceError, match="asks for 2 GPUs, but the cluster has 1"):
        plan(config, Agent(), share.resources())


def test_bundles_of_a_group_hold_every_process_and_room_for_what_ray_places_beside_it():
    found = bundles(RunConfig(), Agent(), {"CPU": 64.0})
    # collector 0.5, one engine 1.0; the learner's 1.0 and the oracle's 0.5 are room; the driver reserves nothing
    assert found == [{}, {"CPU": 0.5}, {"CPU": 1.0}, {"CPU": 1.5}]


def test_a_run_in_its_own_group_fits_into_the_bundles_that_were_made_for_it():
    group = bundles(RunConfig(), Demanding(), {"CPU": 0.99})
    total = sum(bundle.get("CPU", 0.0) for bundle in group)
    planned = plan(RunConfig(), Demanding(), {"CPU": total})
    assert 0.9 < total <= 0.99
    assert planned.rollout.cpus_per_replica <= group[2]["CPU"]
    outside = beside_group(planned)
    assert (outside.oracle.cpus_per_replica, outside.learner.cpus_per_worker) == (0.0, 0.001)
    assert outside.learner.threads_per_worker == 1


def test_gpus_of_the_learner_are_not_in_the_group_and_those_of_engines_are():
    config = RunConfig()
    config = replace(config, rollout=replace(config.rollout, gpus_per_replica=0.5, num_replicas=2))
    config = replace(config, learner=replace(config.learner, gpus_per_worker=1.0))
    group = bundles(config, Agent(), {"CPU": 64.0, "GPU": 2.0})
    assert [bundle.get("GPU", 0.0) for bundle in group] == [0.0, 0.0, 0.5, 0.5, 0.0]


def test_a_second_oracle_for_evaluation_is_planned_for():
    judged = apply(RunConfig(), {"evaluation.oracle.kind": "function", "evaluation.oracle.target": "math:dist"})
    by_role = {share.setting: (share.processes, share.cpus) for share in shares(judged, Agent())}
    assert by_role["evaluation.oracle.cpus_per_replica"] == (1, 0.5)
    planned = plan(judged, Agent(), {"CPU": 2.0})
    assert 1.9 < total(planned) <= 2.0 and planned.evaluation.oracle.cpus_per_replica < 0.5
    with pytest.raises(ResourceError, match=r"1 x evaluation\.oracle \(0\.5 CPU, 0 GPU\)"):
        plan(judged, Agent(), {"CPU": 0.1})
    assert bundles(judged, Agent(), {"CPU": 64.0})[-1] == {"CPU": 2.0}, "room for both oracles and the learner"
    assert beside_group(judged).evaluation.oracle.cpus_per_replica == 0


def node(cpus, alive=True, **labels):
    return {"Alive": alive, "Resources": {"CPU": cpus}, "Labels": labels}


def bound(**selector):
    config = RunConfig()
    return replace(config, learner=replace(config.learner, nodes=selector))


@pytest.mark.parametrize(
    ("selector", "fits"),
    [("a", True), ("!a", True), ("!in(a,b)", False), ("in(b,c)", True), ("c", False), ("in(c,d)", False)],
)
def test_a_role_is_bound_to_the_living_nodes_whose_labels_match(selector, fits):
    nodes = [node(1.0, role="a"), node(1.0, role="b"), node(8.0, alive=False, role="c")]
    if fits:
        check_nodes(bound(role=selector), Agent(), nodes)
    else:
        with pytest.raises(ResourceError, match=r"1 x learner .*0 of the 2 nodes have these labels"):
            check_nodes(bound(role=selector), Agent(), nodes)


def test_roles_that_are_bound_to_the_same_nodes_have_to_fit_there_together():
    config = bound(role="a")
    config = replace(config, rollout=replace(config.rollout, nodes={"role": "a"}))
    check_nodes(config, Agent(), [node(2.0, role="a"), node(8.0)])
    with pytest.raises(ResourceError, match=r"together 1.5 CPU, of which 2 are asked for"):
        check_nodes(config, Agent(), [node(1.5, role="a"), node(8.0)])


@pytest.mark.parametrize("selector", ["a or b", "in()", "!!a", "-a", "in(a b)", "in(a, b)", ""])
def test_a_selector_that_ray_would_not_understand_is_refused(selector):
    with pytest.raises(ConfigError, match=r"learner.nodes={'role': .*} is no label of nodes"):
        bound(role=selector)
