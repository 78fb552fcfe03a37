"""The command line: parse, call one stage, print. Nothing heavy is imported before a command runs.

runs         commands that take a run.toml
synth        the command that makes a synthetic run
stores       commands that take a store
attribution  those of them that show weights and influence
queries      the command that asks a store
evaluation   commands that measure what scores are worth
clusters     the command for who runs a cluster
jobs         commands for runs that go on by themselves
viewer       the command that shows a store in a browser
telling      who is told of the stages of a command
"""

from __future__ import annotations

import sys

from gradstore.cli import attribution, clusters, evaluation, jobs, queries, runs, stores, synth, viewer
from gradstore.cli.application import app
from gradstore.errors import GradstoreError

__all__ = [
    "app",
    "attribution",
    "clusters",
    "evaluation",
    "jobs",
    "main",
    "queries",
    "runs",
    "stores",
    "synth",
    "viewer",
]


def main() -> None:
    """Run the command line; gradstore's own errors become one message and an exit code, never a traceback."""
    try:
        app()
    except GradstoreError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
