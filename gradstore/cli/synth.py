"""The command that makes a synthetic run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradstore.cli.application import Quiet, app
from gradstore.cli.runs import Scheduler, run_stages


def _count(name: str, text: str) -> typer.models.OptionInfo:
    """An option that is a count of at least one."""
    option: typer.models.OptionInfo = typer.Option(name, min=1, help=text)
    return option


@app.command()
def synth(  # noqa: PLR0913 - typer takes a command's options from its parameters
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where run.toml and planted.json are written.")],
    *,
    rows: Annotated[int, _count("--rows", "Rows of the train set.")] = 100_000,
    groups: Annotated[int, _count("--groups", "Parameter groups.")] = 224,
    features: Annotated[int, _count("--features", "Features of every group: a product, such as 128 = 8 x 16.")] = 128,
    queries: Annotated[int, _count("--queries", "Eval queries.")] = 100,
    learn_queries: Annotated[
        int | None, _count("--learn-queries", "Queries that weights are learned from; as many as --queries.")
    ] = None,
    topics: Annotated[int, _count("--topics", "Topics, which are the labels.")] = 64,
    contributors: Annotated[
        int, typer.Option("--contributors", min=0, help="Train rows that contribute to each query.")
    ] = 5,
    noisy: Annotated[float, typer.Option("--noisy", help="Share of the groups that hold nothing but noise.")] = 0.5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="What everything is drawn from.")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="float16, float32, bfloat16 or int8.")] = "float16",
    block_rows: Annotated[int | None, _count("--block-rows", "Rows of a block; by default the plan's.")] = None,
    kernel: Annotated[str, typer.Option("--kernel", help="The kernel that run.toml names.")] = "block",
    store: Annotated[
        str | None, typer.Option("--store", help="A directory or s3://bucket/prefix; by default FOLDER/store.")
    ] = None,
    workers: Annotated[int | None, _count("--workers", "Worker processes; by default one per core.")] = None,
    memory: Annotated[
        str, typer.Option("--memory-per-worker", metavar="SIZE", help="Such as 2.5GB; by default this machine's share.")
    ] = "auto",
    scheduler: Scheduler = None,
    quiet: Quiet = False,
) -> None:
    """Make a run with planted structure and its features, without a model: for scale tests and to size a cluster."""
    from gradstore.stages.featurize import featurize
    from gradstore.stages.synth import SynthSettings, make_folder

    settings = SynthSettings(
        folder=folder,
        store=store,
        rows=rows,
        queries=queries,
        learn_queries=learn_queries,
        groups=groups,
        features=features,
        topics=topics,
        contributors=contributors,
        noisy=noisy,
        seed=seed,
        dtype=dtype,
        block_rows=block_rows,
        kernel=kernel,
        workers=workers,
        memory_per_worker=memory,
    )
    run_stages(context, make_folder(settings), scheduler, quiet, featurize)
    typer.echo(f"wrote {folder / 'run.toml'}; next: gradstore kernel {folder / 'run.toml'}")
