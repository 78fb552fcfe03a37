"""A scheduler that a network could reach: who may use it, and who is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradstore.stages.certificates import certificates
from tests import synthetic
from tests.clusters import SeparateCluster, with_certificates
from tests.runs import gradstore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates") / "made"
    certificates(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeparateCluster]:
    """A scheduler and a worker, each of which was told of its certificate by DASK_CONFIG alone."""
    env = {"PYTHONPATH": str(ROOT), "DASK_CONFIG": str(made / "dask.yaml")}
    with with_certificates(made):
        started = SeparateCluster(tmp_path_factory.mktemp("cluster"), 1, env).__enter__()
    try:
        yield started
    finally:
        started.__exit__()


def featurize(folder: Path, cluster: SeparateCluster, settings: Path | None, scheme: str = "tls") -> tuple[int, str]:
    """Exit code and errors of a command with these settings."""
    synthetic.make(folder)
    env = {"DASK_CONFIG": str(settings / "dask.yaml") if settings else os.devnull}
    address = cluster.address.replace("tls://", f"{scheme}://")
    done = gradstore("featurize", folder / "run.toml", "--quiet", "--scheduler", address, env=env)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_a_command_with_a_certificate_of_the_cluster_is_let_in(
    made: Path, cluster: SeparateCluster, tmp_path: Path
) -> None:
    assert cluster.address.startswith("tls://127.0.0.1:")
    code, errors = featurize(tmp_path / "run", cluster, made)
    assert code == 0, errors


def test_a_certificate_of_another_authority_is_refused(cluster: SeparateCluster, tmp_path: Path) -> None:
    certificates(tmp_path / "other")
    code, errors = featurize(tmp_path / "run", cluster, tmp_path / "other")
    assert code == 2
    assert "do not accept each other's certificates" in errors
    assert not (tmp_path / "run" / "store").exists()


def test_a_command_that_trusts_the_scheduler_but_has_a_certificate_of_another_is_refused(
    made: Path, cluster: SeparateCluster, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    certificates(mixed)
    (mixed / "authority.pem").write_bytes((made / "authority.pem").read_bytes())
    code, errors = featurize(tmp_path / "run", cluster, mixed)
    assert code == 2
    assert "do not accept each other's certificates" in errors


def test_a_command_without_a_certificate_is_told_what_to_set(cluster: SeparateCluster, tmp_path: Path) -> None:
    code, errors = featurize(tmp_path / "run", cluster, None)
    assert code == 2
    assert "Dask's settings name none. Set DASK_CONFIG" in errors


def test_a_command_that_does_not_encrypt_is_not_answered(cluster: SeparateCluster, tmp_path: Path) -> None:
    code, errors = featurize(tmp_path / "run", cluster, None, scheme="tcp")
    assert code == 8
    assert "no scheduler answers" in errors


def test_an_embedded_cluster_starts_under_the_same_settings(made: Path, tmp_path: Path) -> None:
    synthetic.make(tmp_path / "run")
    done = gradstore(
        "featurize", tmp_path / "run" / "run.toml", "--quiet", env={"DASK_CONFIG": str(made / "dask.yaml")}
    )
    assert done.returncode == 0, done.stderr
