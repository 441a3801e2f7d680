import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayalign.agents import make_agent
from rayalign.agents.agent import Proposal
from rayalign.agents.losses import PairLogProbs, dpo
from rayalign.errors import ConfigError


def bought(box, agent, groups, labels, batch=0):
    """What the ledger gives back of the agent's choices: `meta` has been JSON."""
    prompts = [box.prompt(i) for i in range(len(groups))]
    choices = agent.select(batch, prompts, groups, np.random.default_rng(0))
    preferences = []
    for choice, label in zip(choices, labels, strict=True):
        group = groups[choice.prompt]
        made = box.preference(prompts[choice.prompt], group[choice.first], group[choice.second], label, batch)
        meta = json.loads(json.dumps(dict(choice.meta)))
        preferences.append(replace(made, duel=replace(made.duel, meta=meta)))
    return preferences


def pairs_of(preferences, logprob):
    """Log-probabilities by text; the reference gives -2 to everything."""

    def column(side):
        return torch.tensor([logprob[getattr(p, side).text] for p in preferences])

    twos = torch.full((len(preferences),), -2.0)
    return PairLogProbs(
        winner_B=column("winner"), loser_B=column("loser"), reference_winner_B=twos, reference_loser_B=twos,
        winner_length_B=twos, loser_length_B=twos, preferences=preferences,
    )  # fmt: skip


def test_the_policy_answers_once_and_the_reference_twice_or_once():
    assert make_agent("xpo").proposals() == (Proposal(n=1), Proposal(n=2, source="reference"))
    assert make_agent("xpo", optimism="duelled").proposals() == (Proposal(n=1), Proposal(n=1, source="reference"))
    assert make_agent("xpo").samples_reference()


def test_the_policys_response_meets_the_references_and_the_other_one_is_noted(box):
    a, b, c = box.response(1), box.response(2), box.response(3)
    agent = make_agent("xpo")
    choices = agent.select(0, [box.prompt(i) for i in range(3)], [[a, b, c], [a, a, c], [a, a, a]], None)
    assert [(x.prompt, x.first, x.second) for x in choices] == [(0, 0, 1), (1, 0, 2)]
    assert all(x.meta["y_ref"] == {"text": c.text, "token_ids": list(c.token_ids)} for x in choices)
    assert all(x.label is None for x in choices)


def test_mean_loss_is_equation_22_by_hand(box):
    groups = [[box.response(1), box.response(2), box.response(3)], [box.response(4), box.response(5), box.response(6)]]
    logprob = {box.response(n).text: -float(n) for n in range(1, 7)}
    agent = make_agent("xpo", beta=0.5, alpha=0.1)
    duels = agent.training_duels(bought(box, agent, groups, [1.0, 0.0]))
    assert [d.duel.meta.get("auxiliary", False) for d in duels] == [False, False, True, True]
    # h: -1 - -2 = 1 where the policy's won, and -5 - -4 = -1 where the reference's did; y_ref: -3 and -6
    want = np.mean([math.log1p(math.exp(-0.5)) - 0.3, math.log1p(math.exp(0.5)) - 0.6])
    assert agent.loss(pairs_of(duels, logprob)).mean().item() == pytest.approx(want, rel=1e-6)

    duelled = make_agent("xpo", beta=0.5, alpha=0.1, optimism="duelled")
    duels = duelled.training_duels(bought(box, duelled, [g[:2] for g in groups], [1.0, 0.0]))
    want = np.mean([math.log1p(math.exp(-0.5)) - 0.2, math.log1p(math.exp(0.5)) - 0.5])
    assert len(duels) == 2
    assert duelled.loss(pairs_of(duels, logprob)).mean().item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("optimism", ["separate", "duelled"])
def test_loss_with_zero_alpha_is_dpo_loss(box, optimism):
    agent = make_agent("xpo", alpha=0.0, optimism=optimism)
    groups = [[box.response(i), box.response(i + 10), box.response(i + 20)] for i in range(4)]
    logprob = {c.text: -0.37 * i for i, c in enumerate(c for group in groups for c in group)}
    preferences = bought(box, agent, groups, [1.0, 0.0, 0.5, 1.0])
    duels = agent.training_duels(preferences)
    plain = dpo(pairs_of(preferences, logprob), agent.config).mean()
    assert agent.loss(pairs_of(duels, logprob)).mean().item() == pytest.approx(plain.item())


def test_schedules_hold_each_value_for_a_stage_and_the_last_one_for_ever(box):
    agent = make_agent("xpo", alpha_schedule=(0.3, 0.0), beta_schedule=(1.0, 2.0, 4.0), stage_batches=2)
    config = agent.config
    assert [agent.scheduled(config.alpha_schedule, b, 9.0) for b in range(6)] == [0.3, 0.3, 0.0, 0.0, 0.0, 0.0]
    assert [agent.scheduled(config.beta_schedule, b, 9.0) for b in range(7)] == [1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.0]
    assert agent.scheduled((), 3, 9.0) == 9.0
    group, logprob = [[box.response(1), box.response(2)]], {box.response(1).text: -1.0, box.response(2).text: -2.0}
    agent = make_agent(agent, optimism="duelled")
    for batch, (alpha, beta) in {0: (0.3, 1.0), 5: (0.0, 4.0)}.items():
        duels = agent.training_duels(bought(box, agent, group, [1.0], batch))
        want = math.log1p(math.exp(-beta)) - 2.0 * alpha
        assert agent.loss(pairs_of(duels, logprob)).item() == pytest.approx(want)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimism": "duel"}, "agent.optimism='duel' is unknown. Did you mean 'duelled'"),
        ({"alpha_schedule": (1e-5, -1.0)}, "agent.alpha_schedule="),
        ({"beta_schedule": (0.1, 0.0)}, "agent.beta_schedule="),
        ({"stage_batches": 0}, "agent.stage_batches=0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_agent("xpo", **settings)
