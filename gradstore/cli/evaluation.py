"""Commands that measure what scores are worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstore.cli.application import Json, Quiet, Run, Store, app, draw
from gradstore.cli.runs import Scheduler, run_told

if TYPE_CHECKING:
    from gradstore.cluster import Engine
    from gradstore.spec import RunSpec
    from gradstore.stages.progress import Progress

evaluate = typer.Typer(
    help="Measure what scores are worth, with and without weights, beside the baselines.", no_args_is_help=True
)
app.add_typer(evaluate, name="evaluate")


@evaluate.command()
def lds(
    context: typer.Context, run: Run, scheduler: Scheduler = None, quiet: Quiet = False, as_json: Json = False
) -> None:
    """Retrain on subsets of the train set, and correlate what the models output with what scores predict; see [evaluate.lds]."""
    from gradstore.stages.evaluate import evaluate_lds

    _evaluate(context, run, scheduler, evaluate_lds, quiet=quiet, as_json=as_json)


@evaluate.command()
def mislabel(
    context: typer.Context, run: Run, scheduler: Scheduler = None, quiet: Quiet = False, as_json: Json = False
) -> None:
    """How surely self-influence finds train examples whose label is known to be wrong; see [evaluate.mislabel]."""
    from gradstore.stages.evaluate import evaluate_mislabel

    _evaluate(context, run, scheduler, evaluate_mislabel, quiet=quiet, as_json=as_json)


@evaluate.command("tail-patch")
def tail_patch(
    context: typer.Context, run: Run, scheduler: Scheduler = None, quiet: Quiet = False, as_json: Json = False
) -> None:
    """What one optimizer step on a query's proponents does to its log-probability; see [evaluate.tail_patch]."""
    from gradstore.stages.evaluate import evaluate_tail_patch

    _evaluate(context, run, scheduler, evaluate_tail_patch, quiet=quiet, as_json=as_json)


@evaluate.command()
def recall(
    context: typer.Context, run: Run, scheduler: Scheduler = None, quiet: Quiet = False, as_json: Json = False
) -> None:
    """Recall@k and the reciprocal rank of train examples that are known to have contributed; see [evaluate.recall]."""
    from gradstore.stages.evaluate import evaluate_recall

    _evaluate(context, run, scheduler, evaluate_recall, quiet=quiet, as_json=as_json)


@app.command()
def plots(
    store: Store,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder that pictures are written to.")] = Path(
        "plots"
    ),
) -> None:
    """Draw what a store holds, as PNG files: weights along the model, LDS by group, LDS against k and noise."""
    from gradstore.stages.plots import plots as stage

    for file in stage(store, output):
        typer.echo(str(file))


def _evaluate(
    context: typer.Context,
    run: Path,
    scheduler: str | None,
    measure: Callable[[RunSpec, Engine, Progress], dict[str, Any]],
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure on the workers of a run, and tell it."""
    from gradstore.spec import read_spec

    _tell(run_told(context, read_spec(run), scheduler, quiet, measure), as_json=as_json)


def _tell(found: Mapping[str, Any], *, as_json: bool) -> None:
    from gradstore.stages.evaluate import render_evaluation

    if as_json:
        typer.echo(json.dumps(found))
    else:
        draw(render_evaluation(found))
