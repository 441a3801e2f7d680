"""The pool on real Ray: hand-out, replacement of dead replicas, verified syncs."""

import dataclasses
import os
import signal
import threading
import time

import pytest
import ray

from rayalign.errors import ConfigError, DataError, ResourceError, RolloutError, WaitError, WeightSyncError
from rayalign.rollout.config import RolloutConfig, VllmSettings
from rayalign.rollout.engine import Sampling
from rayalign.rollout.model_pool import cut
from rayalign.rollout.pool import RolloutPool
from rayalign.rollout.transformers_engine import TransformersEngine

pytestmark = pytest.mark.usefixtures("ray_cluster")

CONFIG = RolloutConfig(
    engine="transformers", num_replicas=2, cpus_per_replica=0.5, chunk_prompts=2, start_timeout_s=120, sync_timeout_s=60
)
SAMPLING = Sampling(n=3, temperature=0.8, max_tokens=12)
SLOW = Sampling(n=150, temperature=1.0, max_tokens=200)


@pytest.fixture(scope="module")
def shared_pool(ray_cluster, policy):
    with RolloutPool(CONFIG, policy, name="shared") as pool:
        yield pool


def kill_process(pool: RolloutPool, index: int) -> None:
    answer = pool.ping()[index]
    assert answer is not None
    os.kill(int(answer["pid"]), signal.SIGKILL)


def in_thread(function, *args):
    result: list = []
    thread = threading.Thread(target=lambda: result.append(function(*args)), daemon=True)
    thread.start()
    return thread, result


def test_chunks_depend_on_the_settings_alone():
    assert cut(7, 3, 2) == [range(0, 3), range(3, 6), range(6, 7)]
    assert cut(7, 0, 2) == [range(0, 2), range(2, 4), range(4, 6), range(6, 7)]
    assert cut(7, 0, 1) == [range(0, 7)]
    assert cut(0, 0, 2) == []


def test_candidates_come_back_in_prompt_order_and_are_those_of_a_single_engine(
    shared_pool, policy, prompts, new_weights
):
    weights = new_weights(version=2)
    shared_pool.sync(weights)
    engine = TransformersEngine(policy)
    engine.load(weights)
    expected = [[c.token_ids for c in group] for group in engine.generate(prompts, SAMPLING, seed=4)]
    groups = shared_pool.generate(prompts, SAMPLING, seed=4)
    assert [[c.token_ids for c in group] for group in groups] == expected
    assert {c.policy_version for group in groups for c in group} == {2} == {shared_pool.version}


def test_an_empty_request_gives_nothing(shared_pool):
    assert shared_pool.generate([], SAMPLING, seed=0) == []


def test_stats_count_the_tokens_that_were_sampled(shared_pool, prompts):
    before = shared_pool.stats()
    groups = shared_pool.generate(prompts, SAMPLING, seed=0)
    after = shared_pool.stats()
    assert after["tokens"] - before["tokens"] == sum(len(c.token_ids) for group in groups for c in group)
    assert after["responses"] - before["responses"] == 3 * len(prompts)
    assert after["seconds"] > before["seconds"]


def test_an_engines_own_error_arrives_as_it_was_raised_and_the_pool_lives_on(shared_pool, prompts):
    with pytest.raises(DataError, match="'p0' has no token ids"):
        shared_pool.generate([dataclasses.replace(prompts[0], token_ids=())], SAMPLING, 0)
    assert len(shared_pool.generate(prompts, SAMPLING, 0)) == len(prompts)


def test_a_deadline_names_the_replicas_that_are_waited_for(shared_pool, prompts):
    with pytest.raises(
        WaitError, match=r"'shared': 0 of 5 chunks .* within 0.01 s; still waiting for shared-0, shared-1"
    ):
        shared_pool.generate(prompts, SLOW, 0, timeout_s=0.01)
    assert len(shared_pool.generate(prompts, SAMPLING, 0)) == len(prompts)


def test_a_ping_is_answered_while_the_replica_samples(shared_pool, prompts):
    thread, result = in_thread(shared_pool.generate, prompts, SLOW, 0)
    time.sleep(0.3)
    answers = shared_pool.ping(timeout_s=20)
    assert thread.is_alive() and not result
    assert len({answer["pid"] for answer in answers}) == 2
    thread.join(timeout=120)
    assert result


def test_a_replica_killed_while_it_samples_is_replaced_and_nothing_changes(shared_pool, prompts, new_weights):
    weights = new_weights(version=5)
    shared_pool.sync(weights)
    expected = shared_pool.generate(prompts, SLOW, seed=1)
    restarts = shared_pool.stats()["restarts"]
    thread, result = in_thread(shared_pool.generate, prompts, SLOW, 1)
    time.sleep(0.3)
    kill_process(shared_pool, 0)
    assert thread.is_alive()
    thread.join(timeout=120)
    assert result == [expected]  # logprobs and version 5 included: the new one had the weights before its first chunk
    assert shared_pool.stats()["restarts"] == restarts + 1
    assert all(shared_pool.ping())


def test_a_replica_killed_between_requests_gets_the_weights_of_the_next_sync(shared_pool, prompts, new_weights):
    expected_of = {}
    for version in (6, 7):
        shared_pool.sync(new_weights(version=version, seed=version))
        expected_of[version] = shared_pool.generate(prompts, SAMPLING, seed=1)
    kill_process(shared_pool, 1)
    shared_pool.sync(new_weights(version=8, seed=6))
    groups = shared_pool.generate(prompts, SAMPLING, seed=1)
    assert [[dataclasses.replace(c, policy_version=6) for c in group] for group in groups] == expected_of[6]
    assert groups[0][0].policy_version == 8 != expected_of[7][0][0].policy_version


def test_a_chunk_that_kills_every_replica_ends_in_an_error_that_says_so(policy, prompts):
    config = dataclasses.replace(CONFIG, num_replicas=1, max_restarts=1)
    with RolloutPool(config, policy, name="doomed") as pool:
        thread, _ = in_thread(_expect, RolloutError, pool, prompts)
        for generation in (1, 2):
            while pool._slots[0].generation < generation or pool._slots[0].starting or not pool._slots[0].actor:
                time.sleep(0.05)
            ray.kill(pool._slots[0].actor)
        thread.join(timeout=60)
        assert "rollout.max_restarts=1 replicas were replaced" in ERRORS.pop()


def test_a_chunk_that_never_ends_is_taken_from_its_replica(policy, prompts):
    config = dataclasses.replace(CONFIG, num_replicas=1, max_restarts=0, request_timeout_s=0.2)
    with (
        RolloutPool(config, policy, name="stuck") as pool,
        pytest.raises(WaitError, match=r"stuck-0 was lost \(no answer"),
    ):
        pool.generate(prompts, SLOW, 0)


ERRORS: list[str] = []


def _expect(kind, pool, prompts):
    with pytest.raises(kind) as error:
        pool.generate(prompts, SLOW, 0)
    ERRORS.append(str(error.value))


def test_a_corrupted_sync_is_detected_and_the_old_version_stays_in_force(shared_pool, prompts, new_weights):
    good = new_weights(version=9)
    shared_pool.sync(good)
    expected = shared_pool.generate(prompts, SAMPLING, seed=2)
    bad = new_weights(version=10, seed=3)
    next(iter(bad.arrays.values())).flat[0] += 1e-3
    with pytest.raises(WeightSyncError, match=r"replica shared-. .*was sent weights version 10 with checksum"):
        shared_pool.sync(bad)
    assert shared_pool.version == 9
    assert shared_pool.generate(prompts, SAMPLING, seed=2) == expected


def test_a_sync_that_takes_too_long_names_its_replicas(policy, prompts, new_weights):
    config = dataclasses.replace(CONFIG, num_replicas=1, sync_timeout_s=1e-4)
    with RolloutPool(config, policy, name="slow") as pool:
        with pytest.raises(WaitError, match="replica slow-0 did not load weights version 1 within"):
            pool.sync(new_weights(version=1))
        assert pool.version == 0
        assert pool.generate(prompts, SAMPLING, 0)[0][0].policy_version == 0


def test_a_pool_without_replicas_runs_one_engine_here_with_the_same_results(shared_pool, policy, prompts, new_weights):
    weights = new_weights(version=11)
    shared_pool.sync(weights)
    with RolloutPool(dataclasses.replace(CONFIG, num_replicas=0), policy) as pool:
        pool.sync(weights)
        here, there = pool.generate(prompts, SAMPLING, seed=0), shared_pool.generate(prompts, SAMPLING, seed=0)
        assert [[c.token_ids for c in group] for group in here] == [[c.token_ids for c in group] for group in there]
        bad = new_weights(version=12)
        next(iter(bad.arrays.values())).flat[0] += 1e-3
        with pytest.raises(WeightSyncError, match="version 12"):
            pool.sync(bad)
    with pytest.raises(RolloutError, match="is closed"):
        pool.generate(prompts, SAMPLING, 0)


def test_a_pool_that_can_not_be_placed_is_an_error_at_once(policy):
    with pytest.raises(
        ResourceError, match=r"3 x 1 CPU, but the cluster has 2.*num_replicas or rollout.cpus_per_replica"
    ):
        RolloutPool(RolloutConfig(engine="transformers", num_replicas=3), policy)


def test_a_replica_that_waits_for_a_place_is_an_error_in_the_end(policy):
    blocker = ray.remote(num_cpus=0.9)(threading.Event).remote()
    ray.get(blocker.is_set.remote(), timeout=60)
    config = dataclasses.replace(CONFIG, num_replicas=1, cpus_per_replica=2, start_timeout_s=1)
    with pytest.raises(WaitError, match=r"was not ready after rollout.start_timeout_s=1: it waits for 2 CPU"):
        RolloutPool(config, policy)
    ray.kill(blocker)


def test_a_policy_that_can_not_be_loaded_is_an_error_of_the_pool(tmp_path):
    with pytest.raises(DataError, match="has no tokenizer"):
        RolloutPool(CONFIG, tmp_path)


def test_no_process_outlives_the_pool(policy):
    pool = RolloutPool(dataclasses.replace(CONFIG, num_replicas=1), policy)
    pid = int(pool.ping()[0]["pid"])
    pool.close()
    pool.close()
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.1)
    pytest.fail(f"replica process {pid} is still there")


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"rollout.engine='vlm' is unknown. Did you mean 'vllm'"):
        RolloutConfig(engine="vlm")
    with pytest.raises(ConfigError, match=r"rollout.num_replicas=-1"):
        RolloutConfig(num_replicas=-1)
    with pytest.raises(ConfigError, match=r"rollout.top_p=0"):
        RolloutConfig(top_p=0)
    with pytest.raises(ConfigError, match=r"rollout.vllm.transport='nccI' is unknown"):
        RolloutConfig(vllm=VllmSettings(transport="nccI"))
    assert RolloutConfig(cpus_per_replica=2.5).threads == 2 and RolloutConfig(cpus_per_replica=0.2).threads == 1
    assert RolloutConfig(max_tokens=9).sampling(3, temperature=0) == Sampling(n=3, temperature=0, max_tokens=9)
