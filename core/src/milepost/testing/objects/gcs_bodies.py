"""Decide what the parts of a body are in which Google Cloud Storage is sent several things at once.

The rule: lines end as the first one does, because some clients end them with a line feed alone, and data may begin or
end with anything.
"""

from __future__ import annotations

import re
import urllib.parse
from typing import TYPE_CHECKING

from milepost.testing.objects.values import RefusedError
from milepost.testing.objects.wire import Call

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["acts", "related"]


def acts(call: Call) -> Iterator[tuple[str, Call]]:
    """Return the requests of a batch, each with the name by which its answer is told."""
    for part in call.body.split(_boundary(call))[1:-1]:
        top, _, inner = part.replace(b"\r\n", b"\n").strip(b"\n").partition(b"\n\n")
        identity = re.search(rb"(?im)^content-id:\s*<?([^>\n]*)", top)
        method, url = inner.decode().split(maxsplit=2)[:2]
        split = urllib.parse.urlsplit(url)
        query = dict(urllib.parse.parse_qsl(split.query, keep_blank_values=True))
        yield identity[1].decode() if identity else "", Call(method, split.path, query, {}, each=call.each)


def _boundary(call: Call) -> bytes:
    match = re.search(r'boundary="?([^";]+)', call.headers.get("content-type", ""))
    if match is None:
        raise RefusedError(400, "InvalidRequest", "the body has parts without a boundary")
    return b"--" + match[1].encode()


def related(call: Call) -> tuple[bytes, str, bytes]:
    """Return the description in JSON of an object, the type of its content, and the content."""
    # What separates lines is what ends the first one: data may end in a carriage return of its own.
    body, boundary = call.body, _boundary(call)
    first = body.index(boundary)
    line = b"\r\n" if body.startswith(b"\r\n", first + len(boundary)) else b"\n"
    second = body.index(line + boundary, first + len(boundary))
    end = body.rindex(line + boundary + b"--")
    described = body[first:second].partition(line * 2)[2]
    start = body.index(line * 2, second + len(line) + len(boundary)) + 2 * len(line)
    top = re.search(rb"(?im)^content-type:\s*([^\r\n]*)", body[second:start])
    return described, top[1].decode() if top else "", body[start:end]
