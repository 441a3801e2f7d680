"""The bandit on numbers: a reward that is what it says, regrets that are exact, Gymnasium's contract."""

import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence

from rayalign.env import NUMERIC, make_world
from rayalign.env.rff import LINKS, FourierReward, RFFBandit, RFFBanditVector, net
from rayalign.env.wrappers import LabelBudget
from rayalign.errors import BudgetError, ConfigError

ID = "rayalign/RFF-v0"


def duel(context, first, second):
    return {"context": np.array([context]), "first": np.array([first]), "second": np.array([second])}


def test_check_env_finds_nothing_to_say_in_any_dimension():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for settings in ({}, {"context_dim": 3, "action_dim": 2}, {"link": "gaussian"}):
            check_env(gym.make(ID, **settings).unwrapped)


def test_numeric_environments_are_registered_with_both_entry_points():
    for name, path in NUMERIC.items():
        assert gym.spec(name).entry_point == path and gym.spec(name).vector_entry_point == f"{path}Vector"
    assert isinstance(gym.make(ID).unwrapped, RFFBandit)


def test_reward_is_the_sum_of_its_waves():
    reward = FourierReward(context_dim=2, action_dim=1, num_features=3, lengthscale=0.7, scale=1.5, seed=4)
    rng = np.random.default_rng([4, 2, 1])
    weights, omega = rng.standard_normal(3), rng.standard_normal((3, 3)) / 0.7
    phases = rng.uniform(0, 2 * np.pi, 3)
    z = [0.2, 0.9, 0.4]
    by_hand = sum(
        1.5 * math.sqrt(2 / 3) * w * math.cos(sum(o * c for o, c in zip(row, z, strict=True)) + b)
        for w, row, b in zip(weights, omega, phases, strict=True)
    )
    assert reward(np.array([z[:2]]), np.array([z[2:]]))[0] == pytest.approx(by_hand, abs=1e-12)


def test_table_holds_every_pair_of_context_and_action():
    reward = FourierReward(context_dim=2, action_dim=3)
    rng = np.random.default_rng(0)
    contexts, actions = rng.random((4, 2)), rng.random((5, 3))
    pairs = reward(np.repeat(contexts, 5, axis=0), np.tile(actions, (4, 1))).reshape(4, 5)
    np.testing.assert_allclose(reward.table(contexts, actions), pairs, atol=1e-12)


def test_many_functions_have_the_covariance_of_the_squared_exponential_kernel():
    a, b = np.array([[0.3, 0.5]]), np.array([[0.45, 0.3]])
    draws = []
    for seed in range(4000):
        reward = FourierReward(num_features=16, lengthscale=0.3, scale=2.0, seed=seed)
        draws.append([reward(z[:, :1], z[:, 1:])[0] for z in (a, b)])
    kernel = 4 * math.exp(-np.sum((a - b) ** 2) / (2 * 0.3**2))
    np.testing.assert_allclose(np.cov(np.array(draws).T), [[4, kernel], [kernel, 4]], atol=0.35)


@pytest.mark.parametrize("dims", [(1, 1), (0, 1), (2, 2)])
def test_best_action_is_better_than_a_hundred_thousand_others(dims):
    reward = FourierReward(*dims, seed=1)
    rng = np.random.default_rng(2)
    contexts = rng.random((3, dims[0]))
    values, actions = reward.best(contexts)
    assert (actions >= 0).all() and (actions <= 1).all()
    np.testing.assert_allclose(reward(contexts, actions), values, atol=1e-12)
    others = reward.table(contexts, rng.random((100_000, dims[1]))).max(axis=1)
    assert (values >= others).all() and (values - others < 0.01).all()


def test_borda_function_is_the_mean_over_uniform_opponents_and_has_the_rewards_maximiser():
    reward = FourierReward(seed=3)
    context = np.full((200, 1), 0.6)
    actions = net(1, 200)
    borda = reward.borda(context, actions)
    assert borda.argmax() == reward(context, actions).argmax()
    opponents = np.random.default_rng(0).random((100_000, 1))
    monte_carlo = reward.borda(context[:3], actions[:3], opponents_ND=opponents)
    np.testing.assert_allclose(borda[:3], monte_carlo, atol=4e-3)
    midpoints = (np.arange(512)[:, None] + 0.5) / 512
    average = reward.borda(np.full((512, 1), 0.6), midpoints).mean()
    assert average == pytest.approx(0.5, abs=1e-12)  # each duel counted from both sides


def test_regrets_are_those_of_their_definitions_and_zero_for_the_best_pair():
    env = gym.make(ID, seed=5).unwrapped
    env.reset(seed=0)
    context = np.array([[0.25]])
    (best,), (top,) = env.reward.best(context)
    *_, info = env.step(duel(0.25, 0.1, 0.8))
    r = [float(env.reward(context, np.array([[a]]))[0]) for a in (0.1, 0.8)]
    assert info["regret_reward"] == pytest.approx(best - sum(r) / 2)
    wins = [1 / (1 + math.exp(value - best)) for value in r]
    assert info["regret_preference"] == pytest.approx(sum(wins) - 1)
    assert info["probability"] == pytest.approx(1 / (1 + math.exp(r[1] - r[0])))
    *_, info = env.step(duel(0.25, top[0], top[0]))
    assert abs(info["regret_reward"]) + abs(info["regret_preference"]) < 1e-12 and info["probability"] == 0.5


def test_first_action_wins_as_often_as_its_probability_says():
    env = gym.make_vec(ID, num_envs=4000, seed=5)
    env.reset(seed=1)
    same = {"context": np.full((4000, 1), 0.25), "first": np.full((4000, 1), 0.1), "second": np.full((4000, 1), 0.8)}
    _, rewards, _, _, info = env.step(same)
    p = info["probability"][0]
    assert set(rewards) == {0.0, 1.0} and abs(rewards.mean() - p) < 4 * math.sqrt(p * (1 - p) / 4000)


def test_links_agree_at_zero_and_are_symmetric():
    for link in LINKS.values():
        assert link(0.0) == 0.5 and link(1.3) + link(-1.3) == pytest.approx(1)


def test_vector_env_is_as_many_single_ones_of_one_function():
    env = gym.make_vec(ID, num_envs=3, context_dim=2, seed=7)
    assert isinstance(env.unwrapped, RFFBanditVector)
    env.action_space.seed(0)
    action = env.action_space.sample()
    seen = []
    for _ in range(2):
        observation, _ = env.reset(seed=4)
        step = env.step(action)
        assert all(env.observation_space.contains(o) for o in (observation, step[0]))
        seen.append((observation, *step))
    assert data_equivalence(seen[0], seen[1], exact=True)
    info = seen[0][-1]
    single = gym.make(ID, context_dim=2, seed=7).unwrapped
    single.reset(seed=4)
    for i in range(3):
        *_, one = single.step({name: part[i] for name, part in action.items()})
        for key in ("probability", "regret_reward", "regret_preference"):
            assert one[key] == pytest.approx(info[key][i], abs=1e-9)


def test_a_budget_truncates_it_like_any_dueling_bandit():
    env = LabelBudget(gym.make(ID), budget=2)
    env.reset(seed=0)
    assert [env.step(duel(0.1, 0.2, 0.3))[3] for _ in range(2)] == [False, True]
    with pytest.raises(BudgetError, match="spent"):
        env.step(duel(0.1, 0.2, 0.3))


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"env\.action_dim=0 must be at least 1"):
        gym.make(ID, action_dim=0)
    with pytest.raises(ConfigError, match=r"env\.lengthscal is not a setting of RFF-v0. Did you mean 'lengthscale'"):
        gym.make(ID, lengthscal=1)
    with pytest.raises(ConfigError, match="Did you mean 'logistic'"):
        gym.make(ID, link="logistics")
    with pytest.raises(ConfigError, match="no language model can be run on it"):
        make_world(ID)
    env = RFFBandit()
    with pytest.raises(gym.error.ResetNeeded):
        env.step(duel(0.1, 0.2, 0.3))
    env.reset()
    with pytest.raises(ConfigError, match=r"action\['second'\]=.* must be of shape \(1,\) with numbers in \[0, 1\]"):
        env.step(duel(0.1, 0.2, 1.3))
    with pytest.raises(ConfigError, match="it must be a dict of arrays"):
        env.step(("a", "b"))
    with pytest.raises(ConfigError, match="reset option 'index' is unknown"):
        env.reset(options={"index": 3})
