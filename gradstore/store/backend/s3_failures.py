"""What can go wrong in a request to S3: which failures pass, and what each error says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NoReturn, TypeVar

from gradstore.errors import ObjectMissingError, StorageError

if TYPE_CHECKING:
    from tenacity import RetryCallState

T = TypeVar("T")

Action = Literal["read", "list", "write", "delete", "sweep"]

# A server that never answered is probably misaddressed: its user is told soon.
_UNREACHED_SECONDS: Final = 20.0
_LONGEST_PAUSE_SECONDS: Final = 20.0

# Stands for S3's own code where no whole answer came: refused, reset, timed out or cut short.
UNREACHABLE: Final = "Unreachable"

# Codes of answers that are no refusal: the same request may succeed later.
_PASSING: Final = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "ThrottlingException",
        "Throttling",
        "XAmzContentSHA256Mismatch",
        UNREACHABLE,
    }
)
_PASSING_STATUS: Final = frozenset({408, 409, 429})
_REFUSED_STATUS: Final = frozenset({403, 405, 501})
_MISSING: Final = frozenset({"NoSuchKey", "NotFound"})

_PERMISSIONS: Final[dict[Action, str]] = {
    "read": "s3:GetObject",
    "list": "s3:ListBucket",
    "write": "s3:PutObject",
    "delete": "s3:DeleteObject",
    "sweep": "s3:ListBucketMultipartUploads and s3:AbortMultipartUpload",
}
_REMEDIES: Final = {
    "NoSuchBucket": "Create the bucket, or correct run.store and AWS_ENDPOINT_URL.",
    "SignatureDoesNotMatch": "Check AWS_SECRET_ACCESS_KEY.",
    "InvalidAccessKeyId": "Check AWS_ACCESS_KEY_ID.",
    "InvalidToken": "Check AWS_SESSION_TOKEN.",
    "ExpiredToken": "Renew the credentials, then run the same command again.",
    "RequestTimeTooSkewed": "Set this machine's clock.",
    "AuthorizationHeaderMalformed": "Set AWS_REGION to the region of the bucket.",
    "PermanentRedirect": "Set AWS_REGION to the region of the bucket.",
    "SlowDown": "The server asks for fewer requests: use fewer workers, then run the same command again.",
    "NotImplemented": "The server does not offer this request.",
}
_DEFAULT_REMEDY: Final = "Check that AWS_ENDPOINT_URL is right and reachable, then run the same command again."


class PassingError(StorageError):
    """A request failed in a way that may pass; it is sent again.

    Attributes
    ----------
    answered
        Whether the server answered at all.
    """

    def __init__(self, message: str, *, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


class EmptyRangeError(StorageError):
    """The object has no byte in the range that was asked for."""


class RefusedError(StorageError):
    """The server may not or cannot do what was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What a client says of a request that failed.

    Attributes
    ----------
    code
        S3's own error code; `UNREACHABLE` if no whole answer came, ``""`` if the answer holds no code.
    status
        Of the HTTP answer; 0 if none is known.
    reason
        In the words of the server or of the client.
    """

    code: str
    status: int
    reason: str

    @property
    def passes(self) -> bool:
        """Whether the same request may succeed later."""
        return (
            self.code in _PASSING
            or self.status in _PASSING_STATUS
            or (self.status >= 500 and self.status not in _REFUSED_STATUS)
        )

    def error(self, where: str, action: Action, *, anonymous: bool) -> StorageError:
        """Make the error: what was found, where, and what to change."""
        if self.code in _MISSING or (self.status == 404 and not self.code and action == "read"):
            return ObjectMissingError(f"{where}: no such object.")
        code = self.code or (f"status {self.status}" if self.status else "Failed")
        message = f"{where}: {code}: {self.reason.rstrip('. ')}. {self._remedy(action, anonymous)}"
        if self.status == 416:
            return EmptyRangeError(message)
        if self.passes:
            return PassingError(message, answered=self.status > 0)
        return RefusedError(message) if self.status in _REFUSED_STATUS else StorageError(message)

    def _remedy(self, action: Action, anonymous: bool) -> str:
        if self.code in _REMEDIES:
            return _REMEDIES[self.code]
        if self.code != "AccessDenied" and self.status != 403:
            return _DEFAULT_REMEDY
        lacking = f"{action} there: that needs {_PERMISSIONS[action]} on the bucket and prefix."
        if anonymous:
            return f"Requests are unsigned, because AWS_SKIP_SIGNATURE is set, and the public may not {lacking}"
        if self.code:
            return f"These credentials may not {lacking}"
        return f"Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they may {lacking}"


def botocore_failure(error: BaseException) -> Failure | None:
    """What an exception of botocore means; None if it is none of botocore's."""
    from botocore.exceptions import BotoCoreError, ClientError

    if isinstance(error, ClientError):
        said = error.response.get("Error", {})
        # Without a body, the code is the status.
        code = "" if (name := str(said.get("Code", ""))).isdigit() else name
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return Failure(code=code, status=status, reason=said.get("Message") or str(error))
    if isinstance(error, BotoCoreError):
        return Failure(code=UNREACHABLE, status=0, reason=str(error))
    return None


class Retries:
    """Sends requests again that failed in a way that may pass, after pauses that grow, with jitter.

    Parameters
    ----------
    seconds
        No request is sent again later than this after it was first sent. Until the server has answered for the first
        time, it is 20 seconds at most.
    """

    def __init__(self, seconds: float) -> None:
        from tenacity import Retrying, retry_if_exception_type, wait_random_exponential

        self._seconds = seconds
        self._reached = False
        self._send = Retrying(
            retry=retry_if_exception_type(PassingError),
            wait=wait_random_exponential(multiplier=0.2, max=_LONGEST_PAUSE_SECONDS),
            stop=self._is_enough,
            retry_error_callback=_give_up,
        )

    def __call__(self, request: Callable[[], T]) -> T:
        """Return the answer to a request; ``request`` sends it once.

        Raises
        ------
        StorageError
            The last failure, with how often it was tried.
        """
        answer = self._send(request)
        self._reached = True
        return answer

    def _is_enough(self, state: RetryCallState) -> bool:
        assert state.outcome is not None
        failed = state.outcome.exception()
        self._reached = self._reached or (isinstance(failed, PassingError) and failed.answered)
        limit = self._seconds if self._reached else min(self._seconds, _UNREACHED_SECONDS)
        return (state.seconds_since_start or 0.0) + state.upcoming_sleep > limit


def _give_up(state: RetryCallState) -> NoReturn:
    assert state.outcome is not None
    error = state.outcome.exception()
    raise StorageError(
        f"{error} Tried {state.attempt_number} times in {state.seconds_since_start:.0f} seconds."
    ) from error
