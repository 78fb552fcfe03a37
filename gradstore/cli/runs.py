"""Commands that take a run.toml: from its plan to its report."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstore.cli.application import Json, Quiet, Run, app, draw
from gradstore.cli.telling import telling
from gradstore.errors import StoppedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradstore.cluster import Engine
    from gradstore.spec import RunSpec
    from gradstore.stages.progress import Progress

    Stage = Callable[[RunSpec, Engine, Progress], None]

Append = Annotated[
    bool, typer.Option("--append", help="Append to a set the examples that its data has beyond the stored ones.")
]


Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS",
        help="Run on the workers of this Dask scheduler, tls://HOST:PORT or on this machine tcp://, instead of [cluster].",
    ),
]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="[RUN.toml]", help="Where to write it.")] = Path("run.toml"),
) -> None:
    """Write a commented run.toml to start from."""
    from gradstore.stages.init import init as stage

    stage(path)
    typer.echo(f"wrote {path}; edit it, then: gradstore plan {path}")


@app.command()
def plan(
    run: Run,
    *,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Also hours and cost on so many workers, with what is assumed.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="KIND", help="What each has: H200, H100, A100, L40S or L4.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="Rows a second that one featurizes, as doctor measures it.")
    ] = None,
    price: Annotated[float | None, typer.Option("--price", help="Dollars for one and hour.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a run will write, in how many blocks and objects, with how much memory; refuse what does not fit."""
    from gradstore.plan import make_plan
    from gradstore.plan.cost import cluster_of, estimate, offer_of, render_cost
    from gradstore.plan.table import render_plan
    from gradstore.spec import read_spec

    spec, offer = read_spec(run), offer_of(workers, gpu, rate, price)
    if offer is not None:
        spec = spec.model_copy(update={"cluster": cluster_of(spec, offer)})
    made = make_plan(spec)
    cost = None if offer is None else estimate(spec, made, offer)
    if as_json:
        typer.echo(json.dumps({**made.to_json(), **({} if cost is None else {"cost": cost.to_json()})}))
    else:
        draw(render_plan(made), *([] if cost is None else [render_cost(cost)]))


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
        draw(render_diagnosis(found))
    found.refuse_failed()


@app.command()
def train(
    context: typer.Context,
    run: Run,
    *,
    force: Annotated[bool, typer.Option("--force", help="Train anew what was trained otherwise.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train the model of a run on its train examples, as [training] says, and write it where [model] looks for it."""
    from gradstore.spec import read_spec
    from gradstore.stages.train import train_model

    spec = read_spec(run)
    try:
        with telling(context, spec.run.name, quiet=quiet) as progress:
            found = train_model(spec, progress, force=force)
    except KeyboardInterrupt:
        raise StoppedError("stopped. Models that were trained stay; the same command goes on from there.") from None
    if as_json:
        typer.echo(json.dumps({"models": found}))
        return
    for model in found:
        done = "is there" if model["kept"] else f"trained on {model['examples']:,} examples in {model['seconds']:.1f} s"
        if "output" in model:
            told = "mean output: " + ", ".join(f"{name} {value:.4g}" for name, value in model["output"].items())
        else:
            gain, low, high = (100 * model["gain"][key] for key in ("mean", "low", "high"))
            told = (
                f"ranks {model['accuracy']:.1%} of pairs of subsets that were held out, {model['accuracy_before']:.1%} before: "
                f"{gain:+.1f} points, [{low:+.1f}, {high:+.1f}] with 95 % confidence"
            )
            if low <= 0:
                told += "; what is held out tells no gain: give more subsets, learn queries or layers, or take the encoder as it was"
        typer.echo(f"{model['model']}: {done}; {told}")


@app.command()
def signal(
    context: typer.Context, run: Run, scheduler: Scheduler = None, quiet: Quiet = False, as_json: Json = False
) -> None:
    """Train the model on small subsets of its train examples, from which an encoder learns attribution; see [signal]."""
    from gradstore.spec import read_spec
    from gradstore.stages.retraining import make_signal

    told = run_told(context, read_spec(run), scheduler, quiet, make_signal)
    if as_json:
        typer.echo(json.dumps(told))
        return
    typer.echo(
        f"{told['store']}/retrained/{told['signal']}: models of {told['subsets']:,} subsets of {told['examples']:,} examples, with what "
        f"they output for {told['queries']:,} learn queries"
    )


@app.command()
def featurize(
    context: typer.Context, run: Run, append: Append = False, scheduler: Scheduler = None, quiet: Quiet = False
) -> None:
    """Stream the gradient features of every split into the store."""
    from gradstore.stages.featurize import featurize as stage

    _run_stages(context, run, scheduler, quiet, partial(stage, append=append))


@app.command()
def kernel(context: typer.Context, run: Run, scheduler: Scheduler = None, quiet: Quiet = False) -> None:
    """Build the kernel's spectra from the train features."""
    from gradstore.stages.kernel import build_kernel as stage

    _run_stages(context, run, scheduler, quiet, stage)


@app.command("self-influence")
def self_influence(context: typer.Context, run: Run, scheduler: Scheduler = None, quiet: Quiet = False) -> None:
    """Compute what every training example contributes to itself, group by group; contribute does so where it needs it."""
    from gradstore.stages.self_influence import self_influence as stage

    _run_stages(context, run, scheduler, quiet, stage)


@app.command()
def sketch(context: typer.Context, run: Run, scheduler: Scheduler = None, quiet: Quiet = False) -> None:
    """Keep a few numbers of every train row, by which `gradstore query` finds the rows worth scoring exactly."""
    from gradstore.stages.sketch import sketch as stage

    _run_stages(context, run, scheduler, quiet, stage)


@app.command()
def contribute(context: typer.Context, run: Run, scheduler: Scheduler = None, quiet: Quiet = False) -> None:
    """Build the contribution tensor C[q, n, j] of the learn and eval queries."""
    from gradstore.stages.contribute import contribute as stage

    _run_stages(context, run, scheduler, quiet, stage)


@app.command()
def learn(context: typer.Context, run: Run, scheduler: Scheduler = None, quiet: Quiet = False) -> None:
    """Learn one weight per parameter group from the contributions of the learn queries."""
    from gradstore.stages.learn import learn as stage

    _run_stages(context, run, scheduler, quiet, stage)


@app.command()
def score(context: typer.Context, run: Run, scheduler: Scheduler = None, quiet: Quiet = False) -> None:
    """Rank the training examples of every eval query, with and without weights, beside the baselines."""
    from gradstore.stages.score import score as stage

    _run_stages(context, run, scheduler, quiet, stage)


@app.command("run")
def run_all(
    context: typer.Context, run: Run, append: Append = False, scheduler: Scheduler = None, quiet: Quiet = False
) -> None:
    """Do the whole path, featurize to report; what is already done is kept."""
    from gradstore.spec import read_spec
    from gradstore.stages.featurize import featurize as first
    from gradstore.stages.report import render_tables
    from gradstore.stages.report import report as page_stage
    from gradstore.stages.run import stages_of

    spec = read_spec(run)
    run_stages(context, spec, scheduler, quiet, partial(first, append=append), *stages_of(spec)[1:])
    if spec.contribute.mode == "scores":
        typer.echo('no report: its page shows the parts of scores, which contribute.mode = "scores" does not make')
        return
    found, page = page_stage(spec.run.store, None, spec.sweep()[0].kernel.name)
    draw(*render_tables(found))
    typer.echo(f"report: {page}")


def _run_stages(context: typer.Context, path: Path, scheduler: str | None, quiet: bool, *stages: Stage) -> RunSpec:
    """Run the stages of a run.toml one after the other on one cluster: its own, or the workers of a scheduler."""
    from gradstore.spec import read_spec

    return run_stages(context, read_spec(path), scheduler, quiet, *stages)


def run_told(
    context: typer.Context,
    spec: RunSpec,
    scheduler: str | None,
    quiet: bool,
    stage: Callable[[RunSpec, Engine, Progress], dict[str, Any]],
) -> dict[str, Any]:
    """Run one stage as `run_stages` does, and return what it tells."""
    found: list[dict[str, Any]] = []
    run_stages(
        context, spec, scheduler, quiet, lambda spec, engine, progress: found.append(stage(spec, engine, progress))
    )
    return found[0]


def run_stages(context: typer.Context, spec: RunSpec, scheduler: str | None, quiet: bool, *stages: Stage) -> RunSpec:
    """Run stages one after the other on one cluster: that of the run, or the workers of a scheduler."""
    from gradstore.cluster import Engine

    if scheduler is not None:
        spec = spec.model_copy(update={"cluster": spec.cluster.at(scheduler)})
    with telling(context, spec.run.name, quiet=quiet) as progress:
        try:
            with Engine(spec.cluster, progress.note, count=progress.count) as engine:
                for stage in stages:
                    stage(spec, engine, progress)
        except KeyboardInterrupt:
            raise StoppedError("stopped. What was committed stays; the same command goes on from there.") from None
    return spec
