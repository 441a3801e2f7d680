"""The optimism term that XPO and SELM share, and what it makes of a batch."""

import math

import numpy as np
import pytest
import torch

from rayalign.agents import make_agent
from rayalign.agents.losses import PairLogProbs, dpo
from rayalign.agents.optimism import Terms, averaged_over_prompts, carrier, optimistic_dpo, with_terms
from rayalign.errors import ConfigError
from rayalign.types import LabelSource


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def pair_logprobs(preferences, first, second, reference_first=None, reference_second=None):
    """`PairLogProbs` as the learner makes them: winner and loser by the labels, the first of a tie."""
    won = np.array([p.label >= 0.5 for p in preferences])

    def sides(a, b):
        a, b = np.asarray(a, float), np.asarray(b, float)
        return torch.tensor(np.where(won, a, b)), torch.tensor(np.where(won, b, a))

    winner, loser = sides(first, second)
    reference_winner, reference_loser = sides(
        np.zeros(len(won)) if reference_first is None else reference_first,
        np.zeros(len(won)) if reference_second is None else reference_second,
    )
    ones = torch.ones(len(won))
    return PairLogProbs(
        winner_B=winner, loser_B=loser, reference_winner_B=reference_winner, reference_loser_B=reference_loser,
        winner_length_B=ones, loser_length_B=ones, preferences=preferences,
    )  # fmt: skip


def three(box):
    labels = (1.0, 0.0, 0.5)
    return [
        box.preference(box.prompt(i), box.response(i), box.response(i + 9), label) for i, label in enumerate(labels)
    ]


def test_sides_are_first_and_second_whoever_won_and_in_a_tie_turned_round(box):
    preferences = three(box)
    pairs = pair_logprobs(preferences, [-1, -2, -3], [-4, -5, -6])
    for seen in (pairs, pairs.swapped(), pairs.swapped().swapped()):
        first, second = seen.sides()
        assert first.tolist() == [-1, -2, -3] and second.tolist() == [-4, -5, -6]


def test_loss_by_hand(box):
    agent = make_agent("xpo", beta=0.5)
    preferences = [with_terms(p, Terms(dpo=2.0, first=1.0, second=3.0)) for p in three(box)]
    pairs = pair_logprobs(preferences, [-1, -2, -3], [-4, -5, -6], [-2, -2, -2], [-3, -3, -3])
    # h is (first - its reference) - (second - its reference) = 2, 2, 2; the second duel was won by the second
    want = [
        -2 * log_sigmoid(0.5 * 2) + 0.1 * (-1 - 12),
        -2 * log_sigmoid(-0.5 * 2) + 0.1 * (-2 - 15),
        -2 * log_sigmoid(0.5 * 2) + 0.1 * (-3 - 18),
    ]
    assert optimistic_dpo(pairs, agent.config, 0.1).tolist() == pytest.approx(want)


def test_loss_without_optimism_is_dpo(box):
    config = make_agent("passive").config
    preferences = [with_terms(p, Terms(dpo=1.0, first=1.0)) for p in three(box)]
    pairs = pair_logprobs(preferences, [-1, -2, -3], [-4, -5, -7])
    assert torch.equal(optimistic_dpo(pairs, config, 0.0), dpo(pairs, config))


def test_optimism_takes_likelihood_away(box):
    first = torch.tensor([-3.0], requires_grad=True)
    preference = with_terms(box.preference(box.prompt(0), box.response(1), box.response(2)), Terms(first=1.0))
    one = torch.ones(1)
    pairs = PairLogProbs(
        winner_B=first, loser_B=-one, reference_winner_B=-one, reference_loser_B=-one, winner_length_B=one,
        loser_length_B=one, preferences=[preference],
    )  # fmt: skip
    optimistic_dpo(pairs, make_agent("xpo").config, 0.25).sum().backward()
    assert first.grad.item() == 0.25  # descent lowers log pi(y)


def test_carrier_brings_one_response_twice_under_an_id_of_its_own(box):
    bought = box.preference(box.prompt(0), box.response(1), box.response(2), batch=3)
    carried = carrier(bought, box.response(7))
    assert carried.duel.first == carried.duel.second == box.response(7)
    assert (carried.label, carried.duel.batch, carried.source) == (0.5, 3, LabelSource.SYNTHETIC)
    assert carried.duel.id != bought.duel.id and carried.duel.meta["auxiliary"]


def test_mean_over_duels_is_the_sum_of_terms_over_prompts(box):
    duels = [with_terms(p, Terms(dpo=1.0)) for p in three(box)]
    duels += [carrier(duels[0], box.response(20)), carrier(duels[1], box.response(21))]
    scaled = averaged_over_prompts(duels, prompts=3)
    config = make_agent("xpo").config
    first, second = [-1.0, -2.0, -3.0, -7.0, -8.0], [-4.0, -5.0, -6.0, -7.0, -8.0]
    losses = optimistic_dpo(pair_logprobs(scaled, first, second), config, 0.01)
    plain = optimistic_dpo(pair_logprobs(duels[:3], first[:3], second[:3]), config, 0.0)
    assert losses.mean().item() == pytest.approx((plain.sum().item() + 0.01 * (-7.0 - 8.0)) / 3)
    assert averaged_over_prompts([], prompts=0) == []


@pytest.mark.parametrize("name", ["xpo", "selm"])
def test_settings_of_the_term_are_checked(name):
    with pytest.raises(ConfigError, match=r"agent.alpha=-1.0 must not be negative"):
        make_agent(name, alpha=-1.0)
    with pytest.raises(ConfigError, match=r"agent.loss='ipo': the optimism term is derived for DPO"):
        make_agent(name, loss="ipo")
