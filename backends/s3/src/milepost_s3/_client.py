"""One process's requests to one bucket: how often each is repeated, how long it may take, and what its failure means.

Decides which failures pass by themselves. The rule: a request is repeated here and nowhere else, at most `retries`
times, and each try ends after `timeout` seconds, body included; so every wait ends. What is repeated is what a store
says of its own state (429, 5xx, conflicts that ask for it) and what happens on the way (timeouts, lost connections,
short bodies). A try that failed on the way may have been carried out: whoever asked under a condition learns how many
tries there were.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from milepost.errors import (
    ConfigError,
    MilepostError,
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    noted,
)

from milepost_s3 import _settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
    from concurrent.futures import Future

    from milepost_s3._settings import Settings

__all__ = ["AgainError", "Body", "Client", "Reply", "Request", "Take", "Unmet"]

Reply: TypeAlias = "Mapping[str, Any]"
Take: TypeAlias = "Callable[[Reply], Awaitable[Any]]"

_PORTION: Final = 256 << 10
_LONGEST_PAUSE: Final = 5.0

_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_PASSING_CODES: Final = frozenset(
    {
        *("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "TooManyRequests"),
        *("ConditionalRequestConflict", "OperationAborted"),
        *("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody"),
    }
)
_NO_BUCKET: Final = "NoSuchBucket"
_DENIED: Final = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})
_FULL: Final = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "StorageFull"})
_NEEDS: Final = {
    "get_object": "s3:GetObject",
    "head_object": "s3:GetObject",
    "list_objects_v2": "s3:ListBucket",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "delete_object": "s3:DeleteObject",
    "delete_objects": "s3:DeleteObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
}
_CREDENTIALS: Final = (
    "credentials are those that s3fs finds: the options `key` and `secret`, `profile`, or `anon = true`; else the"
    " environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...), the files in ~/.aws, and what the machine was given"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One request: what it does, as an error would say it, its operation and its parameters.

    Of refusals with the statuses `expected` the caller is told by `Unmet`; those in `answers` stand for a reply.
    """

    what: str
    operation: str
    words: Mapping[str, Any]
    expected: frozenset[int] = frozenset()
    answers: Mapping[HTTPStatus, Any] = dataclasses.field(default_factory=dict)


class Unmet(Exception):  # noqa: N818 - an answer, which never leaves this package
    """Tell that a request got a status it was expected to get, and by how many tries."""

    def __init__(self, status: int, code: str, tries: int) -> None:
        super().__init__(status, code, tries)
        self.status, self.code, self.tries = status, code, tries


class AgainError(Exception):
    """Tell that a reply is not what it should be, and that asking again may help."""


class Body:
    """Bytes to be sent from where they are, a portion at a time, and once."""

    # aiohttp warns of large `bytes`, and reads files in other threads, 64 KiB at a time; an iterator it just sends. And
    # it sends a request again by itself when a connection was lost, so that the reply to the second would pass for that
    # to the first; what cannot be iterated over again it cannot send again.

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0
        self._sent = False

    def __len__(self) -> int:
        return len(self._data)

    def __bool__(self) -> bool:
        return True

    def __aiter__(self) -> AsyncIterator[memoryview]:
        if self._sent:
            raise AgainError("the connection was lost")
        self._sent = True
        return self._portions()

    async def _portions(self) -> AsyncIterator[memoryview]:
        for at in range(0, len(self._data), _PORTION):
            yield self._data[at : at + _PORTION]

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, as whoever signs a request wants them."""
        end = len(self._data) if size is None or size < 0 else self._at + size
        found = bytes(self._data[self._at : end])
        self._at += len(found)
        return found

    def tell(self) -> int:
        """Return how many bytes were read."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to where the next read begins."""
        self._at = offset + (0, self._at, len(self._data))[whence]
        return self._at


class Client:
    """The requests of one process; used by many threads, carried out by the one of fsspec's loop."""

    def __init__(self, url: str, bucket: str, settings: Settings) -> None:
        self._url = url
        self._bucket = bucket
        self._tries = settings.retries + 1
        self._timeout = settings.timeout
        try:
            self._fs = _settings.opened(settings)
        except Exception as error:
            raise _unopened(url, error) from error
        self._loop = self._fs.loop
        self._gate = asyncio.Semaphore(settings.concurrency)
        self._client: Any = None
        config = self._waited(self._connected()).meta.config
        self.concurrency: int = settings.concurrency
        # The setting by which users of stores that know no checksums switch them off, in all clients at once.
        self.checksums: bool = getattr(config, "request_checksum_calculation", None) != "when_required"

    def ask(self, request: Request, take: Take | None = None) -> Any:
        """Return the reply, or what `take` makes of it; raise `Unmet` for an expected refusal."""
        return self._waited(self._answered(request, take))

    def ask_all(self, asked: Iterable[tuple[Request, Take | None]]) -> list[Any]:
        """Return what is made of many replies, in order; when one fails, none goes on behind the caller's back."""
        results: list[Any] = self._waited(self._answered_all(list(asked)))
        return results

    def start(self, request: Request) -> Future[Reply]:
        """Ask without waiting for the reply."""
        return asyncio.run_coroutine_threadsafe(self._answered(request, None), self._loop)

    def drop(self, started: Iterable[Future[Reply]]) -> None:
        """Give up what was started, and return when nothing of it goes on."""
        for each in started:
            each.cancel()
        self._waited(_two_turns())

    def describe(self, act: Callable[[Any, Any], Awaitable[Any]]) -> Any:
        """Return what `act` finds in s3fs's file system and the client it made."""

        async def acted() -> Any:
            return await act(self._fs, await self._connected())

        return self._waited(acted())

    def _waited(self, answer: Any) -> Any:
        future = asyncio.run_coroutine_threadsafe(answer, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # what interrupts the wait ends the request, too
            del future  # it holds the error, which holds this frame, and so on to the bytes that were sent

    async def _answered_all(self, asked: list[tuple[Request, Take | None]]) -> list[Any]:
        if len(asked) == 1:
            return [await self._answered(*asked[0])]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._answered(*each)) for each in asked]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answered(self, request: Request, take: Take | None) -> Any:
        await self._connected()
        for tried in range(1, self._tries + 1):
            try:
                async with self._gate, asyncio.timeout(self._timeout):
                    return await self._tried(request, take)
            except MilepostError:
                raise
            except Exception as error:
                status, code = _answer(error)
                final = code != _NO_BUCKET and not _passes(error)
                if final and status in request.answers:
                    return request.answers[HTTPStatus(status)]
                if final and status in request.expected:
                    raise Unmet(status, code, tried) from error
                if tried == self._tries or not _passes(error):
                    raise self._failure(request, error, tried) from error
            # noise, so that many writers that were refused at once do not come back at once
            await asyncio.sleep(min(_LONGEST_PAUSE, 0.1 * 2 ** (tried - 1)) * random.uniform(0.5, 1))  # noqa: S311
        raise AssertionError("unreachable")

    async def _tried(self, request: Request, take: Take | None) -> Any:
        words = {"Bucket": self._bucket, **request.words}
        if isinstance(words.get("Body"), memoryview):
            words["Body"] = Body(words["Body"])
        # What the user adds to requests of some kinds; conditions are never among what is filtered.
        added = {**self._fs.s3_additional_kwargs, **self._fs.req_kw}
        method = getattr(self._client, request.operation)
        reply = await method(**{**self._fs._filter_kwargs(method, added), **words})  # noqa: SLF001 - no other way
        return await take(reply) if take else reply

    async def _connected(self) -> Any:
        try:
            client = await self._fs.set_session()
        except Exception as error:
            raise _unopened(self._url, error) from error
        if client is not self._client and client.meta.endpoint_url.startswith("https:"):
            # The checksum and TLS vouch for a body already; hashing it for the signature would hold up other requests.
            config = client.meta.config
            config.s3 = {"payload_signing_enabled": False, **(config.s3 or {})}
        self._client = client
        return client

    def _failure(self, request: Request, error: Exception, tries: int) -> MilepostError:
        what, (status, code) = f"cannot {request.what}", _answer(error)
        if code == _NO_BUCKET:
            return StorageError(f"{what}: there is no bucket {self._bucket!r}")
        if status == HTTPStatus.NOT_FOUND:
            return NotFoundError(f"{what}: no such object")
        if code in _FULL or status == HTTPStatus.INSUFFICIENT_STORAGE:
            return StorageFullError(f"{what}: the store has no room left ({code or status})")
        if isinstance(error, _credential_errors()):
            return noted(StorageDeniedError(f"{what}: {_said(error)}"), _CREDENTIALS)
        if status in {401, 403} or code in _DENIED:
            needs = _NEEDS.get(request.operation, "s3:PutObject")
            return noted(
                StorageDeniedError(f"{what}: the store refused it ({status} {_said(error)})"),
                f"this needs the permission {needs}; without s3:ListBucket, S3 says the same of what is not there",
                _CREDENTIALS,
            )
        tried = f", {tries} times" if tries > 1 else ""
        reason = f"no reply within {self._timeout} seconds" if isinstance(error, TimeoutError) else _said(error)
        return StorageError(f"{what}: {reason}{tried}")


async def _two_turns() -> None:
    # In the first the cancelled tasks are told; in the second they have ended.
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def _answer(error: Exception) -> tuple[int, str]:
    """Return the status and the code of an error reply; 0 and "" for any other failure."""
    reply = getattr(error, "response", None)
    if not isinstance(reply, dict):
        return 0, ""
    return reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), str(reply.get("Error", {}).get("Code", ""))


def _passes(error: Exception) -> bool:
    from aiohttp import ClientError as ConnectionFailure
    from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

    exceptions = _exceptions()
    status, code = _answer(error)
    if status or code:
        return status in _PASSING or code in _PASSING_CODES
    on_the_way = (
        *(exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError),
        *(ConnectionFailure, TimeoutError, ConnectionError, ResponseParserError, AgainError),
    )
    return isinstance(error, on_the_way) and not isinstance(error, exceptions.SSLError)


def _said(error: Exception) -> str:
    """Return what a failure says of itself: the words of the store, or else of the client."""
    reply = getattr(error, "response", None)
    if not isinstance(reply, dict):
        return str(error) or type(error).__name__
    status, code = _answer(error)
    text = " ".join(str(reply.get("Error", {}).get("Message", "")).split())
    return f"{code or status}: {text}" if text else code or str(status)


def _exceptions() -> Any:
    from botocore import exceptions  # type: ignore[import-untyped]

    return exceptions


def _credential_errors() -> tuple[type[Exception], ...]:
    exceptions = _exceptions()
    # Which of them there are depends on the version of botocore.
    names = (
        *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
        *("TokenRetrievalError", "SSOError", "UnauthorizedSSOTokenError", "LoginError"),
    )
    return tuple(getattr(exceptions, name) for name in names if hasattr(exceptions, name))


def _unopened(url: str, error: Exception) -> MilepostError:
    """Return the error for a client that could not be made: what it was told is wrong."""
    kind = StorageDeniedError if isinstance(error, _credential_errors()) else ConfigError
    return noted(kind(f"cannot open {url!r}: {_said(error)}"), _CREDENTIALS)
