"""Who is told of the stages of a command: a person or what collects logs, and what collects metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import typer

from gradstore.cli.application import Telling

if TYPE_CHECKING:
    from gradstore.stages.progress import Progress, Watcher


@contextmanager
def telling(context: typer.Context, run: str, *, quiet: bool) -> Iterator[Progress]:
    """Enter with the progress of a run, told as the options before the command's name say."""
    from gradstore.stages.logs import JsonLog
    from gradstore.stages.metrics import Metrics, in_file, on_port
    from gradstore.stages.progress import Progress, on_standard_error

    asked = context.find_object(Telling)
    assert asked is not None, "the application's callback makes it before any command"
    watchers: list[Watcher] = []
    with ExitStack() as stack:
        if not quiet and asked.log_format == "json":
            log = JsonLog(run)
            watchers.append(log)
            stack.enter_context(log.telling_errors())
        elif not quiet:
            watchers.append(on_standard_error())
        if asked.metrics is not None or asked.metrics_port is not None:
            metrics = Metrics(run)
            watchers.append(metrics)
            if asked.metrics is not None:
                stack.enter_context(in_file(metrics, asked.metrics))
            if asked.metrics_port is not None:
                stack.enter_context(on_port(metrics, asked.metrics_port))
        yield Progress(watchers=watchers)
