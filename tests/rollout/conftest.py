"""Fixtures: tiny random Llamas on disk, prompts, other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from random_policies import changed_weights, random_prompts, save_policy

from rayalign.rollout.weights import Weights
from rayalign.types import Prompt


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices gain nothing from more, and lose much where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return lambda **settings: save_policy(tmp_path_factory.mktemp("policy"), **settings)


@pytest.fixture(scope="session")
def policy(make_policy: Callable[..., Path]) -> Path:
    """0.3M random parameters in float32, tied embeddings, grouped-query attention."""
    return make_policy()


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Nine prompts of 3 to 12 tokens."""
    return random_prompts(9)


@pytest.fixture(scope="session")
def new_weights(policy: Path) -> Callable[..., Weights]:
    return lambda version=1, seed=7: changed_weights(policy, version, seed)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()
