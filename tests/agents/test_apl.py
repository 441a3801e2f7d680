import numpy as np
import pytest

from rayalign.agents import make_agent
from rayalign.agents.agent import AgentContext, Proposal
from rayalign.agents.apl import implicit_rewards, largest_margin, predictive_entropy
from rayalign.errors import ConfigError


class Table:
    """A scorer that knows log-probabilities by text, and remembers what it was asked."""

    def __init__(self, policy, reference):
        self.known = {"policy": policy, "reference": reference}
        self.asked = []

    def logprobs(self, prompts, groups, of="policy"):
        self.asked.append((of, [prompt.id for prompt in prompts]))
        return [np.array([self.known[of][c.text] for c in group], dtype=np.float32) for group in groups]


def ready(tmp_path, scorer, batch_size=2, **settings):
    agent = make_agent("apl", **settings)
    agent.setup(AgentContext(policy=tmp_path, seed=0, batch_size=batch_size, scorer=scorer))
    return agent


def test_predictive_entropy_is_that_of_a_known_distribution():
    chances = np.array([0.5, 0.25, 0.125, 0.125])
    samples = np.random.default_rng(0).choice(4, size=20_000, p=chances)
    assert predictive_entropy(np.log(chances)[samples]) == pytest.approx(-(chances * np.log(chances)).sum(), abs=0.02)
    assert predictive_entropy(np.array([-1.5, -2.5, -5.0])) == pytest.approx(3.0)
    assert predictive_entropy(np.zeros(3)) == 0.0


def test_implicit_rewards_by_hand_and_none_where_policy_and_reference_are_one_model():
    got = implicit_rewards(np.array([-1.0, -4.0]), np.array([-3.0, -3.5]), beta=0.1)
    assert got == pytest.approx([0.2, -0.05])
    same = np.array([-301.2345, -17.5], dtype=np.float32)
    assert not implicit_rewards(same, same + np.float32(4e-5), beta=0.1).any()


def test_largest_margin_is_brute_force_over_pairs_of_different_texts():
    draw = np.random.default_rng(1)
    for _ in range(200):
        rewards, texts = draw.integers(0, 5, 6).astype(float), [str(t) for t in draw.integers(0, 4, 6)]
        pairs = [(i, j) for i in range(6) for j in range(6) if texts[i] != texts[j]]
        firsts = [i for i in range(6) if texts[i] not in texts[:i]]
        first, second, margin = largest_margin(rewards, texts)
        if pairs:
            assert margin == max(rewards[i] - rewards[j] for i in firsts for j in firsts if i != j)
            assert texts[first] != texts[second] and rewards[first] >= rewards[second]
            assert {first, second} <= set(firsts)


def test_equal_margins_go_to_the_lowest_indices():
    assert largest_margin(np.zeros(4), ["a", "a", "b", "c"]) == (0, 2, 0.0)
    assert largest_margin(np.array([1.0, 0.0, 1.0, 0.0]), list("abcd")) == (0, 1, 1.0)
    assert largest_margin(np.array([1.5, 1.5]), ["a", "a"]) == (0, 1, 0.0)


def test_the_most_uncertain_prompts_are_kept_and_their_largest_margin_asked_about(tmp_path, box):
    groups = [[box.response(3 * p + i) for i in range(3)] for p in range(5)]
    prompts = [box.prompt(p) for p in range(5)]
    entropies = [2.0, 9.0, 5.0, 7.0, 9.0]  # nats; prompt 1 and 4 tie
    policy = {c.text: -h for h, group in zip(entropies, groups, strict=True) for c in group}
    gain = (0.0, -3.0, 4.0)  # of the policy over the reference
    reference = {c.text: policy[c.text] - g for group in groups for c, g in zip(group, gain, strict=True)}
    scorer = Table(policy, reference)
    agent = ready(tmp_path, scorer, batch_size=3, beta=0.5)
    choices = agent.select(0, prompts, groups, np.random.default_rng(0))
    assert [c.prompt for c in choices] == [1, 3, 4], "the highest predictive entropy, not the lowest"
    assert all((c.first, c.second) == (2, 1) for c in choices)
    assert all(c.meta["margin"] == pytest.approx(0.5 * 7.0) for c in choices)
    assert [c.meta["entropy"] for c in choices] == [9.0, 7.0, 9.0]
    assert scorer.asked == [("policy", [p.id for p in prompts]), ("reference", [prompts[i].id for i in (1, 3, 4)])]


def test_prompts_whose_responses_are_all_the_same_are_not_kept(tmp_path, box):
    same, different = [box.response(1)] * 2, [box.response(1), box.response(2)]
    known = {box.response(1).text: -50.0, box.response(2).text: -1.0}
    agent = ready(tmp_path, Table(known, known), batch_size=2)
    choices = agent.select(0, [box.prompt(i) for i in range(3)], [same, different, same], None)
    assert [(c.prompt, c.first, c.second) for c in choices] == [(1, 0, 1)]
    assert agent.select(0, [box.prompt(0)], [same], None) == []
    kept = ready(tmp_path, Table(known, known), pair_sampling="keep").select(0, [box.prompt(0)], [same], None)
    assert [(c.first, c.second) for c in kept] == [(0, 1)]


def test_initial_policy_asks_about_the_first_two_responses_that_differ(tmp_path, box):
    group = [box.response(1), box.response(1), box.response(2), box.response(3)]
    known = {c.text: -float(i) for i, c in enumerate(group)}
    agent = ready(tmp_path, Table(known, known), batch_size=1)
    (choice,) = agent.select(0, [box.prompt(0)], [group], None)
    assert (choice.first, choice.second, choice.meta["margin"]) == (0, 2, 0.0)


def test_a_thousand_prompts_for_a_batch_of_128_and_the_certainty_only_variant_draws_no_more_than_it_asks():
    agent = make_agent("apl")
    assert agent.prompts_per_batch(128) == 1024 and agent.proposals() == (Proposal(n=8),)
    assert agent.needs_scorer()
    assert make_agent("apl", prompts_per_duel=1).prompts_per_batch(128) == 128


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"agent.loss='simpo' has no reference"):
        make_agent("apl", loss="simpo")
    with pytest.raises(ConfigError, match=r"agent.prompts_per_duel=0"):
        make_agent("apl", prompts_per_duel=0)
    with pytest.raises(ConfigError, match=r"agent.num_candidates=1"):
        make_agent("apl", num_candidates=1)
