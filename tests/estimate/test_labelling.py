"""How long labelling takes: what limits say, what may be timed for nothing, and whom nobody asks."""

from __future__ import annotations

import pytest
from model_shapes import TINY

from rayalign.config import apply
from rayalign.estimate.labelling import LabelTime, free_oracles, label_times
from rayalign.estimate.purchases import purchases_of
from rayalign.runs.config import RunConfig

JUDGE = {"oracle.kind": "judge", "oracle.target": "some/model", "loop.budget": 1000, "evaluation.every": 0}


def config(**settings: object) -> RunConfig:
    return apply(RunConfig(), settings)


def times(found: RunConfig, measured: dict[str, float] | None = None, custom: object = None) -> list[LabelTime]:
    return list(label_times(found, purchases_of(found, heldout=100), measured, custom))


def test_a_limit_of_calls_a_minute_is_the_least_time_of_all_replicas() -> None:
    (found,) = times(config(**JUDGE, **{"oracle.judge.calls_per_minute": 30.0, "oracle.num_replicas": 2}))
    # both orders: 2 calls a label, 60 a minute by two replicas; 1,000 labels and 2 x 100 of the evaluation
    assert (found.training, found.evaluation, found.at_least) == (2000.0, 400.0, True)
    assert "60 calls a minute (oracle.judge.calls_per_minute)" in found.how
    assert "32 at a time (oracle.judge.concurrency x replicas)" in found.how


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (JUDGE, "calls x seconds of a call / 16 at a time"),
        ({"oracle.kind": "human"}, "people at work at the same time"),
        ({"oracle.kind": "http", "oracle.target": "http://127.0.0.1:1"}, "is not asked for an estimate"),
        ({"oracle.kind": "function", "oracle.target": "math:sqrt"}, "a function of yours is not called"),
        ({"oracle.kind": "reward_model", "oracle.target": str(TINY), "oracle.price": 0.1}, "has a price"),
    ],
)
def test_who_may_cost_something_is_not_asked_and_the_row_says_how_to_reason(settings, said) -> None:
    found = config(**settings)
    assert "oracle" not in free_oracles(found)
    (told,) = times(found)
    assert told.training is None and told.evaluation is None and said in told.how


def test_an_oracle_given_by_hand_is_not_asked_either() -> None:
    assert free_oracles(config(), custom=lambda prompt, answer: 0.0) == {}
    (told,) = times(config(), custom=lambda prompt, answer: 0.0)
    assert told.training is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"oracle.kind": "reward_model", "oracle.target": str(TINY)},
        {"oracle.kind": "judge", "oracle.target": str(TINY), "oracle.judge.base_url": "local"},
    ],
)
def test_who_costs_nothing_may_be_asked_and_is_timed_per_replica(settings) -> None:
    found = config(**settings, **{"loop.budget": 1000, "evaluation.every": 0, "oracle.num_replicas": 2})
    assert list(free_oracles(found)) == ["oracle"]
    (told,) = times(found, {"oracle": 0.5})
    assert (told.training, told.evaluation, told.at_least) == (250.0, 50.0, False)
    assert times(found) == []  # nothing to say before it was timed


def test_a_replica_without_gpus_is_timed_on_the_cpu() -> None:
    settings = {"oracle.kind": "reward_model", "oracle.target": str(TINY)}
    assert free_oracles(config(**settings))["oracle"].device == "cpu"
    assert free_oracles(config(**settings, **{"oracle.gpus_per_replica": 0.5}))["oracle"].device == "auto"


def test_each_oracle_has_its_own_labels() -> None:
    found = config(**JUDGE, **{"evaluation.oracle.kind": "world"})
    labels, evaluation = times(found, {"evaluation.oracle": 0.1})
    assert (labels.section, labels.training) == ("oracle", None)
    assert (evaluation.section, evaluation.training, evaluation.evaluation) == ("evaluation.oracle", 0.0, 20.0)
