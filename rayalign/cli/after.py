"""What comes after a run: `replay`, `export`, `serve` and `evaluate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rayalign.cli.app import Changes, Policy, Seed, app, plain_errors, wait_until_stopped
from rayalign.cli.runs import read_changes
from rayalign.errors import ConfigError


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
    run_dir: Annotated[
        str | None, typer.Option(help="Where the replay is kept, a local folder. Default: a new folder under runs/.")
    ] = None,
    changes: Changes = None,
) -> None:
    """Train an agent offline on the labels of a run. None is bought; evaluation needs an --oracle."""
    from rayalign.after.replay import replay as start

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
    from rayalign.after.export import export as write

    written = write(run_dir, out, adapter=adapter, base_model=base_model, conversational=conversational)
    typer.echo(str(written))


@app.command()
@plain_errors
def serve(
    what: Annotated[str, typer.Argument(metavar="RUN_DIR|MODEL", help="A finished run, or a model.")],
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port to listen on.")] = 8000,
    model: Annotated[str | None, typer.Option(help="Name that requests name. Default: the run's directory.")] = None,
    best_of: Annotated[int, typer.Option(help="Samples of which the run's agent picks each answer; 0: off.")] = 0,
    replicas: Annotated[int, typer.Option(help="Engines that work at the same time.")] = 1,
    token_file: Annotated[
        str | None, typer.Option(help="File with the token that callers need. Default: $RAYALIGN_SERVE_TOKEN.")
    ] = None,
    changes: Changes = None,
) -> None:
    """Serve the policy behind an OpenAI-compatible endpoint until Ctrl-C or SIGTERM."""
    from rayalign.after.serving import serve_policy

    settings = dict(read_changes(changes))
    with serve_policy(
        what,
        host=host,
        port=port,
        model=model,
        best_of=best_of,
        replicas=replicas,
        token_file=token_file,
        **settings,
    ) as server:
        token = " with your token as api_key" if server.needs_token else ""
        typer.echo(f"serving model {server.model!r} at {server.url}{token}; Ctrl-C ends it")
        wait_until_stopped()


@app.command()
@plain_errors
def evaluate(
    what: Annotated[str, typer.Argument(metavar="RUN_DIR|MODEL", help="A finished run, or a model.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="Answers; with --harness the directory of results.")],
    format: Annotated[str | None, typer.Option(help="alpaca_eval or mt_bench.")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="The questions, in that format.")] = None,
    harness: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Run these tasks of lm-eval instead, if it is installed.")
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="Your own tasks for the harness: a directory of its YAML files.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per task of the harness. Default: all.")] = None,
    best_of: Annotated[int, typer.Option(help="Samples of which the run's agent picks each answer; 0: off.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(help="Of all answers. Default: as the format's authors do.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model in the file. Default: the run's directory.")] = None,
    seed: Seed = None,
    changes: Changes = None,
) -> None:
    """Write answers for AlpacaEval or MT-Bench, or run the lm-eval harness."""
    settings = dict(read_changes(changes))
    if (harness is None) == (format is None):
        raise ConfigError("name one of --format (alpaca_eval, mt_bench; with --prompts) and --harness TASKS.")
    if harness is None:
        ignored: dict[str, Any] = {"--limit": limit, "--include-path": include_path}
    else:
        ignored = {"--best-of": best_of or None, "--temperature": temperature, "--name": name}
        ignored |= {"--seed": seed, "--prompts": prompts}
    if unused := [option for option, value in ignored.items() if value is not None]:
        raise ConfigError(
            f"{', '.join(unused)} means nothing with {'--harness' if harness else '--format'}; leave it out."
        )
    if harness is not None:
        from rayalign.after.harness import run_harness

        typer.echo(str(run_harness(what, harness, out, include_path=include_path, limit=limit, **settings)))
        return
    if prompts is None or format is None:
        raise ConfigError("--format needs --prompts, the file with its questions.")
    from rayalign.after.answers import write_answers

    written = write_answers(
        what,
        prompts,
        out,
        format=format,
        best_of=best_of,
        temperature=temperature,
        name=name,
        seed=seed or 0,
        **settings,
    )
    typer.echo(str(written))
