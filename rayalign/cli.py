"""The command line. Help texts of settings come from the configs' own docstrings.

    rayalign run tuned_examples/sea_tinyworld.py --set agent.num_candidates=10
    rayalign resume RUN_DIR        rayalign report RUN_DIR [RUN_DIR ...]
    rayalign agents [NAME]         rayalign envs [ID]         rayalign settings [SECTION]

A mistake in the input is one line and exit code 2; a traceback is a mistake of ours.
"""

from __future__ import annotations

import functools
import inspect
import runpy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayalign.config import REQUIRED, Setting, describe, flatten, type_name
from rayalign.errors import ConfigError, RayalignError, did_you_mean

app = typer.Typer(
    name="rayalign",
    help="The most aligned language model out of a fixed number of preference labels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

SHORT_NAMES = {"budget": "loop.budget", "seed": "loop.seed", "max_staleness": "loop.max_staleness"}
"""What `rayalign.run` takes as arguments of its own, and the settings that they are."""

Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Change a setting; repeat for more. `rayalign settings` lists them."
    ),
]
RunDir = Annotated[str | None, typer.Option(help="Where the run is kept. Default: a new folder under runs/.")]
Policy = Annotated[
    str | None, typer.Option(help="Initial policy: Hugging Face directory or id. Default: the world's own.")
]
Budget = Annotated[int | None, typer.Option(help="Labels to buy (loop.budget).")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random (loop.seed).")]
Staleness = Annotated[
    int | None, typer.Option(help="Batches generation may run ahead of learning (loop.max_staleness).")
]


def main() -> None:
    """Entry point of the `rayalign` command."""
    app()


def _plain_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """A mistake in the input is told without a traceback, exit code 2; an interrupt says how to go on."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except RayalignError as error:
            Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), str(error)))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            note = "interrupted: nothing that was bought is lost, `rayalign resume RUN_DIR` goes on"
            Console(stderr=True).print(note, style="yellow")
            raise typer.Exit(130) from None

    return guarded


# -- runs ---------------------------------------------------------------------------------------------------------
@app.command()
@_plain_errors
def run(
    what: Annotated[str, typer.Argument(metavar="FILE.py|AGENT", help="A tuned example, or a registered agent.")],
    env: Annotated[str | None, typer.Option(help="Registered environment; `rayalign envs` lists them.")] = None,
    policy: Policy = None,
    budget: Budget = None,
    seed: Seed = None,
    max_staleness: Staleness = None,
    run_dir: RunDir = None,
    changes: Changes = None,
) -> None:
    """Spend a budget of labels: run a tuned example, or an agent in an environment."""
    named = {"env": env, "policy": policy, "run_dir": run_dir, "budget": budget, "seed": seed}
    base = load_example(what) if what.endswith(".py") else {"agent": what}
    start(base, [*read_changes(changes), *_given(max_staleness=max_staleness, **named)])


@app.command()
@_plain_errors
def resume(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="Directory of the run.")],
    budget: Annotated[int | None, typer.Option(help="A larger budget, to go on with a finished run.")] = None,
    changes: Changes = None,
) -> None:
    """Go on with an interrupted run, or with a finished one that gets a larger budget."""
    from rayalign.loop import resume as resume_run

    resume_run(run_dir, **_merged({}, [*read_changes(changes), *_given(budget=budget)]))


@app.command()
@_plain_errors
def report(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN_DIR...", help="One run, or several to compare.")],
    out: Annotated[str | None, typer.Option(help="Where to write the page. Default: beside the runs.")] = None,
) -> None:
    """Write plots and one self-contained HTML page about a run, or a comparison of several."""
    from rayalign.report import write_report

    typer.echo(str(write_report(run_dirs, out)))


def run_example(config: Mapping[str, Any]) -> Any:
    """Run a tuned example's `CONFIG` with what `sys.argv` adds, as `rayalign run FILE.py` would.

    A tuned example ends with `if __name__ == "__main__": run_example(CONFIG)`, so that
    `python tuned_examples/x.py --set agent.k=3` and `ray job submit` work. Returns the run's `Result`.
    """
    results: list[Any] = []
    example = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

    @example.command(help=f"Run {config.get('agent', 'the example')} as set in this file.")
    @_plain_errors
    def command(
        env: Annotated[str | None, typer.Option(help="Another registered environment.")] = None,
        policy: Policy = None,
        budget: Budget = None,
        seed: Seed = None,
        max_staleness: Staleness = None,
        run_dir: RunDir = None,
        changes: Changes = None,
    ) -> None:
        named = {"env": env, "policy": policy, "run_dir": run_dir, "budget": budget, "seed": seed}
        results.append(start(config, [*read_changes(changes), *_given(max_staleness=max_staleness, **named)]))

    try:
        example()
    except SystemExit as done:
        if done.code not in (0, None) or not results:
            raise
    return results[0]


def start(base: Mapping[str, Any], changes: Sequence[tuple[str, Any]]) -> Any:
    """Call `rayalign.loop.run` with the settings of `base` and then `changes`; the later of two wins."""
    from rayalign.loop import run as run_loop

    settings = _merged(base, changes)
    if "agent" not in settings:
        raise ConfigError("agent is not set; name a registered agent, e.g. `agent='sea'` in CONFIG.")
    return run_loop(settings.pop("agent"), settings.pop("env", "rayalign/TinyWorld-v0"), **settings)


def load_example(file: str) -> dict[str, Any]:
    """The dict `CONFIG` of a Python file, which is executed for it."""
    if not Path(file).is_file():
        raise ConfigError(f"{file!r} is not a file. Name a tuned example, or an agent (`rayalign agents` lists them).")
    config = runpy.run_path(file, run_name="rayalign_example").get("CONFIG")
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"{file!r} does not define CONFIG, a dict of settings such as dict(agent='sea', budget=2000)."
        )
    return dict(config)


def read_changes(changes: Iterable[str] | None) -> list[tuple[str, str]]:
    """`NAME=VALUE` texts as pairs.

    >>> read_changes(["agent.beta=0.1", "policy=a=b"])
    [('agent.beta', '0.1'), ('policy', 'a=b')]
    """
    pairs = []
    for change in changes or ():
        name, equals, value = change.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {change!r} must be NAME=VALUE, e.g. --set agent.beta=0.1.")
        pairs.append((name.strip(), value))
    return pairs


def _merged(base: Mapping[str, Any], changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Dotted names only, each once: `seed` and `loop.seed` are one setting, and the last word on it wins."""
    settings: dict[str, Any] = {}
    for name, value in [*flatten(base).items(), *changes]:
        settings[SHORT_NAMES.get(name, name)] = value
    return settings


def _given(**options: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in options.items() if value is not None]


# -- lists --------------------------------------------------------------------------------------------------------
@app.command()
@_plain_errors
def agents(name: Annotated[str | None, typer.Argument(help="Show this agent's settings.")] = None) -> None:
    """List the agents, or the settings of one."""
    from rayalign.agents import agent_class, list_agents

    if name is None:
        rows = [(agent, _first_line(_doc(agent_class(agent)))) for agent in list_agents()]
        _print_table(("agent", "what it does"), rows)
        return
    kind = agent_class(name)
    typer.echo(_doc(kind) + "\n")
    _print_settings([s._replace(name=f"agent.{s.name}") for s in describe(kind.Config)])


@app.command()
@_plain_errors
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
    typer.echo("\n\n".join(dict.fromkeys([_doc(world), inspect.cleandoc(world.__doc__ or "")])) + "\n")
    _print_table(("setting", "type", "default"), _keywords(world))


@app.command()
@_plain_errors
def settings(
    section: Annotated[str | None, typer.Argument(help="Only this section, e.g. learner or rollout.")] = None,
) -> None:
    """List all settings with types, defaults and meanings (an agent's own: `rayalign agents NAME`)."""
    from rayalign.run_config import RunConfig

    known = describe(RunConfig)
    shown = [s for s in known if section is None or s.name == section or s.name.startswith(f"{section}.")]
    if not shown:
        sections = {s.name.rpartition(".")[0] for s in known} - {""}
        raise ConfigError(f"{section!r} is not a section. {did_you_mean(str(section), sections)}")
    _print_settings(shown)


def _keywords(world: type) -> list[tuple[str, str, str]]:
    """The keywords of a world's constructor, which are settings `env.<name>`."""
    rows = []
    for parameter in inspect.signature(world, eval_str=True).parameters.values():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            default = "required" if parameter.default is parameter.empty else _value(parameter.default)
            kind = "" if parameter.annotation is parameter.empty else type_name(parameter.annotation)
            rows.append((f"env.{parameter.name}", kind, default))
    return rows


def _doc(kind: type) -> str:
    """The docstring of the file (of an agent: its paper's algorithm box) if there is one, else of the class."""
    module = inspect.getmodule(kind)
    return inspect.cleandoc((module.__doc__ if module else None) or kind.__doc__ or "")


def _first_line(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _print_settings(rows: Iterable[Setting]) -> None:
    _print_table(
        ("setting", "type", "default", "meaning"),
        [(s.name, s.type, "required" if s.default is REQUIRED else _value(s.default), s.help) for s in rows],
    )


def _value(value: Any) -> str:
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


if __name__ == "__main__":
    main()
