import dataclasses
import math

import numpy as np
import pytest
import torch

from rayalign.agents import make_agent
from rayalign.agents.agent import AgentContext, Proposal
from rayalign.agents.posteriors.ensemble import agreement
from rayalign.agents.sea import SEA, VARIANTS, SEAConfig
from rayalign.errors import ConfigError, NonFiniteLossError
from rayalign.types import LabelSource

SMALL = {
    "posterior.members": 5,
    "posterior.hidden": 8,
    "posterior.batch_size": 16,
    "posterior.calibration_responses": 40,
}


def ready(policy, seed=0, **settings):
    agent = make_agent("sea", **{**SMALL, **settings})
    agent.setup(AgentContext(policy=policy, seed=seed, batch_size=6))
    return agent


def rng(*words):
    return np.random.default_rng([11, *words])


def batch_of(box, batch, prompts=6, candidates=8):
    own = [box.prompt(batch * prompts + p) for p in range(prompts)]
    draw = np.random.default_rng([5, batch])
    return own, [
        [box.response(*draw.integers(0, 40, size=draw.integers(1, 20))) for _ in range(candidates)] for _ in own
    ]


def longer_wins(first, second):
    return 0.5 if len(first.token_ids) == len(second.token_ids) else float(len(first.token_ids) > len(second.token_ids))


def labelled(box, batch, prompts, candidates, choices):
    """What the loop hands back: the oracle, which likes length, then the agent's own labels."""
    made = []
    for choice in choices:
        group = candidates[choice.prompt]
        first, second = group[choice.first], group[choice.second]
        source = LabelSource.ORACLE if choice.label is None else LabelSource.SYNTHETIC
        label = longer_wins(first, second) if choice.label is None else choice.label
        made.append(box.preference(prompts[choice.prompt], first, second, label, batch, source))
    return sorted(made, key=lambda preference: preference.source is not LabelSource.ORACLE)


def play(agent, box, batches):
    """The loop's hooks for these batches; returns choices, preferences and facts of each."""
    story = []
    for batch in batches:
        prompts, candidates = batch_of(box, batch)
        choices = agent.select(batch, prompts, candidates, rng(batch, 0))
        preferences = labelled(box, batch, prompts, candidates, choices)
        story.append((choices, preferences, agent.observe(batch, preferences, rng(batch, 1))))
    return story


def test_proposes_m_candidates_and_two_where_it_explores_passively():
    assert make_agent("sea").proposals() == (Proposal(n=20),)
    assert make_agent("sea", num_candidates=7).proposals() == (Proposal(n=7),)
    assert make_agent("sea", exploration="passive").proposals() == (Proposal(n=2),)


@pytest.mark.parametrize("exploration", ["bai_ts", "ee_ts", "uncertainty", "passive"])
def test_every_exploration_picks_one_distinct_pair_a_prompt_and_repeats_itself(policy, box, exploration):
    agent, again = ready(policy, exploration=exploration), ready(policy, exploration=exploration)
    prompts, candidates = batch_of(box, 0)
    choices = agent.select(0, prompts, candidates, rng(0))
    assert [choice.prompt for choice in choices] == list(range(6))
    assert all(candidates[c.prompt][c.first].text != candidates[c.prompt][c.second].text for c in choices)
    assert all(choice.label is None for choice in choices)
    assert agent.select(0, prompts, candidates, rng(0)) == choices == again.select(0, prompts, candidates, rng(0))


def test_one_member_is_drawn_per_prompt_not_per_batch(policy, box):
    prompts, candidates = batch_of(box, 0, prompts=20)
    choices = ready(policy).select(0, prompts, candidates, rng(0))
    assert len({choice.meta["member"] for choice in choices}) >= 4


def test_first_response_is_the_drawn_members_best(policy, box):
    agent = ready(policy)
    play(agent, box, range(2))
    prompts, candidates = batch_of(box, 9)
    rewards = agent._rewards(prompts, candidates)
    for choice in agent.select(9, prompts, candidates, rng(9)):
        assert choice.first == int(rewards[choice.prompt][choice.meta["member"]].argmax())


def test_repeated_texts_are_one_candidate_and_the_first_of_them_is_named(policy, box):
    agent = ready(policy, exploration="uncertainty")
    a, b = box.response(1, 2), box.response(3)
    prompts, candidates = [box.prompt(0), box.prompt(1), box.prompt(2)], [[a, a, b, b], [b, b, a, b], [a, a, a, a]]
    choices = agent.select(0, prompts, candidates, rng(0))
    assert [(c.prompt, c.first, c.second) for c in choices] == [(0, 0, 2), (1, 0, 2)]


def test_identical_pair_is_asked_only_on_request(policy, box):
    same = [[box.response(1)] * 4]
    assert ready(policy).select(0, [box.prompt(0)], same, rng(0)) == []
    (choice,) = ready(policy, pair_sampling="keep").select(0, [box.prompt(0)], same, rng(0))
    assert choice.first != choice.second


def test_oracle_labels_exactly_the_burn_in_and_then_its_share(policy, box):
    agent = ready(policy, gamma_burn_in=10, gamma_after=0.0)
    sources = [choice.label is None for choices, _, _ in play(agent, box, range(4)) for choice in choices]
    assert sources == [True] * 10 + [False] * 14  # within the batch, not at its border


def test_oracles_share_after_the_burn_in_is_gamma_decided_per_pair(policy, box):
    agent = ready(policy, gamma_burn_in=0, gamma_after=0.7)
    prompts, candidates = batch_of(box, 0, prompts=400, candidates=2)
    asked = [choice.label is None for choice in agent.select(0, prompts, candidates, rng(0))]
    assert abs(sum(asked) - 280) < 4 * math.sqrt(400 * 0.7 * 0.3)
    assert any(asked[i] != asked[i + 1] for i in range(10))


def test_labels_lost_on_the_way_prolong_the_burn_in(policy, box):
    agent = ready(policy, gamma_burn_in=8, gamma_after=0.0)
    prompts, candidates = batch_of(box, 0)
    choices = agent.select(0, prompts, candidates, rng(0, 0))
    agent.observe(0, labelled(box, 0, prompts, candidates, choices)[:3], rng(0, 1))
    prompts, candidates = batch_of(box, 1)
    assert [c.label is None for c in agent.select(1, prompts, candidates, rng(1, 0))] == [True] * 5 + [False]


def test_synthetic_pair_is_the_selected_pair_with_a_members_hard_label(policy, box):
    asks, labels = ready(policy, gamma_after=1.0), ready(policy, gamma_burn_in=0, gamma_after=0.0)
    prompts, candidates = batch_of(box, 0, prompts=1)
    for seed in range(40):
        (asked,) = asks.select(0, prompts, candidates, rng(seed))
        (own,) = labels.select(0, prompts, candidates, rng(seed))
        assert (own.first, own.second, own.meta) == (asked.first, asked.second, asked.meta)
        (rewards,) = labels._rewards(prompts, candidates)
        votes = {float(member[own.first] > member[own.second]) for member in rewards}
        assert own.label in votes


def test_labelling_member_is_drawn_anew_for_each_pair(policy, box):
    agent = ready(policy, gamma_burn_in=0, gamma_after=0.0, exploration="uncertainty")
    prompts, candidates = batch_of(box, 0, prompts=1)
    labels = [agent.select(0, prompts, candidates, rng(seed))[0].label for seed in range(60)]
    (rewards,) = agent._rewards(prompts, candidates)
    (choice,) = agent.select(0, prompts, candidates, rng(0))
    share = float((rewards[:, choice.first] > rewards[:, choice.second]).float().mean())
    assert 0 < share < 1
    assert abs(np.mean(labels) - share) < 4 * math.sqrt(share * (1 - share) / 60)


def test_extreme_pairs_are_a_members_best_and_worst(policy, box):
    agent = ready(policy, gamma_burn_in=0, gamma_after=0.0, synthetic_pairs="extremes")
    prompts, candidates = batch_of(box, 0)
    rewards = agent._rewards(prompts, candidates)
    for choice in agent.select(0, prompts, candidates, rng(0)):
        own = rewards[choice.prompt][choice.meta["member"]]
        assert (choice.first, choice.second) == (int(own.argmax()), int(own.argmin()))
        assert choice.label in (0.0, 1.0)


def test_synthetic_labels_never_reach_the_posteriors_data(policy, box):
    mixed = ready(policy, gamma_burn_in=6, gamma_after=0.5)
    story = play(mixed, box, range(6))
    bought = [p for _, preferences, _ in story for p in preferences if p.source is LabelSource.ORACLE]
    made = sum(len(preferences) for _, preferences, _ in story) - len(bought)
    assert made >= 5
    assert mixed.posterior.num_labels == len(bought) == story[-1][2]["posterior_labels"]
    assert story[-1][2]["synthetic_share"] == pytest.approx(made / (made + len(bought)))
    # and change nothing in it: the same run without them ends in the same posterior, once features are calibrated
    lean, full = ready(policy), ready(policy)
    play(lean, box, range(4)), play(full, box, range(4))
    prompts, candidates = batch_of(box, 5)
    choices = full.select(5, prompts, candidates, rng(5, 0))
    bought = labelled(box, 5, prompts, candidates, choices)
    extra = [dataclasses.replace(p, source=LabelSource.SYNTHETIC, label=1 - p.label) for p in bought[:3]]
    full.observe(5, [*bought, *extra], rng(5, 1))
    lean.observe(5, bought, rng(5, 1))
    assert_same_posterior(lean, full)


def assert_same_posterior(a, b):
    for name in a.posterior.heads:
        assert torch.equal(a.posterior.heads[name], b.posterior.heads[name])
    for name in ("features_BSD", "labels_B", "weights_BE"):
        assert torch.equal(a.posterior.duels[name], b.posterior.duels[name])
    assert torch.equal(a.posterior.standardize.mean_D, b.posterior.standardize.mean_D)


def test_saved_agent_goes_on_bit_for_bit(policy, box, tmp_path):
    a = ready(policy, gamma_burn_in=10)
    play(a, box, range(3))
    a.save(tmp_path)
    b = ready(policy, gamma_burn_in=10)
    b.load(tmp_path)
    for (choices, _, facts), (same, _, equal) in zip(play(a, box, range(3, 6)), play(b, box, range(3, 6)), strict=True):
        assert choices == same and facts == equal
    assert_same_posterior(a, b)


@pytest.mark.parametrize("saved_after", [0, 1, 3])
def test_replay_of_the_ledger_makes_the_same_posterior_bit_for_bit(policy, box, tmp_path, saved_after):
    """Even from nothing: only the duelling responses are known then, not the candidates that lost."""
    a = ready(policy, gamma_burn_in=10)
    story = play(a, box, range(saved_after))
    a.save(tmp_path)
    story += play(a, box, range(saved_after, 5))
    b = ready(policy, gamma_burn_in=10)
    if saved_after:
        b.load(tmp_path)
    for batch in range(saved_after, 5):
        b.observe(batch, story[batch][1][::-1], rng(batch, 1))  # the ledger's order may be another
    assert_same_posterior(a, b)
    prompts, candidates = batch_of(box, 5)
    assert a.select(5, prompts, candidates, rng(5)) == b.select(5, prompts, candidates, rng(5))


def test_another_seed_is_another_posterior(policy):
    a, b = ready(policy, seed=0), ready(policy, seed=1)
    assert not torch.equal(a.posterior.start["w1_EDH"], b.posterior.start["w1_EDH"])


def test_features_of_a_duel_are_not_computed_again_when_its_label_comes(policy, box):
    agent = ready(policy)
    prompts, candidates = batch_of(box, 0)
    choices = agent.select(0, prompts, candidates, rng(0, 0))
    assert agent.features.computed == 48
    agent.observe(0, labelled(box, 0, prompts, candidates, choices), rng(0, 1))
    assert agent.features.computed == 48


def test_accuracy_is_of_labels_that_the_posterior_has_not_seen(policy, box):
    agent, untouched = ready(policy), ready(policy)
    prompts, candidates = batch_of(box, 0)
    preferences = labelled(box, 0, prompts, candidates, agent.select(0, prompts, candidates, rng(0, 0)))
    facts = agent.observe(0, preferences, rng(0, 1))
    ordered = sorted(preferences, key=lambda p: p.duel.id)
    features = untouched._pair_features(ordered)
    untouched.posterior.standardize.add(features.flatten(0, 1))
    labels = torch.tensor([p.label for p in ordered])
    assert facts["posterior_accuracy"] == agreement(untouched.posterior.margins(features), labels)


def test_learns_what_the_oracle_likes_and_says_when_it_was_untrained(policy, box):
    # Random pairs: those that bai_ts takes are the hard ones, by design.
    agent = ready(policy, **{"posterior.members": 10, "posterior.hidden": 16, "exploration": "passive"})
    facts = [fact for _, _, fact in play(agent, box, range(30))]
    assert [fact["posterior_trained"] for fact in facts] == [0.0] + [1.0] * 29
    assert np.mean([fact["posterior_accuracy"] for fact in facts[-8:]]) > 0.75
    assert facts[-1]["posterior_nll"] < 0.5
    assert facts[-1]["posterior_diversity"] > 0.2
    assert 0 <= facts[-1]["posterior_disagreement"] <= 0.56
    prompt, responses = box.prompt(999), [box.response(*range(n)) for n in (2, 18, 5)]
    assert agent.best_of(prompt, responses) == 1


def test_best_of_is_the_arg_max_of_the_ensembles_mean_and_silent_before_training(policy, box):
    agent = ready(policy)
    prompts, candidates = batch_of(box, 0, candidates=12)
    assert agent.best_of(prompts[0], candidates[0]) is None
    play(agent, box, range(2))
    for prompt, group in zip(prompts, candidates, strict=True):
        rewards = agent.posterior.rewards(agent.features([prompt] * 12, group))
        assert agent.best_of(prompt, group) == int(rewards.mean(0).argmax())
    assert agent.best_of(prompts[0], []) is None


def test_a_batch_without_any_label_changes_nothing(policy, box):
    agent = ready(policy)
    play(agent, box, range(2))
    steps = agent.posterior.steps
    assert agent.observe(2, [], rng(2))["posterior_labels"] == 12
    assert agent.posterior.steps == steps


def test_ties_are_learned_as_ties(policy, box):
    agent = ready(
        policy,
        **{
            "posterior.bootstrap": False,
            "posterior.regularization": 0.0,
            "posterior.updates": 300,
            "posterior.learning_rate": 0.01,
        },
    )
    prompts, candidates = batch_of(box, 0)
    tied = [box.preference(p, g[0], g[1], 0.5) for p, g in zip(prompts, candidates, strict=True)]
    before = agent._pair_features(tied)
    agent.observe(0, tied, rng(0))
    assert agent.posterior.margins(before).abs().mean() < 0.3


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_papers_seven_variants_come_out_of_settings(policy, box, variant):
    settings = VARIANTS[variant]
    own = {name.removeprefix("agent."): value for name, value in settings.items() if name.startswith("agent.")}
    agent = ready(policy, **{**SMALL, **own, "gamma_burn_in": 12})
    choices = [choice for chosen, _, _ in play(agent, box, range(4)) for choice in chosen]
    passive = all((choice.first, choice.second) == (0, 1) for choice in choices)
    synthetic = any(choice.label is not None for choice in choices)
    best_of_n = agent.best_of(*(x[0] for x in batch_of(box, 9))) is not None and settings["evaluation.best_of_n"] > 1
    frozen = settings.get("learner.learning_rate") == 0.0
    assert {1: (1, 0, 0, 0), 2: (0, 0, 0, 0), 3: (0, 1, 0, 0), 4: (1, 0, 1, 0), 5: (0, 0, 1, 0), 6: (0, 1, 1, 0),
            7: (0, 0, 1, 1)}[variant] == (passive, synthetic, best_of_n, frozen)  # fmt: skip
    assert (agent.posterior is None) == (variant == 1)


def test_non_finite_features_stop_the_run_before_a_label_is_bought(policy, box):
    agent = ready(policy)
    with torch.no_grad():
        agent.features._backbone.model.embed_tokens.weight[7] = float("nan")
    prompts, candidates = batch_of(box, 0)
    with pytest.raises(NonFiniteLossError, match=r"non-finite rewards with agent.features.backbone='policy'"):
        agent.select(0, prompts, candidates, rng(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exploration": "bai"}, "agent.exploration='bai' is unknown. Did you mean 'bai_ts'"),
        ({"num_candidates": 1}, "agent.num_candidates=1 must be at least 2"),
        ({"gamma_after": 1.5}, "agent.gamma_after=1.5"),
        ({"gamma_burn_in": -1}, "agent.gamma_burn_in=-1"),
        ({"synthetic_pairs": "best"}, "agent.synthetic_pairs='best' is unknown"),
        ({"posterior.updates": 0}, "leaves the reward posterior untrained"),
        ({"posterior.updates": 0, "exploration": "passive"}, "agent.gamma_after=0.7 rely on it"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_agent("sea", **settings)


def test_learner_side_agent_needs_no_setup():
    assert SEA(SEAConfig(loss="simpo")).needs_reference() is False
    assert SEA().features is None
