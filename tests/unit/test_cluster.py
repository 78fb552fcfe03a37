from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask
import pytest
import torch

from gradstore.cluster import Engine
from gradstore.cluster.kinds.kubernetes import read_manifest, sized, wanted_workers
from gradstore.cluster.kinds.settings import variables
from gradstore.errors import ResourceError, SpecError, TaskError
from gradstore.spec import ClusterSection


@pytest.mark.parametrize(
    ("text", "expected"), [("4GiB", 4 * 2**30), ("500 MB", 500 * 10**6), ("1.5gb", 1_500_000_000), ("1024", 1024)]
)
def test_a_memory_size_is_read_in_the_units_people_write(text: str, expected: int) -> None:
    assert ClusterSection(memory_per_worker=text).worker_memory_bytes == expected


def test_workers_share_the_machine_unless_told_otherwise() -> None:
    four, two = ClusterSection(workers=4).worker_memory_bytes, ClusterSection(workers=2).worker_memory_bytes
    assert 2 * four == pytest.approx(two, abs=4)


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(SpecError, match=r'memory_per_worker: found "?\'lots\''):
        ClusterSection(memory_per_worker="lots")


def test_no_cluster_starts_for_no_tasks() -> None:
    announced: list[str] = []
    with Engine(ClusterSection(workers=1), announced.append) as engine:
        assert list(engine.run([])) == []
    assert announced == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused_before_anything_runs() -> None:
    with pytest.raises(SpecError, match=r'cluster\.device: found "cuda", and torch finds no CUDA device'):
        Engine(ClusterSection(device="cuda"))
    Engine(ClusterSection(kind="scheduler", address="tls://host:1", device="cuda"))


def test_a_scheduler_needs_an_address() -> None:
    with pytest.raises(SpecError, match=r"cluster\.address: is missing"):
        ClusterSection(kind="scheduler")


def test_a_scheduler_must_not_be_open_to_a_network() -> None:
    section = ClusterSection(kind="scheduler", address="tcp://192.0.2.7:8786")
    with pytest.raises(SpecError, match="not on this machine and not encrypted"):
        Engine(section)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8786",
        "localhost",
        "http://127.0.0.1:8787",
        "inproc://1",
        "tcp://",
        "tcp://127.0.0.1",
        "tls://:8786",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:99999",
        "tcp://127.0.0.1:port",
        "tcp://[::1:8786",
        "tcp://[::1]",
        "tls://host:8786/status",
        "tls://ho st:8786",
    ],
)
def test_an_address_that_no_scheduler_has_is_refused(address: str) -> None:
    with pytest.raises(SpecError, match=r"cluster\.address: found .*; accepted: tls://HOST:PORT"):
        Engine(ClusterSection(kind="scheduler", address=address))


def batch(kind: str, **changes: Any) -> ClusterSection:
    return ClusterSection(**{"kind": kind, "workers": 4, "memory_per_worker": "2GiB", **changes})


@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": None}, r"cluster\.workers: is missing"),
        ({"memory_per_worker": "auto"}, r"cluster\.memory_per_worker: is missing"),
        ({"minimum": 5}, r"cluster\.minimum: found 5; accepted: 0 to cluster\.workers, which is 4"),
    ],
)
def test_what_is_asked_of_other_machines_is_said(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        batch(kind, **changes)


@pytest.mark.parametrize("section", [{}, {"kind": "scheduler", "address": "tls://host:1"}])
def test_workers_that_nobody_starts_and_ends_have_no_least_number(section: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"cluster\.minimum: found 1 with kind"):
        ClusterSection(minimum=1, **section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (ClusterSection(options={"partition": "gpu"}), r"cluster\.options\.partition: unknown key; local takes no"),
        (batch("slurm", options={"queue": "gpu"}), r"cluster\.options\.queue: unknown key; accepted for slurm: part"),
        (batch("slurm", options={"cores": "two"}), r"cluster\.options\.cores: found 'two'; accepted: a valid integer"),
        (batch("slurm", options={"cores": 0}), r"cluster\.options\.cores: found 0; accepted: 1 or more"),
        (batch("slurm", options={"gpus": -1}), r"cluster\.options\.gpus: found -1; accepted: 0 or more"),
        (batch("slurm", options={"directives": ["--mem=1\nrm"]}), r"cluster\.options\.directives: found .*; accepted"),
        (batch("kubernetes"), r"cluster\.options\.manifest: is missing"),
        (
            batch("kubernetes", options={"manifest": "x", "address": "tcp://192.0.2.7:8786"}),
            r"cluster\.options\.address: .* not on this machine and not encrypted",
        ),
    ],
)
def test_options_that_a_kind_does_not_have_are_refused_before_anything_runs(
    section: ClusterSection, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        Engine(section)


def test_the_workers_of_a_scheduler_take_the_place_of_any_kind() -> None:
    section = batch("slurm", minimum=1, device="cuda", options={"partition": "gpu"})
    assert section.at("tls://host:1") == ClusterSection(
        kind="scheduler", address="tls://host:1", workers=4, memory_per_worker="2GiB", device="cuda"
    )


def test_slurm_without_its_programs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with Engine(batch("slurm")) as engine, pytest.raises(ResourceError, match="needs the program sbatch"):
        assert engine.client is None


def test_slurm_with_certificates_that_are_not_there_blames_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    declared = dict.fromkeys(("ca-file", "scheduler.key", "scheduler.cert"), str(tmp_path / "none.pem"))
    missing = {f"distributed.comm.tls.{key}": path for key, path in declared.items()}
    with dask.config.set(missing), Engine(batch("slurm")) as engine, pytest.raises(SpecError) as found:
        assert engine.client is None
    assert "Dask's TLS settings name a file for the scheduler that is started for Slurm that is not there" in str(
        found.value
    )


def test_settings_for_workers_elsewhere_reach_them_as_variables() -> None:
    found = dask.config.collect_env(variables())
    memory = found["distributed"]["worker"]["memory"]
    assert memory == {"target": False, "spill": False, "pause": False, "terminate": 1.0}
    nanny = dask.config.get("distributed.nanny.pre-spawn-environ", config=found)
    assert nanny["OMP_NUM_THREADS"] == "1"
    assert variables()["OMP_NUM_THREADS"] == "1"


# What the operator needs to see, behind another resource.
OF_OPERATOR = """
kind: Secret
---
apiVersion: kubernetes.dask.org/v1
kind: DaskCluster
metadata: {name: small}
spec:
  worker: {replicas: 1, spec: {containers: [{name: worker, resources: RESOURCES}]}}
  scheduler: {spec: {containers: [{name: scheduler}]}, service: {}}
"""


def manifest(folder: Path, text: str = "", resources: str = '{limits: {memory: 1Gi, nvidia.com/gpu: "1"}}') -> str:
    path = folder / "cluster.yaml"
    path.write_text(text or OF_OPERATOR.replace("RESOURCES", resources))
    return str(path)


def test_a_dask_cluster_has_the_workers_and_the_memory_of_the_run(tmp_path: Path) -> None:
    cluster = sized(read_manifest(manifest(tmp_path)), batch("kubernetes"))
    worker = cluster["spec"]["worker"]
    assert worker["replicas"] == 4
    assert worker["spec"]["containers"][0]["resources"] == {
        "limits": {"memory": str(2 * 2**30), "nvidia.com/gpu": "1"},
        "requests": {"memory": str(2 * 2**30)},
    }


@pytest.mark.parametrize("resources", ["", "{limits: , requests: {}}"])
def test_what_a_manifest_leaves_empty_is_filled(tmp_path: Path, resources: str) -> None:
    worker = sized(read_manifest(manifest(tmp_path, resources=resources)), batch("kubernetes"))["spec"]["worker"]
    memory = {"memory": str(2 * 2**30)}
    assert worker["spec"]["containers"][0]["resources"] == {"limits": memory, "requests": memory}


def test_a_dask_cluster_that_scales_begins_with_the_least(tmp_path: Path) -> None:
    found = read_manifest(manifest(tmp_path))
    assert sized(found, batch("kubernetes", minimum=2))["spec"]["worker"]["replicas"] == 2
    # None would never be asked for its work.
    assert sized(found, batch("kubernetes", minimum=0))["spec"]["worker"]["replicas"] == 1


@pytest.mark.parametrize(
    ("target", "now", "idle", "expected"),
    [(9, 2, 0.0, 4), (3, 2, 0.0, 3), (1, 4, 0.0, 4), (0, 4, 59.0, 4), (0, 4, 60.0, 1), (0, 1, 600.0, 1)],
)
def test_workers_come_with_work_and_go_when_all_is_done(target: int, now: int, idle: float, expected: int) -> None:
    assert wanted_workers(target, now, idle, (1, 4)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: Deployment", "has no resource of kind"),
        ("kind: DaskCluster", "has no metadata.name"),
        ("kind: DaskCluster\nspec: [1]", "has no metadata.name"),
        (OF_OPERATOR.replace("RESOURCES", "{limits: [1]}"), "that are no tables"),
        ("a: [", "is not readable as YAML"),
        ("[" * 1100, "is not readable as YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not readable as YAML"),
    ],
)
def test_a_manifest_without_a_dask_cluster_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=rf"cluster\.options\.manifest: .*{re.escape(message)}"):
        read_manifest(manifest(tmp_path, text))


def test_kubernetes_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    section = batch("kubernetes", options={"manifest": manifest(tmp_path)})
    with Engine(section) as engine, pytest.raises(TaskError, match="Kubernetes did not make DaskCluster small"):
        assert engine.client is None


def test_what_asks_slurm_for_workers_leaves_ctrl_c_to_the_command() -> None:
    script = (
        "import signal; from gradstore.cluster.kinds import slurm; from gradstore.spec import ClusterSection; "
        "section = ClusterSection(kind='slurm', workers=1, memory_per_worker='1GiB'); "
        "slurm._cluster(section, slurm.SlurmOptions(interface='lo'), slurm._security()).close(); "
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
