"""Tasks that are submitted once more: what is after them waits for all that it names, not for them alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import Client, KilledWorker

from gradstore.cluster import Task
from gradstore.cluster.submission import Submission
from gradstore.cluster.tasks import Failed
from tests import works
from tests.clusters import SeparateCluster

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_what_is_after_a_task_that_is_submitted_again_still_waits_for_those_that_were_not(tmp_path: Path) -> None:
    names = str(tmp_path), "unlucky", "long"
    tasks = [
        Task(name="unlucky", function=works.leave, arguments=names[:2]),
        Task(name="long", function=works.leave_late, arguments=(names[0], "long", 2.0)),
        Task(name="behind", function=works.leave_after, arguments=(names[0], "behind", *names[1:]), after=names[1:]),
    ]
    with (
        SeparateCluster(tmp_path / "cluster", 2, {"PYTHONPATH": str(ROOT)}) as cluster,
        Client(cluster.address, set_as_default=False) as client,
    ):
        submission = Submission(client, tasks)
        unlucky = submission.fresh[0]
        assert not list(submission.settle(unlucky, Failed(KilledWorker(unlucky.key, "worker", 3))))
        *_, behind = submission.fresh
        assert behind.result(timeout=30) == "behind"
        submission.release()
