"""Commands for runs that go on by themselves: submitting one, and what is asked of those that a store knows."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from gradstore.cli.application import Json, Run, Store, app, draw
from gradstore.cli.runs import Append, Scheduler
from gradstore.errors import StoppedError

jobs_app = typer.Typer(
    help="Runs that were submitted: list, show, follow, cancel and resume them.", no_args_is_help=True
)
app.add_typer(jobs_app, name="jobs")

Job = Annotated[
    str, typer.Argument(metavar="ID", help="The job, as `gradstore submit` and `gradstore jobs list` name it.")
]


@app.command()
def submit(
    run: Run,
    *,
    append: Append = False,
    scheduler: Scheduler = None,
    priority: Annotated[
        int,
        typer.Option("--priority", help="Of its tasks among those of other jobs on one scheduler; higher goes first."),
    ] = 0,
    after: Annotated[
        str | None, typer.Option("--after", metavar="ID", help="A job of the same store that has to be done before.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hand a run to its cluster and return at once: it goes on without this command, or anew where it stopped."""
    from gradstore.spec import read_spec
    from gradstore.stages.jobs import Wishes
    from gradstore.stages.jobs import submit as stage

    spec = read_spec(run)
    if scheduler is not None:
        spec = spec.model_copy(update={"cluster": spec.cluster.at(scheduler)})
    _tell(stage(spec, Wishes(priority=priority, after=after, append=append)), as_json=as_json)


@jobs_app.command("list")
def list_jobs(store: Store, as_json: Json = False) -> None:
    """List the jobs of a store, their states, and how far they are."""
    from gradstore.stages.jobs import list_jobs as stage
    from gradstore.stages.jobs import render_jobs

    found = stage(store)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        draw(render_jobs(found))


@jobs_app.command()
def show(
    store: Store,
    job: Job,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return once it is not driven any more, with the exit code of its run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a job: its state, how far it is, where it runs, and what went wrong."""
    from gradstore.stages.jobs import exit_code_of, render_show
    from gradstore.stages.jobs import show as stage

    try:
        found = stage(store, job, wait=wait)
    except KeyboardInterrupt:
        raise StoppedError("stopped waiting. The job goes on.") from None
    typer.echo(json.dumps(found) if as_json else "\n".join(render_show(found)))
    if wait:
        raise typer.Exit(exit_code_of(found))


@jobs_app.command()
def logs(store: Store, job: Job, as_json: Json = False) -> None:
    """Print the lines that a job has written, of all its attempts."""
    from gradstore.stages.jobs import read_lines as stage

    found = stage(store, job)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for line in found["lines"]:
        typer.echo(f"{line['at']} {line['attempt']} {line['text']}")


@jobs_app.command()
def cancel(store: Store, job: Job, as_json: Json = False) -> None:
    """Ask a job to stop; what was committed stays."""
    from gradstore.stages.jobs import cancel as stage

    found = stage(store, job)
    typer.echo(json.dumps(found) if as_json else f"{found['id']}: {found['state']}")


@jobs_app.command()
def resume(store: Store, job: Job, scheduler: Scheduler = None, as_json: Json = False) -> None:
    """Go on with a job that failed, was cancelled, is lost, or is done, on the cluster of its last attempt."""
    from gradstore.stages.jobs import resume as stage

    found = stage(store, job, lambda last: last if scheduler is None else last.at(scheduler))
    _tell(found, as_json=as_json)


def _tell(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found))
    elif found["began"]:
        typer.echo(f"{found['id']}\nfollow it: gradstore jobs show {found['store']} {found['id']} --wait")
    else:
        typer.echo(f"{found['id']}\nit is {found['state']} already; nothing was begun")
