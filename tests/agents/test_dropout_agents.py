"""AE-Borda-DPO, AE-DPO and US-DPO: their formulas by hand, and where they spend labels given what a scorer says."""

import math

import numpy as np
import pytest
import torch

from rayalign.agents import make_agent
from rayalign.agents.ae_borda_dpo import borda_bound, value_gap
from rayalign.agents.ae_dpo import reward_gap
from rayalign.agents.agent import AgentContext, Proposal
from rayalign.agents.posteriors.dropout import confidence_bounds, top
from rayalign.agents.scorer import DropoutMoments
from rayalign.agents.us_dpo import mean_variance
from rayalign.errors import ConfigError
from rayalign.rollout.encode import PromptEncoder
from rayalign.scoring.config import ScorerConfig
from rayalign.scoring.model import ScorerModel
from rayalign.types import Prompt


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def moments(mean, std, variance=None):
    arrays = (np.array(values, dtype=float) for values in (mean, std, std if variance is None else variance))
    return DropoutMoments(**dict(zip(("mean_N", "std_N", "variance_N"), arrays, strict=True)))


class Table:
    """A scorer that reads its numbers off the responses' texts: "mean std variance reference"."""

    def __init__(self):
        self.asked = []

    def _column(self, groups, column):
        return [np.array([float(candidate.text.split()[column]) for candidate in group]) for group in groups]

    def dropout_logprobs(self, prompts, groups, *, rate, masks, seed, of="policy"):
        self.asked.append((rate, masks, seed, of))
        found = zip(*(self._column(groups, column) for column in range(3)), strict=True)
        return [DropoutMoments(mean_N=mean, std_N=std, variance_N=variance) for mean, std, variance in found]

    def logprobs(self, prompts, groups, of="policy"):
        assert of == "reference"
        return self._column(groups, 3)


def response(box, mean, std=0.0, variance=0.0, reference=0.0):
    from dataclasses import replace

    return replace(box.response(1), text=f"{mean} {std} {variance} {reference}")


def set_up(name, box, batch_size, scorer=None, **settings):
    agent = make_agent(name, **settings)
    agent.setup(AgentContext(policy="", seed=0, batch_size=batch_size, scorer=scorer or Table()))
    return agent


# -- formulas -----------------------------------------------------------------------------------------------------
def test_confidence_bounds_add_the_tokens_widths_to_the_tokens_means():
    lower_N, upper_N = confidence_bounds(moments([-6.0, -3.0], [0.5, 0.0]), width=4.0)
    assert lower_N.tolist() == [-8.0, -3.0] and upper_N.tolist() == [-4.0, -3.0]


def test_borda_bound_is_the_mean_over_opponents_of_the_probability_to_win():
    found = borda_bound(np.array([2.0, -1.0]), np.array([0.0, 4.0]), gamma=0.5)
    expected = [(sigmoid(1.0) + sigmoid(-1.0)) / 2, (sigmoid(-0.5) + sigmoid(-2.5)) / 2]
    np.testing.assert_allclose(found, expected)
    assert found[0] == pytest.approx(0.5)


def test_borda_bound_of_a_sure_winner_is_1_and_does_not_overflow_for_a_sure_loser():
    np.testing.assert_allclose(borda_bound(np.array([1e6, -1e6]), np.zeros(3), gamma=0.1), [1.0, 0.0])


def test_value_gap_takes_two_separate_maxima():
    # The largest interval belongs to a response that the certain one beats: nothing is unknown about the value.
    assert value_gap(np.array([0.9, 0.6]), np.array([0.9, 0.1])) == 0.0
    assert value_gap(np.array([0.7, 0.8]), np.array([0.6, 0.3])) == pytest.approx(0.2)


def test_reward_gap_by_hand_ignores_the_bad_responses_uncertainty():
    # r = -4 + 5 = 1 and -9 + 6 = -3; widths 4 * 0.25 = 1 and 4 * 0.5 = 2: max(2, -1) - max(0, -5) = 2.
    pair = moments([-4.0, -9.0], [0.25, 0.5])
    assert reward_gap(pair, np.array([-5.0, -6.0]), width=4.0) == pytest.approx(2.0)
    assert reward_gap(pair, np.array([-5.0, -6.0]), width=0.0) == 0.0
    # Once the uncertain one may be the better one, it counts: max(2, 1 + 8) - max(0, 1 - 8) = 9.
    assert reward_gap(moments([-4.0, -4.0], [0.25, 2.0]), np.array([-5.0, -5.0]), width=4.0) == pytest.approx(9.0)


def test_scores_do_not_depend_on_the_order_of_the_pair_nor_on_a_constant():
    pair, swapped = moments([-4.0, -6.0], [0.3, 0.9]), moments([-6.0, -4.0], [0.9, 0.3])
    assert reward_gap(pair, np.array([-5.0, -5.5]), 4.0) == reward_gap(swapped, np.array([-5.5, -5.0]), 4.0)
    shifted = reward_gap(pair, np.array([-5.0, -5.5]) + 100.0, 4.0)
    assert shifted == pytest.approx(reward_gap(pair, np.array([-5.0, -5.5]), 4.0))
    assert mean_variance(moments([0, 0], [0, 0], [0.5, 2.0])) == 1.25


def test_top_gives_the_largest_first_ties_to_the_lowest_index_and_nothing_that_may_not_be_asked():
    scores = np.array([0.5, 2.0, 2.0, -np.inf, 1.0])
    assert top(scores, 3) == [1, 2, 4]
    assert top(scores, 9) == [1, 2, 4, 0]


# -- AE-Borda-DPO -------------------------------------------------------------------------------------------------
def borda_example(box):
    """Three prompts of two policy samples and two opponents; gamma = 1, width = 1."""
    sure = [response(box, 1.0), response(box, -1.0), response(box, 0.0), response(box, -2.0)]
    unsure = [response(box, -1.0, 3.0), response(box, 1.0), response(box, 0.0, 1.0), response(box, 0.5)]
    middle = [response(box, 2.0, 0.5), response(box, 0.0), response(box, 0.0), response(box, 1.0, 0.0, 0.0, 1.0)]
    return [box.prompt(i) for i in range(3)], [sure, unsure, middle]


def test_labels_go_to_the_prompts_with_the_largest_gap_and_to_the_optimistic_response(box):
    prompts, groups = borda_example(box)
    agent = set_up("ae_borda_dpo", box, 2, num_candidates=2, num_opponents=2, beta=1.0, **{"dropout.width": 1.0})
    choices = agent.select(0, prompts, groups, np.random.default_rng(0))

    # unsure: upper ratios (2, 1) against lower opponents (-1, 0.5); lower ratios (-4, 1) against upper ones (1, 0.5).
    upper = [np.mean([sigmoid(2 + 1), sigmoid(2 - 0.5)]), np.mean([sigmoid(1 + 1), sigmoid(1 - 0.5)])]
    lower = [np.mean([sigmoid(-4 - 1), sigmoid(-4 - 0.5)]), np.mean([sigmoid(1 - 1), sigmoid(1 - 0.5)])]
    assert [choice.prompt for choice in choices] == [1, 2]
    assert choices[0].meta["alpha"] == pytest.approx(max(upper) - max(lower))
    assert choices[0].meta["upper"] == pytest.approx(max(upper))
    assert [choice.first for choice in choices] == [0, 0]
    assert all(choice.second in (2, 3) and choice.label is None for choice in choices)
    # middle: opponents' ratios are 0 and 1 - 1 = 0; first 2 +- 0.5, second 0.
    assert choices[1].meta["alpha"] == pytest.approx(sigmoid(2.5) - sigmoid(1.5))
    facts = agent.observe(0, [], np.random.default_rng(0))
    assert facts == {}


def test_bounds_of_every_sample_by_hand(box):
    prompts, groups = borda_example(box)
    agent = set_up("ae_borda_dpo", box, 2, num_candidates=2, num_opponents=2, beta=1.0, **{"dropout.width": 1.0})
    lower_M, upper_M = agent.borda_bounds(prompts, groups, masks_seed=7)[0]
    expected = [np.mean([sigmoid(1), sigmoid(3)]), np.mean([sigmoid(-1), sigmoid(1)])]
    np.testing.assert_allclose(lower_M, expected)
    np.testing.assert_allclose(upper_M, expected)
    assert agent.scorer.asked == [(0.05, 10, 7, "policy")]


def test_without_a_width_nothing_is_unknown_and_the_lowest_prompts_are_asked(box):
    prompts, groups = borda_example(box)
    agent = set_up("ae_borda_dpo", box, 2, num_candidates=2, num_opponents=2, **{"dropout.width": 0.0})
    choices = agent.select(0, prompts, groups, np.random.default_rng(0))
    assert [(choice.prompt, choice.meta["alpha"]) for choice in choices] == [(0, 0.0), (1, 0.0)]


def test_opponents_are_drawn_uniformly_and_never_have_the_text_of_the_response(box):
    best, other = response(box, 3.0, 1.0), response(box, 0.0)
    group = [best, other, best, response(box, 0.5), response(box, 0.25), best]
    agent = set_up("ae_borda_dpo", box, 1, num_candidates=2, num_opponents=4)
    drawn = [agent.select(0, [box.prompt(0)], [group], np.random.default_rng(seed))[0].second for seed in range(200)]
    assert set(drawn) == {3, 4} and 70 < drawn.count(3) < 130
    only_itself = [best, other, best, best]
    assert agent.select(0, [box.prompt(0)], [only_itself], np.random.default_rng(0)) == []
    keep = set_up("ae_borda_dpo", box, 1, num_candidates=2, num_opponents=2, pair_sampling="keep")
    assert keep.select(0, [box.prompt(0)], [only_itself], np.random.default_rng(0))[0].second in (2, 3)


def test_each_batch_has_masks_of_its_own_and_the_same_seed_the_same_choices(box):
    prompts, groups = borda_example(box)
    agent = set_up("ae_borda_dpo", box, 2, num_candidates=2, num_opponents=2)
    first, again, _ = (agent.select(0, prompts, groups, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first == again
    seeds = [seed for _, _, seed, _ in agent.scorer.asked]
    assert seeds[0] == seeds[1] != seeds[2]


def test_what_is_sampled_and_drawn_is_what_the_settings_say():
    agent = make_agent("ae_borda_dpo", num_candidates=3, num_opponents=5)
    assert agent.proposals() == (Proposal(n=3), Proposal(n=5, source="reference"))
    assert agent.samples_reference() and agent.needs_scorer() and agent.prompts_per_batch(32) == 96
    offline = make_agent("ae_dpo")
    assert offline.proposals() == (Proposal(n=2, source="data"),)
    assert not offline.samples_reference() and offline.needs_scorer() and offline.prompts_per_batch(32) == 128


# -- given pairs --------------------------------------------------------------------------------------------------
def given_pairs(box):
    """Three pairs: an uncertain bad response, an uncertain good one, and twice the same text."""
    bad = [response(box, -1.0, 0.1, 0.01, -2.0), response(box, -30.0, 5.0, 9.0, -2.0)]
    good = [response(box, -1.0, 1.0, 1.0, -2.0), response(box, -3.0, 0.5, 0.25, -2.0)]
    same = [response(box, -1.0, 9.0, 9.0, -2.0)] * 2
    return [box.prompt(i) for i in range(3)], [bad, good, same]


def test_ae_dpo_asks_where_the_value_is_unknown_and_us_dpo_where_anything_is(box):
    prompts, groups = given_pairs(box)
    ae = set_up("ae_dpo", box, 1).select(0, prompts, groups, np.random.default_rng(0))
    us = set_up("us_dpo", box, 1).select(0, prompts, groups, np.random.default_rng(0))
    assert [(choice.prompt, choice.first, choice.second) for choice in ae] == [(1, 0, 1)]
    assert ae[0].meta["score"] == pytest.approx(2 * 4.0 * 1.0)
    assert [choice.prompt for choice in us] == [0] and us[0].meta["score"] == pytest.approx((0.01 + 9.0) / 2)


def test_a_pair_of_identical_texts_is_asked_only_where_that_is_wanted(box):
    prompts, groups = given_pairs(box)
    assert [c.prompt for c in set_up("ae_dpo", box, 3).select(0, prompts, groups, np.random.default_rng(0))] == [1, 0]
    keep = set_up("ae_dpo", box, 3, pair_sampling="keep").select(0, prompts, groups, np.random.default_rng(0))
    assert [choice.prompt for choice in keep] == [2, 1, 0]


def test_a_real_policy_is_asked_about_its_own_samples(policy, box):
    torch.set_num_threads(1)
    scorer = ScorerModel(ScorerConfig(num_replicas=0), str(policy))
    encoder = PromptEncoder(policy)
    texts = [("w1 w2", "w3"), ("w4", "w4"), ("w5 w6 w7 w8", "w9 w10 w11"), ("w1", "w2")]
    prompts = [
        Prompt(id=f"p{i}", text="w1 w2 w3", token_ids=box.token_ids("w1 w2 w3"), pair=pair)
        for i, pair in enumerate(texts)
    ]
    groups = [list(encoder.given_pair(prompt)) for prompt in prompts]
    masks_seed = int(np.random.default_rng(0).integers(2**31))
    found = scorer.dropout_logprobs(prompts, groups, rate=0.05, masks=10, seed=masks_seed)
    for name in ("ae_dpo", "us_dpo"):
        choices = set_up(name, box, 3, scorer).select(0, prompts, groups, np.random.default_rng(0))
        scores = [choice.meta["score"] for choice in choices]
        assert scores == sorted(scores, reverse=True) and min(scores) > 0
        assert {choice.prompt for choice in choices} == {0, 2, 3}
        for choice in choices:
            m = found[choice.prompt]
            ratio_N = m.mean_N - scorer.logprobs(prompts, groups, of="reference")[choice.prompt]
            gap = max(ratio_N + 4 * m.std_N) - max(ratio_N - 4 * m.std_N)
            assert choice.meta["score"] == pytest.approx(gap if name == "ae_dpo" else m.variance_N.mean(), rel=1e-4)
    borda = set_up("ae_borda_dpo", box, 2, scorer, num_candidates=1, num_opponents=1)
    choices = borda.select(0, prompts, groups, np.random.default_rng(0))
    # One sample against one opponent, a policy that is the reference: alpha = sigmoid(z) - sigmoid(-z) about 0.
    assert len(choices) == 2 and all(0 < choice.meta["alpha"] < 1 for choice in choices)


# -- settings -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("agent", "settings", "message"),
    [
        ("ae_borda_dpo", {"num_opponents": 0}, "agent.num_opponents=0 must be at least 1"),
        ("ae_borda_dpo", {"loss": "simpo"}, "agent.loss='simpo' has no reference"),
        ("ae_borda_dpo", {"dropout.rate": 0.0}, r"agent.dropout.rate=0.0 must be in \(0, 1\)"),
        ("ae_dpo", {"dropout.masks": 1}, "agent.dropout.masks=1 must be at least 2"),
        ("us_dpo", {"prompts_per_duel": 0}, "agent.prompts_per_duel=0"),
        ("ae_dpo", {"dropout.width": -1.0}, "agent.dropout.width=-1.0 must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(agent, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_agent(agent, **settings)
