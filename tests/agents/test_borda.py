"""Algorithm 1 on numbers: equations by hand, and that labels go where they say."""

import math

import gymnasium as gym
import numpy as np
import pytest

import rayalign.env  # noqa: F401  # registers RFF-v0
from rayalign.agents.borda import BordaBandit, BordaConfig, confidence_width, pairs, value_gap, width_after
from rayalign.agents.posteriors.kernel import BernoulliGP, BernoulliGPConfig, KernelConfig, KernelRidge
from rayalign.env.rff import net
from rayalign.errors import ConfigError

CONTEXTS, ACTIONS = net(1, 7), net(1, 9)


def bandit(contexts=CONTEXTS, actions=ACTIONS, **settings):
    config = BordaConfig(**{"initial_labels": 3, "schedule": "constant", **settings})
    return BordaBandit(config, KernelRidge(KernelConfig(lengthscale=0.3), 2), contexts, actions)


def play(learner, labels, seed=0):
    env = gym.make("rayalign/RFF-v0", seed=seed).unwrapped
    context, _ = env.reset(seed=seed)
    rng, actions = np.random.default_rng(seed), []
    for _ in range(labels):
        actions.append((context, learner.ask(context, rng)))
        context, label, *_ = env.step(actions[-1][1])
        learner.tell(actions[-1][1], label)
    return actions


def test_width_of_lemma_b1_by_hand():
    assert confidence_width(1.5, 2.0, 0.1) == pytest.approx(3 + math.sqrt(2 * (2 + 1 + math.log(20))))
    assert confidence_width(0.0, 0.0, 1.0) == pytest.approx(math.sqrt(2 * (1 + math.log(2))))


def test_theorems_width_grows_with_what_the_labels_told():
    learner = bandit(schedule="theorem", norm_bound=2.0, failure_probability=0.05)
    widths = [learner.width]
    assert widths[0] == pytest.approx(4 + math.sqrt(2 * (1 + math.log(40))))
    for _ in range(4):
        play(learner, 1, seed=len(widths))
        widths.append(learner.width)
    expected = confidence_width(2.0, learner.posterior.information_gain(), 0.05)
    assert widths[-1] == pytest.approx(expected) and (np.diff(widths) > 0).all()
    assert width_after(2, learner.config, learner.posterior) == pytest.approx(widths[2])
    assert bandit(width=0.7).width == 0.7


def test_value_gap_is_of_two_separate_maxima():
    lower = np.array([[0.1, 0.3, 0.2], [0.0, -0.5, 0.1]])
    upper = np.array([[0.9, 0.4, 0.3], [0.2, 0.15, 0.12]])
    np.testing.assert_allclose(value_gap(lower, upper), [0.9 - 0.3, 0.2 - 0.1])
    np.testing.assert_allclose(value_gap(lower[:, ::-1], upper[:, ::-1]), [0.6, 0.1])
    assert (value_gap(lower, lower) == 0).all()


def test_pairs_are_context_major():
    table = pairs(np.array([[0.0], [1.0]]), np.array([[0.1], [0.2], [0.3]]))
    assert table.tolist() == [[0, 0.1], [0, 0.2], [0, 0.3], [1, 0.1], [1, 0.2], [1, 0.3]]
    assert pairs(net(0, 1), np.array([[0.1], [0.2]])).tolist() == [[0.1], [0.2]]


def test_initial_pairs_and_those_of_the_uniform_baseline_are_uniform():
    offered = play(bandit(strategy="uniform"), 400)
    assert all(action["context"] is context for context, action in offered)
    for part in ("first", "second"):
        drawn = np.array([action[part][0] for _, action in offered])
        assert abs(drawn.mean() - 0.5) < 4 / math.sqrt(12 * 400) and len(set(drawn)) == 400
    assert all(action["context"] is context for context, action in play(bandit(initial_labels=30), 30))


def test_context_is_the_one_with_the_largest_gap_and_action_its_most_optimistic():
    learner = bandit()
    play(learner, 20)
    means, deviations = learner.posterior.predict(pairs(CONTEXTS, ACTIONS))
    lower, upper = ((means + sign * deviations).reshape(7, 9) for sign in (-1, 1))
    p = int(np.argmax([u.max() - low.max() for low, u in zip(lower, upper, strict=True)]))
    action = learner.ask(np.array([0.123]), np.random.default_rng(0))
    assert action["context"].tolist() == CONTEXTS[p].tolist()
    assert action["first"].tolist() == ACTIONS[upper[p].argmax()].tolist()


def test_ucb_takes_the_offered_context_and_its_most_optimistic_action():
    learner = bandit(strategy="ucb", width=0.5)
    play(learner, 20)
    means, deviations = learner.posterior.predict(pairs(np.array([[0.123]]), ACTIONS))
    action = learner.ask(np.array([0.123]), np.random.default_rng(0))
    assert action["context"].tolist() == [0.123]
    assert action["first"].tolist() == ACTIONS[np.argmax(means + 0.5 * deviations)].tolist()


def test_opponent_is_uniform_whatever_the_strategy():
    for strategy in ("ae", "ucb"):
        learner = bandit(strategy=strategy)
        play(learner, 10)
        rng = np.random.default_rng(1)
        drawn = np.array([learner.ask(np.array([0.4]), rng)["second"][0] for _ in range(300)])
        assert abs(drawn.mean() - 0.5) < 4 / math.sqrt(12 * 300) and drawn.std() == pytest.approx(12**-0.5, abs=0.03)


def test_label_is_credited_to_the_first_action_alone():
    learner = bandit()
    learner.tell({"context": np.array([0.2]), "first": np.array([0.4]), "second": np.array([0.9])}, 1.0)
    assert learner.posterior.points_TD[: learner.posterior.size].tolist() == [[0.2, 0.4]]


@pytest.mark.parametrize("schedule", ["constant", "theorem"])
def test_policy_is_eq_5_with_the_posterior_after_the_last_label(schedule):
    learner = bandit(schedule=schedule)
    play(learner, 25)
    sizes = range(3, 26)
    widths = [width_after(t, learner.config, learner.posterior) for t in sizes]
    exact = learner.posterior.lower_envelope(pairs(CONTEXTS, ACTIONS), sizes, widths).reshape(7, 9)
    np.testing.assert_allclose(learner.envelope_PN, exact, atol=1e-9)
    assert learner.policy().tolist() == exact.argmax(axis=1).tolist()
    assert learner.policy("last").tolist() == learner.bounds()[0].argmax(axis=1).tolist()


def test_active_exploration_learns_a_policy_better_than_chance():
    regret, chance = [], []
    for seed in range(3):
        env = gym.make("rayalign/RFF-v0", seed=seed, scale=2.0).unwrapped
        learner = BordaBandit(
            BordaConfig(),
            KernelRidge(KernelConfig(lengthscale=0.3, regularization=0.25), 2),
            net(1, 16),
            net(1, 32),
        )
        context, _ = env.reset(seed=seed)
        rng = np.random.default_rng(seed)
        for _ in range(200):
            action = learner.ask(context, rng)
            context, label, *_ = env.step(action)
            learner.tell(action, label)
        table = env.reward.table(net(1, 16), net(1, 32))
        regret.append((table.max(axis=1) - table[np.arange(16), learner.policy()]).mean())
        chance.append((table.max(axis=1) - table.mean(axis=1)).mean())
    assert np.mean(regret) < 0.35 * np.mean(chance)


def test_it_runs_on_the_bernoulli_gp_and_on_several_dimensions():
    pytest.importorskip("gpytorch", reason="GPyTorch is not installed: pip install 'rayalign[borda]'")
    gp = BernoulliGP(BernoulliGPConfig(inducing_points=16, steps_per_label=1), 3)
    learner = BordaBandit(BordaConfig(initial_labels=2, schedule="constant"), gp, net(2, 8), net(1, 5))
    env = gym.make("rayalign/RFF-v0", context_dim=2).unwrapped
    context, _ = env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(5):
        action = learner.ask(context, rng)
        context, label, *_ = env.step(action)
        learner.tell(action, label)
    assert learner.policy().shape == (8,) and np.isfinite(learner.envelope_PN).all()
    learner.config = BordaConfig(schedule="theorem")
    with pytest.raises(ConfigError, match="about kernel ridge regression"):
        _ = learner.width


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"agent\.borda\.strategy='usb' is unknown. Did you mean 'ucb'"):
        BordaConfig(strategy="usb")
    with pytest.raises(ConfigError, match=r"agent\.borda\.failure_probability=1 must be in \(0, 1\)"):
        BordaConfig(failure_probability=1)
    with pytest.raises(ConfigError, match=r"agent\.borda\.width=-1 must not be negative"):
        BordaConfig(width=-1)
