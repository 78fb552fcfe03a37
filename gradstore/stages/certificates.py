"""certificates: an authority and the keys of a cluster, so that nobody else can use its scheduler.

Whoever reaches a scheduler can run code on it. With these files scheduler, workers and clients encrypt what they send,
and each answers only those whose certificate is of the same authority. The authority's own key is not kept: nobody can
issue another certificate, and before they expire all are made anew.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstore.errors import ResourceError, SpecError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate, GeneralName

ROLES = ("scheduler", "worker", "client")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
AUTHORITY = "authority.pem"
SETTINGS = "dask.yaml"
# Clocks of machines differ.
_EARLIER = timedelta(minutes=10)


def certificates(
    folder: Path, hosts: Sequence[str] = (), *, days: int = 30, installed_at: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Write an authority's certificate, a key and a certificate each for scheduler, workers and clients, and dask.yaml.

    Parameters
    ----------
    folder
        Where they are written; the folder itself and the keys are for their owner alone (0700, 0600).
    hosts
        Names and addresses by which the scheduler is reached, beside the loopback.
    days
        How long the certificates are valid.
    installed_at
        The folder in which machines will find the files, as dask.yaml names them; by default ``folder``.
    force
        Replace files that are there: who holds the old ones is refused from then on.

    Returns
    -------
    dict
        ``folder``, ``settings`` (the dask.yaml), ``expires`` (a time), ``files`` (their names).

    Raises
    ------
    SpecError
        If a host is none, ``days`` is not from 1 to 825, or files are there and ``force`` is not given.
    ResourceError
        If the package cryptography is not installed, or the folder cannot be written.
    """
    _refuse_settings(hosts, days)
    found = _signed(hosts, days)
    names = {*found, SETTINGS}
    if (there := sorted(name for name in names if (folder / name).exists())) and not force:
        raise SpecError(
            f"{folder}: holds {', '.join(there)}. Choose another folder, or replace them with --force: whoever holds the "
            "old ones is refused then."
        )
    found[SETTINGS] = _settings((installed_at or folder).absolute())
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, content in found.items():
            _write(folder / name, content)
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be written: {error.strerror}.") from error
    return {
        "folder": str(folder),
        "settings": str(folder / SETTINGS),
        "expires": (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="seconds"),
        "files": sorted(names),
    }


def _refuse_settings(hosts: Sequence[str], days: int) -> None:
    if not 1 <= days <= 825:
        raise SpecError(f"--days: found {days}; accepted: 1 to 825. Make new ones with --force before they expire.")
    for host in hosts:
        if not host or not host.isascii() or (any(part in host for part in " /:@\n") and not _address(host)):
            raise SpecError(
                f"--host: found {host!r}; accepted: the name or address of a machine, without scheme or port."
            )


def _signed(hosts: Sequence[str], days: int) -> dict[str, bytes]:
    """Every PEM file by its name."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ResourceError(
            "certificates are made with the package cryptography, which is not installed. pip install 'gradstore[tls]'"
        ) from error

    def key_text(key: EllipticCurvePrivateKey) -> bytes:
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _authority(authority_key, days)
    found = {AUTHORITY: authority.public_bytes(serialization.Encoding.PEM)}
    for role in ROLES:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(role, key, (authority, authority_key), hosts)
        found[f"{role}.pem"] = certificate.public_bytes(serialization.Encoding.PEM)
        found[f"{role}-key.pem"] = key_text(key)
    return found


def _authority(key: EllipticCurvePrivateKey, days: int) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gradstore cluster")])
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _certificate(
    role: str,
    key: EllipticCurvePrivateKey,
    issuer: tuple[Certificate, EllipticCurvePrivateKey],
    hosts: Sequence[str],
) -> Certificate:
    """Certificate of one role. Clients are asked by nobody, so theirs cannot stand for a scheduler or a worker."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID

    authority, authority_key = issuer
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    names: list[GeneralName] = [x509.DNSName(f"{role}.gradstore")]
    if role != "client":
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        for host in dict.fromkeys([*LOOPBACK, *hosts]):
            address = _address(host)
            names.append(x509.DNSName(host) if address is None else x509.IPAddress(address))
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"gradstore {role}")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(authority.not_valid_before_utc)
        .not_valid_after(authority.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _address(host: str) -> Any:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _settings(folder: Path) -> bytes:
    """Dask's settings, by which each process finds the files of its role; it needs no others."""
    import yaml

    tls: dict[str, Any] = {"ca-file": str(folder / AUTHORITY)}
    for role in ROLES:
        tls[role] = {"cert": str(folder / f"{role}.pem"), "key": str(folder / f"{role}-key.pem")}
    settings = {"distributed": {"comm": {"default-scheme": "tls", "require-encryption": True, "tls": tls}}}
    text: str = yaml.safe_dump(settings, sort_keys=False)
    return text.encode()


def _write(path: Path, content: bytes) -> None:
    """Write a file for its owner alone, whole, in place of one that is there."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
