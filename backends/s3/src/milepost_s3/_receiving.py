"""How the bytes of one object come from the store: in ranges, several of them at once, each straight into its place.

Decides when what was read may be believed. The rule: a range is as long as the store said it would be, and all ranges
of one answer are of one version of the object; else they are read again, and never returned short or mixed.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from milepost.errors import StorageError

from milepost_s3._client import AgainError, Request

if TYPE_CHECKING:
    from milepost.protocols import Buffer

    from milepost_s3._client import Client, Reply, Take

__all__ = ["Source", "read", "read_into"]

_TRIES: Final = 5
_CHUNK: Final = 1 << 20
_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """One object, as it is read: whom to ask, what errors call it, its key, and how much is asked for at once."""

    client: Client
    name: str
    key: str
    part: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """What one range was: how many bytes, of an object of which size and version, and those that had no place."""

    count: int
    size: int
    version: str
    data: bytes = b""


def read(source: Source, start: int, stop: int | None) -> Buffer:
    """Return the bytes `[start, stop)`, which are not none; fewer where the object ends before `stop`."""
    for _ in range(_TRIES):
        # How large the object is, is known from the first range; most have no second.
        first = start + source.part if stop is None else min(stop, start + source.part)
        request, take = _range(source, start, first, None)
        head: _Found = source.client.ask(request, take)
        end = head.size if stop is None else min(stop, head.size)
        if end <= first:
            return head.data
        memory = memoryview(bytearray(end - start))
        memory[: head.count] = head.data
        if _fill(source, first, memory[head.count :], head.version) == end - first:
            return memory
    raise _changing(source)


def read_into(source: Source, start: int, memory: memoryview) -> int:
    """Fill memory with the bytes from `start` on; return how many there were before the object ended."""
    for _ in range(_TRIES):
        count = _fill(source, start, memory, version="")
        if count is not None:
            return count
    raise _changing(source)


def _fill(source: Source, start: int, memory: memoryview, version: str) -> int | None:
    """Return how many bytes were placed; None if they are not all of one version of the object."""
    cuts = range(0, len(memory), source.part)
    places = [memory[cut : cut + source.part] for cut in cuts]
    asked = [
        _range(source, start + cut, start + cut + len(place), place) for cut, place in zip(cuts, places, strict=True)
    ]
    found: list[_Found] = source.client.ask_all(asked)
    # Behind the end of an object there is no version to be told.
    versions = {version, *(each.version for each in found)} - {""}
    expected = min(len(memory), max(0, found[0].size - start)) if found else 0
    return expected if len(versions) <= 1 and sum(each.count for each in found) == expected else None


def _range(source: Source, start: int, stop: int, place: memoryview | None) -> tuple[Request, Take]:
    """Return the request for a range that is not empty, and what takes its bytes."""
    words = {"Key": source.key, "Range": f"bytes={start}-{stop - 1}"}
    behind = {HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE: _Found(0, 0, "")}
    request = Request(f"read {source.name!r}", "get_object", words, answers=behind)
    return request, functools.partial(_taken, request, start, stop, place)


async def _taken(request: Request, start: int, stop: int, place: memoryview | None, reply: Reply) -> _Found:
    body, length, data = reply["Body"], int(reply["ContentLength"]), b""
    try:
        size = _size(request, start, reply)
        expected = max(0, min(stop, size) - start)
        if length != expected:
            raise AgainError(f"the reply has {length} bytes, and should have {expected}")
        if place is None:
            data = await body.read()
            count = len(data)
        else:
            count = await _placed(body, place[:length])
    finally:
        body.close()
    if count != length:
        raise AgainError(f"the reply ended after {count} of {length} bytes")
    return _Found(count, size, str(reply.get("ETag", "")), data)


async def _placed(body: Any, place: memoryview) -> int:
    at = 0
    while chunk := await body.read(_CHUNK):
        place[at : at + len(chunk)] = chunk
        at += len(chunk)
    return at


def _size(request: Request, start: int, reply: Reply) -> int:
    """Return the size of the whole object, as the reply tells it."""
    told = _RANGE.fullmatch(reply.get("ContentRange", ""))
    if told and int(told[1]) == start:
        return int(told[3])
    if not told and not start:
        return int(reply["ContentLength"])  # the whole object, which may be shorter than the range asked for
    raise StorageError(f"cannot {request.what}: the store does not return the range that it was asked for")


def _changing(source: Source) -> StorageError:
    return StorageError(f"cannot read {source.name!r}: it was replaced {_TRIES} times while it was read")
