"""`oracle`: who judges, served to other programs and to runs elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from rayalign.cli.app import Changes, app, plain_errors, wait_until_stopped
from rayalign.cli.runs import read_changes


@app.command()
@plain_errors
def oracle(
    what: Annotated[
        str, typer.Argument(metavar="KIND|MODULE:FUNCTION", help="A kind of oracle, or a function of yours by name.")
    ],
    target: Annotated[str | None, typer.Option(help="Which one: a model, a function (oracle.target).")] = None,
    env: Annotated[str | None, typer.Option(help="For the kind world: whose hidden reward judges.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port to listen on.")] = 8710,
    folder: Annotated[str, typer.Option(metavar="DIR", help="Where paid answers are kept.")] = "oracle-answers",
    token_file: Annotated[
        str | None, typer.Option(help="File with the token that callers need. Default: $RAYALIGN_ORACLE_TOKEN.")
    ] = None,
    changes: Changes = None,
) -> None:
    """Serve an oracle over HTTP until Ctrl-C or SIGTERM: to programs, and to runs with oracle.kind=http."""
    from rayalign.after.serving import serve_oracle

    with serve_oracle(
        what,
        target=target,
        env=env,
        host=host,
        port=port,
        folder=folder,
        token_file=token_file,
        **dict(read_changes(changes)),
    ) as server:
        token = ", for who shows the token" if server.needs_token else ""
        typer.echo(
            f"serving oracle {server.oracle} at {server.url}/v1/verdicts{token}; schema: {server.url}/openapi.json; "
            f"paid answers: {server.folder}; Ctrl-C ends it"
        )
        if server.notice:
            typer.echo(server.notice)
        wait_until_stopped()
