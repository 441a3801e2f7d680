"""What comes after a run: `replay`."""

from __future__ import annotations

from typing import Annotated

import typer

from rayalign.cli.app import Changes, Policy, RunDir, Seed, app, plain_errors
from rayalign.cli.runs import read_changes


@app.command()
@plain_errors
def replay(
    source: Annotated[str, typer.Argument(metavar="LEDGER|RUN_DIR", help="A run, or the file of a ledger.")],
    agent: Annotated[str | None, typer.Option(help="Who learns from it. Default: the run's own agent.")] = None,
    env: Annotated[str | None, typer.Option(help="Where to evaluate, for a ledger without its run.")] = None,
    policy: Policy = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the labels (loop.epochs).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Duels per batch. Default: the ledger's own batches.")] = None,
    synthetic: Annotated[bool, typer.Option(help="Train on the agent's own labels, too.")] = True,
    oracle: Annotated[
        str | None, typer.Option(help="Who judges held-out answers: a kind of oracle, or module:function.")
    ] = None,
    seed: Seed = None,
    run_dir: RunDir = None,
    changes: Changes = None,
) -> None:
    """Train an agent offline on the labels of a run. None is bought; evaluation needs an --oracle."""
    from rayalign.replay_run import replay as start

    start(
        source,
        agent,
        env=env,
        policy=policy,
        epochs=epochs,
        batch_size=batch_size,
        synthetic=synthetic,
        oracle=oracle,
        seed=seed,
        run_dir=run_dir,
        **dict(read_changes(changes)),
    )
