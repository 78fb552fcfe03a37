"""The command line: parse, call one stage, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradstore.errors import GradstoreError, StoppedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradstore.cluster import Engine
    from gradstore.spec import RunSpec
    from gradstore.stages.progress import Progress

    Stage = Callable[[RunSpec, Engine, Progress], None]

app = typer.Typer(
    help="Training-data attribution from an out-of-core store of per-example gradient features.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Run = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run's file; `gradstore init` writes one.")]
Store = Annotated[str, typer.Argument(metavar="STORE", help="A directory or s3://bucket/prefix.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for a program to read.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]


def main() -> None:
    """Run the command line; gradstore's own errors become one message and an exit code, never a traceback."""
    try:
        app()
    except GradstoreError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


def _version(show: bool) -> None:
    if show:
        from gradstore import __version__

        typer.echo(f"gradstore {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Training-data attribution from an out-of-core store of per-example gradient features."""


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="[RUN.toml]", help="Where to write it.")] = Path("run.toml"),
) -> None:
    """Write a commented run.toml to start from."""
    from gradstore.stages.init import init as stage

    stage(path)
    typer.echo(f"wrote {path}; edit it, then: gradstore plan {path}")


@app.command()
def plan(run: Run, as_json: Json = False) -> None:
    """Show what a run will write, in how many blocks and objects, with how much memory; refuse what does not fit."""
    from gradstore.plan import make_plan
    from gradstore.plan.table import render_plan
    from gradstore.spec import read_spec

    made = make_plan(read_spec(run))
    if as_json:
        typer.echo(json.dumps(made.to_json()))
    else:
        _print(render_plan(made))


@app.command()
def doctor(
    run: Run,
    examples: Annotated[int, typer.Option("--examples", min=2, help="How many examples to look through.")] = 8,
    as_json: Json = False,
) -> None:
    """Check a run on a few examples: gradients against autograd, batches, coverage, speed, memory; and forecast it."""
    from gradstore.spec import read_spec
    from gradstore.stages.doctor import doctor as stage
    from gradstore.stages.doctor import render_diagnosis

    found = stage(read_spec(run), examples)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        _print(render_diagnosis(found))
    found.refuse_failed()


@app.command()
def featurize(run: Run, quiet: Quiet = False) -> None:
    """Stream the gradient features of every split into the store."""
    from gradstore.stages.featurize import featurize as stage

    _run_stages(run, quiet, stage)


@app.command()
def kernel(run: Run, quiet: Quiet = False) -> None:
    """Build the kernel's spectra from the train features."""
    from gradstore.stages.kernel import build_kernel as stage

    _run_stages(run, quiet, stage)


@app.command()
def contribute(run: Run, quiet: Quiet = False) -> None:
    """Build the contribution tensor C[q, n, j] of the learn and eval queries."""
    from gradstore.stages.contribute import contribute as stage

    _run_stages(run, quiet, stage)


@app.command()
def learn(run: Run, quiet: Quiet = False) -> None:
    """Learn one weight per parameter group from the contributions of the learn queries."""
    from gradstore.stages.learn import learn as stage

    _run_stages(run, quiet, stage)


@app.command()
def score(run: Run, quiet: Quiet = False) -> None:
    """Rank the training examples of every eval query, with and without weights, beside the baselines."""
    from gradstore.stages.score import score as stage

    _run_stages(run, quiet, stage)


@app.command()
def report(
    store: Store,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page to write; STORE/report.html for a directory.")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option("--kernel", help="Which kernel's rankings, where a store has several.")
    ] = None,
) -> None:
    """Print the tables of a finished run and write its page, one HTML file that needs no network."""
    from gradstore.stages.report import report as stage

    tables, page = stage(store, output, kernel)
    _print(*tables)
    typer.echo(f"report: {page}")


@app.command("run")
def run_all(run: Run, quiet: Quiet = False) -> None:
    """Do the whole path, featurize to report; what is already done is kept."""
    from gradstore.stages.report import report as page_stage
    from gradstore.stages.run import STAGES

    spec = _run_stages(run, quiet, *STAGES)
    tables, page = page_stage(spec.run.store, None, spec.kernel.name)
    _print(*tables)
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
        _print(render_status(found))


def _run_stages(path: Path, quiet: bool, *stages: Stage) -> RunSpec:
    """Run stages one after the other on one cluster."""
    from gradstore.cluster import Engine
    from gradstore.spec import read_spec
    from gradstore.stages.progress import Progress

    spec = read_spec(path)
    progress = Progress(quiet=quiet)
    try:
        with Engine(spec.cluster, progress.note) as engine:
            for stage in stages:
                stage(spec, engine, progress)
    except KeyboardInterrupt:
        raise StoppedError("stopped. What was committed stays; the same command goes on from there.") from None
    return spec


def _print(*renderables: object) -> None:
    from rich.console import Console

    console = Console()
    for renderable in renderables:
        console.print(renderable)
