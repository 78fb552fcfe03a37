"""A Slurm of one node on the loopback that a test starts for itself: munge, controller and node are plain processes."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.servers import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo")
STARTS_WITHIN_SECONDS = 60.0
CORES = 4


def missing() -> list[str]:
    """Programs of Slurm and munge that are not installed."""
    return [program for program in PROGRAMS if find(program) is None]


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@contextmanager
def running_slurm(folder: Path) -> Iterator[Mapping[str, str]]:
    """Run one with what it keeps in ``folder``; yields the environment by which its commands find it."""
    # Sockets have short names, and munge wants folders that others cannot write.
    folder.mkdir(mode=0o755)
    controller, node = free_ports(2)
    host = socket.gethostname().partition(".")[0]
    config = folder / "slurm.conf"
    config.write_text(settings(folder, host, (controller, node)))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    env = {**os.environ, "SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    munge = [
        "munged",
        "--foreground",
        "--force",
        f"--key-file={key}",
        f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munge.pid",
        f"--log-file={folder}/munge.log",
        f"--seed-file={folder}/munge.seed",
    ]
    commands = {
        "munged": munge,
        "slurmctld": ["slurmctld", "-D", "-c", "-f", str(config)],
        "slurmd": ["slurmd", "-D", "-c", "-f", str(config), "-N", host],
    }
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in commands.items():
            with (folder / f"{name}.out").open("wb") as output:
                program = [find(command[0]) or command[0], *command[1:]]
                started.append(subprocess.Popen(program, env=env, cwd=folder, stdout=output, stderr=output))
            if name == "munged":
                _wait((folder / "munge.socket").exists, folder)
        _wait(lambda: _is_idle(env), folder)
        yield {name: env[name] for name in ("SLURM_CONF", "PATH")}
    finally:
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def settings(folder: Path, host: str, ports: tuple[int, int]) -> str:
    """A slurm.conf without cgroups, accounting or plugins that need rights."""
    lines = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": ports[0],
        "SlurmdPort": ports[1],
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket",
        "CredType": "cred/munge",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd.pid",
        "SlurmctldLogFile": f"{folder}/slurmctld.log",
        "SlurmdLogFile": f"{folder}/slurmd.log",
        "ProctrackType": "proctrack/pgid",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "MpiDefault": "none",
        "ReturnToService": 2,
        "SchedulerType": "sched/backfill",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU_Memory",
        "SlurmdParameters": "config_overrides",
        "KillWait": 20,
    }
    node = f"NodeName={host} NodeAddr=127.0.0.1 CPUs={CORES} RealMemory=6000 State=UNKNOWN"
    partition = f"PartitionName=small Nodes={host} Default=YES MaxTime=60 State=UP"
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    return "\n".join([*(f"{key}={value}" for key, value in lines.items()), node, partition, ""])


def _is_idle(env: Mapping[str, str]) -> bool:
    found = subprocess.run(
        [find("sinfo") or "sinfo", "--noheader", "--format=%t"], env=env, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() == "idle"


def _wait(until: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_SECONDS
    while not until():
        if time.monotonic() > deadline:
            logs = [path.read_text(errors="replace")[-1500:] for path in sorted(folder.glob("*.[lo]*[gt]"))]
            raise RuntimeError("Slurm does not start:\n" + "\n---\n".join(logs))
        time.sleep(0.2)
