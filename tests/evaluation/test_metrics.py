"""What is measured beside the win rate."""

import math

import pytest
import torch
from random_policies import random_prompts, save_policy

from rayalign.errors import ConfigError
from rayalign.evaluation.evaluate import EvaluationConfig
from rayalign.evaluation.metrics import METRICS, Answered, Metric, find_metric, null_rates, says
from rayalign.rollout.engine import Sampling
from rayalign.rollout.transformers_engine import TransformersEngine
from rayalign.types import Candidate, Prompt


def answered(text, spoken, reference="Copernicus"):
    said, aloud = (Candidate(text=t, token_ids=(1,), logprobs=(0.0,), policy_version=0) for t in (text, spoken))
    return Answered(prompt=Prompt(id="p", text="q", token_ids=(1,), reference=reference), answer=said, spoken=aloud)


ANSWERS = [
    answered("", "Brahe"),  # silent, and would have been wrong
    answered(" \n", "copernicus!"),  # silent, and would have been right
    answered("Kepler", "Kepler"),
    answered("Who is Copernicus?", "Who is Copernicus?"),
    answered("Galileo", "Galileo"),
]


def test_null_rates_are_counted_by_hand():
    assert null_rates(ANSWERS) == {
        "null_rate": 2 / 5,
        "null_rate_if_wrong": 1 / 3,
        "null_rate_if_right": 1 / 2,
        "right": 2 / 5,
    }


def test_null_rates_given_an_answer_that_never_came_are_unknown_rather_than_zero():
    rates = null_rates(ANSWERS[2:3])
    assert rates["null_rate_if_wrong"] == 0 and math.isnan(rates["null_rate_if_right"])
    assert math.isnan(null_rates([])["null_rate"])


def test_without_right_answers_only_the_null_rate_is_known():
    assert null_rates([answered("", "Brahe", reference=None), ANSWERS[2]]) == {"null_rate": 1 / 2}


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        ("What is the Taj Mahal?", "Taj Mahal", True),
        ("Mahal Taj", "Taj Mahal", False),
        ("Copernican", "Copernicus", False),
        ("the", "The", False),
        ("Pierre & Marie Curie", "Marie Curie", True),
    ],
)
def test_an_answer_is_right_if_it_has_the_words_of_the_reference_in_a_row(answer, reference, right):
    assert says(answer, reference) is right


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_measures_answers_and_names_its_numbers(name):
    numbers = find_metric(name).measure(ANSWERS)
    assert numbers and all(isinstance(value, float) for value in numbers.values())


LENGTH = Metric(measure=lambda answers: {"length": float(len(answers))})


def test_a_metric_of_ones_own_is_an_import_path_and_mistakes_are_named_before_the_run():
    assert find_metric(f"{__name__}:LENGTH") is LENGTH
    with pytest.raises(ConfigError, match=r"evaluation\.metrics: 'nul_rate' is unknown\. Did you mean 'null_rate'"):
        EvaluationConfig(metrics=("nul_rate",))
    with pytest.raises(ConfigError, match=r"'math:pi' is a float, not a rayalign\.evaluation\.metrics\.Metric"):
        EvaluationConfig(metrics=("math:pi",))
    with pytest.raises(ConfigError, match=r"'nowhere:X' can't be imported"):
        EvaluationConfig(metrics=("nowhere:X",))


def test_a_response_that_must_not_be_empty_has_another_first_token_and_its_own_distribution(tmp_path):
    policy = save_policy(tmp_path, scale=1.0)
    engine = TransformersEngine(policy)
    prompts = random_prompts(4)
    sampling = Sampling(n=200, temperature=1.0, max_tokens=2)
    free = [c for group in engine.generate(prompts, sampling, seed=0) for c in group]
    forced = [
        c
        for g in engine.generate(prompts, Sampling(n=200, temperature=1.0, max_tokens=2, min_tokens=1), seed=0)
        for c in g
    ]
    assert any(c.token_ids[0] in engine.eos_ids for c in free), "else there is nothing to forbid"
    assert not any(c.token_ids[0] in engine.eos_ids for c in forced)
    assert any(c.token_ids[1] in engine.eos_ids for c in forced), "only the first token is forced"
    with torch.no_grad():
        logits = engine._live.model(torch.tensor([prompts[0].token_ids])).logits[0, -1]
    logits[list(engine.eos_ids)] = -torch.inf
    expected = logits.log_softmax(-1)
    for candidate in forced[:200]:
        assert candidate.logprobs[0] == pytest.approx(float(expected[candidate.token_ids[0]]), abs=1e-4)
    with pytest.raises(ConfigError, match="min_tokens=3 must be from 0 to max_tokens=2"):
        Sampling(max_tokens=2, min_tokens=3)
