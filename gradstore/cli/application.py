"""The application: its options and what every command shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

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
RedactText = Annotated[
    bool, typer.Option("--redact-text", help="Show no text and no image of queries and examples: ids and labels alone.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """How stages tell of themselves, whatever the command: as options before its name say."""

    log_format: Literal["text", "json"]
    metrics: Path | None
    metrics_port: int | None


def draw(*renderables: object) -> None:
    """Print tables and the like to the terminal."""
    from rich.console import Console

    console = Console()
    for renderable in renderables:
        console.print(renderable)


def _version(show: bool) -> None:
    if show:
        from gradstore import __version__

        typer.echo(f"gradstore {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    log_format: Annotated[
        Literal["text", "json"], typer.Option("--log-format", help="How stages tell of themselves on standard error.")
    ] = "text",
    metrics: Annotated[
        Path | None,
        typer.Option("--metrics", metavar="FILE", help="Keep metrics of stages there, as Prometheus reads them."),
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", metavar="PORT", help="Serve them on the loopback, at /metrics.")
    ] = None,
) -> None:
    """Training-data attribution from an out-of-core store of per-example gradient features."""
    context.obj = Telling(log_format=log_format, metrics=metrics, metrics_port=metrics_port)
