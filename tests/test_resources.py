"""Placement: what does not fit is said before anything is started."""

from dataclasses import replace

import pytest

from rayalign.agents.agent import Agent, Proposal
from rayalign.errors import ConfigError, ResourceError
from rayalign.resources import check_nodes, plan, shares
from rayalign.run_config import RunConfig


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


def node(cpus, alive=True, **labels):
    return {"Alive": alive, "Resources": {"CPU": cpus}, "Labels": labels}


def bound(**selector):
    config = RunConfig()
    return replace(config, learner=replace(config.learner, nodes=selector))


@pytest.mark.parametrize(
    ("selector", "fits"),
    [("a", True), ("!a", True), ("!in(a, b)", False), ("in(b,c)", True), ("c", False), ("in(c, d)", False)],
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


@pytest.mark.parametrize("selector", ["a or b", "in()", "!!a", "-a", "in(a b)", ""])
def test_a_selector_that_ray_would_not_understand_is_refused(selector):
    with pytest.raises(ConfigError, match=r"learner.nodes={'role': .*} is no label of nodes"):
        bound(role=selector)
