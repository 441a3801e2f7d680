"""A policy of random weights, prompts, and candidates that it sampled itself at temperature 1."""

from __future__ import annotations

import pytest
import torch
from random_policies import changed_weights, random_prompts, save_policy

from rayalign.rollout.engine import Sampling
from rayalign.rollout.transformers_engine import TransformersEngine
from rayalign.scoring.config import ScorerConfig
from rayalign.scoring.model import ScorerModel


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny matrices gain nothing from more, and lose much where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """0.3M random parameters in float32."""
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def weights(policy):
    """Version 3: the policy's weights with noise of their own size added."""
    return changed_weights(policy, version=3)


@pytest.fixture(scope="session")
def prompts():
    """Five prompts of 3 to 12 tokens."""
    return random_prompts(5)


@pytest.fixture(scope="session")
def groups(policy, weights, prompts):
    """Three candidates for each prompt, of version 3, at temperature 1."""
    engine = TransformersEngine(policy)
    engine.load(weights)
    return engine.generate(prompts, Sampling(n=3, temperature=1.0, max_tokens=9), seed=5)


@pytest.fixture
def scorer(policy, weights):
    """A scorer that holds version 3; small batches, so that there are several."""
    model = ScorerModel(ScorerConfig(num_replicas=0, max_batch_tokens=64), str(policy))
    model.load(weights)
    return model
