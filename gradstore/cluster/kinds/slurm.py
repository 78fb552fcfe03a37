"""A Slurm job for each worker, asked for by this command, which has the scheduler."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from gradstore.cluster.kinds.scheduler import refuse_certificates
from gradstore.cluster.kinds.settings import SCHEDULER, variables
from gradstore.errors import ResourceError, SpecError, TaskError
from gradstore.spec import resolve_kind

if TYPE_CHECKING:
    from dask_jobqueue import SLURMCluster
    from distributed import Client
    from distributed.security import Security

    from gradstore.spec import ClusterSection

# A job waits in a queue and its worker loads a model: it is not given back for a pause between two stages.
IDLE_CHECKS = 6
CHECK_INTERVAL = "10s"
TEST_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmOptions:
    """[cluster.options] of Slurm.

    Attributes
    ----------
    partition, account, walltime
        As sbatch has them.
    cores, gpus
        Of each worker; the first for what reads and unpacks beside the one thread that computes.
    interface
        The network between nodes, such as ib0, on which the scheduler listens; by default that of the machine's name.
    shared_folder
        A folder that all nodes see, for the keys of this run if Dask's settings name no certificates; by default the
        working directory.
    scratch
        A folder of each node for what a worker keeps while it lives.
    logs
        A folder that all nodes see, for the output of jobs.
    directives
        More lines of #SBATCH.
    prologue
        Lines of shell before a worker starts, such as those that load a module.
    python
        The interpreter on the nodes that has gradstore; by default the path of this one.
    """

    partition: str | None = None
    account: str | None = None
    walltime: str = "24:00:00"
    cores: int = 1
    gpus: int = 0
    interface: str | None = None
    shared_folder: str | None = None
    scratch: str | None = None
    logs: str | None = None
    directives: list[str] | None = None
    prologue: list[str] | None = None
    python: str | None = None

    def __post_init__(self) -> None:
        for key, least in (("cores", 1), ("gpus", 0)):
            if getattr(self, key) < least:
                raise SpecError(f"cluster.options.{key}: found {getattr(self, key)}; accepted: {least} or more.")
        for line in self.directives or []:
            if not line.startswith("-") or "\n" in line:
                raise SpecError(
                    f'cluster.options.directives: found {line!r}; accepted: options of sbatch, such as "--qos=low".'
                )


def on_slurm(section: ClusterSection, stack: ExitStack) -> Client:
    """Start a scheduler here and ask Slurm for workers, anew whenever one is lost; all end with this command.

    Raises
    ------
    ResourceError
        If the package dask-jobqueue or the program sbatch is not installed.
    SpecError
        If Slurm would not take such a job.
    """
    import dask
    from distributed import Client

    options = resolve_kind({"slurm": SlurmOptions}, "slurm", section.options, "cluster.options")
    sbatch, security = _sbatch(), _security()
    stack.enter_context(
        dask.config.set(
            {
                **SCHEDULER,
                # By this guess a worker is asked for each task that waits, before the first has been timed.
                "distributed.scheduler.unknown-task-duration": "1m",
                "distributed.adaptive.interval": CHECK_INTERVAL,
                "distributed.adaptive.wait-count": IDLE_CHECKS,
            }
        )
    )
    cluster = stack.enter_context(_cluster(section, options, security))
    _refuse_job(sbatch, cluster.job_script())
    minimum = section.num_workers if section.minimum is None else section.minimum
    # Also where both are the same: a job that ended is asked for again.
    cluster.adapt(minimum=minimum, maximum=section.num_workers)
    client: Client = stack.enter_context(Client(cluster))
    return client


def _cluster(section: ClusterSection, options: SlurmOptions, security: Security) -> SLURMCluster:
    handler = signal.getsignal(signal.SIGINT)
    from dask_jobqueue import SLURMCluster

    # Its import has Ctrl-C end the process, which is this command's to hear.
    signal.signal(signal.SIGINT, handler)
    arguments = ["--no-dashboard"]
    directives = list(options.directives or [])
    if options.gpus:
        arguments += ["--resources", "GPU=1"]
        directives.append(f"--gres=gpu:{options.gpus}")
    settings: dict[str, Any] = {"python": options.python} if options.python else {}
    try:
        return SLURMCluster(
            queue=options.partition,
            account=options.account,
            walltime=options.walltime,
            # One thread that computes, on as many cores as are asked for.
            cores=1,
            processes=1,
            job_cpu=options.cores,
            memory=f"{section.worker_memory_bytes} B",
            interface=options.interface,
            security=security,
            shared_temp_directory=options.shared_folder or str(Path.cwd()),
            local_directory=options.scratch,
            log_directory=options.logs,
            job_extra_directives=directives,
            job_script_prologue=[
                *(f"export {name}='{value}'" for name, value in _quoted(variables())),
                *(options.prologue or []),
            ],
            worker_extra_args=arguments,
            scheduler_options={"dashboard_address": "127.0.0.1:0"},
            silence_logs=logging.CRITICAL,
            **settings,
        )
    except (OSError, ValueError) as error:
        raise SpecError(f"cluster.options: no scheduler can be started here for Slurm: {error}.") from error


def _quoted(settings: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, value.replace("'", '"')) for name, value in settings.items()]


def _security() -> Security:
    """Certificates that Dask's settings name, else some of this run alone."""
    from distributed.security import Security

    declared = Security()
    if declared.tls_ca_file is not None:
        for role in ("scheduler", "worker", "client"):
            refuse_certificates("cluster.kind", "the scheduler that is started for Slurm", declared, role)
        return declared
    return Security.temporary()


def _sbatch() -> str:
    """Path of the program that submits jobs; refuses where it or a package is missing."""
    for package in ("cryptography", "dask_jobqueue"):
        if find_spec(package) is None:
            raise ResourceError(
                f'cluster.kind: "slurm" needs the package {package}, which is not installed. '
                "pip install 'gradstore[slurm]'"
            )
    if (found := shutil.which("sbatch")) is None:
        raise ResourceError(
            'cluster.kind: "slurm" needs the program sbatch, which is not on this machine. Run the command where jobs are '
            'submitted, or set cluster.kind = "local".'
        )
    return found


def _refuse_job(program: str, script: str) -> None:
    """Ask Slurm whether it would take such a job: one that it refuses later would be waited for without end."""
    with NamedTemporaryFile("w", suffix=".sh", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        try:
            done = subprocess.run(  # noqa: S603 - what is tested is what dask-jobqueue would submit
                [program, "--test-only", file.name],
                capture_output=True,
                text=True,
                timeout=TEST_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TaskError(f"Slurm does not answer within {TEST_SECONDS:.0f} s. Is its controller up?") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split())
        raise SpecError(f"cluster.options: Slurm refuses a job of a worker: {said}. Change what it names.")
