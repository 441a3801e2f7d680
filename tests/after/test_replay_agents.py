"""Which agents can be replayed over another agent's ledger, as docs/after_the_run.md says. Nothing here starts Ray."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from documents import ROOT
from made_runs import made_run

from rayalign import list_agents
from rayalign.after.replay import _check_agent, _prepare, _validate
from rayalign.after.replay_feed import LedgerBatches
from rayalign.agents.agent import Agent
from rayalign.errors import ConfigError
from rayalign.types import Preference

OWN_ALONE = {"xpo": "y_ref", "selm": "ranks"}
"""Agent -> what it misses in others' duels."""


@pytest.fixture(scope="module")
def passive(tmp_path_factory) -> Path:
    """The ledger of an agent that notes nothing in its duels."""
    return made_run(tmp_path_factory.mktemp("replayed") / "run", batches=1).path


def planned(source: Path, agent: str, **settings):
    return _prepare(source, agent, None, None, source.parent / "replay", None, True, settings)


def of_its_own(agent: Agent, known: list[Preference]) -> list[Preference]:
    """The same verdicts about duels that `agent` has selected, hence with what it notes in them."""
    groups = [(p.duel.first, p.duel.second, p.duel.second) for p in known]
    prompts = [p.duel.prompt for p in known]
    return [
        replace(known[c.prompt], duel=replace(known[c.prompt].duel, meta=dict(c.meta), id=f"{c.prompt}-{c.second}"))
        for c in agent.select(0, prompts, groups, np.random.default_rng(0))
    ]


@pytest.mark.parametrize("agent", list_agents())
def test_an_agent_learns_from_anybodys_ledger_unless_the_page_says_that_it_needs_its_own(passive, agent):
    plan = planned(passive, agent)
    if agent not in OWN_ALONE:
        _validate(plan)
        return
    with pytest.raises(ConfigError, match=f"'{agent}' trains on '{OWN_ALONE[agent]}'.*over a ledger of its own"):
        _validate(plan)


@pytest.mark.parametrize("agent", OWN_ALONE)
def test_an_agent_that_needs_its_own_ledger_takes_it_in_the_ledgers_batches(passive, agent):
    plan = planned(passive, agent)
    own = of_its_own(plan.agent, LedgerBatches(plan.replay, plan.ledger).preferences(0))
    assert own
    _check_agent(plan, own)
    with pytest.raises(ConfigError, match="batch_size=2 would cut through"):
        _check_agent(planned(passive, agent, **{"loop.batch_size": 2}), own)


def test_xpo_whose_duel_has_the_sample_to_avoid_learns_from_any_ledger(passive):
    _validate(planned(passive, "xpo", **{"agent.optimism": "duelled"}))


def test_the_page_names_the_agents_that_need_their_own():
    page = (ROOT / "docs" / "after_the_run.md").read_text(encoding="utf-8")
    named = re.search(r"every agent can be replayed but (.*?), which train", " ".join(page.split()))
    assert set(re.findall(r"`(\w+)`", named[1])) == set(OWN_ALONE)
