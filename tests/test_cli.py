"""The command line: what is typed is what `run` gets, and mistakes are one line. Nothing here starts Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import rayalign.loop.loop
from rayalign.agents import list_agents
from rayalign.cli import app, run_example
from rayalign.config import describe
from rayalign.env import list_envs
from rayalign.errors import BudgetError, ConfigError
from rayalign.runs.config import RunConfig
from rayalign.runs.logs import RunLog

Call = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Calls of `rayalign.loop.loop.run` and `resume`, which are caught before they start anything."""
    calls: list[Call] = []

    def caught(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "result"

    monkeypatch.setattr(rayalign.loop.loop, "run", caught)
    monkeypatch.setattr(rayalign.loop.loop, "resume", caught)
    return calls


@pytest.fixture
def example(tmp_path: Path) -> Path:
    file = tmp_path / "example.py"
    file.write_text(
        'CONFIG = {"agent": "sea", "env": "rayalign/Tabular-v0", "budget": 100, "seed": 1,\n'
        '          "agent.beta": 0.2, "learner": {"lora": {"rank": 4}, "learning_rate": 0.1}}\n'
        'if __name__ == "__main__":\n    raise SystemExit("an example is not run by being read")\n'
    )
    return file


def invoke(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_an_agent_is_run_in_the_default_world(runs: list[Call]) -> None:
    assert invoke("run", "sea").exit_code == 0
    assert runs == [(("sea", "rayalign/TinyWorld-v0"), {})]


def test_options_and_set_reach_the_run_under_their_full_names(runs: list[Call]) -> None:
    done = invoke(
        *("run", "passive", "--env", "rayalign/Tabular-v0", "--budget", 64, "--seed", 3, "--max-staleness", 1),
        *(
            "--policy",
            "some/model",
            "--run-dir",
            "there",
            "--set",
            "agent.beta=0.3",
            "--set",
            "learner.schedule=cosine",
        ),
    )
    assert done.exit_code == 0, done.output
    assert runs == [
        (
            ("passive", "rayalign/Tabular-v0"),
            {
                "policy": "some/model",
                "run_dir": "there",
                "agent.beta": "0.3",
                "learner.schedule": "cosine",
                "loop.budget": 64,
                "loop.seed": 3,
                "loop.max_staleness": 1,
            },
        )
    ]


def test_an_example_is_changed_by_set_and_set_by_options(runs: list[Call], example: Path) -> None:
    done = invoke("run", example, "--set", "agent.beta=0.5", "--set", "loop.seed=7", "--set", "budget=5", "--budget", 9)
    assert done.exit_code == 0, done.output
    assert runs == [
        (
            ("sea", "rayalign/Tabular-v0"),
            {
                "loop.budget": 9,
                "loop.seed": "7",
                "agent.beta": "0.5",
                "learner.lora.rank": 4,
                "learner.learning_rate": 0.1,
            },
        )
    ]


def test_an_example_run_by_python_does_the_same(runs: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--set", "agent.k=3", "--seed", "4"])
    assert run_example({"agent": "sea", "env": "e", "seed": 1, "agent.k": 1}) == "result"
    assert runs == [(("sea", "e"), {"loop.seed": 4, "agent.k": "3"})]


def test_an_example_run_by_python_ends_with_the_error_s_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--set", "nonsense"])
    with pytest.raises(SystemExit) as ended:
        run_example({"agent": "sea"})
    assert ended.value.code == 2


def test_resume_passes_the_directory_and_the_changes(runs: list[Call]) -> None:
    assert invoke("resume", "runs/a", "--budget", 500, "--set", "oracle.num_replicas=2").exit_code == 0
    assert runs == [(("runs/a",), {"oracle.num_replicas": "2", "loop.budget": 500})]


@pytest.mark.parametrize("error", [ConfigError("agent.beta=-1 must be positive."), BudgetError("the budget is spent")])
def test_our_errors_are_one_line_and_exit_code_2(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(rayalign.loop.loop, "run", fail)
    done = invoke("run", "sea")
    assert done.exit_code == 2
    assert done.stderr == f"error: {error}\n"
    assert done.stdout == ""


def test_errors_that_are_not_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(rayalign.loop.loop, "run", fail)
    assert isinstance(invoke("run", "sea").exception, ZeroDivisionError)


def test_an_interrupt_has_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rayalign.loop.loop, "run", interrupt)
    done = invoke("run", "sea")
    assert done.exit_code == 130
    assert done.stderr == "interrupted\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("run", "no_such_file.py"), "'no_such_file.py' is not a file"),
        (("run", "sea", "--set", "agent.beta"), "--set 'agent.beta' must be NAME=VALUE"),
        (("run", "sea", "--set", "=1"), "must be NAME=VALUE"),
        (("agents", "pasive"), "agent='pasive' is not registered. Did you mean 'passive'"),
        (("envs", "rayalign/TinyWrld-v0"), "Did you mean 'rayalign/TinyWorld-v0'"),
        (("settings", "lerner"), "'lerner' is not a section. Did you mean 'learner'"),
        (("report", "no/such/run"), "holds no run"),
    ],
)
def test_mistakes_on_the_command_line_are_told_with_the_way_out(args: tuple[str, ...], message: str) -> None:
    done = invoke(*args)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_replay_offers_no_bucket_for_its_run_dir_and_takes_none() -> None:
    told = " ".join(invoke("replay", "--help").stdout.replace("│", " ").split())
    assert "a local folder" in told and "s3://" not in told
    assert "s3://" in invoke("run", "--help").stdout
    done = invoke("replay", "no/such/run", "--run-dir", "s3://bucket/replay")
    assert done.exit_code == 2
    assert "run_dir='s3://bucket/replay' must be a local path" in done.stderr


def test_mistakes_in_names_reach_the_user_through_the_real_run(tmp_path: Path) -> None:
    for args, message in [
        (("run", "saa"), "Did you mean 'sea'"),
        (("run", "sea", "--env", "rayalign/TinyWorld"), "Did you mean 'rayalign/TinyWorld-v0'"),
        (("run", "sea", "--set", "agent.num_candidate=3"), "Did you mean 'agent.num_candidates'"),
        (("run", "sea", "--budget", 0), "loop.budget=0 must be at least 1"),
        (("resume", tmp_path), "holds no run"),
    ]:
        done = invoke(*args)
        assert done.exit_code == 2, done.output
        assert message in done.stderr


def test_a_file_without_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("A = 1\n")
    done = invoke("run", tmp_path / "x.py")
    assert done.exit_code == 2
    assert "does not define CONFIG" in done.stderr


def test_report_writes_the_page_and_says_where(tmp_path: Path) -> None:
    RunLog(tmp_path).metrics({"batch": 0, "labels": 1})
    done = invoke("report", tmp_path)
    assert done.stdout == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").exists()


def test_every_agent_is_listed_with_what_it_does_and_its_settings_with_their_docs() -> None:
    listed = invoke("agents").stdout
    for name in list_agents():
        (line,) = [line for line in listed.splitlines() if line.startswith(f"{name} ")]
        assert len(line.split(maxsplit=1)[1]) > 10
        shown = invoke("agents", name).stdout
        assert "agent.beta " in shown
        assert "Strength of the pull towards the reference" in shown


def test_every_environment_is_listed_and_shown_with_its_keywords() -> None:
    listed = invoke("envs").stdout
    for name in list_envs():
        assert f"{name} " in listed
        done = invoke("envs", name)
        assert done.exit_code == 0, done.output
        assert "env." in done.stdout


def test_every_setting_is_listed_and_documented() -> None:
    listed = invoke("settings").stdout
    for setting in describe(RunConfig):
        (line,) = [line for line in listed.splitlines() if line.split()[0] == setting.name]
        assert setting.help, f"{setting.name} has no docstring"
        assert setting.help in line
    section = invoke("settings", "learner.lora").stdout
    assert "learner.lora.rank" in section
    assert "learner.strategy" not in section


def test_help_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from rayalign.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "print(sorted({'torch', 'ray', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_service_ends_in_good_order_at_sigterm_as_at_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    @contextmanager
    def served(what: str, **options: Any) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(model=what, url="http://127.0.0.1:1/v1", needs_token=False)
        ended.append(what)

    monkeypatch.setattr("rayalign.after.serving.serve_policy", served)

    def stop_it(number: int) -> None:
        while signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
            time.sleep(0.05)
        time.sleep(0.2)  # now it waits
        os.kill(os.getpid(), number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, lambda *_: None)  # such as Ray Tune leaves
            stopper = threading.Thread(target=stop_it, args=(number,))
            stopper.start()
            result = CliRunner().invoke(app, ["serve", "run"])
            stopper.join()
            assert result.exit_code == 0 and "Ctrl-C ends it" in result.output
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended == ["run", "run"]


def test_options_that_would_mean_nothing_are_refused() -> None:
    done = invoke("evaluate", "model", "--out", "results", "--harness", "ifeval", "--best-of", 8, "--seed", 0)
    assert done.exit_code == 2 and "--best-of, --seed means nothing with --harness" in done.stderr
    done = invoke("evaluate", "model", "--out", "o", "--format", "mt_bench", "--prompts", "q", "--limit", 5)
    assert done.exit_code == 2 and "--limit means nothing with --format" in done.stderr
