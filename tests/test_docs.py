"""What the documents name exists: files, tests, settings, commands and options."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from documents import PAGES as DOCS
from documents import RESULTS, ROOT, commands

import rayalign
from rayalign.agents import agent_class, list_agents
from rayalign.cli import app
from rayalign.config import describe
from rayalign.env import list_envs
from rayalign.runs.config import RunConfig

TEXTS = {path.name: path.read_text(encoding="utf-8") for path in DOCS}
EVERYTHING = "\n".join(TEXTS.values())


def test_every_test_that_the_documents_name_exists():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", EVERYTHING))
    assert named and not {name for name in named if f"def {name}(" not in source}


def test_every_setting_that_the_documents_name_exists():
    known = {setting.name for setting in describe(RunConfig)}
    for agent in list_agents():
        known |= {f"agent.{setting.name}" for setting in describe(agent_class(agent).Config)}
    sections = {name.partition(".")[0] for name in known if "." in name}
    named = set(re.findall(rf"(?:--set |[`\"])((?:{'|'.join(sections)})\.[a-z_][a-z_.]*)", EVERYTHING))
    methods = {f"agent.{name}" for name in dir(agent_class("passive"))}
    files = {"evaluation.arrow"}  # of a run directory
    assert named and not named - known - methods - files


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_file_that_a_document_links_to_or_names_exists(path):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXTS[path.name]) if "://" not in link]
    # pages under generated/ are there once the site is built, and its build fails on a link into nothing
    assert not [link for link in links if not link.startswith("generated/") and not (path.parent / link).exists()]
    text = re.sub(r"https?://\S+", "", TEXTS[path.name])
    named = re.findall(r"`?((?:rayalign|tests|tuned_examples|docs|benchmarks)/[\w./]+\.(?:py|md|txt))`?", text)
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_public_name_is_in_the_api_page():
    listed = re.findall(r"^\.\. auto(?:function|class):: rayalign\.(\w+)$", TEXTS["api.md"], re.MULTILINE)
    assert sorted(listed) == sorted(rayalign.__all__)


def test_every_file_in_the_readmes_tree_exists():
    tree = TEXTS["README.md"].split("## Where things are")[1].split("```")[1]
    folder = ROOT
    for line in filter(None, tree.splitlines()):
        name = line.split()[0]
        folder = ROOT / name if not line.startswith(" ") else folder
        assert (folder if not line.startswith(" ") else folder / name).exists(), name


def test_every_agent_and_environment_is_in_the_readme():
    for name in (*list_agents(), *list_envs()):
        assert f"| `{name}` |" in TEXTS["README.md"], f"README's tables lack {name}"


@pytest.mark.parametrize("page", [*DOCS, *RESULTS], ids=lambda page: page.name)
def test_every_command_that_a_document_shows_is_understood_by_the_command_line(page):
    command_line = typer.main.get_command(app)
    for words in commands(page, "rayalign"):
        assert words[0] in command_line.commands, f"rayalign {words[0]} is not a command"
        command_line.commands[words[0]].make_context(words[0], words[1:])  # an unknown option is an error


@pytest.mark.parametrize("page", [*DOCS, *RESULTS], ids=lambda page: page.name)
def test_every_script_module_and_target_that_a_document_runs_exists_with_the_options_shown(page):
    for words in commands(page, "python"):
        file = Path(find_spec(words[1]).origin) if words[0] == "-m" else ROOT / words[0]
        source = file.read_text(encoding="utf-8")
        if "run_example(" not in source:  # a tuned example has the options of `rayalign run`
            assert not [word for word in words if word.startswith("--") and f'"{word}"' not in source], words
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert not [words for words in commands(page, "make") if words[0] not in targets]
