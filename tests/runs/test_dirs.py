"""Where runs are kept when nobody says where."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from whole_runs import SMALL

import rayalign
from rayalign import config as settings
from rayalign import storage
from rayalign.loop import loop, preparation
from rayalign.runs import stored as stored_run
from rayalign.errors import ConfigError, DataError, OracleError
from rayalign.ledger.ledger import Ledger
from rayalign.after.model_card import how_to_reproduce
from rayalign.runs.resumable import FREE_TO_CHANGE, check_budget, check_changes
from rayalign.runs.config import LoopConfig, RunConfig
from rayalign.runs.dirs import FAILED_START, note_failed_start
from rayalign.runs.stored import StoredRun


def new_run(**arguments):
    plan = preparation.new_run("passive", "rayalign/Tabular-v0", given=dict(SMALL), **arguments)
    return Path(plan.config.run_dir)


def test_equal_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop.time, "strftime", lambda _: "20260101-120000")
    folders = [new_run() for _ in range(3)]
    name = "passive-Tabular-v0-seed0-20260101-120000"
    assert [folder.name for folder in folders] == [name, f"{name}-2", f"{name}-3"]
    for folder in folders:
        assert f"run_dir: {folder}" in (folder / "config.yaml").read_text()


def test_a_folder_that_was_named_and_holds_a_run_is_refused(tmp_path):
    new_run(run_dir=tmp_path / "mine")
    with pytest.raises(ConfigError, match="already holds a run"):
        new_run(run_dir=tmp_path / "mine")


def test_a_run_that_failed_before_it_committed_to_anything_leaves_its_name_to_the_next(tmp_path):
    folder = new_run(run_dir=tmp_path / "mine")
    note_failed_start(str(folder), OracleError("nobody there"))
    again = new_run(run_dir=tmp_path / "mine")
    assert again == folder and not (again / FAILED_START).exists()
    assert (tmp_path / "mine.failed" / FAILED_START).read_text() == "OracleError: nobody there\n"
    note_failed_start(str(again), OracleError("nobody there"))
    new_run(run_dir=tmp_path / "mine")
    assert (tmp_path / "mine.failed-2" / "config.yaml").exists()


def test_a_run_that_failed_later_keeps_its_name(tmp_path):
    folder = new_run(run_dir=tmp_path / "mine")
    with Ledger(folder / "ledger.arrow") as ledger:
        ledger.commit(0, [], [])
    note_failed_start(str(folder), OracleError("nobody there"))
    with pytest.raises(ConfigError, match="already holds a run"):
        new_run(run_dir=tmp_path / "mine")


def test_a_failed_start_is_noted_by_the_run_itself(tmp_path, monkeypatch):
    def no_ray():
        raise OracleError("nobody there")

    monkeypatch.setattr(loop, "cluster", no_ray)
    for _ in range(2):
        with pytest.raises(OracleError):
            rayalign.run("passive", "rayalign/Tabular-v0", run_dir=tmp_path / "mine", **SMALL)
    assert (tmp_path / "mine.failed" / "config.yaml").exists()
    with pytest.raises(OracleError):  # it can be gone on with as well
        rayalign.resume(tmp_path / "mine")


def test_whoever_breaks_a_run_off_learns_how_it_goes_on(tmp_path, monkeypatch, capsys):
    def ctrl_c():
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "cluster", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        rayalign.run("passive", "rayalign/Tabular-v0", run_dir=tmp_path / "mine", **SMALL)
    assert f"`rayalign resume {tmp_path / 'mine'}` goes on" in capsys.readouterr().err
    assert not (tmp_path / "mine" / FAILED_START).exists()


def test_the_working_directory_of_a_ray_job_keeps_no_run(tmp_path, monkeypatch):
    package = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(package)
    assert storage.absolute("runs/mine") == str(tmp_path / "home" / "runs" / "mine")
    assert storage.absolute("/data/mine") == "/data/mine"
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/mine") == os.path.join(tmp_path, "runs", "mine")


# ==== what resume may change =========================================================================================
def changed(**values):
    return settings.apply(RunConfig(), values)


def test_every_setting_that_resume_may_change_is_there():
    names = [setting.name for setting in settings.describe(RunConfig())]
    assert [free for free in FREE_TO_CHANGE if not any(name.startswith(free) for name in names)] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rollout.max_batch_tokens", 4096),
        ("rollout.vllm.gpu_memory_utilization", 0.5),
        ("rollout.start_timeout_s", 900.0),
        ("scorer.max_gradient_tokens", 512),
        ("learner.micro_batch_tokens", 2048),
        ("learner.gradient_checkpointing", True),
        ("learner.batch_timeout_s", 7200.0),
        ("loop.gate_timeout_s", 7200.0),
        ("oracle.judge.price", 0.01),
        ("oracle.request_timeout_s", 99.0),
        ("evaluation.oracle.judge.price", 0.01),
        ("evaluation.oracle.request_timeout_s", 99.0),
    ],
)
def test_what_our_own_errors_advise_is_among_them(name, value):
    before = changed(**{"evaluation.oracle.kind": "judge", "evaluation.oracle.target": "model"})
    check_changes(before, settings.apply(before, {name: value}), "runs/mine")


def test_what_changes_the_learning_is_done_by_a_replay():
    with pytest.raises(ConfigError, match=r"learning_rate.*`rayalign replay runs/mine` trains on its labels"):
        check_changes(RunConfig(), changed(**{"learner.learning_rate": 1e-5}), "runs/mine")
    with pytest.raises(ConfigError) as refused:
        check_changes(RunConfig(), changed(**{"rollout.temperature": 0.1}), "runs/mine")
    with pytest.raises(ConfigError, match="enable_lora"):
        check_changes(RunConfig(), changed(**{"rollout.vllm.enable_lora": True}), "runs/mine")
    assert "replay" not in str(refused.value)


def test_more_labels_do_not_come_after_the_passes_over_the_old_ones(tmp_path):
    class Spent:
        spent = 100

    before = RunConfig(loop=LoopConfig(budget=100, epochs=2))
    after = replace(before, loop=replace(before.loop, budget=200))
    with pytest.raises(ConfigError, match=r"loop\.budget=200.*loop\.epochs=2 passes.*replay"):
        check_budget(before, after, Spent(), "runs/mine")
    Spent.spent = 60  # still buying
    check_budget(before, after, Spent(), "runs/mine")
    Spent.spent = 100
    check_budget(before, before, Spent(), "runs/mine")


# ==== on another machine =============================================================================================
def test_a_run_that_was_copied_finds_its_policy_by_its_name(tmp_path):
    folder = new_run(run_dir=tmp_path / "mine")
    config = folder / "config.yaml"
    policy = StoredRun.read(folder).config.policy
    config.write_text(config.read_text().replace(policy, "/gone/policy"))
    assert StoredRun.read(folder).config.policy == policy, "the world's own"
    (folder / "policy_name.txt").write_text(str(tmp_path / "nowhere"))
    assert StoredRun.read(folder).config.policy == "/gone/policy", "who needs it says what is missing"


def test_a_run_whose_prompts_are_gone_is_described_all_the_same(tmp_path, monkeypatch):
    def gone(*_, **__):
        raise DataError("env.path='prompts.jsonl' can't be read.")

    stored = StoredRun.read(new_run(run_dir=tmp_path / "mine"))
    assert stored.world_if_there() is not None
    monkeypatch.setattr(stored_run, "make_world", gone)
    assert stored.world_if_there() is None
    command, _ = how_to_reproduce(stored, None)
    assert "--policy POLICY" in command and "--set loop.batch_size=4" in command
