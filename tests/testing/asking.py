"""Requests as they go over the wire: no client that repeats, hides or checks anything."""

from __future__ import annotations

import dataclasses
import http.client
import json
import threading
import urllib.parse
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["Answer", "Client", "at_once"]


SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=id/20260101/us-east-1/s3/aws4_request"}
"""Who asks, as far as servers look that compare no signatures."""


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def etag(self) -> str:
        return self.headers["etag"]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.texts("Code")[0]

    def texts(self, *path: str) -> list[str]:
        """Return the texts of the elements of these names, one within the other, anywhere."""
        found: Iterable[ET.Element] = [ET.fromstring(self.body)]  # noqa: S314 - a server of our own
        for name in path:
            found = [each for parent in found for each in parent.iter() if each.tag.rpartition("}")[2] == name]
        return [each.text or "" for each in found]


class Client:
    """Asks one server, over a new connection each time."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._address = urllib.parse.urlsplit(url)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        connection = http.client.HTTPConnection(str(self._address.hostname), self._address.port, timeout=30)
        try:
            named = SIGNED | {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            reply = connection.getresponse()
            return Answer(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def put(self, path: str, body: bytes = b"", **headers: str) -> Answer:
        return self.ask("PUT", path, body, **headers)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: bytes = b"", **headers: str) -> Answer:
        return self.ask("POST", path, body, **headers)

    def delete(self, path: str, **headers: str) -> Answer:
        return self.ask("DELETE", path, **headers)


def at_once(count: int, act: Callable[[int], Any]) -> list[Any]:
    """Let so many threads act, as nearly at once as can be; return what each returned."""
    barrier = threading.Barrier(count)
    results: list[Any] = [None] * count

    def run(who: int) -> None:
        barrier.wait(30)
        results[who] = act(who)

    threads = [threading.Thread(target=run, args=(who,)) for who in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
