"""That the examples say what they are and hold settings that exist; that they run is shown by running them."""

import ast
import runpy
from pathlib import Path

import pytest

from rayalign.agents import agent_class
from rayalign.cli import SHORT_NAMES, load_example
from rayalign.config import apply, flatten
from rayalign.env import make_world
from rayalign.runs.config import RunConfig

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "tuned_examples").glob("*.py"))
SEARCHES = sorted((ROOT / "tuned_examples" / "searches").glob("*.py"))
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


def test_there_is_an_example_of_each_agent():
    from rayalign import list_agents

    assert {load_example(str(path))["agent"] for path in EXAMPLES} == set(list_agents())
