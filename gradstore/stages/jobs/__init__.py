"""Jobs: runs that are submitted and go on by themselves.

submit   hands a run to who drives it, unless somebody does already
keeper   the task by which a worker of a cluster drives a job
driver   the process that drives: a run's stages, one after another
report   what the driver tells the store: events, heartbeats, how it ended
states   what is read of jobs: their states, their lines; and asking one to stop
"""

from gradstore.stages.jobs.states import (
    cancel,
    exit_code_of,
    list_jobs,
    read_lines,
    render_jobs,
    render_show,
    show,
)
from gradstore.stages.jobs.submit import Wishes, resume, submit

__all__ = [
    "Wishes",
    "cancel",
    "exit_code_of",
    "list_jobs",
    "read_lines",
    "render_jobs",
    "render_show",
    "resume",
    "show",
    "submit",
]
