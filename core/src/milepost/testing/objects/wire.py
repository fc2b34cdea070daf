"""Decide what a request is and what a reply is, between bytes on a connection and those who understand them.

The rule: a request is taken whole or not at all; one whose body was cut short never reached anybody.
"""

from __future__ import annotations

import dataclasses
import email.utils
import http
import re
import urllib.parse
from typing import TYPE_CHECKING

from milepost.testing.objects.values import RefusedError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping
    from typing import BinaryIO

    from milepost.testing.objects.store import Store

__all__ = ["Call", "Face", "Reply", "Target", "head", "part_of", "read_call", "send"]

_JOINED = 1 << 16  # bytes up to which a body travels with its headers; longer ones are not worth a copy
_BODILESS = frozenset({204, 304})  # statuses that end with their headers
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A request: the path as it came, the query decoded, the names of headers in lower case.

    `each` is asked before each act of a batch, and raises what is to be told instead.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""
    each: Callable[[Target], None] = lambda _target: None


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """An answer; a `Content-Length` among the headers is believed, so that HEAD can tell one without a body."""

    status: int
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: bytes | memoryview = b""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What a request is about: the kind of act, the bucket and key, and whether it may change anything."""

    kind: str
    bucket: str = ""
    key: str = ""
    mutating: bool = False

    @property
    def path(self) -> str:
        """The object or the bucket, as "/bucket/key"."""
        return "/" + "/".join(part for part in (self.bucket, self.key) if part)


@dataclasses.dataclass(frozen=True, slots=True)
class Face:
    """A protocol: how a request is understood, answered, and refused."""

    aim: Callable[[Store, Call], Target]
    answer: Callable[[Store, Call, Target], Reply]
    refuse: Callable[[RefusedError, Target], Reply]


def read_call(file: BinaryIO, sock: socket.socket) -> Call | None:
    """Read the next request; None where the connection ended before it was whole."""
    words = file.readline().decode("latin-1").split()
    if len(words) != 3:  # noqa: PLR2004 - method, path, version
        return None
    headers: dict[str, str] = {}
    while (line := file.readline()) not in {b"\r\n", b"\n"}:
        if not line:
            return None
        name, _, value = line.decode("utf-8", "replace").partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers.get("expect", "").lower() == "100-continue":
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = _body(file, headers)
    if body is None:
        return None
    path, _, query = words[1].partition("?")
    return Call(words[0], path, dict(urllib.parse.parse_qsl(query, keep_blank_values=True)), headers, body)


def _body(file: BinaryIO, headers: Mapping[str, str]) -> bytes | None:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return _chunked(file)
    size = int(headers.get("content-length") or 0)
    body = file.read(size) if size else b""
    return body if len(body) == size else None


def _chunked(file: BinaryIO) -> bytes | None:
    chunks = []
    while size := int(file.readline().partition(b";")[0].strip() or b"-1", 16):
        if size < 0:
            return None
        chunks.append(file.read(size))
        if len(chunks[-1]) < size or file.readline() != b"\r\n":
            return None
    while (line := file.readline()) not in {b"\r\n", b""}:
        pass
    return b"".join(chunks) if line else None


def head(reply: Reply, now: float) -> bytes:
    """Return the status line and the headers."""
    length = {} if reply.status in _BODILESS else {"Content-Length": str(len(reply.body))}
    headers = {"Date": email.utils.formatdate(now, usegmt=True), **length, **reply.headers}
    try:
        phrase = http.HTTPStatus(reply.status).phrase
    except ValueError:
        phrase = "Unknown"
    lines = [f"HTTP/1.1 {reply.status} {phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "\r\n"]).encode("utf-8")


def send(sock: socket.socket, start: bytes, body: bytes | memoryview) -> None:
    """Send a reply."""
    if len(body) <= _JOINED:
        sock.sendall(b"".join((start, body)))
    else:
        sock.sendall(start)
        sock.sendall(body)


def part_of(call: Call, data: bytes) -> tuple[int, Mapping[str, str], memoryview]:
    """Return status, headers and body for what a request wants of an object: all, or a range.

    >>> status, headers, body = part_of(Call("GET", "/", {}, {"range": "bytes=1-"}), b"abc")
    >>> status, headers["Content-Range"], bytes(body)
    (206, 'bytes 1-2/3', b'bc')
    """
    view = memoryview(data)
    match = _RANGE.fullmatch(call.headers.get("range", ""))
    if match is None or match.groups() == ("", ""):
        return 200, {}, view
    first, last = match.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= len(data) or (first and last and int(last) < start):
        raise RefusedError(416, "InvalidRange", f"the range {call.headers['range']!r} is outside of {len(data)} bytes")
    return 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, view[start:stop]
