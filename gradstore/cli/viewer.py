"""The command that shows a store in a browser."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from gradstore.cli.application import Quiet, RedactText, Store, app


@app.command()
def serve(
    store: Store,
    *,
    host: Annotated[
        str, typer.Option("--host", help="The address to listen on; any but the loopback asks for a token.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0 takes a free one.")] = 8321,
    redact_text: RedactText = False,
    quiet: Quiet = False,
) -> None:
    """Show a store in a browser, until Ctrl-C: parts, queries, weights, evaluations, jobs and health. It only reads."""
    from gradstore.stages.serve import TOKEN, Serving
    from gradstore.stages.serve import serve as stage

    def told(address: str) -> None:
        typer.echo(address)
        if not quiet:
            typer.echo("Ctrl-C ends it.", err=True)

    stage(Serving.of(store, host, port, os.environ.get(TOKEN) or None), told, redact=redact_text)
