"""Pages that are made of the package itself, written to `docs/generated/` before each build.

    agents/NAME.md          the head of the agent's file, its settings, the tuned examples that use it
    environments/NAME.md    the docstring of the world, its keywords
    environments.md         all of them
    settings.md             every section of `RunConfig`
    tests.md                the source of each test that a page names

An id in a table, and a label over a heading, is what `name_links` links a name to.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from rayalign.agents import agent_class, list_agents
from rayalign.agents.agent import AgentConfig
from rayalign.cli import load_example
from rayalign.cli.lists import doc_of, keywords, value_text
from rayalign.config import REQUIRED, Setting, describe, field_types, section_type
from rayalign.env import ENVS, NUMERIC, list_envs
from rayalign.runs.config import RunConfig

ROOT = Path(__file__).parents[2]
PAPER = "Differs from the paper"


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx's entry point."""
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir)))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_pages(docs: Path) -> None:
    """Write what changed, and remove the pages of what is no longer there."""
    folder = docs / "generated"
    pages = {folder / name: text for name, text in all_pages(docs)}
    for stale in set(folder.rglob("*.md")) - set(pages):
        stale.unlink()
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def all_pages(docs: Path) -> Iterator[tuple[str, str]]:
    """File name under `generated/` and text of each page."""
    examples = {path: load_example(str(path)) for path in sorted((ROOT / "tuned_examples").glob("*.py"))}
    for name in list_agents():
        used_by = [path for path, config in examples.items() if config["agent"] == name]
        yield f"agents/{name}.md", agent_page(name, used_by)
    for env_id in (*list_envs(), *NUMERIC):
        yield f"environments/{short(env_id)}.md", environment_page(env_id)
    yield "environments.md", environments_page()
    yield "settings.md", settings_page()
    yield "tests.md", tests_page(docs)


# -- agents -------------------------------------------------------------------------------------------------------
def agent_page(name: str, examples: Iterable[Path]) -> str:
    """One agent."""
    kind = agent_class(name)
    head, box, differences = split_docstring(doc_of(kind))
    own = [s for s in describe(kind.Config) if s not in describe(AgentConfig)]
    shared = [s for s in describe(kind.Config) if s in describe(AgentConfig)]
    lines = [f"(agent-{name})=", f"# {name}", f"**{head}.** {sentence(kind.__doc__)}", ""]
    lines += [literal(box), *([f"## {PAPER}", differences] if differences else [])]
    lines += ["## Settings", f"On a terminal: `rayalign agents {name}`."]
    lines += ["### Its own", table(own, prefix="agent.", page=f"agent-{name}")] if own else []
    lines += ["### Of every agent", table(shared, prefix="agent.", page=f"agent-{name}")]
    lines += ["## Tuned examples"]
    for path in examples:
        lines += [f"{{download}}`{path.name} </../tuned_examples/{path.name}>`", literal(docstring_of(path))]
    return page(lines)


def split_docstring(text: str) -> tuple[str, str, str]:
    """The first paragraph, the box (verbatim), and what `Differs from the paper:` says, which is a list."""
    head, _, rest = text.partition("\n\n")
    box, _, differences = rest.partition(PAPER)
    return " ".join(head.split()).rstrip("."), box.strip("\n"), differences.removeprefix(":").strip()


# -- environments -------------------------------------------------------------------------------------------------
def environments_page() -> str:
    """The list."""
    lines = ["# Environments", "Real Gymnasium environments: `gymnasium.make(ID)` and `gymnasium.make_vec(ID)`.", ""]
    lines += ["| id | what it is |", "|---|---|"]
    lines += [f"| [`{env_id}`](#env-{short(env_id)}) | {ENVS[env_id].summary} |" for env_id in list_envs()]
    lines += [f"| [`{env_id}`](#env-{short(env_id)}) | {sentence(world_of(env_id).__doc__)} |" for env_id in NUMERIC]
    lines += ["", "```{toctree}", ":hidden:", ":glob:", "", "environments/*", "```"]
    lines += ["## What a step is", "Those with prompts have the same interface, whatever their world:"]
    bandit = import_module("rayalign.env.dueling_bandit")
    for kind in (bandit.DuelingBandit, bandit.DuelingBanditVector):
        lines += [f"### {kind.__name__}", literal(inspect.cleandoc(kind.__doc__))]
    return page(lines)


def environment_page(env_id: str) -> str:
    """One environment: the head of its file where that says more than the class, the class, the keywords."""
    world = world_of(env_id)
    lines = [f"(env-{short(env_id)})=", f"# {env_id}", ENVS[env_id].summary if env_id in ENVS else "", ""]
    docs = dict.fromkeys([doc_of(world), inspect.cleandoc(world.__doc__ or "")])
    lines += [literal(text) for text in docs]
    if env_id in ENVS:
        rows = [(named(name, f"env-{short(env_id)}"), kind, default) for name, kind, default in keywords(world)]
        lines += ["## Keywords", f"On a terminal: `rayalign envs {env_id}`.", "", "| setting | default |", "|---|---|"]
        lines += [f"| {name} | {typed(kind, default)} |" for name, kind, default in rows]
        lines += defaults_of(world)
    return page(lines)


def defaults_of(world: type) -> list[str]:
    """The settings that the world brings along, where it can be made without a file of the user's."""
    if any(p.default is p.empty for p in inspect.signature(world).parameters.values()) or world.__name__ == "Prompts":
        return []
    values = world().defaults()
    rows = [f"| `{name}` | {code(value_text(value))} |" for name, value in values.items()]
    return ["## Settings that suit it", "Yours win over them.", "", "| setting | value |", "|---|---|", *rows]


def world_of(env_id: str) -> Any:
    """The class behind a registered id."""
    module, _, attribute = (NUMERIC.get(env_id) or ENVS[env_id].world).partition(":")
    return getattr(import_module(module), attribute)


def short(env_id: str) -> str:
    """`rayalign/TinyWorld-v0` -> `TinyWorld-v0`."""
    return env_id.rpartition("/")[2]


# -- settings -----------------------------------------------------------------------------------------------------
def settings_page() -> str:
    """Every section of a run's settings, in the order of `RunConfig`."""
    lines = ["# Settings", sentence(RunConfig.__doc__)]
    lines += ["On a terminal: `rayalign settings`. How to change one: [](../architecture.md#settings)."]
    lines += ["An agent's own settings (`agent.*`) are on [its page](../agents.md), those of an environment"]
    lines += ["(`env.*`) on [its page](environments.md), too.", "## Of the run"]
    rows = [s for s in describe(RunConfig) if not s.name.startswith(("agent.", "evaluation.oracle."))]
    lines += [table([s for s in rows if "." not in s.name])]
    for name, annotation in field_types(RunConfig).items():
        section = section_type(annotation)
        if section is None or name == "agent":
            continue
        lines += [f"## {name}", f"{sentence(section.__doc__)}"]
        inside = [s for s in rows if s.name.startswith(f"{name}.")]
        prefixes = list(dict.fromkeys(s.name.rpartition(".")[0] for s in inside))
        for prefix in prefixes:
            lines += [f"### {prefix}"] if prefix != name else []
            lines += [table([s for s in inside if s.name.rpartition(".")[0] == prefix])]
            lines += ["Fields of `evaluation.oracle` are those of `oracle`."] if prefix == "evaluation" else []
    return page(lines)


# -- tests --------------------------------------------------------------------------------------------------------
def tests_page(docs: Path) -> str:
    """The source of every test that a page names, so that a promise is one click from what holds it."""
    texts = [path.read_text(encoding="utf-8") for path in docs.glob("*.md")]
    named = {name for text in texts for name in re.findall(r"`(test_\w+)`", text)}
    lines = ["# Tests that these pages name", "In the order of their files."]
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        found = {name: source for name, source in tests_of(path).items() if name in named}
        lines += [f"## {path.relative_to(ROOT)}"] if found else []
        for name, source in found.items():
            lines += [f"({name})=", f"### {name.removeprefix('test_').replace('_', ' ')}", literal(source, "python")]
    return page(lines)


def tests_of(path: Path) -> Mapping[str, str]:
    """Name -> source of the test functions of a file, decorators included."""
    text = path.read_text(encoding="utf-8")
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(text.splitlines()[start - 1 : node.end_lineno])
    return found


# -- Markdown -----------------------------------------------------------------------------------------------------
def page(lines: Iterable[str]) -> str:
    """The blocks of a page."""
    return "\n".join(lines) + "\n"


def literal(text: str, language: str = "text") -> str:
    """A block that is shown as it is."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{textwrap.dedent(text)}\n{fence}\n"


def table(settings: Iterable[Setting], prefix: str = "", page: str = "setting") -> str:
    """Settings with type, default and meaning; each has an id to link to."""
    lines = ["", "| setting | default | meaning |", "|---|---|---|"]
    for s in settings:
        default = "required" if s.default is REQUIRED else value_text(s.default)
        lines.append(f"| {named(prefix + s.name, page)} | {typed(s.type, default)} | {cell(s.help)} |")
    return "\n".join(lines) + "\n"


def named(setting: str, page: str) -> str:
    """The name of a setting, with the label that `label_of` gives it."""
    return f"`{setting}`{{#{label_of(setting, page)}}}"


def label_of(setting: str, page: str = "setting") -> str:
    """What a setting is linked by: it may be explained on the pages of several agents.

    >>> label_of("agent.lora.rank", "agent-sea"), label_of("loop.budget")
    ('agent-sea--agent-lora-rank', 'setting--loop-budget')
    """
    return re.sub(r"[^a-z0-9_]", "-", f"{page}--{setting}".lower())


def typed(kind: str, default: str) -> str:
    """A default and its type."""
    return f"{code(default)} {cell(kind)}" if kind and kind != "str" else code(default)


def code(text: str) -> str:
    """Inline code, in a table."""
    return f"`{text}`".replace("|", "\\|")


def cell(text: str) -> str:
    """Prose of a docstring in a table: what Markdown would read as markup is shown as it is, but `code` is code."""
    parts = text.split("`")
    plain = [re.sub(r"([\\*_\[\]<>|{}#])", r"\\\1", part) for part in parts[::2]]
    inline = [code(part) for part in parts[1::2]]
    return "".join(a + b for a, b in zip(plain, [*inline, ""], strict=False))


def sentence(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())


def docstring_of(path: Path) -> str:
    """Of a file, which is not run for it."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
