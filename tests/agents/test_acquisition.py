import math

import numpy as np
import pytest
import torch

from rayalign.agents.acquisition import (
    PICKERS,
    information_gain,
    logit_difference_variance,
    pick_bai_ts,
    pick_ee_ts,
    pick_extremes,
    pick_uncertainty,
    preference_variance,
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def random_rewards(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


class Draws:
    """A generator whose draws of a member are written down beforehand."""

    def __init__(self, *members):
        self.members = list(members)

    def integers(self, n):
        return self.members.pop(0)


def test_preference_variance_of_two_members_by_hand():
    rewards = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    p, q = sigmoid(1.0), sigmoid(-3.0)
    assert preference_variance(rewards)[0, 1].item() == pytest.approx(((p - q) / 2) ** 2)


def test_preference_variance_is_brute_force_over_members_and_pairs():
    rewards = random_rewards(0, 5, 3, 4)
    got = preference_variance(rewards)
    for p in range(3):
        for i in range(4):
            for j in range(4):
                chances = [sigmoid(float(rewards[e, p, i] - rewards[e, p, j])) for e in range(5)]
                assert got[p, i, j].item() == pytest.approx(np.var(chances), abs=1e-12)


def test_logit_difference_variance_is_brute_force_over_members_and_pairs():
    rewards = random_rewards(1, 5, 2, 4)
    got = logit_difference_variance(rewards)
    for p in range(2):
        for i in range(4):
            for j in range(4):
                want = np.var([float(rewards[e, p, i] - rewards[e, p, j]) for e in range(5)])
                assert got[p, i, j].item() == pytest.approx(want)


def test_information_gain_of_two_members_by_hand():
    rewards = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)

    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    p, q = sigmoid(1.0), sigmoid(-3.0)
    want = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    assert information_gain(rewards)[0, 1].item() == pytest.approx(want)


@pytest.mark.parametrize(
    ("acquisition", "most"),
    [(preference_variance, 0.25), (logit_difference_variance, math.inf), (information_gain, math.log(2))],
)
def test_acquisition_is_symmetric_with_a_zero_diagonal_and_in_its_range(acquisition, most):
    values = acquisition(100 * random_rewards(2, 6, 3, 5))
    assert torch.allclose(values, values.transpose(-1, -2))
    assert torch.diagonal(values, dim1=-2, dim2=-1).abs().max() == 0
    assert values.min() >= 0
    assert values.max() <= most + 1e-9


@pytest.mark.parametrize("acquisition", [preference_variance, logit_difference_variance, information_gain])
def test_acquisition_is_zero_where_all_members_agree_and_blind_to_each_members_level(acquisition):
    agreed = random_rewards(3, 1, 1, 4).expand(5, 1, 4)
    assert acquisition(agreed).abs().max() < 1e-12
    rewards = random_rewards(4, 5, 1, 4)
    shifted = rewards + random_rewards(5, 5, 1, 1)
    assert torch.allclose(acquisition(rewards), acquisition(shifted))


def test_bai_ts_takes_the_drawn_members_best_against_its_most_disputed_rival():
    rewards = torch.tensor([[3.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.1, 4.0]])
    pick = pick_bai_ts(rewards, Draws(0))
    variances = [np.var([sigmoid(3 - b), sigmoid(0 - c)]) for b, c in zip(*rewards.tolist(), strict=True)]
    assert (pick.first, pick.second, pick.member) == (0, int(np.argmax(variances)), 0)
    assert pick.value == pytest.approx(max(variances), rel=1e-5)
    assert pick_bai_ts(rewards, Draws(1)).first == 3


def test_bai_ts_with_members_that_agree_takes_the_best_other_of_the_drawn_member():
    rewards = torch.tensor([[1.0, 5.0, 3.0, 4.0]]).expand(3, 4)
    pick = pick_bai_ts(rewards, Draws(2))
    assert (pick.first, pick.second, pick.value) == (1, 3, 0.0)


def test_bai_ts_differs_from_uncertainty_where_the_sigmoid_saturates():
    # Nobody doubts that 0 beats 1, by 10 or by 30; the members deny each other's winner between 0 and 2.
    rewards = torch.tensor([[30.0, 0.0, 29.0], [10.0, 0.0, 11.0]])
    uncertain = pick_uncertainty(rewards, Draws())
    assert (uncertain.first, uncertain.second) == (0, 1)
    assert pick_bai_ts(rewards, Draws(0)).second == 2


def test_ee_ts_draws_again_until_the_second_differs():
    rewards = torch.tensor([[9.0, 0.0, 1.0], [9.0, 1.0, 0.0], [0.0, 1.0, 9.0]])
    draws = Draws(0, 1, 0, 2, 1)
    pick = pick_ee_ts(rewards, draws, max_redraws=5)
    assert (pick.first, pick.second, pick.member) == (0, 2, 2)
    assert draws.members == [1]


def test_ee_ts_gives_up_after_its_redraws_and_takes_the_last_members_runner_up():
    rewards = torch.tensor([[9.0, 0.0, 1.0], [9.0, 1.0, 0.0], [0.0, 1.0, 9.0]])
    draws = Draws(0, 0, 0, 1, 2)
    pick = pick_ee_ts(rewards, draws, max_redraws=2)
    assert (pick.first, pick.second, pick.member) == (0, 1, 1)
    assert draws.members == [2]


def test_uncertainty_takes_the_pair_with_the_largest_variance_of_the_margin():
    for seed in range(10):
        rewards = random_rewards(seed, 6, 5)
        pick = pick_uncertainty(rewards, Draws())
        values = {(i, j): np.var((rewards[:, i] - rewards[:, j]).numpy()) for i in range(5) for j in range(i + 1, 5)}
        assert (pick.first, pick.second) == max(values, key=values.get)


def test_extremes_are_the_drawn_members_best_and_worst():
    pick = pick_extremes(torch.tensor([[0.0, 2.0, -1.0, 1.0]]), Draws(0))
    assert (pick.first, pick.second) == (1, 2)


@pytest.mark.parametrize("pick", [*PICKERS.values(), pick_extremes])
def test_ties_go_to_the_lowest_index_and_the_second_is_never_the_first(pick):
    result = pick(torch.zeros(4, 6), np.random.default_rng(0), 3)
    assert (result.first, result.second) == (0, 1)


@pytest.mark.parametrize("pick", [*PICKERS.values(), pick_extremes])
def test_second_is_never_first_for_any_rewards(pick):
    rng = np.random.default_rng(7)
    for n in (2, 3, 8):
        for _ in range(30):
            rewards = torch.from_numpy(rng.integers(0, 3, size=(4, n)).astype(float))
            result = pick(rewards, rng, 2)
            assert result.first != result.second
            assert {result.first, result.second} <= set(range(n))


@pytest.mark.parametrize("pick", [pick_bai_ts, pick_ee_ts, pick_extremes])
def test_every_member_is_drawn_about_equally_often(pick):
    rng = np.random.default_rng(0)
    rewards = torch.eye(4)  # member e prefers candidate e
    firsts = np.bincount([pick(rewards, rng, 9).first for _ in range(800)], minlength=4)
    assert abs(firsts - 200).max() < 5 * math.sqrt(800 * 0.25 * 0.75)
