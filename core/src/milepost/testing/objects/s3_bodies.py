"""Decide what the body of a request of S3 says, and how a reply is written.

The rule: a body is taken only if it is as long as was announced, and has every checksum that came with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from milepost.testing.objects import digests
from milepost.testing.objects.values import RefusedError
from milepost.testing.objects.wire import Reply

if TYPE_CHECKING:
    from milepost.testing.objects.wire import Call

__all__ = ["children", "data", "element", "leaf", "parsed", "text", "xml"]


def data(call: Call) -> bytes:
    """Return the bytes that were meant: without chunks, and compared with their checksums."""
    headers = dict(call.headers)
    data = call.body
    if headers.get("x-amz-content-sha256", "").startswith("STREAMING-"):
        data, trailers = _unchunked(data)
        headers.update(trailers)
        if int(headers.get("x-amz-decoded-content-length") or len(data)) != len(data):
            raise RefusedError(400, "IncompleteBody", f"{len(data)} bytes came in chunks: others were announced")
    name = digests.wrong(data, headers)
    if name:
        code = "XAmzContentSHA256Mismatch" if name == "x-amz-content-sha256" else "BadDigest"
        raise RefusedError(400, code, f"{name} is not that of the {len(data)} bytes that came")
    return data


def _unchunked(body: bytes) -> tuple[bytes, dict[str, str]]:
    view, chunks, at = memoryview(body), [], 0
    while True:
        end = body.find(b"\r\n", at)
        if end < 0:
            raise RefusedError(400, "IncompleteBody", "the body ended before its last chunk")
        size = int(body[at:end].partition(b";")[0], 16)
        at = end + 2
        if not size:
            break
        chunks.append(view[at : at + size])
        at += size + 2
    lines = (line.partition(":") for line in body[at:].decode().split("\r\n"))
    return b"".join(chunks), {name.strip().lower(): value.strip() for name, _, value in lines if name.strip()}


def parsed(body: bytes) -> ET.Element:
    """Read a document."""
    try:
        return ET.fromstring(body)  # noqa: S314 - tests attack nobody
    except ET.ParseError as error:
        raise RefusedError(400, "MalformedXML", f"the body is no XML: {error}") from error


def children(root: ET.Element, name: str) -> list[ET.Element]:
    """Return the elements of that name directly below one, whatever their namespace."""
    return [each for each in root if each.tag.rpartition("}")[2] == name]


def text(root: ET.Element, name: str) -> str:
    """Return the text of the first element of that name directly below one, "" if there is none."""
    return next((each.text or "" for each in children(root, name)), "")


def leaf(name: str, text: str) -> str:
    """Write an element that holds text."""
    return f"<{name}>{escape(text)}</{name}>"


def element(name: str, *children: str) -> str:
    """Write an element that holds others."""
    return f"<{name}>{''.join(children)}</{name}>"


def xml(body: str, status: int = 200) -> Reply:
    """Return a document as a reply."""
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n{body}'
    return Reply(status, {"Content-Type": "application/xml"}, text.encode("utf-8", "xmlcharrefreplace"))
