import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayalign.agents import AGENTS, agent_class, list_agents, make_agent
from rayalign.agents.agent import Agent, AgentContext
from rayalign.agents.losses import PairLogProbs
from rayalign.config import describe
from rayalign.errors import ConfigError
from rayalign.types import Candidate, LabelSource

SMALL = {
    "num_candidates": 5,
    "posterior.members": 3,
    "posterior.hidden": 8,
    "posterior.batch_size": 8,
    "posterior.calibration_responses": 8,
    "dropout.masks": 3,
}
"""What makes an agent that has such a setting quick."""


def with_scorer(name, policy, batch_size, **settings):
    """The agent in the collector, set up as a run does it, and its settings."""
    known = {setting.name for setting in describe(agent_class(name).Config)}
    settings = {key: value for key, value in {**SMALL, **settings}.items() if key in known}
    agent = make_agent(name, **settings)
    scorer = None
    if agent.needs_scorer():
        from rayalign.scoring.config import ScorerConfig
        from rayalign.scoring.model import ScorerModel

        scorer = ScorerModel(ScorerConfig(num_replicas=0), str(policy))
    agent.setup(AgentContext(policy=policy, seed=0, batch_size=batch_size, scorer=scorer))
    return agent, settings


def batch_for(agent, box, batch_size, batch=0):
    """Prompts with candidates of each of the agent's proposals; few words, so that texts repeat."""
    draw = np.random.default_rng([3, batch])
    prompts = [box.prompt(100 * batch + i) for i in range(agent.prompts_per_batch(batch_size))]

    def response(source):
        made = box.response(*draw.integers(0, 4, draw.integers(1, 3)))
        return replace(made, source=source, policy_version=-1 if source == "data" else 0)

    return prompts, [[response(p.source) for p in agent.proposals() for _ in range(p.n)] for _ in prompts]


def answered(box, prompts, groups, choices, batch=0):
    """The choices as preferences that were in the ledger: `meta` has been JSON."""
    preferences = []
    for slot, choice in enumerate(choices):
        group = groups[choice.prompt]
        source = LabelSource.ORACLE if choice.label is None else LabelSource.SYNTHETIC
        label = float(slot % 3 > 0) if choice.label is None else choice.label
        made = box.preference(prompts[choice.prompt], group[choice.first], group[choice.second], label, batch, source)
        duel = replace(made.duel, id=f"d{batch}-{slot}", meta=json.loads(json.dumps(dict(choice.meta))))
        preferences.append(replace(made, duel=duel))
    return preferences


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_agent_picks_valid_pairs_of_different_texts_and_the_same_ones_again(name, policy, box):
    agent, _ = with_scorer(name, policy, batch_size=6)
    for batch in range(2):
        prompts, groups = batch_for(agent, box, 6, batch)
        choices = agent.select(batch, prompts, groups, np.random.default_rng([0, batch]))
        assert choices, "texts repeat, but not all of them"
        for choice in choices:
            group = groups[choice.prompt]
            assert 0 <= choice.first < len(group) and 0 <= choice.second < len(group)
            assert group[choice.first].text != group[choice.second].text
            assert choice.label is None or 0 <= choice.label <= 1
        assert choices == agent.select(batch, prompts, groups, np.random.default_rng([0, batch]))
        agent.observe(batch, answered(box, prompts, groups, choices, batch), np.random.default_rng([1, batch]))


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_agent_asks_nothing_where_all_responses_are_the_same_text(name, policy, box):
    agent, _ = with_scorer(name, policy, batch_size=3)
    prompts, groups = batch_for(agent, box, 3)
    same = [[replace(box.response(1), source=candidate.source) for candidate in group] for group in groups]
    assert not agent.select(0, prompts, same, np.random.default_rng(0))


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_agents_loss_is_a_finite_number_per_duel_in_the_learner_where_it_was_never_set_up(name, policy, box):
    agent, settings = with_scorer(name, policy, batch_size=6)
    prompts, groups = batch_for(agent, box, 6)
    choices = agent.select(0, prompts, groups, np.random.default_rng(0))
    learner = make_agent(name, **settings)
    assert list(learner.training_duels([])) == []
    duels = learner.training_duels(answered(box, prompts, groups, choices))
    assert duels and len({p.duel.id for p in duels}) == len(duels)
    draw = torch.Generator().manual_seed(0)
    columns = ("winner_B", "loser_B", "reference_winner_B", "reference_loser_B")
    logprobs = {column: -10 * torch.rand(len(duels), generator=draw) for column in columns}
    lengths = {column: torch.full((len(duels),), 3.0) for column in ("winner_length_B", "loser_length_B")}
    pairs = PairLogProbs(**logprobs, **lengths, preferences=duels)
    for seen in (pairs, pairs.swapped()):
        loss = learner.loss(seen)
        assert loss.shape == (len(duels),) and torch.isfinite(loss).all()
    assert all(isinstance(p.duel.first, Candidate) and p.duel.first.token_ids for p in duels)


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_registered_agent_is_made_by_its_name_and_knows_it(name):
    agent = make_agent(name)
    assert isinstance(agent, Agent) and agent.name == name
    assert type(agent.config) is type(agent).Config
    assert make_agent(name, beta=0.7).config.beta == 0.7
    assert agent.proposals() and agent.prompts_per_batch(8) >= 1


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
