import numpy as np
import pytest

from rayalign.agents import make_agent
from rayalign.agents.agent import AgentContext, Proposal
from rayalign.errors import ConfigError

SMALL = {
    "posterior.members": 4,
    "posterior.hidden": 8,
    "posterior.batch_size": 16,
    "posterior.calibration_responses": 8,
}


def ready(name, policy, **settings):
    agent = make_agent(name, **{**SMALL, **settings})
    agent.setup(AgentContext(policy=policy, seed=0, batch_size=4))
    return agent


def batch_of(box, prompts=8, candidates=6):
    draw = np.random.default_rng(5)
    groups = [
        [box.response(*draw.integers(0, 40, draw.integers(1, 9))) for _ in range(candidates)] for _ in range(prompts)
    ]
    return [box.prompt(p) for p in range(prompts)], groups


@pytest.mark.parametrize("name", ["dts", "drts", "delta_ucb"])
def test_every_pair_goes_to_the_oracle_after_any_number_of_labels(name, policy, box):
    agent = ready(name, policy, gamma_burn_in=0)
    assert agent.proposals() == (Proposal(n=20),)
    prompts, groups = batch_of(box)
    choices = agent.select(0, prompts, groups, np.random.default_rng(0))
    assert len(choices) == 8 and all(choice.label is None for choice in choices)


def test_dts_is_two_members_best(policy, box):
    agent = ready("dts", policy)
    prompts, groups = batch_of(box)
    rewards = agent._rewards(prompts, groups)
    for choice in agent.select(0, prompts, groups, np.random.default_rng(0)):
        bests = set(rewards[choice.prompt].argmax(dim=1).tolist())
        assert choice.first in bests and (choice.second in bests or len(bests) == 1)


def test_drts_is_a_members_best_and_anothers_worst(policy, box):
    agent = ready("drts", policy)
    prompts, groups = batch_of(box)
    rewards = agent._rewards(prompts, groups)
    for choice in agent.select(0, prompts, groups, np.random.default_rng(0)):
        assert choice.first in rewards[choice.prompt].argmax(dim=1)
        assert choice.second in rewards[choice.prompt].argmin(dim=1)


@pytest.mark.parametrize("width", [0.0, 1.0, 3.0])
def test_delta_ucb_is_the_largest_upper_bound_minus_the_lowest_lower_bound(width, policy, box):
    agent = ready("delta_ucb", policy, width=width)
    prompts, groups = batch_of(box)
    rewards = [r.double().numpy() for r in agent._rewards(prompts, groups)]
    for choice in agent.select(0, prompts, groups, np.random.default_rng(0)):
        r = rewards[choice.prompt]
        upper, lower = r.mean(0) + width * r.std(0), r.mean(0) - width * r.std(0)
        gaps = {(i, j): upper[i] - lower[j] for i in range(6) for j in range(6) if i != j}
        assert gaps[choice.first, choice.second] == pytest.approx(max(gaps.values()), rel=1e-5)
        assert choice.meta["value"] == pytest.approx(max(gaps.values()), rel=1e-5)


def test_fixed_policy_has_a_learning_rate_of_zero():
    assert [make_agent("dts", fixed_policy=fixed).learning_rate_factor(7) for fixed in (True, False)] == [0.0, 1.0]


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"agent.exploration='dts': agent delta_ucb picks by delta_ucb alone"):
        make_agent("delta_ucb", exploration="dts")
    with pytest.raises(ConfigError, match=r"agent.width=-1.0"):
        make_agent("delta_ucb", width=-1.0)
