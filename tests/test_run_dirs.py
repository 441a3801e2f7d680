"""Where runs are kept when nobody says where."""

from pathlib import Path

import pytest
from whole_runs import SMALL

from rayalign import loop
from rayalign.errors import ConfigError


def new_run(**arguments):
    plan = loop.new_run("passive", "rayalign/Tabular-v0", given=dict(SMALL), **arguments)
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
