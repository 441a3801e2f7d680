"""Rows of a comparison: what is typed, and what is refused before anything is started. Nothing here starts Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rayalign
from rayalign.errors import ConfigError
from rayalign.studies.comparison import _job, _one_oracle, read_rows
from rayalign.studies.many import Job, group_of, how_many_fit, part_of_cluster


def rows(*texts: str) -> list[tuple[str, str, Any]]:
    return [(row.name, row.agent, dict(row.settings)) for row in read_rows(texts)]


@pytest.fixture
def example(tmp_path: Path) -> Path:
    file = tmp_path / "tuned.py"
    file.write_text('CONFIG = {"agent": "sea", "env": "rayalign/Tabular-v0", "budget": 100, "agent.beta": 0.2}\n')
    return file


def test_rows_are_agents_files_and_agents_with_settings_under_names(example: Path) -> None:
    assert rows("passive,xpo") == [("passive", "passive", {}), ("xpo", "xpo", {})]
    tuned = {"env": "rayalign/Tabular-v0", "loop.budget": 100, "agent.beta": 0.2}
    assert rows(f"best={example}", str(example)) == [("best", "sea", tuned), ("tuned", "sea", tuned)]
    assert rows("sea:agent.beta=0.3,learner.learning_rate=1e-4,passive") == [
        ("sea:agent.beta=0.3", "sea", {"agent.beta": "0.3", "learner.learning_rate": "1e-4"}),
        ("passive", "passive", {}),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"agents": []}, "agents is empty"),
        ({"agents": ["passive", "see"]}, "Did you mean 'sea'"),
        ({"agents": ["passive", "passive"]}, "has a name twice"),
        ({"agents": ["passive"], "baseline": "sea"}, "baseline='sea' is none of the rows: passive"),
        ({"agents": ["passive"], "seeds": 0}, "seeds=0 must be a number of at least 1"),
        ({"agents": ["passive"], "seeds": [1, 1]}, r"seeds=\[1, 1\]"),
        (
            {"agents": ["passive", "b=passive:loop.batch_size=8"]},
            "'passive' and 'b' differ in loop.batch_size: 16 and 8",
        ),
        ({"agents": ["passive", "sea:evaluation.num_prompts=9"]}, "differ in evaluation.num_prompts"),
        ({"agents": ["passive", "sea:agent.bta=9"]}, "row 'sea:agent.bta=9': 'agent.bta' is not a setting"),
        ({"agents": ["sea:agent.beta"]}, "write NAME:SETTING=VALUE"),
        ({"agents": {"a": {"beta": 1}}}, "does not say which agent it is"),
        ({"agents": ["passive"], "budget": 0}, "loop.budget=0 must be at least 1"),
    ],
)
def test_what_can_not_be_compared_is_refused_before_anything_is_started(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        rayalign.compare(**{"env": "rayalign/Tabular-v0", "out": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


def test_examples_of_different_environments_do_not_compare(example: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'tuned' is set for env='rayalign/Tabular-v0', the others for"):
        rayalign.compare(["passive", str(example)], "rayalign/TinyWorld-v0", out=tmp_path / "out")


def test_as_many_runs_fit_side_by_side_as_their_reservations_allow(tmp_path: Path) -> None:
    plan = Job(folder=tmp_path, agent="passive", env="rayalign/Tabular-v0").prepare()
    assert how_many_fit(plan, {"CPU": 2.0}) == 1  # 0.5 + 1 + 1 + 0.5 CPUs don't even fit once
    assert how_many_fit(plan, {"CPU": 10.0}) == 3
    group = group_of(plan, {"CPU": 2.0}, 2)
    assert 0.9 < sum(bundle.get("CPU", 0.0) for bundle in group) <= part_of_cluster({"CPU": 2.0}, 2)["CPU"] == 0.98
    with pytest.raises(ValueError, match="parallel=50 leaves each run a part of the cluster"):
        group_of(plan, {"CPU": 2.0}, 50)


def folder_of(text: str, oracle: Any = None) -> Path:
    (row,) = read_rows([text]) if isinstance(text, str) else text
    return _job(row, "rayalign/Tabular-v0", None, oracle, {}, 0, False, Path("out")).folder


def test_runs_are_told_apart_by_who_labels_and_not_by_how_a_number_is_written() -> None:
    def mine(prompt: str, response: str) -> float:
        return float(len(response))

    def other(prompt: str, response: str) -> float:
        return -float(len(response))

    assert folder_of("sea:agent.beta=0.2") == folder_of("sea:agent.beta=2e-1") != folder_of("sea:agent.beta=0.3")
    folders = [folder_of("sea", oracle) for oracle in (None, "human", mine, other)]
    assert len(set(folders)) == 4 and folder_of("sea", mine) == folders[2]


def test_a_functions_name_is_the_same_in_every_process(tmp_path: Path) -> None:
    """A comparison that is resumed has to find its runs: a set in the code is pickled in another order each time."""
    file = tmp_path / "judged.py"
    file.write_text(
        "from rayalign.studies.comparison import _name_of\n"
        "def mine(prompt, response):\n    return float(response in {'a', 'b', 'c', 'd', 'e', 'f'})\n"
        "print(_name_of(mine), _name_of(len))\n"
    )
    told = {
        subprocess.run(
            [sys.executable, str(file)], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(told) == 1 and "__main__.mine#" in told.pop()


def test_an_example_brings_its_oracle_for_all_rows(tmp_path: Path) -> None:
    for name in ("one", "two"):
        code = f"def {name}(prompt, response):\n    return 1.0\n\nCONFIG = {{'agent': 'passive', 'oracle': {name}}}\n"
        (tmp_path / f"{name}.py").write_text(code)
    found = read_rows([str(tmp_path / "one.py"), "sea"])
    assert _one_oracle(found, None).__name__ == "one"
    with pytest.raises(ConfigError, match=r"row 'two' has an oracle of its own, .*two#.*whoever labels is one for all"):
        _one_oracle(read_rows([str(tmp_path / "one.py"), str(tmp_path / "two.py")]), None)
