"""How objects are removed: one by one request, many by batches of a hundred.

Decides what a batch that was carried out by halves means. The rule: each part of the reply is judged as if it were a
reply of its own; what failed for a reason that may pass is asked again, and only that. Where an endpoint has no
batches, each object is removed by a request of its own.
"""

from __future__ import annotations

import asyncio
import email
import secrets
from email.message import Message
from typing import TYPE_CHECKING, Final

from milepost.errors import StorageError

from milepost_gcs.client import together
from milepost_gcs.messages import DONE, GONE, Reply, Request, object_path, passing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milepost_gcs.client import Client

__all__ = ["delete_all", "delete_one"]

_NEEDS: Final = "storage.objects.delete"
_BATCH: Final = 100
_NO_BATCHES: Final = frozenset({400, 404, 405, 501})


async def delete_one(client: Client, key: str, path: str) -> None:
    """Remove an object; if it is gone already, that is no error."""
    await client.ask(Request("delete", key, _NEEDS, "DELETE", path, answers=GONE))


async def delete_all(client: Client, bucket: str, prefix: str, names: Sequence[str]) -> None:
    """Remove objects by their names, which begin with a prefix."""
    paths = [object_path(bucket, name) for name in names]
    await together(_batch(client, prefix, paths[at : at + _BATCH]) for at in range(0, len(paths), _BATCH))


async def _batch(client: Client, prefix: str, paths: Sequence[str]) -> None:
    tries = 1
    while paths:
        if len(paths) == 1:
            await delete_one(client, prefix, paths[0])
            return
        request = _request(client, prefix, paths)
        reply = await client.ask(request)
        if reply.status in _NO_BATCHES:
            await together(delete_one(client, prefix, path) for path in paths)
            return
        found = _parts(reply)
        if len(found) != len(paths):
            raise StorageError(f"cannot delete '{client.url}/{prefix}': {len(found)} of {len(paths)} were answered")
        failed = [(path, each) for path, each in zip(paths, found, strict=True) if not _is_gone(each)]
        for _, each in failed:
            if not passing(each) or tries > client.limits.retries:
                raise client.error(request, each, tries)
        paths = [path for path, _ in failed]
        if failed:
            await asyncio.sleep(client.pause(tries, failed[0][1]))
        tries += 1


def _is_gone(reply: Reply) -> bool:
    return reply.status in DONE | GONE


def _request(client: Client, prefix: str, paths: Sequence[str]) -> Request:
    boundary = secrets.token_hex(16)
    parts = [
        f"--{boundary}\r\nContent-Type: application/http\r\nContent-Transfer-Encoding: binary\r\n"
        f"Content-ID: <{number}>\r\n\r\nDELETE {client.target(path, {})} HTTP/1.1\r\n\r\n\r\n"
        for number, path in enumerate(paths, 1)
    ]
    return Request(
        "delete",
        prefix,
        _NEEDS,
        "POST",
        "/batch/storage/v1",
        headers={"Content-Type": f'multipart/mixed; boundary="{boundary}"'},
        body=["".join(parts).encode(), f"--{boundary}--\r\n".encode()],
        answers=_NO_BATCHES,
    )


def _parts(reply: Reply) -> list[Reply]:
    """Return the replies in a reply; they come in the order of the requests."""
    kind = reply.headers.get("Content-Type", "")
    message = email.message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + reply.body)
    parts = message.get_payload() if message.is_multipart() else []
    return [_part(each.get_payload(decode=True)) for each in parts if isinstance(each, Message)]


def _part(text: object) -> Reply:
    r"""Read the reply to one request.

    >>> _part(b"HTTP/1.1 404 Not Found\r\nA: b\r\n\r\nnone").status
    404
    """
    data = text if isinstance(text, bytes) else b""
    line, _, rest = data.lstrip().partition(b"\n")
    words = line.split()
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    message = email.message_from_bytes(rest)
    body = message.get_payload(decode=True)
    return Reply(status, dict(message.items()), body if isinstance(body, bytes) else b"")
