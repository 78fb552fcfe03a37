"""Commands that take a store: what it holds, whether it is whole, and what is done to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstore.cli.application import DryRun, Json, Quiet, RedactText, Store, app, draw
from gradstore.errors import StoppedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Full = Annotated[bool, typer.Option("--full", help="Read every byte; without, one listing and the records.")]


@app.command()
def report(
    store: Store,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page to write; STORE/report.html for a directory.")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option("--kernel", help="Which kernel's rankings, where a store has several.")
    ] = None,
    redact_text: RedactText = False,
    as_json: Json = False,
) -> None:
    """Print the tables of a finished run and write its page, one HTML file that needs no network."""
    from gradstore.stages.report import as_values, render_tables
    from gradstore.stages.report import report as stage

    found, page = stage(store, output, kernel, redact=redact_text)
    if as_json:
        typer.echo(json.dumps({**as_values(found), "report": str(page)}))
    else:
        draw(*render_tables(found))
        typer.echo(f"report: {page}")


@app.command()
def status(store: Store, as_json: Json = False) -> None:
    """List what a store holds and how far each part is."""
    from gradstore.stages.status import render_status
    from gradstore.stages.status import status as stage

    found = stage(store)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        draw(render_status(found))


@app.command()
def export(  # noqa: PLR0913 - typer takes a command's options from its parameters
    store: Store,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: .parquet, .npz or .safetensors.")],
    *,
    feature_set: Annotated[str, typer.Option("--set", help="The feature set.")] = "train",
    member: Annotated[str | None, typer.Option("--member", help="Whose features; by default the first's.")] = None,
    groups: Annotated[
        str | None, typer.Option("--groups", metavar="REGEX", help="Groups whose whole name matches; all by default.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option("--rows", metavar="A:B", help="Rows from A up to B; all by default.")
    ] = None,
    ids: Annotated[
        Path | None, typer.Option("--ids", metavar="FILE", help="Example ids, one a line, instead of rows.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write features of some groups and rows to one parquet, npz or safetensors file."""
    from gradstore.stages.export import Selection
    from gradstore.stages.export import export as stage
    from gradstore.stages.progress import Progress

    selection = Selection(feature_set=feature_set, member=member, groups=groups, rows=rows, ids=ids)
    try:
        found = stage(store, output, selection, force=force, progress=Progress(quiet=quiet))
    except KeyboardInterrupt:
        raise StoppedError(f"stopped. {output} was not written.") from None
    if as_json:
        typer.echo(json.dumps(found))
    else:
        size = f"{found['bytes']:,} bytes"
        typer.echo(f"wrote {found['path']}: {found['rows']:,} rows, {found['groups']:,} groups, {size}")


@app.command()
def delete(  # noqa: PLR0913 - typer takes a command's options from its parameters
    store: Store,
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of examples.")] = None,
    *,
    ids_file: Annotated[
        Path | None, typer.Option("--ids", metavar="FILE", help="More ids, one a line.", exists=True, dir_okay=False)
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where", metavar="COLUMN=PATTERN", help="What examples are, such as source=*forum*; all must hold."
        ),
    ] = None,
    feature_set: Annotated[
        list[str] | None, typer.Option("--set", help="The feature set to look in; by default all.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Erase them; without, only say what would be erased.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Erase examples for good: from features, tables and inputs.

    What is made from them is told as stale, and holds numbers of theirs until it is pruned: contributions, scores and sketches.
    """
    from gradstore.lines import read_ids
    from gradstore.stages.delete import Query
    from gradstore.stages.delete import delete as stage
    from gradstore.stages.progress import Progress

    named = read_ids(ids_file, "--ids") if ids_file else ()
    query = Query.parse([*(ids or []), *named], where or [])
    found = stage(store, query, feature_set or [], Progress(quiet=quiet), dry_run=not yes)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, rows in found["erased"].items():
        typer.echo(f"features/{name}: {len(rows):,} examples {'erased' if yes else 'would be erased: add --yes'}")
    for path, places in found["stale"].items():
        typer.echo(f"{path}: stale: {_places(places)}. `gradstore prune {store} --stale` removes it.")


@app.command()
def prune(
    store: Store,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH]...", help="Artifacts of the store, such as scores/block.learned."),
    ] = None,
    stale: Annotated[bool, typer.Option("--stale", help="All whose sets have changed since they were made.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove artifacts (never features): those that are named, or stale. Their stage makes them anew."""
    from gradstore.stages.prune import prune as stage

    found = stage(store, paths or [], stale=stale, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for row in found["removed"]:
        what = f"stale: {_places(row['stale'])}" if row["stale"] else "named"
        typer.echo(f"{row['path']}: {'would be ' if dry_run else ''}removed ({what})")
    if not found["removed"]:
        typer.echo("nothing to remove")


@app.command()
def verify(store: Store, full: Full = False, as_json: Json = False, quiet: Quiet = False) -> None:
    """Check a store against its records: that every object is there, has its size, and, if asked, its bytes."""
    from gradstore.stages.progress import Progress
    from gradstore.stages.verify import refuse_damage, render_verify
    from gradstore.stages.verify import verify as stage

    found = _stoppable(lambda: stage(store, full=full, progress=Progress(quiet=quiet)))
    _tell(found, render_verify, as_json=as_json)
    refuse_damage(found["store"], found["problems"])


@app.command()
def repair(
    store: Store, full: Full = False, dry_run: DryRun = False, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Take back blocks that are broken, so that the next run computes just those, and restore Zarr metadata."""
    from gradstore.stages.progress import Progress
    from gradstore.stages.repair import render_repair
    from gradstore.stages.repair import repair as stage
    from gradstore.stages.verify import refuse_damage

    found = _stoppable(lambda: stage(store, full=full, dry_run=dry_run, progress=Progress(quiet=quiet)))
    _tell(found, render_repair, as_json=as_json)
    refuse_damage(found["store"], found["problems" if dry_run else "left"])


@app.command()
def gc(
    store: Store,
    grace: Annotated[
        str, typer.Option("--grace", metavar="TIME", help="What is younger stays: seconds, or 30m, 24h, 7d.")
    ] = "24h",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove what writers that died left: temporary files, unfinished uploads, objects that no record names."""
    from gradstore.stages.gc import collect_garbage, render_garbage

    found = _stoppable(lambda: collect_garbage(store, grace=grace, dry_run=dry_run))
    _tell(found, render_garbage, as_json=as_json)


@app.command()
def stat(store: Store, as_json: Json = False) -> None:
    """Count bytes, objects, rows and blocks of every part of a store, and say whether it is whole."""
    from gradstore.stages.stat import render_stat
    from gradstore.stages.stat import stat as stage

    found = _stoppable(lambda: stage(store))
    if as_json:
        typer.echo(json.dumps(found))
    else:
        draw(render_stat(found))


def _stoppable(command: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return command()
    except KeyboardInterrupt:
        raise StoppedError("stopped. What was done stays; run the same command again.") from None


def _tell(found: Mapping[str, Any], render: Callable[[Mapping[str, Any]], Sequence[str]], *, as_json: bool) -> None:
    for line in [json.dumps(found)] if as_json else render(found):
        typer.echo(line)


def _places(stale: Mapping[str, Sequence[int]]) -> str:
    """Blocks of sets: ``blocks 8, 9 of train/m0``."""
    return "; ".join(f"blocks {', '.join(map(str, blocks))} of {place}" for place, blocks in stale.items())
