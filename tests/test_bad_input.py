"""Bad input: one clear error that names the field and the way out, before Ray is started and anything is bought."""

import json
import shutil

import pytest
import ray

import rayalign
from rayalign.env import make_world
from rayalign.errors import ConfigError, DataError

TABULAR = "rayalign/Tabular-v0"


@pytest.fixture(autouse=True)
def nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not ray.is_initialized()
    assert not list(tmp_path.rglob("ledger.arrow"))


@pytest.fixture
def prompts_file(tmp_path):
    def write(*rows):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_an_unknown_agent_gets_a_suggestion():
    with pytest.raises(ConfigError, match="Did you mean 'passive'"):
        rayalign.run("pasive", TABULAR, budget=4)


def test_an_unknown_environment_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"Did you mean 'rayalign/Tabular-v0'"):
        rayalign.run("passive", "rayalign/Tabular-v1", budget=4)


def test_a_misspelled_setting_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"learner\.learning_rat\b.*learner\.learning_rate"):
        rayalign.run("passive", TABULAR, budget=4, **{"learner.learning_rat": 1e-3})


def test_a_setting_of_the_wrong_type_is_named_with_its_value():
    with pytest.raises(ConfigError, match=r"loop\.batch_size.*'many'"):
        rayalign.run("passive", TABULAR, budget=4, loop={"batch_size": "many"})


@pytest.mark.parametrize("budget", [0, -3])
def test_a_budget_below_one_label_is_refused(budget):
    with pytest.raises(ConfigError, match=rf"loop\.budget={budget} must be at least 1"):
        rayalign.run("passive", TABULAR, budget=budget)


def test_an_unknown_setting_of_the_environment_is_named():
    with pytest.raises(ConfigError, match=r"env\.num_armz.*num_arms"):
        rayalign.run("passive", TABULAR, budget=4, **{"env.num_armz": 3})


def test_a_world_without_a_policy_of_its_own_asks_for_one(prompts_file):
    data = prompts_file({"prompt": "Say something."}, {"prompt": "Say more."})
    with pytest.raises(ConfigError, match=r"policy is not set"):
        rayalign.run("passive", "rayalign/Prompts-v0", budget=4, **{"env.path": data})


def test_a_policy_directory_without_a_tokenizer_says_so(tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(make_world(TABULAR).default_policy(), policy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (policy / name).unlink()
    with pytest.raises(DataError, match="tokenizer"):
        rayalign.run("passive", TABULAR, budget=4, policy=policy)


def test_a_prompt_longer_than_the_limit_is_named():
    with pytest.raises(DataError, match=r"prompt '.*' has \d+ tokens.*max_prompt_tokens=1"):
        rayalign.run("passive", TABULAR, budget=4, rollout={"max_prompt_tokens": 1})


def test_responses_that_do_not_fit_the_context_are_refused():
    with pytest.raises(DataError, match=r"max_tokens=1000000 it exceeds the 64 positions"):
        rayalign.run("passive", TABULAR, budget=4, rollout={"max_tokens": 1_000_000})


def test_references_that_are_not_there_are_refused(prompts_file, tmp_path):
    data = prompts_file(*({"prompt": f"p{i}"} for i in range(30)))
    with pytest.raises(ConfigError, match=r"evaluation\.against='reference'.*has no reference"):
        rayalign.run(
            "passive",
            "rayalign/Prompts-v0",
            budget=4,
            policy=make_world(TABULAR).default_policy(),
            evaluation={"against": "reference", "num_prompts": 2},
            rollout={"max_tokens": 4},
            **{"env.path": data},
        )


def test_a_directory_that_holds_no_run_can_not_be_resumed(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run.*rayalign run"):
        rayalign.resume(tmp_path)
