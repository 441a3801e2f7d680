"""Who shares a GPU, against placements with one of everything on each (Ray's word: tests/runs/test_placement.py)."""

from __future__ import annotations

import math

import pytest
from model_shapes import BIG, TINY

from rayalign.agents import make_agent
from rayalign.config import apply
from rayalign.estimate.gpus import assign, fullest_gpu
from rayalign.estimate.memory import memory_of
from rayalign.estimate.role import RoleMemory, total
from rayalign.estimate.shape import ModelShape
from rayalign.runs.config import RunConfig
from rayalign.runs.placement import collocated, split


def role(name: str, gpus: float, size: int, processes: int = 1, **more: object) -> RoleMemory:
    return RoleMemory(role=name, processes=processes, device="gpu", parts={"weights": size}, gpus=gpus, **more)  # type: ignore[arg-type]


def names(placed: list[list[RoleMemory]]) -> list[list[str]]:
    return [[each.role for each in on_it] for on_it in placed]


def test_a_fraction_goes_to_the_fullest_gpu_with_room_and_a_whole_one_to_an_empty_gpu() -> None:
    roles = [role("a", 0.6, 1), role("b", 0.5, 1), role("c", 0.4, 1), role("d", 1.0, 1), role("e", 0.5, 1)]
    assert names(assign(roles)) == [["a", "c"], ["b", "e"], ["d"]]


def test_shares_that_add_up_to_a_gpu_fit_on_it_though_floats_say_more() -> None:
    assert len(assign([role("a", 0.1, 1, processes=3), role("b", 0.7, 1)])) == 1


def test_what_is_in_the_collectors_process_is_on_the_collectors_gpu() -> None:
    roles = [role("oracle", 1.0, 1), role("posterior", 0.03, 1), role("engine", 0.0, 1)]
    assert names(assign(roles)) == [["oracle"], ["posterior", "engine"]]


def test_a_process_on_two_gpus_has_its_parts_on_both_and_counts_twice() -> None:
    wide = role("oracle", 2.0, 10, processes=2, spread=2)
    assert names(assign([wide])) == [["oracle"]] * 4
    assert total([wide], "gpu") == 40


@pytest.mark.parametrize("place", [collocated, split])
def test_the_placements_have_one_of_everything_on_the_fullest_gpu(place) -> None:
    settings = place(4, oracle=False, posterior=True) | {"rollout.engine": "vllm"}
    sea = make_agent("sea")
    config = apply(RunConfig(policy=str(TINY), agent_name="sea", agent=sea.config), settings)
    roles, _ = memory_of(config, sea, ModelShape.of(TINY), 20, 8)
    found = fullest_gpu(roles, sleeping=config.loop.sleep_engines)
    assert found is not None and found.gpus == 4
    there = [each.role for each in found.roles]
    assert there == (["posterior", "engine", "learner"] if place is collocated else ["posterior", "engine"])
    assert found.bytes == sum(each.total for each in found.roles)
    assert found.claimed == settings["rollout.vllm.gpu_memory_utilization"]


def test_a_gpu_has_to_hold_vllms_need_in_its_share_and_the_others_beside_it() -> None:
    engine, learner = role("engine", 0.4, 30, claims=0.3, asleep=0), role("learner", 0.6, 140)
    found = fullest_gpu([engine, learner], sleeping=True)
    assert found is not None
    assert (found.bytes, found.while_learning) == (170, 140)
    assert found.smallest == pytest.approx(200)  # 140 in 70%; 30 would do with 100
    greedy = fullest_gpu([role("engine", 0.4, 30, claims=1.0), learner])
    assert greedy is not None and math.isinf(greedy.smallest)
    alone = fullest_gpu([role("engine", 1.0, 90, claims=0.9)])
    assert alone is not None and alone.smallest == pytest.approx(100)


def test_without_gpus_there_is_no_fullest_one() -> None:
    roles, _ = memory_of(RunConfig(), make_agent("passive"), BIG, 20, 8)
    assert fullest_gpu(roles) is None


def test_a_scorer_that_sleeps_leaves_the_initial_policy_where_it_is() -> None:
    gpus = {"scorer.gpus_per_replica": 0.3, "rollout.gpus_per_replica": 0.3, "learner.gpus_per_worker": 0.4}
    config = apply(RunConfig(), {**gpus, "rollout.engine": "transformers"})
    roles, _ = memory_of(config, make_agent("apl"), BIG, 20, 8)
    found = fullest_gpu(roles, sleeping=True)
    assert found is not None and [each.role for each in found.roles] == ["engine", "scorer", "learner"]
    assert found.while_learning == found.roles[2].total + BIG.weights("float32")
