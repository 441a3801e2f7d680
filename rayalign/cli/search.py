"""`compare` and `estimate`: what comes before single runs, and many of them."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayalign.cli.app import Budget, Changes, Policy, app, plain_errors
from rayalign.cli.runs import read_changes
from rayalign.errors import ConfigError
from rayalign.example import load_example, merged
from rayalign.runs.recipe import settings_of, split_choices

if TYPE_CHECKING:
    from rayalign.studies.many import Board, Job

EVERY_S = 60.0
"""Seconds between two lines about runs that go on."""


@app.command()
@plain_errors
def compare(
    agents: Annotated[
        str,
        typer.Option(
            metavar="ROW,ROW,...",
            help="Agents, tuned examples (sea=FILE.py), agents with settings (sea:agent.beta=0.2,agent.loss=ipo).",
        ),
    ],
    env: Annotated[str | None, typer.Option(help="Registered environment; default: the examples' own.")] = None,
    seeds: Annotated[str, typer.Option(help="How many, or which: 5, or 10-14, or 3,5,8.")] = "5",
    budget: Budget = None,
    baseline: Annotated[
        str | None, typer.Option(help="The row that others are compared with. Default: the first.")
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="Win rate at which labels are compared. Default: the highest that the baseline mostly reached."
        ),
    ] = None,
    world_per_seed: Annotated[bool, typer.Option(help="Each seed is another world, too (env.seed).")] = False,
    policy: Policy = None,
    parallel: Annotated[int | None, typer.Option(help="Runs at the same time. Default: as many as fit.")] = None,
    out: Annotated[
        str | None, typer.Option(help="Directory. What is finished in it is kept, the rest resumed.")
    ] = None,
    changes: Changes = None,
) -> None:
    """Compare agents fairly: how many labels each needs, against a baseline, with intervals and one sentence."""
    from rayalign.studies.comparison import compare as run_comparison

    board = Lines()
    done = run_comparison(
        [agents],
        env,
        seeds=read_seeds(seeds),
        budget=budget,
        baseline=baseline,
        target=target,
        world_per_seed=world_per_seed,
        policy=policy,
        parallel=parallel,
        out=out,
        announce=board.say,
        show=board,
        **merged({}, read_changes(changes)),
    )
    head, lines = done.table()
    show_table(head, lines)
    for sentence in done.sentences:
        typer.echo(sentence)
    typer.echo(str(done.path / "comparison.html"))
    if done.failed:
        raise typer.Exit(1)


@app.command()
@plain_errors
def estimate(
    what: Annotated[str, typer.Argument(metavar="FILE.py|AGENT", help="A tuned example, or a registered agent.")],
    env: Annotated[str | None, typer.Option(help="Registered environment; `rayalign envs` lists them.")] = None,
    policy: Policy = None,
    budget: Budget = None,
    calibrate: Annotated[bool, typer.Option(help="Run a few batches here for the time; buys nothing.")] = False,
    changes: Changes = None,
) -> None:
    """Say what a run will cost before it is started: labels, money, tokens, memory per role and per GPU, time."""
    from rayalign.estimate.estimate import estimate as work_out
    from rayalign.estimate.rows import rows_of
    from rayalign.loop import preparation

    choices, others = split_choices(read_changes(changes))
    base = load_example(what, choices) if what.endswith(".py") else settings_of({"agent": what}, choices)
    named = {"env": env, "policy": policy, "budget": budget}
    settings = merged(base, [*others, *((k, v) for k, v in named.items() if v is not None)])
    agent, world = settings.pop("agent"), settings.pop("env", "rayalign/TinyWorld-v0")
    plan = preparation.prepare(
        agent,
        world,
        settings.pop("policy", None),
        settings.pop("run_dir", None),
        settings.pop("oracle", None),
        settings,
        weights=False,
    )
    preparation.validate(plan)
    found = work_out(plan, with_calibration=calibrate)
    show_table(["what", "how much", "how it is known"], [list(row) for row in rows_of(found, plan.config)])


def read_seeds(text: str) -> int | list[int]:
    """`5` -> 5; `10-12` and `10,11,12` -> [10, 11, 12].

    >>> read_seeds("5"), read_seeds("10-12,20")
    (5, [10, 11, 12, 20])
    """
    if re.fullmatch(r"\d+", text):
        return int(text)
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not found:
            raise ConfigError(f"--seeds {text!r} must be a number of seeds, or which: 10-14, or 3,5,8.")
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    return seeds


def show_table(head: list[str], lines: list[list[str]]) -> None:
    """A table on the terminal; a pipe gets whole lines."""
    console = Console()
    table = Table(header_style="bold")
    for name in head:
        table.add_column(name, overflow="fold")
    for cells in lines:
        table.add_row(*map(Text, cells))
    (console if console.is_terminal else Console(width=240)).print(table)


class Lines:
    """Says when runs start and end, and once a minute how far they are."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._told = time.monotonic()
        self._jobs: dict[Any, Any] = {}

    def __call__(self, board: Board, job: Job, event: str) -> None:
        """See `rayalign.studies.many.run_many`."""
        self._jobs[job.folder] = job
        where = f"[{board.done}/{board.total}]"
        if event == "start":
            self.say(f"{where} {job.folder.name}: {'goes on' if job.labels else 'starts'}")
        elif event == "done":
            self.say(f"{where} {job.folder.name}: done, {job.labels} labels")
        elif event == "failed":
            self.say(f"{where} {job.folder.name}: FAILED: {board.failed[job.folder]}")
        elif time.monotonic() - self._told >= EVERY_S:
            self._told = time.monotonic()
            now = [f"{folder.name} {self._jobs[folder].labels}" for folder in list(board.running)]
            self.say(f"{where} labels so far: {', '.join(now)}")

    def say(self, line: str) -> None:
        """One line, on standard error."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
