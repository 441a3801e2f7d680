"""The dueling bandit: who is asked what, what comes back, what it was worth."""

import math

import gymnasium as gym
import numpy as np
import pytest

from rayalign.env.dueling_bandit import DuelingBandit, DuelingBanditVector
from rayalign.env.labels import DirectLabeler
from rayalign.env.truth import TruthOracle, preference_probability, regrets
from rayalign.env.world import World
from rayalign.env.wrappers import LabelBudget, LabelBudgetVector
from rayalign.errors import BudgetError, ConfigError
from rayalign.types import Candidate, Duel, Prompt, Verdict


class Lengths(World):
    """r*(y) = its length, at most 3; prompts are numbers."""

    id = "test/Lengths"

    def prompt(self, index):
        return Prompt(id=f"n{index}", text=str(index), token_ids=())

    has_truth = True
    reward_scale = 2.0

    def reward(self, prompt, response):
        return float(min(len(response), 3))

    def best_reward(self, prompt):
        return 3.0


class Blind(World):
    def prompt(self, index):
        return Prompt(id=str(index), text=str(index), token_ids=())


class Recording:
    """A labeler that writes down every call; `fails` are texts of firsts whose verdict fails."""

    def __init__(self, fails=()):
        self.calls, self.fails, self.inner = [], fails, DirectLabeler(TruthOracle(Lengths()), "deterministic")

    def label(self, duels):
        self.calls.append([(d.prompt.id, d.first.text, d.second.text) for d in duels])
        return [None if d.first.text in self.fails else p for d, p in zip(duels, self.inner.label(duels), strict=True)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def duel(prompt, first, second, name="mine"):
    one, two = (Candidate(text=t, token_ids=(1,), logprobs=(-1.0,), policy_version=3) for t in (first, second))
    return Duel(id=name, batch=0, prompt=prompt, first=one, second=two)


# -- truth ----------------------------------------------------------------------------------------------------------
def test_truth_is_bradley_terry_with_the_worlds_scale():
    prompt = Lengths().prompt(0)
    (verdict,) = TruthOracle(Lengths(), price=0.5).judge([duel(prompt, "aaa", "a")])
    assert verdict == Verdict(duel_id="mine", probability=pytest.approx(sigmoid(2.0 * (3 - 1))), price=0.5)
    assert preference_probability(Lengths(), 0.0, 1e6) == 0.0 and preference_probability(Lengths(), 1e6, 0.0) == 1.0


def test_truth_needs_a_world_that_knows_it():
    with pytest.raises(ConfigError, match="Blind has no known reward"):
        TruthOracle(Blind())


def test_both_regrets_by_hand():
    reward_form, preference_form = regrets(Lengths(), Lengths().prompt(0), "aa", "")
    assert reward_form == 3 - (2 + 0) / 2
    assert preference_form == pytest.approx(sigmoid(2.0 * 1) + sigmoid(2.0 * 3) - 1)
    assert regrets(Lengths(), Lengths().prompt(0), "aaa", "bbbb") == (0.0, 0.0)


# -- single ---------------------------------------------------------------------------------------------------------
def test_one_step_buys_one_bit_and_deals_the_next_prompt():
    env = DuelingBandit(Lengths(), labels="deterministic")
    observation, info = env.reset(seed=0)
    assert observation == "0" and info["prompt"].id == "n0"
    observation, reward, terminated, truncated, info = env.step(("a", "aaa"))
    assert (observation, reward, terminated, truncated) == ("1", 0.0, False, False)
    assert info["prompt_id"] == "n0" and info["prompt"].id == "n1"
    assert (info["labelled"], info["label"], info["probability"]) == (True, 0.0, pytest.approx(sigmoid(-4)))
    assert info["regret_reward"] == 1.0
    assert env.step(("aaa", "a"))[1] == 1.0 and env.step(("a", "b"))[1] == 0.5  # a tie


def test_a_reset_at_the_index_shows_the_same_prompt_again():
    env = DuelingBandit(Lengths())
    env.reset(options={"index": 7})
    observation, *_ = env.step(("a", "b"))
    assert observation == "8" and env.index == 8
    assert env.reset(options={"index": env.index})[0] == observation
    assert env.reset()[0] == "0"


def test_bernoulli_labels_have_the_oracles_frequency_and_depend_on_the_seed():
    env, labels = DuelingBandit(Lengths()), []
    for seed in (1, 1, 2):
        env.reset(seed=seed)
        labels.append([env.step(("aa", "a"))[1] for _ in range(400)])
    assert labels[0] == labels[1] != labels[2]
    assert np.mean(labels[0]) == pytest.approx(sigmoid(2.0), abs=0.05)  # 3 standard errors


def test_an_unseeded_env_draws_its_labels_at_random():
    runs = []
    for _ in range(2):
        env = DuelingBandit(Lengths())
        env.reset()
        runs.append([env.step(("a", "b"))[1] for _ in range(64)])
    assert runs[0] != runs[1]


def test_a_failed_verdict_is_no_label():
    env = DuelingBandit(Lengths(), labeler=Recording(fails=("x",)))
    env.reset()
    _, reward, _, _, info = env.step(("x", "a"))
    assert reward == 0.0 and not info["labelled"] and info["label"] is info["probability"] is info["preference"] is None


def test_a_world_without_truth_needs_somebody_to_ask():
    env = DuelingBandit(Blind())
    env.reset()
    with pytest.raises(ConfigError, match=r"nobody was given to ask. Pass `labeler="):
        env.step(("a", "b"))


def test_mistakes_are_named():
    env = DuelingBandit(Lengths())
    with pytest.raises(gym.error.ResetNeeded):
        env.step(("a", "b"))
    env.reset()
    with pytest.raises(ConfigError, match="must be a Duel, a \\(first, second\\) pair"):
        env.step("ab")
    with pytest.raises(ConfigError, match="prompt 'n5', which is not on the table"):
        env.step(duel(Lengths().prompt(5), "a", "b"))
    with pytest.raises(ConfigError, match=r"reset option 'idx' is unknown. Did you mean 'index'"):
        env.reset(options={"idx": 3})
    with pytest.raises(ConfigError, match="index=-1"):
        env.reset(options={"index": -1})
    with pytest.raises(ConfigError, match="labels='coin' is unknown"):
        DuelingBandit(Lengths(), labels="coin")


# -- vector ---------------------------------------------------------------------------------------------------------
def test_a_step_asks_once_for_all_its_duels_in_order():
    labeler = Recording()
    env = DuelingBanditVector(Lengths(), num_envs=4, labeler=labeler)
    _, info = env.reset()
    third = info["prompts"][2]
    _, rewards, _, _, info = env.step([("aa", "a"), None, duel(third, "a", "aa"), duel(third, "aaa", "a", "other")])
    assert labeler.calls == [[("n0", "aa", "a"), ("n2", "a", "aa"), ("n2", "aaa", "a")]]
    assert rewards.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert info["labelled"].tolist() == [True, False, True, True]
    assert [p and p.duel.id for p in info["preferences"]][1:] == [None, "mine", "other"]
    assert np.isnan(info["probability"]).tolist() == [False, True, False, False]
    np.testing.assert_allclose(info["regret_reward"], [1.5, np.nan, 1.5, 1.0])
    assert [p.id for p in info["prompts"]] == ["n4", "n5", "n6", "n7"] and env.index == 4


def test_a_prompt_with_token_ids_is_the_prompt_on_the_table():
    env = DuelingBanditVector(Lengths(), num_envs=1)
    env.reset()
    encoded = Prompt(id="n0", text="0", token_ids=(1, 2))
    assert env.step([duel(encoded, "aa", "a")])[-1]["preferences"][0].duel.prompt is encoded


def test_nothing_is_asked_where_everybody_passes():
    labeler = Recording()
    env = DuelingBanditVector(Lengths(), num_envs=2, labeler=labeler)
    env.reset()
    for actions in ([], [None], [None, None]):
        _, rewards, _, _, info = env.step(actions)
        assert rewards.tolist() == [0.0, 0.0] and info["preferences"] == [None, None]
    assert labeler.calls == [] and env.index == 6


def test_more_actions_than_prompts_is_an_error():
    env = DuelingBanditVector(Lengths(), num_envs=1)
    with pytest.raises(gym.error.ResetNeeded):
        env.step([None])
    env.reset()
    with pytest.raises(ConfigError, match="2 actions for num_envs=1"):
        env.step([None, ("a", "bb")])
    with pytest.raises(ConfigError, match="num_envs=0"):
        DuelingBanditVector(Lengths(), num_envs=0)


def test_duels_may_be_more_than_the_prompts_they_are_about_within_the_budget():
    env = LabelBudgetVector(DuelingBanditVector(Lengths(), num_envs=2, labels="deterministic"), budget=5)
    _, info = env.reset(seed=0)
    pairs = [("a", "bb"), ("a", "ccc"), ("bb", "ccc")]
    duels = [duel(prompt, *pair, name=f"{prompt.id}{pair}") for prompt in info["prompts"] for pair in pairs]
    observation, rewards, _, truncated, info = env.step(duels)
    assert (len(observation), rewards.shape, truncated.all(), env.spent) == (2, (2,), True, 5)
    assert info["labelled"].tolist() == [True] * 5 + [False]
    assert np.isfinite(info["regret_reward"]).tolist() == [True] * 5 + [False]
    assert [p and p.duel for p in info["preferences"]] == [*duels[:5], None]


# -- budget ---------------------------------------------------------------------------------------------------------
def test_the_step_that_spends_the_last_label_truncates_and_the_next_is_refused():
    labeler = Recording(fails=("x",))
    env = LabelBudget(DuelingBandit(Lengths(), labeler=labeler), budget=4, spent=2)
    env.reset()
    assert env.step(("a", "b"))[3] is False and env.remaining == 1
    assert env.step(("x", "b"))[3] is False and env.remaining == 1  # a failure is free
    assert env.step(("a", "b"))[3] is True and (env.spent, env.remaining) == (4, 0)
    env.reset()  # gives no money back
    with pytest.raises(BudgetError, match="budget of 4 labels is spent"):
        env.step(("a", "b"))
    assert len(labeler.calls) == 3


def test_actions_beyond_the_budget_become_passes_in_order():
    labeler = Recording()
    env = LabelBudgetVector(DuelingBanditVector(Lengths(), num_envs=4, labeler=labeler), budget=5)
    env.reset()
    *_, truncations, info = env.step([("a", "b"), None, ("c", "d"), ("e", "f")])
    assert not truncations.any() and env.remaining == 2
    *_, truncations, info = env.step([None, ("g", "h"), ("i", "j"), ("k", "l")])
    assert labeler.calls[1] == [("n5", "g", "h"), ("n6", "i", "j")]
    assert info["labelled"].tolist() == [False, True, True, False]
    assert truncations.all() and (env.spent, env.remaining) == (5, 0)
    *_, truncations, info = env.step([("m", "n")])
    assert truncations.all() and len(labeler.calls) == 2 and env.spent == 5


def test_a_failed_verdict_leaves_its_label_in_the_budget():
    env = LabelBudgetVector(DuelingBanditVector(Lengths(), num_envs=2, labeler=Recording(fails=("x",))), budget=2)
    env.reset()
    *_, truncations, _ = env.step([("x", "a"), ("a", "b")])
    assert env.remaining == 1 and not truncations.any()


def test_budgets_are_checked():
    with pytest.raises(ConfigError, match="budget=0"):
        LabelBudget(DuelingBandit(Lengths()), budget=0)
    with pytest.raises(ConfigError, match="spent=-1"):
        LabelBudgetVector(DuelingBanditVector(Lengths()), budget=1, spent=-1)
