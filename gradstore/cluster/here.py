"""Tasks without a cluster: for work on a store that is in this process's memory, which no worker sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gradstore.cluster.tasks import Task


class Here:
    """Runs tasks in this process, one after another in the order in which they are given."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        """Yield each task with its result."""
        for task in tasks:
            yield task, task.function(*task.arguments)
