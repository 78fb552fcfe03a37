"""Certificates of a cluster, and what is told of those that cannot be used."""

from __future__ import annotations

import stat
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from gradstore.cluster.kinds import CLUSTERS
from gradstore.errors import SpecError
from gradstore.spec import ClusterSection
from gradstore.stages.certificates import certificates
from tests.clusters import with_certificates


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates") / "made"
    certificates(folder, ["scheduler.example.org", "192.0.2.7"])
    return folder


def connect(address: str) -> None:
    """Connect as a command does."""
    with ExitStack() as stack:
        section = ClusterSection(kind="scheduler", address=address)
        CLUSTERS["scheduler"](section, stack)


def test_a_command_without_certificates_is_told_what_to_set() -> None:
    with pytest.raises(SpecError, match=r"names? none\. Set DASK_CONFIG to the dask\.yaml"):
        connect("tls://127.0.0.1:9")


def test_a_certificate_that_is_not_there_is_named(tmp_path: Path) -> None:
    certificates(tmp_path / "gone")
    (tmp_path / "gone" / "client.pem").unlink()
    with (
        with_certificates(tmp_path / "gone"),
        pytest.raises(SpecError, match=r"name a file for tls://.* that is not there"),
    ):
        connect("tls://127.0.0.1:9")


def test_certificates_name_the_hosts_and_expire(made: Path) -> None:
    found = x509.load_pem_x509_certificate((made / "scheduler.pem").read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "scheduler.example.org" in names.get_values_for_type(x509.DNSName)
    assert "192.0.2.7" in map(str, names.get_values_for_type(x509.IPAddress))
    left = found.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=29) < left <= timedelta(days=30)


def test_a_clients_certificate_cannot_stand_for_a_scheduler(made: Path) -> None:
    usages = {
        role: x509.load_pem_x509_certificate((made / f"{role}.pem").read_bytes())
        .extensions.get_extension_for_class(x509.ExtendedKeyUsage)
        .value
        for role in ("client", "scheduler", "worker")
    }
    server = x509.oid.ExtendedKeyUsageOID.SERVER_AUTH
    assert {role: server in usage for role, usage in usages.items()} == {
        "client": False,
        "scheduler": True,
        "worker": True,
    }


def test_files_are_for_their_owner_alone_and_the_authoritys_key_is_not_kept(made: Path) -> None:
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()} == {0o600}
    keys = sorted(path.name for path in made.iterdir() if b"PRIVATE KEY" in path.read_bytes())
    assert keys == ["client-key.pem", "scheduler-key.pem", "worker-key.pem"]


def test_files_that_are_there_are_replaced_only_if_asked(tmp_path: Path) -> None:
    certificates(tmp_path)
    before = (tmp_path / "authority.pem").read_bytes()
    with pytest.raises(SpecError, match=r"holds authority\.pem, .* replace them with --force"):
        certificates(tmp_path)
    assert (tmp_path / "authority.pem").read_bytes() == before
    certificates(tmp_path, force=True)
    assert (tmp_path / "authority.pem").read_bytes() != before


def test_settings_name_the_files_where_machines_find_them(tmp_path: Path) -> None:
    certificates(tmp_path, installed_at=Path("/certificates"))
    tls = yaml.safe_load((tmp_path / "dask.yaml").read_text())["distributed"]["comm"]["tls"]
    assert tls["ca-file"] == "/certificates/authority.pem"
    assert tls["worker"] == {"cert": "/certificates/worker.pem", "key": "/certificates/worker-key.pem"}


@pytest.mark.parametrize("host", ["", "tls://host", "host:8786", "a b", "hôte"])
def test_a_host_that_is_none_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--host: found"):
        certificates(tmp_path / "new", [host])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("days", [0, 826])
def test_certificates_are_short_lived(days: int, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--days: found"):
        certificates(tmp_path / "new", days=days)
