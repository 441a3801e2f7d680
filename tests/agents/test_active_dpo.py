"""ActiveDPO and its baselines: which pairs they pick, and that a replay leaves the state that the run had."""

import numpy as np
import pytest

from rayalign.agents import make_agent
from rayalign.agents.active_dpo import pack
from rayalign.agents.agent import AgentContext, Proposal
from rayalign.agents.posteriors.gradient_features import greedy_batch, pair_features, uncertainty
from rayalign.errors import ConfigError
from rayalign.scoring.config import ScorerConfig
from rayalign.scoring.pool import ScorerPool
from rayalign.types import Duel, Preference

DIM = 48
NAMES = ("active_dpo", "apo", "aplp", "random")


@pytest.fixture(scope="module")
def scorer(policy):
    """In this process; the policy is its own reference."""
    with ScorerPool(ScorerConfig(num_replicas=0, lora_rank=4), policy) as pool:
        yield pool


@pytest.fixture
def make(policy, scorer):
    def build(name="active_dpo", batch_size=4, **settings):
        settings = {"prompts_per_duel": 2, **({"dim": DIM} if name == "active_dpo" else {}), **settings}
        agent = make_agent(name, **settings)
        agent.setup(AgentContext(policy=policy, seed=3, batch_size=batch_size, scorer=scorer))
        return agent

    return build


def table(box, batch=0, prompts=8):
    """Different prompts with 3 different responses each."""
    of = range(batch * prompts, (batch + 1) * prompts)
    return [box.prompt(n) for n in of], [[box.response(n, n + 3 * i, 5 * i) for i in range(3)] for n in of]


def duels_of(batch, prompts, candidates, choices):
    pairs = [(prompts[c.prompt], candidates[c.prompt][c.first], candidates[c.prompt][c.second], c) for c in choices]
    return [
        Preference(
            duel=Duel(
                id=Duel.make_id("run", batch, slot, prompt, first, second),
                batch=batch,
                prompt=prompt,
                first=first,
                second=second,
                meta=choice.meta,
            ),
            label=float(slot % 2),
        )
        for slot, (prompt, first, second, choice) in enumerate(pairs)
    ]


def step(agent, box, batch):
    prompts, candidates = table(box, batch)
    choices = agent.select(batch, prompts, candidates, np.random.default_rng(batch))
    preferences = duels_of(batch, prompts, candidates, choices)
    agent.observe(batch, preferences, np.random.default_rng(batch))
    return choices, preferences


def picked(choices):
    return [(c.prompt, c.first, c.second) for c in choices]


def every_pair(prompts=8):
    return [(p, i, j) for p in range(prompts) for i, j in ((0, 1), (0, 2), (1, 2))]


def features(scorer, prompts, candidates, normalize="response"):
    rows = np.concatenate(scorer.gradients(prompts, candidates, dim=DIM, seed=3))
    pairs = [(3 * p + i, 3 * p + j) for p, i, j in every_pair(len(prompts))]
    return pair_features(rows, *zip(*pairs, strict=True), normalize)


# -- what all have in common -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_the_pool_is_20_prompts_a_label_with_3_responses_each_by_default(name):
    agent = make_agent(name)
    assert agent.prompts_per_batch(50) == 1000 and agent.proposals() == (Proposal(n=3),)


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_buys_a_batch_of_different_pairs_of_different_texts(name, make, box):
    prompts, candidates = table(box)
    candidates[2] = [candidates[2][0]] * 3
    candidates[4] = [candidates[4][0], candidates[4][1], candidates[4][0]]
    agent = make(name)
    choices = agent.select(0, prompts, candidates, np.random.default_rng(0))
    pairs = picked(choices)
    assert len(pairs) == len(set(pairs)) == 4 and all(choice.label is None for choice in choices)
    assert 2 not in {p for p, _, _ in pairs}
    assert all(candidates[p][i].text != candidates[p][j].text for p, i, j in pairs)
    again = agent.select(0, prompts, candidates, np.random.default_rng(0))
    assert again == choices


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_compare_is_nothing_to_buy(name, make, box):
    prompts, candidates = table(box, prompts=2)
    assert make(name).select(0, prompts, [[group[0]] * 3 for group in candidates], np.random.default_rng(0)) == []


@pytest.mark.parametrize("name", ["random", "active_dpo", "apo"])
def test_a_small_pool_is_bought_whole_several_pairs_of_a_prompt_included(name, make, box):
    prompts, candidates = table(box, prompts=2)
    choices = make(name, batch_size=50).select(0, prompts, candidates, np.random.default_rng(0))
    assert sorted(picked(choices)) == every_pair(2)


def test_repeated_texts_make_one_pair_unless_they_are_to_be_kept(make, box):
    prompts, candidates = table(box, prompts=1)
    candidates = [[candidates[0][0], candidates[0][0], candidates[0][1]]]
    for kept, pairs in (("distinct", [(0, 0, 2)]), ("keep", every_pair(1))):
        for name in ("random", "active_dpo"):
            agent = make(name, pair_sampling=kept)
            assert sorted(picked(agent.select(0, prompts, candidates, np.random.default_rng(0)))) == pairs
    (*_, last) = agent.select(0, prompts, candidates, np.random.default_rng(0))
    assert picked([last]) == [(0, 0, 1)] and last.meta["uncertainty"] == 0.0


# -- random -----------------------------------------------------------------------------------------------------------
def test_random_takes_every_pair_equally_often(make, box):
    prompts, candidates = table(box, prompts=4)
    agent = make("random", batch_size=3)
    rng = np.random.default_rng(0)
    draws = 800
    seen = [pair for _ in range(draws) for pair in picked(agent.select(0, prompts, candidates, rng))]
    counts = np.array([seen.count(pair) for pair in every_pair(4)])
    assert counts.sum() == 3 * draws
    np.testing.assert_allclose(counts, 3 * draws / 12, rtol=0.3)  # 4.2 standard deviations


# -- active_dpo -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("normalize", ["response", "pair", "none"])
def test_active_dpo_is_the_greedy_batch_of_the_models_gradient_features(normalize, make, scorer, box):
    prompts, candidates = table(box)
    choices = make(normalize=normalize, reg=0.5).select(0, prompts, candidates, np.random.default_rng(0))
    phi = features(scorer, prompts, candidates, normalize)
    picks, values = greedy_batch(phi, phi[:0], 0.5, 4)
    assert picked(choices) == [every_pair()[i] for i in picks]
    assert [c.meta["uncertainty"] for c in choices] == pytest.approx(values, rel=1e-4)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("earlier", ["recompute", "keep", "reset"])
def test_the_next_batch_starts_from_the_duels_of_the_earlier_ones(earlier, make, scorer, box):
    agent = make(earlier=earlier, reg=0.05)
    _, first = step(agent, box, 0)
    prompts, candidates = table(box, 0)  # the same pool again: what was asked is known now
    choices = agent.select(1, prompts, candidates, np.random.default_rng(1))
    phi = features(scorer, prompts, candidates)
    asked, _ = greedy_batch(phi, phi[:0], 0.05, 4)
    expected, values = greedy_batch(phi, phi[:0] if earlier == "reset" else phi[asked], 0.05, 4)
    assert picked(choices) == [every_pair()[i] for i in expected]
    assert [c.meta["uncertainty"] for c in choices] == pytest.approx(values, rel=2e-3)
    assert (picked(choices) == [every_pair()[i] for i in asked]) == (earlier == "reset")
    assert len(first) == 4


def test_recomputed_features_follow_the_model_and_kept_ones_do_not(make, policy, box):
    import torch
    from transformers import AutoModelForCausalLM

    from rayalign.rollout.weights import pack as pack_weights

    with ScorerPool(ScorerConfig(num_replicas=0, lora_rank=4), policy) as own:
        agents = {earlier: make(earlier=earlier) for earlier in ("recompute", "keep")}
        for agent in agents.values():
            agent.scorer = own
            step(agent, box, 0)
        before = {earlier: agent._asked() for earlier, agent in agents.items()}
        np.testing.assert_allclose(before["recompute"], before["keep"], atol=2e-3)  # float16
        torch.manual_seed(0)
        state = AutoModelForCausalLM.from_pretrained(policy).state_dict()
        own.sync(pack_weights(1, {k: v + 0.1 * torch.randn_like(v) for k, v in state.items()}))
        assert np.abs(agents["recompute"]._asked() - before["recompute"]).max() > 0.05
        np.testing.assert_array_equal(agents["keep"]._asked(), before["keep"])


def test_a_verdict_that_failed_leaves_no_trace(make, box):
    prompts, candidates = table(box)
    agent = make()
    preferences = duels_of(0, prompts, candidates, agent.select(0, prompts, candidates, np.random.default_rng(0)))
    agent.observe(0, preferences[1:], np.random.default_rng(0))
    assert agent._asked().shape == (3, DIM)


def test_kept_features_cost_2_bytes_a_dimension_in_base64():
    assert len(pack(np.ones(8192, dtype=np.float32))) == pytest.approx(8192 * 2 * 4 / 3, abs=4)


# -- apo --------------------------------------------------------------------------------------------------------------
def test_apo_ranks_once_under_one_v_and_then_updates_it(make, box):
    agent = make("apo", reg=0.1)
    for batch in range(2):
        prompts, candidates = table(box, batch)
        phi = agent._differences(
            prompts, candidates, *zip(*[(3 * p + i, 3 * p + j) for p, i, j in every_pair()], strict=True)
        )
        values = np.sqrt(uncertainty(phi, agent._asked_MD, 0.1))
        assert len(agent._asked_MD) == 4 * batch
        choices, _ = step(agent, box, batch)
        order = np.argsort(-values, kind="stable")[:4]
        assert picked(choices) == [every_pair()[i] for i in order]
        assert [c.meta["uncertainty"] for c in choices] == pytest.approx(values[order].tolist(), rel=1e-5)


def test_apo_never_samples_anew():
    agent = make_agent("apo")
    assert {agent.sampling_window(batch, 3) for batch in range(9)} == {(0, 0)}
    assert make_agent("active_dpo").sampling_window(5, 1) == (4, None)


# -- aplp -------------------------------------------------------------------------------------------------------------
def test_aplp_takes_one_pair_of_each_of_the_prompts_with_the_highest_entropy(make, scorer, box):
    prompts, candidates = table(box)
    choices = make("aplp").select(0, prompts, candidates, np.random.default_rng(0))
    entropy = [-np.mean(logprobs) for logprobs in scorer.logprobs(prompts, candidates)]
    assert {c.prompt for c in choices} == set(np.argsort(entropy)[-4:].tolist())


# -- replay -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "settings"),
    [("active_dpo", {}), ("active_dpo", {"earlier": "keep"}), ("active_dpo", {"earlier": "reset"}), ("apo", {})],
)
def test_state_that_was_saved_and_replayed_picks_as_if_nothing_had_happened(name, settings, make, box, tmp_path):
    agent = make(name, **settings)
    history = []
    for batch in range(3):
        history.append(step(agent, box, batch)[1])
        if batch == 0:
            agent.save(tmp_path)
    resumed = make(name, **settings)
    resumed.load(tmp_path)
    for batch in (1, 2):
        resumed.observe(batch, history[batch][::-1], np.random.default_rng(batch))  # another order of arrival
    assert step(agent, box, 3)[0] == step(resumed, box, 3)[0]


def test_a_ledgers_json_keeps_what_an_agent_remembers_of_a_duel(make, box):
    import json

    prompts, candidates = table(box)
    for choice in make(earlier="keep").select(0, prompts, candidates, np.random.default_rng(0)):
        assert json.loads(json.dumps(dict(choice.meta))) == choice.meta


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("active_dpo", {"dim": 0}, r"agent.dim=0 must be at least 1"),
        ("active_dpo", {"reg": 0.0}, r"agent.reg=0.0 must be positive"),
        ("active_dpo", {"normalize": "pairs"}, r"agent.normalize='pairs' is unknown. Did you mean 'pair'"),
        ("active_dpo", {"earlier": "forget"}, r"agent.earlier='forget' is unknown"),
        ("apo", {"reg": -1.0}, r"agent.reg=-1.0 must be positive"),
        ("random", {"num_candidates": 1}, r"agent.num_candidates=1 must be at least 2"),
        ("random", {"prompts_per_duel": 0}, r"agent.prompts_per_duel=0 must be at least 1"),
    ],
)
def test_settings_are_checked(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_agent(name, **settings)
