"""`agents`, `envs` and `settings`: what there is, told by the classes' own docstrings."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayalign.cli.app import app, plain_errors
from rayalign.config import REQUIRED, Setting, describe, type_name
from rayalign.errors import ConfigError, did_you_mean


@app.command()
@plain_errors
def agents(name: Annotated[str | None, typer.Argument(help="Show this agent's settings.")] = None) -> None:
    """List the agents, or the settings of one."""
    from rayalign.agents import agent_class, list_agents

    if name is None:
        rows = [(agent, first_paragraph(doc_of(agent_class(agent)))) for agent in list_agents()]
        _print_table(("agent", "what it does"), rows)
        return
    kind = agent_class(name)
    typer.echo(doc_of(kind) + "\n")
    _print_settings([s._replace(name=f"agent.{s.name}") for s in describe(kind.Config)])


@app.command()
@plain_errors
def envs(
    env_id: Annotated[str | None, typer.Argument(metavar="ID", help="Show this environment's keywords.")] = None,
) -> None:
    """List the environments, or the keywords of one."""
    from rayalign.env import ENVS, list_envs

    if env_id is None:
        _print_table(("environment", "what it is"), [(name, ENVS[name].summary) for name in list_envs()])
        return
    if env_id not in ENVS:
        raise ConfigError(f"env={env_id!r} is unknown. {did_you_mean(env_id, ENVS)}")
    module, _, attribute = ENVS[env_id].world.partition(":")
    world = getattr(__import__(module, fromlist=[attribute]), attribute)
    typer.echo("\n\n".join(dict.fromkeys([doc_of(world), inspect.cleandoc(world.__doc__ or "")])) + "\n")
    _print_table(("setting", "type", "default"), keywords(world))


@app.command()
@plain_errors
def settings(
    section: Annotated[str | None, typer.Argument(help="Only this section, e.g. learner or rollout.")] = None,
) -> None:
    """List all settings with types, defaults and meanings (an agent's own: `rayalign agents NAME`)."""
    from rayalign.runs.config import RunConfig

    known = describe(RunConfig)
    shown = [s for s in known if section is None or s.name == section or s.name.startswith(f"{section}.")]
    if not shown:
        sections = {s.name.rpartition(".")[0] for s in known} - {""}
        raise ConfigError(f"{section!r} is not a section. {did_you_mean(str(section), sections)}")
    _print_settings(shown)


def keywords(world: type) -> list[tuple[str, str, str]]:
    """The keywords of a world's constructor, which are settings `env.<name>`."""
    rows = []
    for parameter in inspect.signature(world, eval_str=True).parameters.values():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            default = "required" if parameter.default is parameter.empty else value_text(parameter.default)
            kind = "" if parameter.annotation is parameter.empty else type_name(parameter.annotation)
            rows.append((f"env.{parameter.name}", kind, default))
    return rows


def doc_of(kind: type) -> str:
    """The docstring of the file (of an agent: its paper's algorithm box) if there is one, else of the class."""
    module = inspect.getmodule(kind)
    return inspect.cleandoc((module.__doc__ if module else None) or kind.__doc__ or "")


def first_paragraph(text: str) -> str:
    """A docstring's first paragraph, on one line."""
    return " ".join(text.split("\n\n")[0].split())


def _print_settings(rows: Iterable[Setting]) -> None:
    _print_table(
        ("setting", "type", "default", "meaning"),
        [(s.name, s.type, "required" if s.default is REQUIRED else value_text(s.default), s.help) for s in rows],
    )


def value_text(value: Any) -> str:
    """As one would write it after `--set`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) and value else repr(value)


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    # A pipe has no width: there a row is one line, for grep.
    console = Console() if sys.stdout.isatty() else Console(width=1000)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, name in enumerate(head):
        table.add_column(name, no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    with console.capture() as text:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in text.get().rstrip().splitlines()))
