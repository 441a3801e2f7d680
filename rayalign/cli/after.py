"""What comes after a run: `replay` and `export`."""

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


@app.command()
@plain_errors
def export(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="Directory of a finished run.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="A new or empty directory.")],
    adapter: Annotated[bool, typer.Option("--adapter", help="The LoRA adapter alone, not merged.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hugging Face id of the initial policy. Default: what its directory says.")
    ] = None,
    conversational: Annotated[
        bool | None, typer.Option(help="Preferences as chat messages. Default: where the policy has a chat template.")
    ] = None,
) -> None:
    """Write the policy, its preferences and a model card as Hugging Face directories."""
    from rayalign.export_run import export as write

    written = write(run_dir, out, adapter=adapter, base_model=base_model, conversational=conversational)
    typer.echo(str(written))
