"""Workers of a scheduler that others started."""

from __future__ import annotations

import logging
import ssl
from contextlib import ExitStack
from typing import TYPE_CHECKING

from gradstore.errors import SpecError, TaskError

if TYPE_CHECKING:
    from distributed import Client
    from distributed.security import Security

    from gradstore.spec import ClusterSection

CONNECT_TIMEOUT = "30s"


def on_scheduler(section: ClusterSection, stack: ExitStack) -> Client:
    """Connect to a scheduler that is already running; it and its workers need gradstore installed."""
    assert section.address is not None, "ClusterSection refuses a scheduler without an address"
    client = connect("cluster.address", section.address, stack)
    threads = client.nthreads()
    if not threads:
        raise TaskError(
            f"cluster.address: the scheduler at {section.address} has no workers. Start some, then run again."
        )
    for worker, count in threads.items():
        if count != 1:
            # A model's hooks belong to one pass at a time.
            raise SpecError(
                f"cluster.address: worker {worker} has {count} threads; accepted: 1. Start workers with --nthreads 1, "
                "several per machine."
            )
    return client


def connect(key: str, address: str, stack: ExitStack, timeout: str = CONNECT_TIMEOUT) -> Client:
    """Return a client of the scheduler at an address, with the certificates that Dask's settings name.

    Raises
    ------
    SpecError
        If the certificates are missing, or are not of the authority that the scheduler trusts.
    TaskError
        If no scheduler answers.
    """
    from distributed import Client
    from distributed.security import Security
    from distributed.utils import silence_logging_cmgr

    security = Security()
    if address.startswith("tls://"):
        refuse_certificates(key, address, security)
    # What matters of a worker's end is told by the engine.
    stack.enter_context(silence_logging_cmgr(logging.CRITICAL))
    try:
        client: Client = stack.enter_context(Client(address, timeout=timeout, security=security))
    except (OSError, TimeoutError) as error:
        if any(isinstance(cause, ssl.SSLError) for cause in _causes(error)) or "[SSL" in str(error):
            raise SpecError(
                f"{key}: the scheduler at {address} and this command do not accept each other's certificates: they are of "
                "different authorities, or expired. Use files that one call of `gradstore certificates` made."
            ) from error
        raise TaskError(f"{key}: no scheduler answers at {address}: {error}") from error
    return client


def refuse_certificates(key: str, address: str, security: Security, role: str = "client") -> None:
    """Refuse TLS settings without which a connection would fail with an error of Dask's own.

    Parameters
    ----------
    key, address
        What asks for a connection, and to what.
    security
        The settings.
    role
        Whose certificate it is: that of a client, scheduler or worker.

    Raises
    ------
    SpecError
        If a file is missing or no certificate, or none is named.
    """
    advice = "Set DASK_CONFIG to the dask.yaml that `gradstore certificates` wrote."
    try:
        context = security.get_connection_args(role)["ssl_context"]
    except FileNotFoundError as error:
        raise SpecError(f"{key}: Dask's TLS settings name a file for {address} that is not there. {advice}") from error
    except OSError as error:
        raise SpecError(f"{key}: Dask's TLS settings for {address} cannot be used: {error}. {advice}") from error
    if context is None:
        raise SpecError(f"{key}: {address} needs a certificate, and Dask's settings name none. {advice}")


def _causes(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
