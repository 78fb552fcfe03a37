"""Where tasks run, and the engine that sends a stage's tasks there.

Arguments and results of tasks are names and numbers, never arrays: a task reads from the store and ends in commit
records, so losing a worker, the scheduler or this process loses no committed work.

tasks       a task, and what a worker does with it
kinds       one function per kind of cluster
submission  what becomes of the tasks of one submission: their order, retries, and smaller ones in their place
engine      starts the cluster, submits, and yields what finishes
"""

from gradstore.cluster.engine import Engine
from gradstore.cluster.kinds import refuse_device
from gradstore.cluster.tasks import Task

__all__ = ["Engine", "Task", "refuse_device"]
