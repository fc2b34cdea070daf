"""How a range of an object is read: in parts, several at once, all of one generation.

Decides that a reader never sees a mixture of two writes, nor less than there is. The rule: the reply to the first part
says how large the object is and which generation it is; the others ask for that generation, while the first is still
under way. If it is gone by then, the object was overwritten, and everything is read again. A part that ends early is
asked for again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from typing import TYPE_CHECKING, Final

from milepost.errors import StorageError

from milepost_gcs.client import together
from milepost_gcs.messages import EXISTS, GONE, Request

if TYPE_CHECKING:
    from collections.abc import Callable

    import aiohttp

    from milepost_gcs.client import Client

__all__ = ["Wanted", "fetch"]

_TRIES: Final = 4  # of a whole read, when the object is overwritten again and again
_PARTIAL, _WHOLE = 206, 200
_BEHIND_THE_END: Final = 416


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """Which bytes of which object: `count` from `start` on, or all; `place` gives memory for so many as there are."""

    key: str
    path: str
    start: int
    count: int | None
    place: Callable[[int], memoryview]


async def fetch(client: Client, wanted: Wanted) -> int:
    """Read what is wanted; return how many bytes there were."""
    for _ in range(_TRIES):
        try:
            return await _Reading(client, wanted).run()
        except _Overwritten:
            continue
    raise StorageError(f"cannot read '{client.url}/{wanted.key}': it was overwritten {_TRIES} times meanwhile")


class _Overwritten(Exception):  # noqa: N818 - it never leaves this module
    """Say that the generation that is being read is gone."""


class _Reading:
    """One reading of one generation."""

    def __init__(self, client: Client, wanted: Wanted) -> None:
        self._client = client
        self._wanted = wanted
        self._memory: memoryview | None = None
        self._generation: str | None = None
        self._known = asyncio.Event()

    async def run(self) -> int:
        """Read all parts."""
        part = self._client.limits.part_bytes
        count = part if self._wanted.count is None else min(part, self._wanted.count)
        await together([self._part(0, count), self._others(count)])
        return 0 if self._memory is None else len(self._memory)

    async def _others(self, first: int) -> None:
        await self._known.wait()
        part, end = self._client.limits.part_bytes, 0 if self._memory is None else len(self._memory)
        await together(self._part(at, min(part, end - at)) for at in range(first, end, part))

    async def _part(self, at: int, count: int) -> None:
        begin = self._wanted.start + at

        async def take(response: aiohttp.ClientResponse) -> None:
            await self._take(response, at, count)

        request = Request(
            "read",
            self._wanted.key,
            "storage.objects.get",
            "GET",
            f"/download{self._wanted.path}",
            params={"alt": "media", **({} if self._generation is None else {"generation": self._generation})},
            # The bytes as they are: what is compressed on the way has no ranges.
            headers={"Range": f"bytes={begin}-{begin + count - 1}", "Accept-Encoding": "identity"},
            answers=frozenset({_BEHIND_THE_END}) | (GONE | {EXISTS} if self._memory is not None else frozenset()),
            take=take,
        )
        reply = await self._client.ask(request)
        if self._memory is not None and reply.status not in {_PARTIAL, _WHOLE}:
            raise _Overwritten
        self._known.set()

    async def _take(self, response: aiohttp.ClientResponse, at: int, count: int) -> None:
        """Put the body where it belongs."""
        total = self._total(response)
        generation = response.headers.get("X-Goog-Generation")
        if self._memory is None:
            there = max(0, total - self._wanted.start)
            self._generation = generation
            self._memory = self._wanted.place(there if self._wanted.count is None else min(there, self._wanted.count))
            self._known.set()
        elif generation != self._generation:
            raise _Overwritten
        into = self._memory[at : at + count]
        done = 0
        async for chunk in response.content.iter_any():
            if len(chunk) > len(into) - done:
                raise ConnectionError(f"more than {len(into)} bytes came")
            into[done : done + len(chunk)] = chunk
            done += len(chunk)
        if done < len(into):
            raise ConnectionError(f"{done} of {len(into)} bytes came")

    def _total(self, response: aiohttp.ClientResponse) -> int:
        found = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if found:
            return int(found[1])
        if response.content_length is not None and self._wanted.start == 0:
            return response.content_length  # all of it, because it is less than what was asked for
        raise StorageError(f"cannot read '{self._client.url}/{self._wanted.key}': the service returns no ranges of it")
