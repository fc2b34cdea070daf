"""One gcsfs, opened in this process, and how a request is made by it.

Decides how long anybody waits. The rule: credentials, endpoint and connections are gcsfs's, but each request is made
here, because gcsfs repeats for more than half a minute, and turns a refusal into one of a dozen exceptions, without its
status. `timeout` bounds one request from its credentials to the last byte of the reply, `retries` how often it is
repeated; whoever asks gets a reply then, or an error of milepost's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import os
import random
import urllib.parse
from typing import TYPE_CHECKING, Any, Final, TypeVar

from milepost.errors import MilepostError, StorageDeniedError, noted

from milepost_gcs import messages
from milepost_gcs.messages import CREDENTIALS, DONE, Outcome, Reply, Request, UnsignedError, passing

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence

    import aiohttp
    from milepost.protocols import Buffer

    from milepost_gcs.options import Limits

__all__ = ["GOOGLE", "Client", "together"]

T = TypeVar("T")

GOOGLE: Final = "https://storage.googleapis.com"
"""The endpoint of Google's own service."""

_BLOCK: Final = 1 << 20  # a body is handed over in blocks, so that other requests get their turn
_SMALL: Final = 64 << 10  # what is sent at one go
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 32.0
_CLOSING: Final = 5.0


class Client:
    """A gcsfs of one process. Coroutines run on its loop; `run` and `start` bring them there from any thread."""

    def __init__(self, url: str, limits: Limits, options: Mapping[str, Any]) -> None:
        self.pid: int = os.getpid()
        self.url: str = url
        self.limits: Limits = limits
        fs, self._session = _opened(url, options)
        self.fs: Any = fs
        # The environment is looked at once: uploads that are under way stay where they began.
        self.endpoint: str = self.fs._location.rstrip("/")  # noqa: SLF001 - gcsfs offers no public name for it
        self._loop: asyncio.AbstractEventLoop = self.fs.loop
        self._slots = asyncio.Semaphore(limits.concurrency)

    @property
    def anonymous(self) -> bool:
        """Say whether requests carry no credentials."""
        return self.fs.credentials.credentials is None

    def target(self, path: str, params: Mapping[str, str]) -> str:
        """Return a path with parameters, and with who pays where the requester does."""
        words = self.fs._get_params(dict(params))  # noqa: SLF001 - gcsfs knows who pays
        query = urllib.parse.urlencode(words, quote_via=urllib.parse.quote)
        return f"{path}{'&' if '?' in path else '?'}{query}" if query else path

    def start(self, act: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Begin something."""
        return asyncio.run_coroutine_threadsafe(act, self._loop)

    def run(self, act: Coroutine[Any, Any, T]) -> T:
        """Do something, and return what it returns."""
        future = self.start(act)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # without effect unless this thread was interrupted
            raise

    def close(self) -> None:
        """Give up the connections."""
        if self.pid != os.getpid():
            _left_to_the_parent(self._session)
            return
        if self._session.closed or not self._loop.is_running():
            return
        closed = self.start(self._session.close())
        with contextlib.suppress(RuntimeError):
            if asyncio.get_running_loop() is self._loop:
                return  # garbage is collected in the middle of anything
        with contextlib.suppress(Exception):
            closed.result(_CLOSING)

    # --- on the loop ---

    async def ask(self, request: Request) -> Reply:
        """Make a request, again if it failed for a reason that may pass; return the reply, or raise what it means."""
        tries = 1
        while True:
            outcome = await self.attempt(request)
            if isinstance(outcome, Reply) and outcome.status in DONE | request.answers:
                return dataclasses.replace(outcome, tries=tries)
            if not passing(outcome) or tries > self.limits.retries:
                raise self.error(request, outcome, tries) from messages.cause(outcome)
            await asyncio.sleep(self.pause(tries, outcome))
            tries += 1

    async def attempt(self, request: Request) -> Outcome:
        """Make a request once; return the reply, whatever it says, or the error that came instead of one."""
        import aiohttp

        try:
            async with self._slots, asyncio.timeout(self.limits.timeout):
                return await self._made(request)
        except MilepostError:
            raise
        except (aiohttp.ClientError, OSError, UnsignedError) as error:
            return error

    def pause(self, tries: int, outcome: Outcome) -> float:
        """Return how long to wait before the next try; the service may ask for more, up to `timeout`."""
        longest = min(_FIRST_PAUSE * 3 ** (tries - 1), _LONGEST_PAUSE)
        seconds = random.uniform(longest / 2, longest)  # noqa: S311 - that clients come back apart is no secret
        wished = outcome.headers.get("Retry-After", "") if isinstance(outcome, Reply) else ""
        return max(seconds, min(float(wished), self.limits.timeout)) if wished.isdecimal() else seconds

    def error(self, request: Request, outcome: Outcome, tries: int = 1) -> MilepostError:
        """Return the error for a request that failed for good."""
        return messages.error(self.url, request, outcome, tries=tries, anonymous=self.anonymous)

    async def _made(self, request: Request) -> Reply:
        import aiohttp
        import yarl

        headers = await self._signed(request.headers)
        size = sum(map(len, request.body))
        body: bytes | _Body | None = b"".join(request.body) if size <= _SMALL else _Body(request.body)
        if size > _SMALL:
            headers["Content-Length"] = str(size)
        target = self.target(request.path, request.params)
        async with self._session.request(
            request.method,
            yarl.URL(target if "://" in request.path else self.endpoint + target, encoded=True),
            headers=headers,
            data=body or None,
            timeout=aiohttp.ClientTimeout(total=None),
            allow_redirects=False,
        ) as response:
            if request.take is not None and response.status in DONE:
                await request.take(response)
                return Reply(response.status, response.headers)
            return Reply(response.status, response.headers, await response.read())

    async def _signed(self, headers: Mapping[str, str]) -> dict[str, str]:
        sign = self.fs._get_headers  # noqa: SLF001 - what refreshes credentials and adds them
        try:
            if self.anonymous:
                return dict(sign(headers))
            # A refresh is a request of its own that blocks: not on the loop that everybody shares.
            return dict(await asyncio.to_thread(sign, headers))
        except Exception as error:
            raise UnsignedError(str(error)) from error


class _Body:
    """Buffers as a body that can be sent again: aiohttp does so by itself when an idle connection turns out closed."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._buffers = buffers

    async def __aiter__(self) -> AsyncIterator[Buffer]:
        for buffer in self._buffers:
            view = memoryview(buffer)
            for at in range(0, len(view), _BLOCK):
                yield view[at : at + _BLOCK]


def _left_to_the_parent(session: aiohttp.ClientSession) -> None:
    """Make a session unusable in a process that was forked, and touch nothing of it, for ever.

    A child shares the sockets with its parent, and what watches them: to close its own would deafen the parent's.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(session.connector))  # whatever is collected is closed
    session.detach()


async def together(acts: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Do all at once; when one fails, none is left running."""
    tasks = [asyncio.ensure_future(act) for act in acts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _opened(url: str, options: Mapping[str, Any]) -> tuple[Any, aiohttp.ClientSession]:
    """Open gcsfs and its session, before anybody asks to be told of the end of the process: gcsfs closes it badly."""
    from gcsfs.core import GCSFileSystem  # not gcsfs.GCSFileSystem, which asks another service what the bucket is

    chosen = {**options, "use_listings_cache": False, "skip_instance_cache": True}
    emulator = "" if chosen.get("endpoint_url") else _emulator()
    endpoint = chosen.get("endpoint_url") or emulator
    if endpoint:
        chosen["endpoint_url"] = endpoint.rstrip("/")
        # Credentials are for Google; to look for some would be to ask a metadata server that is not there.
        if chosen.get("token") is None and (emulator or endpoint.startswith("http://")):
            chosen["token"] = "anon"  # noqa: S105 - gcsfs's word for none
    try:
        fs: Any = GCSFileSystem(**chosen)
        return fs, asyncio.run_coroutine_threadsafe(fs._set_session(), fs.loop).result()  # noqa: SLF001 - as gcsfs does
    except Exception as error:
        raise noted(StorageDeniedError(f"cannot open {url!r}: gcsfs refuses: {error}"), CREDENTIALS) from error


def _emulator() -> str:
    host = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if host in {"", "default"}:
        return ""
    return host if "://" in host else f"http://{host}"
