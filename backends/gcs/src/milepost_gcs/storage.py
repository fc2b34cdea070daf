"""Checkpoints' bytes as objects of a bucket of Google Cloud Storage.

Decides which request each verb of a storage is. The rule: only objects are asked for, never buckets, and what is not an
object (a folder, a marker of one, a copy) is never made. So reading needs no more than the permissions
storage.objects.get and list, and writing create and delete besides. Nothing is remembered between two calls but
connections.
"""

from __future__ import annotations

import email.utils
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final

from milepost_gcs.client import GOOGLE, Client
from milepost_gcs.deleting import delete_all, delete_one
from milepost_gcs.messages import Request, object_path, objects_path
from milepost_gcs.options import Limits, checked_client_options, parse_url, plain, refused_key
from milepost_gcs.reading import Wanted, fetch
from milepost_gcs.uploads import Target, put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from milepost.protocols import Buffer, Json

__all__ = ["GcsStorage"]

_PAGE: Final = "1000"
_GENERATIONS: Final = range(1, 1 << 63)


class GcsStorage:
    """Objects below a `gs://` URL, through gcsfs; the bucket has to exist.

    timeout: seconds that one request may take.
    retries: how often a request is repeated that failed for a reason that may pass.
    concurrency: how many requests there may be at once.
    part_bytes: how much one request carries at most, a multiple of 256 KiB. A write holds two parts in memory.
    options: those of gcsfs, unchanged: `token`, `project`, `endpoint_url`, `requester_pays`, `session_kwargs`, ...
    """

    def __init__(
        self,
        url: str,
        /,
        *,
        timeout: float = 60.0,
        retries: int = 5,
        concurrency: int = 16,
        part_bytes: int = 16 << 20,
        **options: Any,
    ) -> None:
        self._bucket, self._root = parse_url(url)
        self.url: str = url.rstrip("/")
        self.commit = "create"
        self._limits = Limits(timeout, retries, concurrency, part_bytes)
        self._options = checked_client_options(options)
        self._opening = os.getpid(), threading.Lock()
        self._client: Client | None = None

    @property
    def request_bytes(self) -> int:
        """How many bytes a request should move: a part."""
        return self._limits.part_bytes

    @property
    def writes_at_once(self) -> int:
        """How many objects to write at once at the most: some, because the parts of one go one after the other."""
        return 4

    # --- reading ---

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """Return the bytes `[start, stop)` of an object; fewer where it ends before `stop`."""
        if stop is not None and stop <= start:
            return b""
        memory: list[bytearray] = [bytearray()]

        def place(count: int) -> memoryview:
            memory[0] = bytearray(count)
            return memoryview(memory[0])

        self._fetch(key, start, None if stop is None else stop - start, place)
        return memory[0]

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        """Fill the buffer with the bytes from `start` on; return how many there were before the object ended."""
        if not buffer.nbytes:
            return 0
        memory = buffer.cast("B")
        return self._fetch(key, start, len(memory), lambda count: memory[:count])

    def size(self, key: str) -> int:
        """Return the size of an object in bytes."""
        return int(self._known("read the size of", key, "size"))

    def children(self, prefix: str) -> Iterable[str]:
        """Return the names directly below a prefix; those that are prefixes themselves end in "/"."""
        below = self._root + prefix
        names: list[str] = []
        for page in self._pages(prefix, {"delimiter": "/", "fields": "items(name),prefixes,nextPageToken"}):
            found = [each["name"] for each in page.get("items", [])] + page.get("prefixes", [])
            # What other tools make for a folder is an object of the prefix's own name, or of a name without letters.
            names += [name for name in (each[len(below) :] for each in found) if name not in {"", "/"}]
        return names

    def keys_after(self, prefix: str, key: str) -> Sequence[str]:
        """Return the first keys below a prefix that come after a key, at all depths; none if there are no more."""
        words = {"fields": "items(name),nextPageToken"}
        if key:
            words["startOffset"] = self._root + key
        for page in self._pages(prefix, words):
            found = [each["name"][len(self._root) :] for each in page.get("items", [])]
            # The service begins with the key itself; what ends in "/" is no key: other tools make it for a folder.
            if keys := [each for each in found if each > key and not each.endswith("/")]:
                return keys
        return []

    def time(self) -> float:
        """Return what the service's clock says, in seconds since the epoch."""
        words = {"prefix": self._root, "maxResults": "1", "fields": "nextPageToken"}
        reply = self._opened().run(self._opened().ask(self._listing("", words)))
        return email.utils.parsedate_to_datetime(reply.headers["Date"]).timestamp()

    # --- writing ---

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Store the buffers as one object: wholly and durably, or not at all."""
        self._put("write", key, buffers, None)

    def create(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Store a new object as `write` does, or raise `AlreadyExistsError` and change nothing."""
        self._put("create", key, buffers, "0")

    def version(self, key: str) -> str:
        """Return the object's generation."""
        return str(self._known("read the version of", key, "generation"))

    def replace(self, key: str, buffers: Iterable[Buffer], version: str) -> None:
        """Store the object as `write` does if its version is still that one, else raise `AlreadyExistsError`."""
        # What is no generation is asked for as one that no object has; 0 would mean that there is to be none.
        known = version.isdecimal() and int(version) in _GENERATIONS
        self._put("replace", key, buffers, version if known else "1")

    def delete(self, key: str) -> None:
        """Remove an object, or with a key that ends in "/" everything below it; what is gone already is no error."""
        client = self._opened()
        if key and not key.endswith("/"):
            client.run(delete_one(client, key, self._path("delete", key)))
            return
        for page in self._pages(key, {"fields": "items(name),nextPageToken"}):
            names = [each["name"] for each in page.get("items", [])]
            client.run(delete_all(client, self._bucket, key, names))

    # --- for native drivers ---

    def kvstore(self, prefix: str) -> Mapping[str, Json] | None:
        """Return TensorStore's specification of a prefix, or None if it would go elsewhere, or as somebody else."""
        client = self._opened()
        # TensorStore takes the endpoint and the credentials from the environment alone.
        told = os.environ.get("TENSORSTORE_GCS_HTTP_URL", GOOGLE).rstrip("/")
        if told != client.endpoint or not self._same_credentials(client):
            return None
        spec: dict[str, Json] = {
            "driver": "gcs",
            "bucket": self._bucket,
            "path": self._root + prefix,
            "gcs_request_concurrency": {"limit": self._limits.concurrency},
            "gcs_request_retries": {"max_retries": max(1, self._limits.retries)},
        }
        payer = self._options.get("requester_pays")
        if payer:
            spec["gcs_user_project"] = {"project_id": payer if isinstance(payer, str) else client.fs.project}
        return spec

    def _same_credentials(self, client: Client) -> bool:
        if "GOOGLE_AUTH_TOKEN_FOR_TESTING" in os.environ:
            return client.anonymous
        # Without credentials it would look for some, which at an endpoint of one's own are nobody's business.
        token = self._options.get("token")
        default = token is None or token == "google_default"  # noqa: S105 - gcsfs's word for where to look
        return (
            default and client.fs.credentials.method != "cache" and not (client.anonymous and client.endpoint != GOOGLE)
        )

    # --- helpers ---

    def _opened(self) -> Client:
        client, pid = self._client, os.getpid()
        if client is not None and client.pid == pid:
            return client
        if self._opening[0] != pid:
            self._opening = pid, threading.Lock()  # another thread may have held it when this process was forked
        with self._opening[1]:
            if self._client is None or self._client.pid != pid:
                self._client = Client(self.url, self._limits, self._options)
                weakref.finalize(self, self._client.close)
            return self._client

    def _path(self, verb: str, key: str) -> str:
        if not plain(key):
            raise refused_key(self.url, verb, key)
        return object_path(self._bucket, self._root + key)

    def _fetch(self, key: str, start: int, count: int | None, place: Callable[[int], memoryview]) -> int:
        client = self._opened()
        return client.run(fetch(client, Wanted(key, self._path("read", key), start, count, place)))

    def _put(self, verb: str, key: str, buffers: Iterable[Buffer], generation: str | None) -> None:
        self._path(verb, key)
        put(self._opened(), Target(verb, key, self._bucket, self._root + key, generation), buffers)

    def _known(self, verb: str, key: str, field: str) -> Any:
        client = self._opened()
        request = Request(verb, key, "storage.objects.get", "GET", self._path(verb, key), params={"fields": field})
        return client.run(client.ask(request)).json()[field]

    def _pages(self, prefix: str, words: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        client = self._opened()
        token: Mapping[str, str] = {}
        while True:
            asked = {"prefix": self._root + prefix, "maxResults": _PAGE, **words, **token}
            page = client.run(client.ask(self._listing(prefix, asked))).json()
            yield page
            if not page.get("nextPageToken"):
                return
            token = {"pageToken": page["nextPageToken"]}

    def _listing(self, prefix: str, words: Mapping[str, str]) -> Request:
        return Request("list", prefix, "storage.objects.list", "GET", objects_path(self._bucket), params=words)
