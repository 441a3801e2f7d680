"""The application that commands are added to, what they share, and how mistakes are told."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from rayalign.errors import RayalignError

app = typer.Typer(
    name="rayalign",
    help="The most aligned language model out of a fixed number of preference labels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Change a setting; repeat for more. `rayalign settings` lists them."
    ),
]
RunDir = Annotated[
    str | None,
    typer.Option(help="Where the run is kept: a folder, or s3://bucket/folder. Default: a new folder under runs/."),
]
Policy = Annotated[
    str | None, typer.Option(help="Initial policy: Hugging Face directory or id. Default: the world's own.")
]
Budget = Annotated[int | None, typer.Option(help="Labels to buy (loop.budget).")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random (loop.seed).")]
Staleness = Annotated[
    int | None, typer.Option(help="Batches generation may run ahead of learning (loop.max_staleness).")
]


def plain_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """A mistake in the input is told without a traceback, exit code 2; so is an interrupt, 130."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except RayalignError as error:
            Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), str(error)))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("interrupted", style="yellow")
            raise typer.Exit(130) from None

    return guarded


def wait_until_stopped() -> None:
    """Return at Ctrl-C or SIGTERM. Call it when Ray runs: its own handler of SIGTERM would abort the process.

    Ctrl-C stops it whatever handler a library has left (Ray Tune leaves one that swallows the first), unless the
    process was started to ignore it. A second one interrupts the end.
    """
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    heeded = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    if heeded:
        signal.signal(signal.SIGINT, lambda *_: over.set())
    over.wait()
    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
