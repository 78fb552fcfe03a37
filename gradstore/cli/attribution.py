"""Commands that show what attribution found in a store: weights, and what train rows do; and that choose rows by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from gradstore.cli.application import Json, Store, app, draw

Kernel = Annotated[
    str | None, typer.Option("--kernel", help="Name of the kernel, where a store has contributions of several.")
]
Weights = Annotated[str | None, typer.Option("--weights", help="Name of the weights; none by default.")]
Query = Annotated[
    str | None, typer.Option("--query", metavar="ID", help="One eval query, by its id, instead of all of them.")
]
OnItself = Annotated[
    bool, typer.Option("--self", help="What every train row does to itself (self-influence), instead of to queries.")
]


@app.command()
def weights(  # noqa: PLR0913 - typer takes a command's options from its parameters
    store: Store,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Which weights; all by default.")
    ] = None,
    *,
    by: Annotated[
        Literal["group", "depth", "function"],
        typer.Option("--by", help="What is one row: sums over its groups. A picture shows all three."),
    ] = "group",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file to write: .parquet or .json, .svg or .html.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    candidates: Annotated[
        bool, typer.Option("--candidates", help="Show also what they were chosen from, by queries that were held out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show or draw learned weights by group, or summed along the depth or by function, and how alike several are."""
    from gradstore.stages.show_weights import render_candidates, render_weights, show_weights, write_weights

    if output is None:
        found = show_weights(store, names or [], by)
    else:
        found = write_weights(store, names or [], by, output, force=force)
    if as_json:
        typer.echo(json.dumps(found))
    elif output is None:
        draw(*render_weights(found), *(render_candidates(found) if candidates else []))
    else:
        typer.echo(f"{output}: weights {', '.join(item['name'] for item in found['weights'])}")


@app.command()
def transfer(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The store that they were learned on.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the weights there.")],
    store: Store,
    new_name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Their name in STORE; the same by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Give a store the weights that were learned on another one, if it has the same groups; see score.weights."""
    from gradstore.stages.transfer import transfer as stage

    found = stage(source, name, store, new_name or name)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        typer.echo(f"{found['to']}: weights of {found['groups']:,} groups from {found['from']}")


@app.command()
def influence(  # noqa: PLR0913 - typer takes a command's options from its parameters
    store: Store,
    *,
    by: Annotated[Literal["label", "source"], typer.Option("--by", help="Whose train rows are summed.")] = "label",
    pool: Annotated[
        Literal["sum", "attention"], typer.Option("--pool", help="How rows are put together: attention as AirRep does.")
    ] = "sum",
    sharpness: Annotated[
        float, typer.Option("--sharpness", metavar="T", help="By attention: what scores are multiplied by before it.")
    ] = 1.0,
    examples: Annotated[
        Path | None,
        typer.Option("--examples", metavar="FILE", help="Instead of labels and sources one set: ids, one a line."),
    ] = None,
    kernel: Kernel = None,
    weighted: Weights = None,
    query: Query = None,
    on_itself: OnItself = False,
    as_json: Json = False,
) -> None:
    """Sum the scores of all eval queries, or of one, or self-influence, over the train rows of every label or source."""
    from gradstore.stages.influence import Asked, render_influence
    from gradstore.stages.influence import influence as stage

    asked = Asked(kernel=kernel, weights=weighted, query=query, on_itself=on_itself)
    found = stage(store, asked, by, pool=pool, sharpness=sharpness, examples=examples)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        draw(render_influence(found))


@app.command()
def select(  # noqa: PLR0913 - typer takes a command's options from its parameters
    store: Store,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file to write: ids, one a line; .jsonl with rows and influence.")
    ],
    *,
    top: Annotated[str, typer.Option("--top", help="How many train examples: a number, or a share such as 5%.")],
    kernel: Kernel = None,
    weighted: Weights = None,
    query: Query = None,
    on_itself: OnItself = False,
    lowest: Annotated[bool, typer.Option("--lowest", help="Those of the lowest influence instead.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Choose the train examples whose scores, summed over all eval queries, or whose self-influence are the largest."""
    from gradstore.stages.influence import Asked
    from gradstore.stages.influence import select as stage

    asked = Asked(kernel=kernel, weights=weighted, query=query, on_itself=on_itself)
    found = stage(store, output, top, asked, lowest=lowest, force=force)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        typer.echo(f"{found['output']}: {found['examples']:,} of {found['of']:,} train examples")
