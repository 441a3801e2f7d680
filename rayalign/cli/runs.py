"""`run`, `resume` and `report`, and what a tuned example ends with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from rayalign.cli.app import Budget, Changes, Policy, RunDir, Seed, Staleness, app, plain_errors
from rayalign.errors import ConfigError
from rayalign.example import load_example, merged
from rayalign.runs.recipe import Recipe, describe_choices, settings_of, split_choices


@app.command()
@plain_errors
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
    choices, others = split_choices(read_changes(changes))
    base = load_example(what, choices) if what.endswith(".py") else settings_of({"agent": what}, choices)
    start(base, [*others, *_given(max_staleness=max_staleness, **named)])


@app.command()
@plain_errors
def resume(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="Directory of the run, or s3://bucket/folder.")],
    budget: Annotated[int | None, typer.Option(help="A larger budget, to go on with a finished run.")] = None,
    changes: Changes = None,
) -> None:
    """Go on with an interrupted run, or with a finished one that gets a larger budget."""
    from rayalign.loop.loop import resume as resume_run

    resume_run(run_dir, **merged({}, [*read_changes(changes), *_given(budget=budget)]))


@app.command()
@plain_errors
def report(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN_DIR...", help="One run, or several to compare.")],
    out: Annotated[str | None, typer.Option(help="Where to write the page. Default: beside the runs.")] = None,
) -> None:
    """Write plots and one self-contained HTML page about a run, or a comparison of several."""
    from rayalign import storage
    from rayalign.report.report import write_report

    page = str(write_report(run_dirs, out))
    typer.echo(storage.join(run_dirs[0], "report.html") if out is None and storage.in_bucket(run_dirs[0]) else page)


def run_example(config: Mapping[str, Any] | Recipe) -> Any:
    """Run a tuned example's `CONFIG`, a dict or a recipe, with what `sys.argv` adds, as `rayalign run` does.

    A tuned example ends with `if __name__ == "__main__": run_example(CONFIG)`, so that
    `python tuned_examples/x.py --set agent.k=3` and `ray job submit` work. Returns the run's `Result`.
    """
    results: list[Any] = []
    example = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

    about = f"Run {settings_of(config).get('agent', 'the example')} as set in this file. {describe_choices(config)}"

    @example.command(help=about.strip())
    @plain_errors
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
        choices, others = split_choices(read_changes(changes))
        base = settings_of(config, choices)
        results.append(start(base, [*others, *_given(max_staleness=max_staleness, **named)]))

    try:
        example()
    except SystemExit as done:
        if done.code not in (0, None) or not results:
            raise
    return results[0]


def start(base: Mapping[str, Any], changes: Sequence[tuple[str, Any]]) -> Any:
    """Call `rayalign.loop.loop.run` with the settings of `base` and then `changes`; the later of two wins."""
    from rayalign.loop.loop import run as run_loop

    settings = merged(base, changes)
    if "agent" not in settings:
        raise ConfigError("agent is not set; name a registered agent, e.g. `agent='sea'` in CONFIG.")
    return run_loop(settings.pop("agent"), settings.pop("env", "rayalign/TinyWorld-v0"), **settings)


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


def _given(**options: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in options.items() if value is not None]
