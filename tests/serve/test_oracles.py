"""Functions as oracles, in this process: no Ray."""

import asyncio
import math
import pickle

import pytest

from rayalign.env.truth import TruthOracle
from rayalign.env.world import World
from rayalign.errors import ConfigError, OracleError, UnfinishedError
from rayalign.serve.config import OracleConfig
from rayalign.serve.oracles import FunctionOracle, oracle_factory
from rayalign.serve.wire import DuelColumns, VerdictColumns
from rayalign.types import Candidate, Duel, Prompt, Verdict


def duel(name, text="p", first="a", second="b", **prompt):
    def response(t):
        return Candidate(text=t, token_ids=(1, 2), logprobs=(-0.5, -0.5), policy_version=3)

    return Duel(
        id=name,
        batch=7,
        prompt=Prompt(id=f"id of {text}", text=text, token_ids=(5, 6), **prompt),
        first=response(first),
        second=response(second),
    )


def length(prompt, response):
    return float(len(response))


async def async_length(prompt, response):
    await asyncio.sleep(0)
    return float(len(response))


def lengths(prompts, responses):
    return [float(len(r)) for r in responses]


async def async_lengths(prompts, responses):
    return [float(len(r)) for r in responses]


class Callable:
    async def __call__(self, prompt, response):
        return len(response)


@pytest.mark.parametrize(
    ("function", "batched"),
    [
        *[(length, False), (async_length, False), (lengths, True), (async_lengths, True), (Callable(), False)],
        (lambda prompt, response: async_length(prompt, response), False),
    ],
)
def test_reward_of_every_kind_of_function_becomes_bradley_terry(function, batched):
    verdicts = FunctionOracle(function, batched=batched, scale=0.5, price=0.1).judge(
        [duel("x", first="aaaa", second="aa"), duel("y", first="a", second="a"), duel("z", first="", second="aaa")]
    )
    expected = [1 / (1 + math.exp(-1.0)), 0.5, 1 / (1 + math.exp(1.5))]
    assert [v.probability for v in verdicts] == pytest.approx(expected)
    assert [(v.duel_id, v.price) for v in verdicts] == [("x", 0.1), ("y", 0.1), ("z", 0.1)]


def test_probability_function_gets_prompt_first_second_and_is_taken_as_it_is():
    def probability(prompt, first, second):
        assert (prompt, first, second) == ("p", "a", "b")
        return 0.25

    assert FunctionOracle(probability, returns="probability").judge([duel("x")])[0].probability == 0.25


def test_async_calls_overlap():
    running, most = 0, 0

    async def reward(prompt, response):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return 0.0

    FunctionOracle(reward).judge([duel(str(i)) for i in range(10)])
    assert most == 20


def test_extreme_rewards_do_not_overflow():
    oracle = FunctionOracle(lambda p, r: {"a": 1e6, "b": -1e6}[r])
    forward, backward = oracle.judge([duel("x"), duel("y", first="b", second="a")])
    assert (forward.probability, backward.probability) == (1.0, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "good"])
def test_reward_that_is_not_a_finite_number_names_the_duel(value):
    oracle = FunctionOracle(lambda p, r: value if p == "odd" else 1.0)
    with pytest.raises(OracleError, match=r"as a reward in duel d2 \(prompt id of odd\)"):
        oracle.judge([duel("d1"), duel("d2", text="odd")])


@pytest.mark.parametrize("value", [math.nan, 1.5, -0.1])
def test_probability_out_of_range_names_the_duel_and_the_setting(value):
    oracle = FunctionOracle(lambda p, a, b: value, returns="probability")
    with pytest.raises(OracleError, match=r"duel d1 .* Set oracle\.returns=reward"):
        oracle.judge([duel("d1")])


@pytest.mark.parametrize("kind", ["plain", "async"])
@pytest.mark.parametrize("returns", ["reward", "probability"])
def test_what_was_answered_before_the_function_broke_is_handed_over(kind, returns):
    asked = []

    def plain(prompt, *responses):
        asked.append(prompt)
        if prompt == "odd":
            raise KeyError("no such key")
        return 0.5

    async def waiting(prompt, *responses):
        return plain(prompt, *responses)

    oracle = FunctionOracle({"plain": plain, "async": waiting}[kind], returns=returns, price=0.1)
    duels = [duel("d1"), duel("d2", text="odd"), *(duel(f"later-{i}") for i in range(100))]
    with pytest.raises(UnfinishedError, match=r"raised KeyError on duel d2: 'no such key'") as caught:
        oracle.judge(duels)
    assert [(v.duel_id, v.probability, v.price) for v in caught.value.answered] == [("d1", 0.5, 0.1)]
    assert len(asked) == (2 if returns == "probability" else 3), "nothing is begun after the first error"


@pytest.mark.parametrize("batched", [False, True])
def test_exception_of_the_function_names_the_duel(batched):
    def broken(*args):
        raise KeyError("no such key")

    with pytest.raises(OracleError, match=r"raised KeyError on .*duel d1.*: 'no such key'"):
        FunctionOracle(broken, batched=batched).judge([duel("d1"), duel("d2")])


def test_batched_function_of_the_wrong_length_is_an_error():
    with pytest.raises(OracleError, match="returned 1 values for 2 rows"):
        FunctionOracle(lambda prompts, responses: [1.0], batched=True).judge([duel("d")])


def test_function_by_import_path():
    oracle = oracle_factory(OracleConfig(kind="function", target="math:dist", returns="probability"))()
    assert oracle.id == "function:math:dist"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "reward-model"}, r"oracle\.kind='reward-model' is unknown\. Did you mean 'reward_model'"),
        ({"kind": "function"}, r"oracle\.kind='function' needs oracle\.target"),
        ({"kind": "function", "target": "math"}, r"oracle\.target='math' must be an import path"),
        ({"kind": "world"}, r"no world has none"),
    ],
)
def test_settings_that_can_be_seen_to_be_wrong_are_refused_before_anything_starts(settings, message):
    with pytest.raises(ConfigError, match=message):
        oracle_factory(OracleConfig(**settings))


@pytest.mark.parametrize("target", ["no_such_module_anywhere:f", "math:no_such_function"])
def test_target_that_can_not_be_imported_is_named(target):
    with pytest.raises(ConfigError, match=rf"oracle\.target='{target}' can't be imported"):
        oracle_factory(OracleConfig(kind="function", target=target))()


@pytest.mark.parametrize(
    "settings",
    [
        {"labels": "gumbel"},
        {"scale": 0.0},
        {"num_replicas": 0},
        {"retries": -1},
        {"batch_wait_s": -0.1},
        {"dtype": "int4"},
        {"quantization": "int2"},
        {"request_timeout_s": math.nan},
        {"num_replicas": 4, "max_replicas": 2},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ConfigError, match=rf"oracle\.{list(settings)[-1]}="):
        OracleConfig(**settings)


class Known(World):
    id = "test/Known"
    has_truth = True
    reward_scale = 2.0

    def reward(self, prompt, response):
        return float(len(response))


def test_world_kind_is_the_worlds_own_truth_at_the_configured_price():
    oracle = oracle_factory(OracleConfig(kind="world", price=0.5), Known())()
    assert isinstance(oracle, TruthOracle)
    [verdict] = oracle.judge([duel("x", first="aa", second="a")])
    assert verdict.probability == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert verdict.price == 0.5


def test_an_oracle_or_a_function_given_by_hand_overrules_the_kind():
    mine = TruthOracle(Known())
    assert oracle_factory(OracleConfig(), custom=mine)() is mine
    made = oracle_factory(OracleConfig(scale=3.0), custom=length)()
    assert made.judge([duel("x", first="aa", second="a")])[0].probability == pytest.approx(1 / (1 + math.exp(-3.0)))


def test_what_travels_has_the_texts_and_the_prompts_facts_but_no_tokens():
    sent = [
        duel("x", text="p", first="a", second="b", reference="r", pair=("c", "d"), meta={"items": [1, 2]}),
        duel("y", text="q", first="e", second="f"),
    ]
    got = pickle.loads(pickle.dumps(DuelColumns.pack(sent))).unpack()
    for a, b in zip(sent, got, strict=True):
        assert (a.id, a.batch, a.first.text, a.second.text) == (b.id, b.batch, b.first.text, b.second.text)
        for fact in ("id", "text", "reference", "pair", "meta"):
            assert getattr(a.prompt, fact) == getattr(b.prompt, fact)
        assert b.prompt.token_ids == b.first.token_ids == b.first.logprobs == ()
        assert b.first.policy_version == -1


def test_duels_of_one_prompt_send_it_once():
    prompt = Prompt(id="p", text="p", token_ids=())
    response = Candidate(text="a", token_ids=(), logprobs=(), policy_version=0)
    duels = [Duel(id=str(i), batch=0, prompt=prompt, first=response, second=response) for i in range(5)]
    columns = DuelColumns.pack(duels)
    assert columns.prompts.ids == ["p"]
    assert [d.prompt.id for d in columns.unpack()] == ["p"] * 5


def test_verdicts_travel_unchanged():
    verdicts = [Verdict(duel_id="x", probability=0.1, price=2.0), Verdict(duel_id="y", failure="refused")]
    assert VerdictColumns.pack(verdicts).unpack() == verdicts
