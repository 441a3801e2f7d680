"""What the documents name exists: files, tests, settings and options."""

import re
from pathlib import Path

import pytest

from rayalign import cli
from rayalign.agents import agent_class, list_agents
from rayalign.config import describe
from rayalign.env import list_envs
from rayalign.run_config import RunConfig

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))
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
    assert named and not named - known - methods


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_file_that_a_document_links_to_or_names_exists(path):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXTS[path.name]) if "://" not in link]
    assert not [link for link in links if not (path.parent / link).exists()]
    named = re.findall(
        r"`?((?:rayalign|tests|tuned_examples|docs|benchmarks)/[\w./]+\.(?:py|md|txt))`?", TEXTS[path.name]
    )
    assert not [name for name in named if not (ROOT / name).exists()]


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


def test_every_command_and_option_that_the_documents_show_exists():
    source = "\n".join(file.read_text(encoding="utf-8") for file in Path(cli.__file__).parent.glob("*.py"))
    for command in set(re.findall(r"^rayalign (\w+)", EVERYTHING, re.MULTILINE)):
        assert re.search(rf"^def {command}\(", source, re.MULTILINE), command
    for option in set(re.findall(r"^rayalign .*? --([a-z-]+)", EVERYTHING, re.MULTILINE)):
        assert option == "set" or f"{option.replace('-', '_')}: " in source, option


def test_the_example_agent_of_the_guide_selects_the_extremes():
    import numpy as np

    from rayalign.types import Candidate, Prompt

    names: dict = {}
    exec(TEXTS["adding_an_agent.md"].split("```python\n")[1].split("```")[0], names)
    agent = names["Extremes"](names["ExtremesConfig"](num_candidates=3))
    group = [Candidate(text="x" * n, token_ids=(1,) * n, logprobs=(0.0,) * n, policy_version=0) for n in (2, 3, 1)]
    (choice,) = agent.select(0, [Prompt(id="p", text="", token_ids=())], [group], np.random.default_rng(0))
    assert (choice.first, choice.second) == (1, 2)
    assert agent.proposals()[0].n == 3
