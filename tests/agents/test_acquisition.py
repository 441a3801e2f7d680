import math

import numpy as np
import pytest
import torch

from rayalign.agents.acquisition import (
    PICKERS,
    information_gain,
    logit_difference_variance,
    optimistic_gap,
    pick_bai_ts,
    pick_delta_ucb,
    pick_drts,
    pick_dts,
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


def test_optimistic_gap_is_brute_force_and_without_width_the_gap_of_the_means():
    rewards = random_rewards(7, 5, 2, 4)
    got = optimistic_gap(rewards, width=1.5)
    for p in range(2):
        values = rewards[:, p].numpy()
        for i in range(4):
            for j in range(4):
                upper = values[:, i].mean() + 1.5 * values[:, i].std()
                lower = values[:, j].mean() - 1.5 * values[:, j].std()
                assert got[p, i, j].item() == pytest.approx(upper - lower)
    means = rewards.mean(0)
    assert torch.allclose(optimistic_gap(rewards, width=0.0), means.unsqueeze(-1) - means.unsqueeze(-2))


def test_delta_ucb_takes_the_largest_optimistic_gap_in_its_direction_and_ties_go_to_the_lowest():
    rewards = torch.tensor([[0.0, 4.0, 1.0], [0.0, 0.0, 3.0]])  # means 0, 2, 2; deviations 0, 2, 1

    def pair(rewards, width=1.0):
        pick = pick_delta_ucb(rewards, np.random.default_rng(0), width=width)
        return pick.first, pick.second, pick.value

    assert pair(rewards) == (1, 0, 4.0)
    assert pair(rewards.flip(1)) == (1, 2, 4.0)
    assert pair(rewards, width=0.0) == (1, 0, 2.0)
    assert pair(rewards, width=3.0) == (1, 2, 9.0)  # two wide intervals: 2 + 3 * 2 - (2 - 3 * 1), 8 against 0
    assert pair(torch.zeros(2, 3)) == (0, 1, 0.0)


def test_dts_redraws_a_member_until_its_best_is_another_and_then_takes_any_other():
    rewards = torch.tensor([[3.0, 1.0, 0.0, 2.0], [0.0, 0.0, 5.0, 1.0]])
    pick = pick_dts(rewards, Draws(0, 0, 0, 1), max_redraws=2)
    assert (pick.first, pick.second, pick.member) == (0, 2, 1)
    assert pick_dts(rewards, Draws(0, 0, 0, 0), max_redraws=1).second == 1  # draw 0 of the others 1, 2, 3
    assert pick_dts(rewards, Draws(1, 1, 2), max_redraws=0).second == 3  # draw 2 of the others 0, 1, 3
    generator = np.random.default_rng(0)
    seconds = [pick_dts(rewards[:1], generator, max_redraws=3).second for _ in range(300)]
    assert set(seconds) == {1, 2, 3} and abs(seconds.count(1) - 100) < 4 * math.sqrt(300 * 2 / 9)


def test_drts_is_one_members_best_against_anothers_worst():
    rewards = torch.tensor([[3.0, 1.0, 0.0, 2.0], [0.0, 1.0, 5.0, 2.0]])
    pick = pick_drts(rewards, Draws(0, 0))
    assert (pick.first, pick.second) == (0, 2)  # the members agree: the largest gap, as pick_extremes
    pick = pick_drts(rewards, Draws(0, 1, 1, 0), max_redraws=2)  # the other's worst is the first's best: drawn again
    assert (pick.first, pick.second, pick.member) == (0, 2, 0)
    assert pick_drts(rewards, Draws(0, 1, 1, 1), max_redraws=1).second == 2  # draw 1 of the others 1, 2, 3


@pytest.mark.parametrize("name", sorted(PICKERS))
def test_every_picker_names_two_candidates_of_two(name):
    for seed in range(20):
        rewards = random_rewards(seed, 3, 2).round()
        pick = PICKERS[name](rewards, np.random.default_rng(seed), 2)
        assert {pick.first, pick.second} == {0, 1}
