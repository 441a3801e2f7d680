"""One contract for every registered environment; adding an entry to ENVS adds its tests."""

import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence

import rayalign.env
from rayalign.env import ENVS, EnvEntry, list_envs, make_world, register
from rayalign.env.dueling_bandit import AnyText, DuelingBandit, DuelingBanditVector
from rayalign.env.labels import DirectLabeler
from rayalign.env.tabular import Tabular
from rayalign.env.world import World
from rayalign.errors import ConfigError
from rayalign.types import Verdict


class LongerWins:
    """An oracle for worlds that have no truth."""

    id = "longer"

    def judge(self, duels):
        return [
            Verdict(duel_id=d.id, probability=0.9 if len(d.first.text) > len(d.second.text) else 0.1) for d in duels
        ]


@pytest.fixture(params=sorted(ENVS))
def env_id(request):
    return request.param


@pytest.fixture
def settings(env_id, tmp_path):
    """What an environment needs beside its id."""
    if env_id != "rayalign/Prompts-v0":
        return {}
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(12)))
    return {"path": str(path), "labeler": DirectLabeler(LongerWins())}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Prompts-v0 reads through Ray Data; one Ray for all of its tests."""
    import ray

    own = not ray.is_initialized()
    if own:
        ray.init(num_cpus=2, include_dashboard=False)
    yield
    if own:
        ray.shutdown()


def test_check_env_finds_nothing_to_say(env_id, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what gymnasium says things with
        env = gym.make(env_id, **settings)
        check_env(env.unwrapped)
        env.close()


def test_vector_env_keeps_gymnasiums_contract(env_id, settings):
    n = 3
    env = gym.make_vec(env_id, num_envs=n, **settings)
    assert isinstance(env.unwrapped, DuelingBanditVector) and env.num_envs == n
    assert env.metadata["autoreset_mode"] is gym.vector.AutoresetMode.DISABLED
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(3)]
    seen = []
    for _ in range(2):
        observation, info = env.reset(seed=5)
        steps = [(observation, 0, 0, 0, info)] + [env.step(action) for action in actions]
        for observation, *_, info in steps:
            assert env.observation_space.contains(observation)
            assert [p.text for p in info["prompts"]] == list(observation)
        for _, rewards, terminations, truncations, info in steps[1:]:
            assert rewards.shape == terminations.shape == truncations.shape == (n,)
            assert rewards.dtype == np.float64 and terminations.dtype == truncations.dtype == np.bool_
            assert not terminations.any() and not truncations.any()
            assert info["labelled"].all() and set(rewards) <= {0.0, 0.5, 1.0}
        seen.append(steps)
    assert data_equivalence(seen[0], seen[1], exact=True)
    env.close()
    env.close()


def test_slot_i_is_the_single_env_at_position_i(env_id, settings):
    n = 3
    vector, single = gym.make_vec(env_id, num_envs=n, **settings), gym.make(env_id, **settings).unwrapped
    vector.reset(seed=9)
    vector.action_space.seed(1)
    for table in range(2):
        actions = vector.action_space.sample()
        observations, rewards, _, _, info = vector.step(actions)
        for slot, action in enumerate(actions):
            single.reset(seed=9, options={"index": table * n + slot})
            _, reward, _, _, one = single.step(action)
            assert reward == rewards[slot]
            assert one["preference"] == info["preferences"][slot]
            for key in ("probability", "label", "regret_reward", "regret_preference"):
                if key in one:
                    assert one[key] == info[key][slot], key
        assert list(observations) == [single.reset(options={"index": (table + 1) * n + slot})[0] for slot in range(n)]


def test_summaries_are_one_line():
    assert all("\n" not in entry.summary and entry.summary.endswith(".") for entry in ENVS.values())
    assert list_envs() == sorted(ENVS)


def test_unknown_ids_and_settings_get_a_suggestion():
    with pytest.raises(ConfigError, match=r"unknown\. Did you mean 'rayalign/Tabular-v0'"):
        make_world("rayalign/Tabula-v0")
    with pytest.raises(ConfigError, match=r"env\.num_arm is not a setting of Tabular. Did you mean 'num_arms'"):
        make_world("rayalign/Tabular-v0", num_arm=3)
    with pytest.raises(ConfigError, match=r"env\.num_arms=1 must be at least 2"):
        make_world("rayalign/Tabular-v0", num_arms=1)


def test_a_world_is_found_behind_every_kind_of_env():
    world = Tabular(num_arms=3)
    assert make_world(DuelingBandit(world)) is world
    assert make_world(DuelingBanditVector(world, num_envs=2)) is world
    assert make_world(world) is world
    assert make_world(gym.make("rayalign/Tabular-v0", num_arms=5)).num_arms == 5
    assert make_world(gym.make_vec("rayalign/Tabular-v0", num_arms=5)).num_arms == 5
    with pytest.raises(ConfigError, match="not a dueling bandit"):
        make_world(gym.make("CartPole-v1"))
    with pytest.raises(ConfigError, match="'seed' can't be given"):
        make_world(world, seed=3)


def test_ones_own_world_can_be_registered():
    try:
        register("mine/Own-v0", EnvEntry(world=f"{Tabular.__module__}:Tabular", summary="Mine."))
        assert isinstance(make_world("mine/Own-v0"), World) and "mine/Own-v0" in list_envs()
        gym.make("mine/Own-v0").reset()
    finally:
        ENVS.pop("mine/Own-v0")
        gym.registry.pop("mine/Own-v0")


def test_any_text_takes_every_string_and_samples_short_ones():
    space = AnyText()
    assert "日本語 \n\t é" in space and "" in space and 3 not in space and "x" * (space.max_length + 1) not in space
    space.seed(0)
    samples = [space.sample() for _ in range(200)]
    assert all(sample in space and len(sample) <= 64 for sample in samples) and len(set(samples)) > 150
    assert space == AnyText() and space != gym.spaces.Text(5)


def test_environments_are_registered_by_the_import():
    assert rayalign.env.ENVS is ENVS and set(ENVS) <= set(gym.registry)
