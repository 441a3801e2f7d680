"""That the examples say what they are and hold settings that exist; that they run is shown by running them."""

import ast
import re
import runpy
import shlex
from pathlib import Path

import click
import pytest
import typer
from ray.dashboard.modules.job.cli import submit

from rayalign.agents import agent_class
from rayalign.cli import SHORT_NAMES, app, load_example
from rayalign.config import apply, describe, flatten
from rayalign.env import make_world
from rayalign.runs.config import RunConfig

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "tuned_examples").glob("*.py"))
SEARCHES = sorted((ROOT / "tuned_examples" / "searches").glob("*.py"))
RECIPES = sorted((ROOT / "tuned_examples" / "recipes").glob("[!_]*.py"))
ARGUMENTS = {"agent", "env", "policy", "run_dir", "oracle"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_named_after_its_agent_and_says_command_hardware_and_result(path):
    config = load_example(str(path))
    assert path.stem.startswith(config["agent"])
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for word in ("Command", "Hardware", "Result", f"rayalign run tuned_examples/{path.name}", "ray job submit"):
        assert word in head, f"{path.name}: its docstring does not say {word!r}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_holds_settings_that_exist_and_pass_their_checks(path):
    config = load_example(str(path))
    world = make_world(config["env"], **{k.removeprefix("env."): v for k, v in config.items() if k.startswith("env.")})
    base = RunConfig(agent=agent_class(config["agent"]).Config())
    given = {k: v for k, v in flatten(config).items() if k not in ARGUMENTS and not k.startswith("env.")}
    settings = {**world.defaults(), **{SHORT_NAMES.get(name, name): value for name, value in given.items()}}
    assert apply(base, settings).loop.budget == config["budget"]


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_search_says_command_hardware_and_result_and_searches_settings_that_exist(path):
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for word in ("Command", "Hardware", "Result", f"python tuned_examples/searches/{path.name}", "ray job submit"):
        assert word in head, f"{path.name}: its docstring does not say {word!r}"
    space = runpy.run_path(str(path), run_name="imported")["SPACE"]
    base = RunConfig(agent=agent_class(path.stem.split("_")[0]).Config())
    for _ in range(10):
        apply(base, {name: domain.sample() for name, domain in space.items()})


def header_commands(path: Path) -> list[list[str]]:
    """The command lines in the docstring of an example, as words; what follows two spaces is a remark."""
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    lines = re.sub(r"\\\n\s*", "", head.replace("Command  ", "         ")).splitlines()
    plain = [re.split(r"\s{2,}", line.strip())[0] for line in lines if re.match(r"\s+(rayalign|python|ray) ", line)]
    return [shlex.split(line) for line in plain]


def check_script(path: Path, words: list[str]) -> None:
    """That `python WORDS` is the script itself, with options and settings that it has."""
    assert ROOT / words[0] == path
    source = path.read_text(encoding="utf-8")
    if "run_example(" not in source:
        assert not [word for word in words if word.startswith("--") and f'"{word}"' not in source], words
        return
    check_rayalign(["run", *words])  # a tuned example has the options of `rayalign run`


def check_rayalign(words: list[str]) -> None:
    command = typer.main.get_command(app).commands[words[0]]
    given = command.make_context(words[0], words[1:]).params  # an unknown option is an error
    if words[0] == "run":
        names = [change.partition("=")[0] for change in given["changes"] or ()]
        base = RunConfig(agent=agent_class(load_example(ROOT / given["what"])["agent"]).Config())
        known = {setting.name for setting in describe(base)}
        assert not [name for name in names if name not in known and not name.startswith(("recipe.", "env."))], words


@pytest.mark.parametrize("path", [*EXAMPLES, *SEARCHES, *RECIPES], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_commands_of_a_header_name_the_file_itself_and_options_and_settings_that_exist(path):
    jobs = 0
    for program, *words in header_commands(path):
        if program == "ray":
            assert words[:2] == ["job", "submit"]
            job = submit.make_context("submit", words[2:]).params
            assert job["working_dir"] == "." and job["entrypoint"][0] == "python"
            check_script(path, list(job["entrypoint"][1:]))
            jobs += 1
        elif program == "python":
            check_script(path, words)
        else:
            check_rayalign(words)
    assert jobs == 1


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("ray job submit --workingdir . -- python {file}", "No such option"),
        ("ray job submit --working-dir . -- python tuned_examples/other.py", "other.py"),
        ("ray job submit --working-dir . -- python {file} --sed 1", "No such option"),
        ("rayalign run {file} --set agent.bta=1", "agent.bta"),
    ],
)
def test_a_wrong_command_in_a_header_is_found(line, error, tmp_path, monkeypatch):
    """The check above is one that can fail."""
    path = tmp_path / "tuned_examples" / "mine.py"
    path.parent.mkdir()
    wrong = line.format(file="tuned_examples/mine.py")
    path.write_text(f'"""Mine.\n\nCommand     {wrong}\n"""\nCONFIG = {{"agent": "sea"}}\n# run_example(CONFIG)\n')
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    misused = (click.UsageError, *typer.BadParameter.__bases__)  # Typer has a click of its own
    with pytest.raises((*misused, AssertionError), match=error):
        test_commands_of_a_header_name_the_file_itself_and_options_and_settings_that_exist(path)


def test_there_is_an_example_of_each_agent():
    from rayalign import list_agents

    assert {load_example(str(path))["agent"] for path in EXAMPLES} == set(list_agents())
