"""Commands for who runs a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gradstore.cli.application import Json, app


@app.command()
def certificates(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write them.")],
    *,
    host: Annotated[
        list[str] | None, typer.Option("--host", help="A name or address of the scheduler; may be repeated.")
    ] = None,
    days: Annotated[int, typer.Option("--days", help="How long they are valid.")] = 30,
    at: Annotated[
        Path | None, typer.Option("--at", metavar="PATH", help="Where machines find them, if not in DIR.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace those that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Make the keys and certificates by which scheduler, workers and clients know each other, and Dask's settings of them."""
    from gradstore.stages.certificates import certificates as stage

    found = stage(folder, host or [], days=days, installed_at=at, force=force)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(f"wrote {', '.join(found['files'])} to {folder}; valid until {found['expires']}")
    typer.echo(f"start scheduler, workers and commands with DASK_CONFIG={found['settings']}")
