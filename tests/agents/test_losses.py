"""The losses against hand numbers, limits and their own derivatives."""

import math

import pytest
import torch

from rayalign.agents.agent import AgentConfig
from rayalign.agents.losses import LOSSES, PairLogProbs, dpo, ipo, margin, simpo, slic

WITH_REFERENCE = ["dpo", "ipo", "slic"]


def pairs(winner, loser, reference_winner=0.0, reference_loser=0.0, winner_length=1, loser_length=1):
    def column(value):
        return torch.atleast_1d(torch.as_tensor(value, dtype=torch.float64))

    return PairLogProbs(
        winner_B=column(winner),
        loser_B=column(loser),
        reference_winner_B=column(reference_winner),
        reference_loser_B=column(reference_loser),
        winner_length_B=column(winner_length),
        loser_length_B=column(loser_length),
    )


def with_margin(h):
    """Pairs whose margin is `h`, from numbers that are all different from 0."""
    return pairs(winner=h - 5.0, loser=-7.0, reference_winner=-6.0, reference_loser=-8.0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_margin_is_the_difference_of_the_two_log_ratios():
    # (-3 - -4) - (-10 - -7) = 1 + 3
    assert margin(pairs(-3.0, -10.0, -4.0, -7.0)).item() == 4.0


def test_dpo_by_hand():
    # h = 4, beta = 0.1: -log s(0.4) = log(1 + e^-0.4) = 0.513015...
    loss = dpo(with_margin(4.0), AgentConfig(beta=0.1)).item()
    assert loss == pytest.approx(0.5130152523999526)
    assert loss == pytest.approx(-math.log(sigmoid(0.4)))


def test_dpo_label_smoothing_by_hand():
    # e = 0.2: 0.8 * 0.513015 + 0.2 * (0.513015 + 0.4)
    config = AgentConfig(beta=0.1, label_smoothing=0.2)
    assert dpo(with_margin(4.0), config).item() == pytest.approx(0.5930152523999526)


def test_ipo_by_hand():
    # beta = 0.25 aims at a margin of 2: (5 - 2)^2
    assert ipo(with_margin(5.0), AgentConfig(beta=0.25, loss="ipo")).item() == pytest.approx(9.0)


def test_ipo_is_zero_at_its_target_and_symmetric_around_it():
    config = AgentConfig(beta=0.1, loss="ipo")
    assert ipo(with_margin(5.0), config).item() == pytest.approx(0.0)
    assert ipo(with_margin(5.0 + 1.5), config).item() == pytest.approx(ipo(with_margin(5.0 - 1.5), config).item())


def test_ipo_smoothing_has_the_minimum_of_the_mixture_of_both_labels():
    config, e = AgentConfig(beta=0.1, loss="ipo", label_smoothing=0.2), 0.2
    plain = AgentConfig(beta=0.1, loss="ipo")
    for h in (-1.0, 0.0, 2.0):  # the mixture differs by a constant that no gradient sees
        mixture = (1 - e) * ipo(with_margin(h), plain) + e * ipo(with_margin(h).swapped(), plain)
        constant = 4 * e * (1 - e) * 25.0
        assert mixture.item() == pytest.approx(ipo(with_margin(h), config).item() + constant)


def test_slic_by_hand_and_flat_beyond_its_hinge():
    config = AgentConfig(beta=0.5, loss="slic")
    assert slic(with_margin(1.0), config).item() == pytest.approx(0.5)  # 1 - 0.5 * 1
    assert slic(with_margin(-3.0), config).item() == pytest.approx(2.5)
    assert slic(with_margin(2.0), config).item() == 0.0
    assert slic(with_margin(9.0), config).item() == 0.0


def test_slic_label_smoothing_by_hand():
    # 0.9 * (1 - 0.5) + 0.1 * (1 + 0.5)
    assert slic(with_margin(1.0), AgentConfig(beta=0.5, loss="slic", label_smoothing=0.1)).item() == pytest.approx(0.6)


def test_simpo_by_hand_is_length_normalised_and_needs_no_reference():
    # beta = 10: 10 * (-6/3 - -5/2) - 3 = 2
    given = PairLogProbs(
        winner_B=torch.tensor([-6.0], dtype=torch.float64),
        loser_B=torch.tensor([-5.0], dtype=torch.float64),
        winner_length_B=torch.tensor([3]),
        loser_length_B=torch.tensor([2]),
    )
    loss = simpo(given, AgentConfig(beta=10.0, loss="simpo")).item()
    assert loss == pytest.approx(-math.log(sigmoid(2.0)))


def test_simpo_label_smoothing_weighs_both_orders():
    config = AgentConfig(beta=2.0, loss="simpo", label_smoothing=0.3)
    plain = AgentConfig(beta=2.0, loss="simpo")
    given = pairs(-6.0, -5.0, winner_length=3, loser_length=2)
    expected = 0.7 * simpo(given, plain) + 0.3 * simpo(given.swapped(), plain)
    assert simpo(given, config).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_lower_for_the_better_order_and_gives_one_number_per_duel(name):
    config = AgentConfig(loss=name, beta=0.1)
    given = pairs([-3.0, -4.0, -1.0], [-4.0, -9.0, -2.0], winner_length=[2, 2, 2], loser_length=[2, 2, 2])
    better_B, worse_B = LOSSES[name](given, config), LOSSES[name](given.swapped(), config)
    assert better_B.shape == (3,)
    assert (better_B < worse_B).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_every_loss_passes_gradcheck(name, smoothing):
    config = AgentConfig(loss=name, beta=0.7, label_smoothing=smoothing)
    winner_B = torch.tensor([-3.0, -4.0], dtype=torch.float64, requires_grad=True)
    loser_B = torch.tensor([-5.0, -2.5], dtype=torch.float64, requires_grad=True)

    def loss(winner_B, loser_B):
        return LOSSES[name](pairs(winner_B, loser_B, -3.5, -4.0, winner_length=[3, 2], loser_length=[2, 4]), config)

    assert torch.autograd.gradcheck(loss, (winner_B, loser_B))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_finite_where_the_policy_has_run_far_away(name):
    given = pairs([-1e4, -1.0], [-1.0, -1e4])
    assert LOSSES[name](given, AgentConfig(loss=name, beta=1.0)).isfinite().all()


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_losses_with_a_reference_see_the_margin_alone(name):
    config = AgentConfig(loss=name)
    shifted = pairs(-3.0 - 11.0, -5.0 - 13.0, -4.0 - 11.0, -4.5 - 13.0)
    assert LOSSES[name](shifted, config).item() == pytest.approx(
        LOSSES[name](pairs(-3.0, -5.0, -4.0, -4.5), config).item()
    )


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_swapping_twice_changes_nothing(name):
    given = pairs(-3.0, -5.0, -4.0, -4.5, winner_length=3, loser_length=2)
    assert torch.equal(LOSSES[name](given.swapped().swapped(), AgentConfig()), LOSSES[name](given, AgentConfig()))
