"""The command that asks a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from gradstore.cli.application import Json, Quiet, RedactText, Store, app, draw
from gradstore.errors import StoppedError


@app.command()
def query(  # noqa: PLR0913 - typer takes a command's options from its parameters
    store: Store,
    *,
    text: Annotated[str | None, typer.Option("--text", help="A text.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="A prompt, whose --completion is asked about.")] = None,
    completion: Annotated[str | None, typer.Option("--completion", help="What follows --prompt.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="A text file, or .jsonl with one query a line.")
    ] = None,
    index: Annotated[
        str | None, typer.Option("--index", metavar="SET:ROW", help="A stored row, such as eval:12; needs no model.")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option("--kernel", help="Name of the kernel, where a store has several.")
    ] = None,
    weighted: Annotated[
        list[str] | None,
        typer.Option("--weights", help="Names of weights; by default all that were learned under the kernel."),
    ] = None,
    k: Annotated[
        int, typer.Option("--k", help="How many proponents, and how many opponents; above 100 every row is scored.")
    ] = 10,
    by: Annotated[
        Literal["group", "depth", "function"], typer.Option("--by", help="What parts of scores are told of.")
    ] = "group",
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut a query to data.eval.length.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Score every row, though the store has a sketch.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="Where the model is, if not where it was when the store was made.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where the model computes.")
    ] = "auto",
    redact_text: RedactText = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask which train examples would change the model's loss on a query most, and through which layers."""
    from gradstore.stages.progress import Progress
    from gradstore.stages.query import Session
    from gradstore.stages.query.stage import Asked, render_answers
    from gradstore.stages.query.stage import query as stage

    asked = Asked(text=text, prompt=prompt, completion=completion, file=file, index=index)
    try:
        # One reading: nothing of it is worth keeping.
        with Session(
            store, kernel=kernel, weights=weighted or None, memory_bytes=0, model=model, device=device
        ) as session:
            session.progress = Progress(quiet=quiet)
            answers = stage(session, asked, k, truncate=truncate, exact=exact)
    except KeyboardInterrupt:
        raise StoppedError("stopped. The store is as it was.") from None
    if redact_text:
        answers = [answer.redacted() for answer in answers]
    if as_json:
        typer.echo(json.dumps({"store": store, "answers": [answer.to_json() for answer in answers]}))
    else:
        draw(*render_answers(answers, by))
