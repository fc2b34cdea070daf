"""What a request says, and what the answer to it means.

Decides which failures are worth another try, and which error each is after the last one. The rule: the status and the
reason that the service gives decide, never a guess; and an error names the object, and the way out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import urllib.parse
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from milepost.errors import (
    AlreadyExistsError,
    MilepostError,
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    noted,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    import aiohttp
    from milepost.protocols import Buffer

__all__ = [
    "CREDENTIALS",
    "DONE",
    "EXISTS",
    "GONE",
    "Outcome",
    "Reply",
    "Request",
    "UnsignedError",
    "cause",
    "error",
    "object_path",
    "objects_path",
    "passing",
]

CREDENTIALS: Final = (
    "credentials are found as by gcsfs: the option `token`, the file that GOOGLE_APPLICATION_CREDENTIALS names, "
    "`gcloud auth application-default login`, or the machine's service account"
)
DONE: Final = frozenset({200, 201, 204, 206})
GONE: Final = frozenset({404, 410})
EXISTS: Final = 412

_DENIED: Final = frozenset({401, 403})
_FULL: Final = 507
_PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
_RATES: Final = frozenset({"rateLimitExceeded", "userRateLimitExceeded"})
_QUOTAS: Final = frozenset({"quotaExceeded", "storageQuotaExceeded"})
_LONGEST: Final = 500  # of what is quoted of a refusal that is no JSON


class UnsignedError(Exception):
    """Say that no credentials could be had for a request; it never leaves this package."""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One request: what it does to which key, in words for an error, and how it is said.

    `path` begins with "/", or is the whole URL. `answers` are statuses that are no failures here. `take` reads the body
    of a good reply; it may be called again when the request is repeated. `needs` is the permission.
    """

    verb: str
    key: str
    needs: str
    method: str
    path: str
    params: Mapping[str, str] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: Sequence[Buffer] = ()
    answers: frozenset[int] = frozenset()
    take: Callable[[aiohttp.ClientResponse], Awaitable[None]] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """What came back, and which try it was that got it."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    tries: int = 1

    def json(self) -> dict[str, Any]:
        """Return the body as an object of JSON, {} if it is none."""
        with contextlib.suppress(ValueError):
            found = json.loads(self.body)
            return found if isinstance(found, dict) else {}
        return {}


Outcome: TypeAlias = Reply | Exception
"""What a try ends with."""


def object_path(bucket: str, name: str) -> str:
    """Return the path of one object.

    >>> object_path("bucket", "a/b c")
    '/storage/v1/b/bucket/o/a%2Fb%20c'
    """
    return f"{objects_path(bucket)}/{urllib.parse.quote(name, safe='')}"


def objects_path(bucket: str) -> str:
    """Return the path of a bucket's objects."""
    return f"/storage/v1/b/{urllib.parse.quote(bucket, safe='')}/o"


def passing(outcome: Outcome) -> bool:
    """Say whether a failure may be gone at the next try.

    >>> [passing(Reply(status, {})) for status in (200, 404, 429, 503)]
    [False, False, True, True]
    """
    if isinstance(outcome, Reply):
        return outcome.status in _PASSING or (outcome.status in _DENIED and _refusal(outcome)[0] in _RATES)
    return not isinstance(outcome, UnsignedError) or _may_be_signed_later(outcome)


def cause(outcome: Outcome) -> BaseException | None:
    """Return what an error about a failure is raised from."""
    if isinstance(outcome, UnsignedError):
        return outcome.__cause__
    return outcome if isinstance(outcome, Exception) else None


def error(url: str, request: Request, outcome: Outcome, *, tries: int, anonymous: bool) -> MilepostError:
    """Return the error for a request that failed for good."""
    what = f"cannot {request.verb} '{url}/{request.key}'"
    times = f" ({tries} tries)" if tries > 1 else ""
    if isinstance(outcome, UnsignedError):
        return noted(StorageDeniedError(f"{what}: no credentials: {outcome}{times}"), CREDENTIALS)
    if isinstance(outcome, TimeoutError):
        return noted(
            StorageError(f"{what}: no answer in time{times}"), "raise the option `timeout` if the line is slow"
        )
    if isinstance(outcome, Exception):
        return StorageError(f"{what}: {type(outcome).__name__}: {outcome}{times}")
    return _refused(what, times, request, outcome, anonymous=anonymous)


def _refused(what: str, times: str, request: Request, reply: Reply, *, anonymous: bool) -> MilepostError:
    reason, message = _refusal(reply)
    if reply.status in GONE:
        bucket = request.path.endswith("/o") or "bucket" in message.lower()
        return NotFoundError(f"{what}: no such {'bucket' if bucket else 'object'}")
    if reply.status == EXISTS:
        return AlreadyExistsError(f"{what}: another object is there")
    said = f"the service answers {reply.status} {message or reason!r}{times}"
    if reply.status in _DENIED and reason not in _QUOTAS | _RATES:
        needs = f"it needs {request.needs} on the bucket"
        remedy = f"it was asked without credentials; {CREDENTIALS}" if anonymous else needs
        return noted(StorageDeniedError(f"{what}: {said}"), remedy)
    kind = StorageFullError if reply.status == _FULL or reason in _QUOTAS else StorageError
    notes = ["set the option `requester_pays`"] if "requester pays" in message else []
    return noted(kind(f"{what}: {said}"), *notes)


def _refusal(reply: Reply) -> tuple[str, str]:
    """Return the reason and the message of a refusal, as far as the service gives any."""
    found = reply.json().get("error")
    if not isinstance(found, dict):
        text = found if isinstance(found, str) else reply.body.decode(errors="replace")
        return "", text.strip()[:_LONGEST]
    errors = found.get("errors")
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    return str(first.get("reason", "")), str(found.get("message", ""))


def _may_be_signed_later(failure: BaseException | None) -> bool:
    from google.auth.exceptions import TransportError

    while failure is not None:
        if isinstance(failure, (OSError, TransportError)) or getattr(failure, "retryable", False):
            return True
        failure = failure.__cause__
    return False
