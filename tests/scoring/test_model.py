"""What a scorer says of responses: the engine's own numbers, and the initial policy's."""

import numpy as np
import pytest
import ray

from rayalign.errors import ConfigError, DataError
from rayalign.rollout.engine import Sampling
from rayalign.rollout.transformers_engine import TransformersEngine
from rayalign.scoring.config import ScorerConfig
from rayalign.scoring.model import ScorerModel
from rayalign.scoring.pool import ScorerPool


def sampled(groups):
    return [[sum(candidate.logprobs) for candidate in group] for group in groups]


def test_logprobs_are_those_that_the_engine_sampled_with(scorer, prompts, groups):
    found = scorer.logprobs(prompts, groups)
    assert [len(group) for group in found] == [3] * len(prompts)
    np.testing.assert_allclose(np.stack(found), sampled(groups), rtol=1e-4)


def test_the_reference_is_the_initial_policy_whatever_was_loaded(scorer, policy, prompts, groups):
    initial = ScorerModel(ScorerConfig(num_replicas=0), str(policy))
    expected = initial.logprobs(prompts, groups)
    np.testing.assert_allclose(scorer.logprobs(prompts, groups, of="reference"), expected, rtol=1e-5)
    np.testing.assert_allclose(initial.logprobs(prompts, groups, of="reference"), expected, rtol=1e-6)
    assert np.abs(np.stack(expected) - np.stack(scorer.logprobs(prompts, groups))).max() > 0.1


def test_groups_may_differ_in_size_and_be_empty(scorer, prompts, groups):
    uneven = [group[:n] for group, n in zip(groups, (0, 3, 1, 0, 2), strict=True)]
    found = scorer.logprobs(prompts, uneven)
    assert [group.shape for group in found] == [(0,), (3,), (1,), (0,), (2,)]
    np.testing.assert_allclose(found[4], sampled(groups)[4][:2], rtol=1e-4)


def test_a_response_without_token_ids_is_an_error_that_names_the_prompt(scorer, prompts, groups):
    from dataclasses import replace

    with pytest.raises(DataError, match=r"'p1' or one of its responses has no token ids"):
        scorer.logprobs(prompts[:2], [groups[0], [replace(groups[1][0], token_ids=(), logprobs=())]])


def test_an_unknown_model_is_refused(scorer, prompts, groups):
    with pytest.raises(ConfigError, match="of='teacher'"):
        scorer.logprobs(prompts, groups, of="teacher")


def test_a_pool_of_scorers_answers_as_one_and_follows_the_weights(policy, weights, prompts, groups):
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with ScorerPool(ScorerConfig(num_replicas=2, cpus_per_replica=0.5, chunk_prompts=2), policy) as pool:
            before = pool.logprobs(prompts, groups)
            pool.sync(weights)
            assert pool.version == 3
            np.testing.assert_allclose(np.stack(pool.logprobs(prompts, groups)), sampled(groups), rtol=1e-4)
            np.testing.assert_allclose(pool.logprobs(prompts, groups, of="reference"), before, rtol=1e-5)
    finally:
        ray.shutdown()


def test_a_greedy_policy_gives_its_own_samples_a_higher_score_than_random_ones(policy, scorer, weights, prompts):
    engine = TransformersEngine(policy)
    engine.load(weights)
    greedy = engine.generate(prompts, Sampling(n=1, temperature=0.0, max_tokens=9), seed=0)
    hot = engine.generate(prompts, Sampling(n=1, temperature=3.0, max_tokens=9), seed=0)
    assert np.mean(scorer.logprobs(prompts, greedy)) > np.mean(scorer.logprobs(prompts, hot))
