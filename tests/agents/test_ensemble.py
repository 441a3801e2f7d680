import math

import numpy as np
import pytest
import torch

from rayalign.agents.posteriors.ensemble import (
    EnsembleConfig,
    RewardEnsemble,
    Standardizer,
    agreement,
    disagreement,
    distance_from,
    head_rewards,
    init_heads,
    regularised_nll,
    spread,
)
from rayalign.errors import ConfigError, NonFiniteLossError

DIM = 6
SMALL = EnsembleConfig(members=4, hidden=8, batch_size=16, calibration_responses=8)


def duels(seed, n, dim=DIM):
    """Features of both sides, and labels of a linear reward."""
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(n, 2, dim)).astype(np.float32))
    gap = (features[:, 0] - features[:, 1]) @ torch.linspace(-1, 1, dim)
    return features, (gap > 0).float()


def taught(config=SMALL, seed=0, n=64, rounds=1):
    posterior = RewardEnsemble(config, DIM, seed)
    features, labels = duels(1, n)
    posterior.standardize.add(features.flatten(0, 1))
    posterior.add(features, labels, np.random.default_rng(2))
    for r in range(rounds):
        posterior.update(np.random.default_rng([3, r]))
    return posterior


def test_all_heads_at_once_equal_each_head_alone():
    heads = init_heads(5, DIM, 8, np.random.default_rng(0))
    heads = {name: tensor + 0.1 for name, tensor in heads.items()}  # biases of zero would hide an error
    x = torch.randn(7, DIM, generator=torch.Generator().manual_seed(0))
    for shared in (True, False):
        got = head_rewards(heads, x if shared else x.expand(5, 7, DIM))
        for e in range(5):
            a = torch.relu(x @ heads["w1_EDH"][e] + heads["b1_EH"][e])
            b = torch.relu(a @ heads["w2_EHH"][e] + heads["b2_EH"][e])
            assert torch.allclose(got[e], (b @ heads["w3_EH1"][e]).squeeze(-1), atol=1e-5)


def test_loss_is_eq_4_by_hand():
    # Two members, two duels, one of them lost by the first response; the second member counts the last duel twice.
    margins = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    weights = torch.tensor([[1.0, 1.0], [0.0, 2.0]])

    def nll(x):
        return math.log(1 + math.exp(-x))

    want = (nll(1) + nll(2)) / 2 + 0.5 * 4.0 + (0 * nll(0) + 2 * nll(-3)) / 2 + 0.5 * 1.0
    assert regularised_nll(margins, labels, weights, torch.tensor([4.0, 1.0]), 0.5).item() == pytest.approx(want)


def test_a_tie_is_half_of_each_label():
    margins, one = torch.tensor([[0.7]]), torch.ones(1, 1)
    zero = torch.zeros(1)
    won, lost, tied = (regularised_nll(margins, z * one, one, zero, 0.0).item() for z in (1.0, 0.0, 0.5))
    assert tied == pytest.approx((won + lost) / 2)


def test_distance_is_the_sum_of_squares_of_one_member_not_a_mean():
    start = init_heads(3, DIM, 8, np.random.default_rng(0))
    heads = {name: tensor.clone() for name, tensor in start.items()}
    heads["w1_EDH"][1] += 0.5
    heads["b2_EH"][2] -= 2.0
    assert distance_from(heads, start).tolist() == pytest.approx([0.0, 0.25 * DIM * 8, 4.0 * 8])


def test_regularizer_pulls_with_twice_lambda_times_the_distance():
    posterior = RewardEnsemble(SMALL, DIM, 0)
    moved = {name: (tensor + 0.3).requires_grad_() for name, tensor in posterior.start.items()}
    one = torch.zeros(4, 1)
    regularised_nll(one, one, one, distance_from(moved, posterior.start), 0.25).backward()
    for tensor in moved.values():
        assert torch.allclose(tensor.grad, torch.full_like(tensor, 2 * 0.25 * 0.3))


def test_strong_regularizer_keeps_members_at_their_start_and_none_lets_go():
    def moved(regularization):
        posterior = taught(
            EnsembleConfig(members=4, hidden=8, batch_size=16, updates=200, regularization=regularization)
        )
        return float(distance_from(posterior.heads, posterior.start).detach().mean())

    assert moved(1.0) < 0.1 * moved(0.01) < 0.5 * moved(0.0)


def test_members_start_apart_and_see_different_data():
    posterior = taught()
    starts = posterior.start["w1_EDH"].flatten(1)
    assert torch.corrcoef(starts).fill_diagonal_(0).abs().max() < 0.5
    weights = posterior.duels["weights_BE"].float()
    assert torch.unique(weights.T, dim=0).shape[0] == 4
    assert 0.2 < (weights == 0).float().mean() < 0.55  # exp(-1) = 0.37
    without = taught(EnsembleConfig(members=4, hidden=8, bootstrap=False))
    assert (without.duels["weights_BE"] == 1).all()


def test_members_of_equal_start_grow_apart_by_their_data_alone():
    posterior = RewardEnsemble(EnsembleConfig(members=2, hidden=8, updates=20, regularization=0.0), DIM, 0)
    with torch.no_grad():
        for tensor in posterior.heads.values():
            tensor[1] = tensor[0]
    features, labels = duels(1, 16)
    posterior.standardize.add(features.flatten(0, 1))
    posterior.add(features, labels, np.random.default_rng(2))
    assert spread(posterior.margins(features)) == 0
    posterior.update(np.random.default_rng(3))
    assert spread(posterior.margins(features)) > 0.01


def test_a_member_learns_from_its_own_loss_alone():
    """Changing what member 3 sees leaves members 0 to 2 where they would have been, to the bit."""
    a, b = taught(rounds=0), taught(rounds=0)
    b.duels["weights_BE"][:, 3] = 0
    for posterior in (a, b):
        posterior.update(np.random.default_rng(5))
    for name in a.heads:
        assert torch.equal(a.heads[name][:3], b.heads[name][:3])
    assert not torch.equal(a.heads["w2_EHH"][3], b.heads["w2_EHH"][3])


def test_learns_a_linear_reward_and_stays_diverse_where_it_has_no_data():
    posterior = RewardEnsemble(EnsembleConfig(members=10, hidden=32, batch_size=32), DIM, seed=0)
    test_features, test_labels = duels(99, 500)
    before = posterior.margins(test_features)
    for batch in range(40):
        features, labels = duels(batch, 32)
        posterior.standardize.add(features.flatten(0, 1))
        posterior.add(features, labels, np.random.default_rng([batch, 0]))
        posterior.update(np.random.default_rng([batch, 1]))
    after = posterior.margins(test_features)
    assert agreement(before, test_labels) < 0.75
    assert agreement(after, test_labels) > 0.93
    assert disagreement(after) < 0.5 * disagreement(before)  # it became surer
    far = 5 * test_features  # outside the data
    assert spread(posterior.margins(far)) > 2 * spread(after) > 0


def test_updates_go_on_from_where_they_were():
    posterior = taught(rounds=1)
    assert posterior.steps == 5
    heads = {name: tensor.detach().clone() for name, tensor in posterior.heads.items()}
    posterior.update(np.random.default_rng(9))
    moved = max(float((posterior.heads[name].detach() - heads[name]).abs().max()) for name in heads)
    assert posterior.steps == 10 and moved <= 5 * 1.01e-3 * 2  # a step of Adam is about the learning rate


def test_nothing_is_learned_without_labels():
    posterior = RewardEnsemble(SMALL, DIM, 0)
    assert posterior.update(np.random.default_rng(0)) is None and posterior.steps == 0


def test_state_goes_on_bit_for_bit():
    a = taught(rounds=2)
    b = RewardEnsemble(SMALL, DIM, seed=0)
    b.load_state_dict(a.state_dict())
    features, labels = duels(7, 10)
    for posterior in (a, b):
        posterior.add(features, labels, np.random.default_rng(8))
        posterior.update(np.random.default_rng(9))
    assert torch.equal(a.margins(features), b.margins(features))


def test_saved_state_does_not_follow_later_updates():
    posterior = taught()
    features, _ = duels(7, 10)
    before, state = posterior.margins(features), posterior.state_dict()
    posterior.update(np.random.default_rng(9))
    other = RewardEnsemble(SMALL, DIM, seed=0)
    other.load_state_dict(state)
    assert torch.equal(other.margins(features), before)


def test_prior_functions_shift_margins_and_never_learn():
    features, _ = duels(7, 10)
    plain = RewardEnsemble(SMALL, DIM, 0)
    with_prior = RewardEnsemble(EnsembleConfig(members=4, hidden=8, prior_scale=3.0), DIM, 0)
    difference = with_prior.margins(features) - plain.margins(features)
    x = with_prior.standardize(features.view(-1, DIM))
    own = head_rewards(with_prior._prior, x).view(4, -1, 2)
    assert torch.allclose(difference, 3 * (own[..., 0] - own[..., 1]), atol=1e-4)
    prior = {name: tensor.clone() for name, tensor in with_prior._prior.items()}
    with_prior.add(*duels(1, 16), np.random.default_rng(0))
    with_prior.update(np.random.default_rng(1))
    assert all(torch.equal(prior[name], with_prior._prior[name]) for name in prior)


def test_standardizer_counts_in_pieces_what_numpy_says_of_the_whole():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(50, DIM))
    standardize = Standardizer(DIM, enough=50)
    for piece in np.split(x, [1, 7, 30]):
        assert not standardize.done
        standardize.add(torch.from_numpy(piece))
    assert standardize.done
    want = (x - x.mean(0)) / x.std(0)
    assert np.allclose(standardize(torch.from_numpy(x)).numpy(), want)
    standardize.add(torch.from_numpy(x * 100))
    assert np.allclose(standardize(torch.from_numpy(x)).numpy(), want)


def test_standardizer_turns_a_constant_feature_into_zero_and_serves_before_it_is_calibrated():
    x = torch.randn(20, DIM, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 7.0
    standardize = Standardizer(DIM, enough=10)
    early = standardize(x)
    assert standardize.count == 0
    assert torch.allclose(early.std(dim=0, correction=0), torch.tensor([1.0, 1, 0, 1, 1, 1]))
    assert torch.equal(standardize(x[:1]), torch.zeros(1, DIM))
    standardize.add(x)
    assert torch.equal(standardize(x), early) and (early[:, 2] == 0).all()


def test_facts_by_hand():
    margins = torch.tensor([[1.0, -1.0, 2.0], [3.0, 1.0, -2.0]])
    labels = torch.tensor([1.0, 1.0, 0.5])
    assert agreement(margins, labels) == pytest.approx(0.75)  # right, undecided, a tie that does not count
    assert disagreement(margins) == pytest.approx(2 / 3)
    assert spread(margins) == pytest.approx(math.sqrt((1 + 1 + 4) / 3))
    assert math.isnan(agreement(margins, torch.full((3,), 0.5)))


def test_non_finite_loss_stops_the_run_with_a_way_out():
    posterior = RewardEnsemble(SMALL, DIM, 0)
    features, labels = duels(0, 4)
    features[0, 0, 0] = float("inf")
    posterior.standardize.add(torch.randn(8, DIM))
    posterior.add(features, labels, np.random.default_rng(0))
    with pytest.raises(NonFiniteLossError, match=r"reward posterior's loss is .*agent.posterior.learning_rate"):
        for step in range(10):
            posterior.update(np.random.default_rng(step))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"members": 0}, "agent.posterior.members=0"),
        ({"regularization": -1.0}, "agent.posterior.regularization=-1.0"),
        ({"learning_rate": 0.0}, "agent.posterior.learning_rate=0.0 .*updates=0"),
        ({"calibration_responses": 1}, "agent.posterior.calibration_responses=1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        EnsembleConfig(**settings)
