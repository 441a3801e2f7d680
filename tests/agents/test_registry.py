import subprocess
import sys

import pytest

from rayalign.agents import AGENTS, agent_class, list_agents, make_agent
from rayalign.agents.agent import Agent
from rayalign.errors import ConfigError


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_registered_agent_is_made_by_its_name_and_knows_it(name):
    agent = make_agent(name)
    assert isinstance(agent, Agent) and agent.name == name
    assert type(agent.config) is type(agent).Config
    assert make_agent(name, beta=0.7).config.beta == 0.7
    assert agent.proposals() and agent.prompts_per_batch(8) >= 8


def test_agents_are_listed():
    assert {"passive", "sea"} <= set(list_agents())


def test_unknown_agent_gets_a_hint():
    with pytest.raises(ConfigError, match=r"agent='pasive' is not registered. Did you mean 'passive'"):
        make_agent("pasive")


def test_agent_by_import_path_class_and_example():
    kind = agent_class("rayalign.agents.passive:Passive")
    assert make_agent("rayalign.agents.passive:Passive").name == "passive"
    assert make_agent(kind, schedule="offline").config.schedule == "offline"
    example = kind(kind.Config(beta=0.3))
    assert make_agent(example) is example
    changed = make_agent(example, schedule="iterative")
    assert (changed.config.beta, changed.config.schedule) == (0.3, "iterative")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rayalign.nowhere:Agent", "can't be imported"),
        ("rayalign.agents.passive:Nobody", "can't be imported"),
        ("rayalign.agents.passive:PassiveConfig", "not a subclass"),
    ],
)
def test_wrong_import_path_says_what_is_wrong(path, message):
    with pytest.raises(ConfigError, match=message):
        make_agent(path)


def test_unknown_and_nested_settings():
    with pytest.raises(ConfigError, match="num_candidates"):
        make_agent("sea", num_candidate=3)
    for settings in ({"posterior": {"members": 3}}, {"posterior.members": 3}):
        assert make_agent("sea", **settings).config.posterior.members == 3


def test_listing_agents_imports_no_torch_and_agents_import_no_transformers():
    code = (
        "import sys, rayalign.agents as a; a.list_agents(); assert 'torch' not in sys.modules; "
        "a.make_agent('sea'); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
