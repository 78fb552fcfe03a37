"""How S3 is reached: what the environment and the profile say. Credentials are asked for here and never kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from gradstore.errors import SpecError, StorageError
from gradstore.spec.urls import refuse_credentials

if TYPE_CHECKING:
    from botocore.credentials import Credentials
    from botocore.session import Session

# Variables that name the server, in the order in which they count; the third is obstore's.
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_SWITCH: Final = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings:
    """Where the server is and how requests are sent to it.

    Attributes
    ----------
    endpoint
        URL of the server, without the bucket; ``""`` for Amazon's own.
    region
        Signs the requests.
    virtual_hosted
        Whether the bucket is a part of the host name instead of the path.
    anonymous
        Whether requests are sent unsigned, to a bucket that is public.
    retry_seconds
        How long a request that fails is sent again.
    timeout_seconds
        When a request has failed that is not answered in full.
    session
        Finds the credentials and refreshes those that expire.
    """

    endpoint: str
    region: str
    virtual_hosted: bool
    anonymous: bool
    retry_seconds: float
    timeout_seconds: float
    session: Session

    def credentials(self, where: str) -> Credentials:
        """Find the credentials that requests are signed with.

        Raises
        ------
        StorageError
            If there are none.
        """
        from botocore.exceptions import BotoCoreError

        try:
            found = self.session.get_credentials()
        except BotoCoreError as error:
            raise StorageError(f"{where}: the credentials cannot be had: {error}") from error
        if found is None:
            raise StorageError(
                f"{where}: NoCredentials: neither the environment nor a profile holds AWS credentials. Set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket, AWS_SKIP_SIGNATURE=true."
            )
        return found


def read_settings(bucket: str) -> S3Settings:
    """Read the settings from the environment and from the profile that it names, else the default one.

    Raises
    ------
    SpecError
        If a variable of gradstore's own holds what it must not.
    StorageError
        If a variable or the profile does, or if there is no such profile.
    """
    session, profile = _profile()
    endpoint = _endpoint(profile, session)
    virtual = os.environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST")
    # A server of one's own seldom serves bucket names as host names, and no certificate covers names with dots.
    virtual_hosted = (
        (not endpoint and "." not in bucket)
        if virtual is None
        else _switch("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", virtual)
    )
    if virtual_hosted:
        # obstore's convention is an endpoint that names the bucket, botocore's is one that does not.
        endpoint = endpoint.replace(f"://{bucket}.", "://", 1)
    retry_seconds = _seconds("GRADSTORE_S3_RETRY_SECONDS", 180.0)
    return S3Settings(
        endpoint=endpoint,
        region=os.environ.get("AWS_REGION")
        or os.environ.get("AWS_DEFAULT_REGION")
        or str(profile.get("region", "us-east-1")),
        virtual_hosted=virtual_hosted,
        anonymous=_switch("AWS_SKIP_SIGNATURE", os.environ.get("AWS_SKIP_SIGNATURE", "false")),
        retry_seconds=retry_seconds,
        # At 16 in flight of 64 MiB each, 70 Mbit/s are needed. No longer than all tries together, and never no time at all.
        timeout_seconds=max(1.0, min(_seconds("GRADSTORE_S3_TIMEOUT_SECONDS", 120.0), retry_seconds)),
        session=session,
    )


def _profile() -> tuple[Session, dict[str, Any]]:
    """Return the session of a profile and what the profile says."""
    import botocore.session
    from botocore.exceptions import BotoCoreError

    session = botocore.session.Session()
    try:
        return session, session.get_scoped_config()
    except BotoCoreError as error:
        raise StorageError(f"AWS_PROFILE: {error}. Correct it, or the files in ~/.aws.") from error


def _endpoint(profile: Mapping[str, Any], session: Session) -> str:
    found = {name: os.environ[name] for name in _ENDPOINTS if name in os.environ}
    services = session.full_config.get("services", {}).get(profile.get("services"), {})
    for name, value in (
        ("The profile's services", services.get("s3", {}).get("endpoint_url")),
        ("The profile's endpoint_url", profile.get("endpoint_url")),
    ):
        if value is not None:
            found[name] = value
    for name, value in found.items():
        _require_url(name, value)
    return next(iter(found.values()), "").rstrip("/")


def _require_url(name: str, value: str) -> None:
    refuse_credentials(name, value)
    try:
        url = urlsplit(value)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    # obstore would panic.
    if not usable:
        # What has an @ may be credentials, without the scheme by which they would be known.
        found = "a text with an @" if "@" in value else repr(value)
        raise StorageError(f"{name}: found {found}; accepted: http://HOST or https://HOST, with or without a port.")


def _switch(name: str, value: str) -> bool:
    try:
        return _SWITCH[value.lower()]
    except KeyError:
        raise StorageError(f"{name}: found {value!r}; accepted: true, false.") from None


def _seconds(name: str, default: float) -> float:
    value = os.environ.get(name)
    if value is None:
        return default
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise SpecError(f"{name}: found {value!r}; accepted: a number of seconds from 0.")
    return seconds
