import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayalign.agents import make_agent
from rayalign.agents.agent import Proposal
from rayalign.agents.losses import PairLogProbs, dpo
from rayalign.agents.selm import best_and_worst
from rayalign.errors import ConfigError


def judged(box, agent, groups, better):
    """The agent's duels, answered by `better(prompt, i, j)`: 1.0, 0.5, 0.0, or None for a verdict that failed."""
    prompts = [box.prompt(i) for i in range(len(groups))]
    preferences = []
    for choice in agent.select(0, prompts, groups, np.random.default_rng(0)):
        label = better(choice.prompt, choice.first, choice.second)
        if label is not None:
            group = groups[choice.prompt]
            made = box.preference(prompts[choice.prompt], group[choice.first], group[choice.second], label)
            meta = json.loads(json.dumps(dict(choice.meta)))
            preferences.append(replace(made, duel=replace(made.duel, meta=meta)))
    return preferences


def by_rank(*rewards):
    """Answers of an oracle with these rewards for each prompt's responses."""
    return lambda p, i, j: 0.5 + 0.5 * float(np.sign(rewards[p][i] - rewards[p][j]))


def pairs_of(preferences, logprob):
    def column(side):
        return torch.tensor([logprob[getattr(p, side).text] for p in preferences])

    zeros = torch.zeros(len(preferences))
    return PairLogProbs(
        winner_B=column("winner"), loser_B=column("loser"), reference_winner_B=zeros, reference_loser_B=zeros,
        winner_length_B=zeros, loser_length_B=zeros, preferences=preferences,
    )  # fmt: skip


def groups_of(box, prompts, size=3):
    return [[box.response(3 * p + i) for i in range(size)] for p in range(prompts)]


def test_one_fresh_response_joins_the_datasets_pair_and_the_online_form_needs_none():
    assert make_agent("selm").proposals() == (Proposal(n=1), Proposal(n=2, source="data"))
    assert make_agent("selm", fresh=3).proposals() == (Proposal(n=3),)
    assert [make_agent("selm", fresh=n).prompts_per_batch(32) for n in (1, 2, 3)] == [10, 32, 10]
    assert make_agent("selm").prompts_per_batch(2) == 1


def test_three_responses_are_three_labels_and_repeated_texts_are_not_asked_about(box):
    agent = make_agent("selm")
    a, b, c = (box.response(i) for i in range(3))
    groups = [[a, b, c], [a, a, c], [a, b, b], [a, a, a]]
    choices = agent.select(0, [box.prompt(i) for i in range(4)], groups, np.random.default_rng(0))
    assert [(x.prompt, x.first, x.second) for x in choices] == [
        (0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 2), (2, 0, 1),
    ]  # fmt: skip
    assert all(x.label is None for x in choices)
    kept = make_agent("selm", pair_sampling="keep").select(0, [box.prompt(3)], groups[3:], None)
    assert len(kept) == 3


@pytest.mark.parametrize("order", itertools.permutations((3.0, 2.0, 1.0)))
def test_best_and_worst_of_a_ranking_whatever_the_order_of_the_verdicts(order):
    pairs = list(itertools.combinations(range(3), 2))
    best, worst = order.index(3.0), order.index(1.0)
    for known in itertools.permutations(pairs):
        verdicts = [(i, j, float(order[i] > order[j])) for i, j in known]
        assert best_and_worst(verdicts) == (best, worst, 1.0)
        turned = [(j, i, 1 - label) for i, j, label in verdicts]
        assert best_and_worst(turned) == (best, worst, 1.0)


def test_ties_and_cycles_are_broken_by_the_duel_itself_and_then_by_index():
    assert best_and_worst([(0, 1, 0.5), (0, 2, 0.5), (1, 2, 0.5)]) == (0, 1, 0.5)
    assert best_and_worst([(0, 1, 0.5), (0, 2, 1.0), (1, 2, 1.0)]) == (0, 2, 1.0)
    assert best_and_worst([(0, 1, 1.0), (0, 2, 1.0), (1, 2, 0.5)]) == (0, 1, 1.0)
    for cycle in ([(0, 1, 1.0), (1, 2, 1.0), (0, 2, 0.0)], [(0, 1, 0.0), (1, 2, 0.0), (0, 2, 1.0)]):
        best, worst, label = best_and_worst(cycle)
        assert best == 0 and label == 1.0
        assert (0, worst, 1.0) in cycle, "a cycle keeps a verdict that was bought"


def test_two_verdicts_of_three_still_rank_and_one_is_taken_as_it_is():
    assert best_and_worst([(0, 1, 1.0), (0, 2, 0.0)]) == (2, 1, 1.0)  # 2 > 0 > 1, never compared
    assert best_and_worst([(0, 1, 1.0), (0, 2, 1.0)]) == (0, 1, 1.0)
    assert best_and_worst([(1, 2, 0.0)]) == (2, 1, 1.0)
    assert best_and_worst([(1, 2, 0.5)]) == (1, 2, 0.5)


def test_rankings_of_two_batches_are_not_mixed_up_where_late_answers_bring_them_together(box):
    agent, groups = make_agent("selm"), groups_of(box, 2)
    earlier = judged(box, agent, groups[:1], by_rank([3.0, 2.0, 1.0]))
    later = [
        replace(p, duel=replace(p.duel, id=f"later-{p.duel.id}", batch=p.duel.batch + 1))
        for p in judged(box, agent, groups[1:], by_rank([1.0, 2.0, 3.0]))
    ]
    ranked = agent.training_duels([*earlier, *later])
    assert [(d.winner, d.loser) for d in ranked] == [(groups[0][0], groups[0][2]), (groups[1][2], groups[1][0])]


def test_best_meets_worst_and_the_fresh_response_is_named_wherever_it_ranks(box):
    agent, groups = make_agent("selm"), groups_of(box, 3)
    rewards = ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0])  # the fresh one is best, worst, in the middle
    duels = agent.training_duels(judged(box, agent, groups, by_rank(*rewards)))
    assert [(d.winner, d.loser) for d in duels] == [
        (groups[0][0], groups[0][2]),
        (groups[1][2], groups[1][0]),
        (groups[2][1], groups[2][2]),
        (groups[2][0], groups[2][0]),
    ]
    assert [bool(d.duel.meta.get("auxiliary")) for d in duels] == [False, False, False, True]
    assert len({d.duel.id for d in duels}) == 4


def test_mean_loss_is_algorithm_1_by_hand(box):
    agent, groups = make_agent("selm", beta=0.5, alpha=0.1), groups_of(box, 2)
    logprob = {c.text: -float(i) for i, c in enumerate(c for group in groups for c in group)}
    duels = agent.training_duels(judged(box, agent, groups, by_rank([2.0, 3.0, 1.0], [1.0, 2.0, 3.0])))
    # first prompt: -1 against -2, y in the middle has 0; second: -5 against -3, y is the loser
    want = np.mean([math.log1p(math.exp(-0.5)) - 0.1 * 0.0, math.log1p(math.exp(1.0)) - 0.1 * 3.0])
    assert agent.loss(pairs_of(duels, logprob)).mean().item() == pytest.approx(want, rel=1e-6)


def test_algorithm_1s_alpha_is_equation_4_2s_times_beta(box):
    beta, alpha_of_4_2 = 0.2, 0.7
    agent, groups = make_agent("selm", beta=beta, alpha=alpha_of_4_2 * beta), groups_of(box, 4)
    logprob = {c.text: -1.0 - 0.3 * i for i, c in enumerate(c for group in groups for c in group)}
    duels = agent.training_duels(judged(box, agent, groups, by_rank(*np.random.default_rng(3).normal(size=(4, 3)))))
    real = [d for d in duels if not d.duel.meta.get("auxiliary")]
    equation_4_2 = dpo(pairs_of(real, logprob), agent.config).mean().item() + alpha_of_4_2 * beta * np.mean(
        [logprob[group[0].text] for group in groups]
    )
    assert agent.loss(pairs_of(duels, logprob)).mean().item() == pytest.approx(equation_4_2, rel=1e-6)


def test_last_batch_cut_in_the_middle_of_a_prompt_and_failed_verdicts_leave_what_is_known(box):
    agent, groups = make_agent("selm"), groups_of(box, 3)
    oracle = by_rank([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    # of prompt 1 the third verdict is missing, of prompt 2 both about the fresh response
    missing = {(1, 1, 2), (2, 0, 1), (2, 0, 2)}
    known = judged(box, agent, groups, lambda *duel: None if duel in missing else oracle(*duel))
    duels = agent.training_duels(known)
    assert [(d.winner, d.loser) for d in duels] == [
        (groups[0][0], groups[0][2]),
        (groups[1][1], groups[1][0]),
        (groups[2][2], groups[2][1]),
    ]
    assert [d.duel.meta["terms"] for d in duels] == [
        {"dpo": 1.0, "first": 1.0, "second": 0.0},
        {"dpo": 1.0, "first": 0.0, "second": 1.0},
        {"dpo": 1.0, "first": 0.0, "second": 0.0},
    ]
    assert agent.training_duels(known[::-1]) == duels
    assert agent.training_duels([]) == []


def test_online_form_with_two_responses_is_their_duel_with_optimism_about_the_first(box):
    agent, groups = make_agent("selm", fresh=2), groups_of(box, 2, size=2)
    preferences = judged(box, agent, groups, by_rank([1.0, 2.0], [2.0, 1.0]))
    assert len(preferences) == 2
    duels = agent.training_duels(preferences)
    assert [(d.winner, d.loser) for d in duels] == [tuple(groups[0][::-1]), tuple(groups[1])]
    assert [d.duel.meta["terms"]["first"] for d in duels] == [0.0, 1.0]
    assert [d.duel.meta["terms"]["second"] for d in duels] == [1.0, 0.0]


def test_sampling_policy_and_reference_are_the_policy_at_the_iterations_start_and_the_rate_decays():
    agent = make_agent("selm", iterations=3, batches_per_iteration=4)
    batches = range(14)
    starts = [0] * 4 + [4] * 4 + [8] * 6
    assert [agent.reference_version(b) for b in batches] == starts
    assert [agent.sampling_window(b, 2) for b in batches] == [(start, start) for start in starts]
    rates = [agent.learning_rate_factor(b) for b in batches]
    assert rates == pytest.approx([1.0] * 4 + [0.6] * 4 + [0.2] * 6)  # 5e-7 to 1e-7 in three iterations
    assert make_agent("selm", iterations=1).learning_rate_factor(99) == 1.0


def test_the_learning_rate_falls_at_the_last_iteration_alone_and_warms_up_in_each_if_asked():
    agent = make_agent("selm", iterations=3, batches_per_iteration=4, decay="last", warmup=0.5)
    rates = [agent.learning_rate_factor(b) for b in range(14)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.5, 1, 1, 1, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2])
    cosine = make_agent("selm", iterations=2, batches_per_iteration=4, cycle="cosine", final_learning_rate=1.0)
    half, most = 0.5 * (1 + math.cos(math.pi / 4)), 0.5 * (1 + math.cos(3 * math.pi / 4))
    assert [cosine.learning_rate_factor(b) for b in range(9)] == pytest.approx([1, half, 0.5, most] * 2 + [0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fresh": 4}, "agent.fresh=4 must be 1"),
        ({"iterations": 0}, "agent.iterations=0"),
        ({"batches_per_iteration": 0}, "agent.batches_per_iteration=0"),
        ({"final_learning_rate": 0.0}, "agent.final_learning_rate=0.0"),
        ({"warmup": 1.0}, "agent.warmup=1.0 must be in"),
        ({"decay": "lats"}, "agent.decay='lats' is unknown. Did you mean 'last'"),
        ({"cycle": "cosin"}, "agent.cycle='cosin' is unknown. Did you mean 'cosine'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_agent("selm", **settings)
