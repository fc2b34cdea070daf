"""How bytes become one object: by one request up to a part's size, by a resumable upload above it.

Decides what a lost reply to an upload means. The rule: the object appears with the last request, which carries the
checksum of everything, so that what arrived otherwise never appears. The parts of an upload go one after the other, as
the service wants them, each while the caller makes the next; so an upload holds two parts, and several objects are
written at once by as many threads. After a failure the service is asked how much it has, and the rest is sent.

A condition is met once only, so that a repeated request finds its own success in the way. Objects that are written
under one therefore carry a word of their own, by which the writer knows them again.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import re
import secrets
from typing import TYPE_CHECKING, Any, Final

from milepost.errors import StorageError

from milepost_gcs.messages import DONE, EXISTS, GONE, Reply, Request, cause, object_path, objects_path, passing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from milepost.protocols import Buffer

    from milepost_gcs.client import Client

__all__ = ["Target", "crc32c", "gathered", "put"]

_NEEDS: Final = "storage.objects.create, and storage.objects.delete to replace an object,"
_WRITER: Final = "milepost-writer"
_TYPE: Final = "application/octet-stream"
_BLOCK: Final = 1 << 20
_MORE: Final = 308


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What is written where: the verb and the key for people, the name, and the generation it takes the place of."""

    verb: str
    key: str
    bucket: str
    name: str
    generation: str | None
    writer: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))

    @property
    def path(self) -> str:
        """Return the path to which uploads go."""
        return f"/upload{objects_path(self.bucket)}"

    def params(self, kind: str) -> Mapping[str, str]:
        """Return the parameters of an upload of that kind."""
        condition = {} if self.generation is None else {"ifGenerationMatch": self.generation}
        return {"uploadType": kind, "fields": "size,crc32c,generation", **condition}

    def metadata(self) -> dict[str, Any]:
        """Return what is known of the object before its bytes are."""
        known: dict[str, Any] = {"name": self.name, "contentType": _TYPE}
        return known if self.generation is None else {**known, "metadata": {_WRITER: self.writer}}


def put(client: Client, target: Target, buffers: Iterable[Buffer]) -> None:
    """Store the buffers as one object, wholly or not at all."""
    parts = gathered(buffers, client.limits.part_bytes)
    part, last = next(parts)
    if last:
        client.run(_put_at_once(client, target, part))
    else:
        _put_in_parts(client, target, part, parts)


def gathered(buffers: Iterable[Buffer], size: int) -> Iterator[tuple[bytearray, bool]]:
    """Join buffers to parts of one size, the last of which may be smaller; say of each whether it is the last.

    >>> [(bytes(part), last) for part, last in gathered([b"12345", b"6"], 3)]
    [(b'123', False), (b'456', True)]
    """
    part = bytearray()
    for buffer in buffers:
        view = memoryview(buffer)
        while view:
            if len(part) == size:
                yield part, False
                part = bytearray()
            room = size - len(part)
            part += view[:room]
            view = view[room:]
    yield part, True


def crc32c(data: Buffer, before: int = 0) -> int:
    """Return the checksum of bytes that follow others.

    >>> hex(crc32c(b"6789", crc32c(b"12345")))
    '0xe3069283'
    """
    import google_crc32c

    view, found = memoryview(data), before
    for at in range(0, len(view), _BLOCK):
        # It takes nothing but bytes; the copy of a block stays in the processor's cache.
        found = google_crc32c.extend(found, bytes(view[at : at + _BLOCK]))
    return found


def _encoded(checksum: int) -> str:
    return base64.b64encode(checksum.to_bytes(4, "big")).decode()


# --- one request -----------------------------------------------------------------------------------------------------


async def _put_at_once(client: Client, target: Target, data: bytearray) -> None:
    boundary = secrets.token_hex(16)
    about = json.dumps({**target.metadata(), "crc32c": _encoded(crc32c(data))})
    head = (
        f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{about}\r\n"
        f"--{boundary}\r\nContent-Type: {_TYPE}\r\n\r\n"
    )
    request = Request(
        target.verb,
        target.key,
        _NEEDS,
        "POST",
        target.path,
        params=target.params("multipart"),
        headers={"Content-Type": f'multipart/related; boundary="{boundary}"'},
        body=[head.encode(), data, f"\r\n--{boundary}--\r\n".encode()],
        answers=frozenset({EXISTS}),
    )
    reply = await client.ask(request)
    if reply.status == EXISTS:
        # The first try may have been carried out though its reply was lost.
        if reply.tries > 1 and await _is_ours(client, target):
            return
        raise client.error(request, reply)


async def _is_ours(client: Client, target: Target) -> bool:
    path = object_path(target.bucket, target.name)
    request = Request(
        "tell who wrote",
        target.key,
        "storage.objects.get",
        "GET",
        path,
        params={"fields": "metadata"},
        answers=GONE,
    )
    found = (await client.ask(request)).json().get("metadata")
    return isinstance(found, dict) and found.get(_WRITER) == target.writer


# --- several requests ------------------------------------------------------------------------------------------------


def _put_in_parts(client: Client, target: Target, first: bytearray, parts: Iterator[tuple[bytearray, bool]]) -> None:
    upload = client.run(_begun(client, target))
    try:
        upload.take(first)
        sending = client.start(upload.send(first))
        for part, last in parts:
            upload.take(part)
            sending.result()
            sending = client.start(upload.send(part, last=last))
        sending.result()
    except BaseException:
        # What is under way is told to stop before the upload is given up, or it could still end it.
        client.run(upload.cancel())
        raise


async def _begun(client: Client, target: Target) -> _Upload:
    about = json.dumps(target.metadata()).encode()
    request = Request(
        target.verb,
        target.key,
        _NEEDS,
        "POST",
        target.path,
        params={**target.params("resumable"), "name": target.name},
        headers={"Content-Type": "application/json; charset=UTF-8", "X-Upload-Content-Type": _TYPE},
        body=[about],
    )
    reply = await client.ask(request)
    address = reply.headers.get("Location", "")
    if not address:
        what = f"cannot {target.verb} '{client.url}/{target.key}'"
        raise StorageError(f"{what}: the service began an upload and did not say where")
    return _Upload(client, target, address)


class _Upload:
    """A resumable upload; `take` is called with each part, in order, then `send`."""

    def __init__(self, client: Client, target: Target, address: str) -> None:
        self._client = client
        self._target = target
        self._address = address
        self._checksum = 0
        self._stored = 0
        self._sending: asyncio.Task[Any] | None = None

    def take(self, part: bytearray) -> None:
        """Add a part to the checksum, in the thread of the caller."""
        self._checksum = crc32c(part, self._checksum)

    async def send(self, part: bytearray, *, last: bool = False) -> None:
        """Send a part, and after a failure what is missing of it."""
        self._sending = asyncio.current_task()
        begin, end = self._stored, self._stored + len(part)
        tries = 1
        while True:
            before = self._stored
            request = self._request(memoryview(part)[before - begin :], end, last=last)
            outcome = await self._client.attempt(request)
            if not isinstance(outcome, Reply) or passing(outcome):
                if not passing(outcome) or tries > self._client.limits.retries:
                    raise self._client.error(request, outcome, tries) from cause(outcome)
                await asyncio.sleep(self._client.pause(tries, outcome))
                outcome = await self._client.ask(self._question())
            if self._settled(request, outcome, end, last=last):
                break
            # The service may keep less than it was sent; as long as it keeps something, it goes on.
            tries = tries + 1 if self._stored == before else 1
            if tries > self._client.limits.retries + 1:
                raise self._failed(f"the service keeps no more than {before} bytes of it")
        if last:
            await self._compare(outcome)

    async def cancel(self) -> None:
        """Give the upload up; what fails here is forgotten after a week, and was never visible."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
        await self._client.attempt(self._request_of("DELETE", {}))

    def _settled(self, request: Request, reply: Reply, end: int, *, last: bool) -> bool:
        """Take note of how much the service has; say whether that is all."""
        if reply.status == _MORE:
            found = re.fullmatch(r"bytes=0-(\d+)", reply.headers.get("Range", ""))
            stored = int(found[1]) + 1 if found else 0
            if not self._stored <= stored <= end:
                raise self._failed(f"of {self._stored} to {end} bytes the service has {stored}")
            self._stored = stored
            return stored == end and not last
        if reply.status in GONE:
            raise self._failed("the service has forgotten the upload")
        if reply.status not in DONE:
            raise self._client.error(request, reply)
        if not last or reply.json().get("size", str(end)) != str(end):
            raise self._failed("the service ended the upload before its end")
        return True

    async def _compare(self, reply: Reply) -> None:
        """Look whether what arrived is what was sent: not every emulator does."""
        told = reply.json()
        if told.get("crc32c", _encoded(self._checksum)) == _encoded(self._checksum):
            return
        target = self._target
        path, params = object_path(target.bucket, target.name), {"ifGenerationMatch": told["generation"]}
        await self._client.ask(
            Request("remove", target.key, _NEEDS, "DELETE", path, params=params, answers=GONE | {EXISTS})
        )
        raise self._failed("other bytes arrived than were sent")

    def _failed(self, why: str) -> StorageError:
        return StorageError(f"cannot {self._target.verb} '{self._client.url}/{self._target.key}': {why}")

    def _request(self, data: memoryview, end: int, *, last: bool) -> Request:
        total = str(end) if last else "*"
        span = f"{end - len(data)}-{end - 1}" if data else "*"
        headers = {"Content-Range": f"bytes {span}/{total}"}
        if last:
            headers["X-Goog-Hash"] = f"crc32c={_encoded(self._checksum)}"
        # Not PUT: aiohttp would repeat that by itself, without asking first how much is there.
        return self._request_of("POST", headers, data)

    def _question(self) -> Request:
        request = self._request_of("PUT", {"Content-Range": "bytes */*"})
        return dataclasses.replace(request, answers=GONE | {_MORE, EXISTS})

    def _request_of(self, method: str, headers: Mapping[str, str], data: Buffer = b"") -> Request:
        target = self._target
        return Request(
            target.verb, target.key, _NEEDS, method, self._address, headers=headers, body=[data] if data else ()
        )
