"""Checkpoints' bytes as objects of an S3 bucket, below one prefix.

Decides what each question to a storage asks of S3. The rule: nothing is asked but of objects and of lists of them,
nothing is kept from one question to the next, and what must hold at one instant is a condition of one request. A key is
a relative path of plain segments, so that no manifest reaches outside the root by its keys.
"""

from __future__ import annotations

import email.utils
import functools
import hashlib
import itertools
import os
import threading
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote_plus

from milepost.errors import AlreadyExistsError, NotFoundError, StorageError
from milepost.protocols import Upload

from milepost_s3 import _receiving
from milepost_s3._client import Client, Request, Unmet
from milepost_s3._deleting import delete_all
from milepost_s3._driver import specification
from milepost_s3._sending import MARK, Writing, portions
from milepost_s3._settings import Settings, place

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from milepost.protocols import Buffer, Json

    from milepost_s3._client import Reply

__all__ = ["S3Storage"]

_PAGE: Final = 1000
_CONDITIONAL: Final = 64 << 20
"""Up to this size a conditional write is one request: Ceph and others heed no condition at the end of an upload."""


class S3Storage:
    """Objects below an `s3://bucket/prefix`, which need not exist before the first write.

    Options are those of `s3fs.S3FileSystem` (`key`, `secret`, `token`, `anon`, `profile`, `endpoint_url`,
    `requester_pays`, `client_kwargs`, `config_kwargs`, `s3_additional_kwargs`, ...) and these:

    - `region`: the region of the bucket;
    - `timeout`: after how many seconds one try of one request, body included, is given up;
    - `retries`: how often a request is repeated after failures that pass by themselves;
    - `concurrency`: how many requests are under way at once;
    - `part_bytes`: how large the parts are in which large objects are sent and read, from 5 MiB on. Of each object
      that is being written at most eight parts and 128 MiB wait for the store, or one if it is larger.

    A version changes with every write of milepost's. Of two writes of others within a second that store the same bytes,
    it may be the same.
    """

    def __init__(
        self,
        url: str,
        /,
        *,
        region: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        concurrency: int = 16,
        part_bytes: int = 16 << 20,
        **options: Any,
    ) -> None:
        self._bucket, self._root = place(url)
        self.url: str = url.rstrip("/")
        self.commit = "create"
        self._settings = Settings(region, timeout, retries, concurrency, part_bytes, options)
        self._settings.check(url)
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._made: Client | None = None
        self._inherited: list[Client | None] = []

    @property
    def request_bytes(self) -> int:
        """How many bytes a request should move: a part."""
        return self._settings.part_bytes

    @property
    def writes_at_once(self) -> int:
        """How many objects to write at once at the most: one, of which several parts are sent at once."""
        return 1

    # --- reading ---

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """Return the bytes `[start, stop)` of an object; fewer where it ends before `stop`."""
        whole = self._key(key)
        if stop is not None and stop <= start:
            return b""
        return _receiving.read(self._source(key, whole), start, stop)

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        """Fill the buffer with the bytes from `start` on; return how many there were before the object ended."""
        whole = self._key(key)
        if not buffer.nbytes:
            return 0
        return _receiving.read_into(self._source(key, whole), start, buffer.cast("B"))

    def size(self, key: str) -> int:
        """Return the size of an object in bytes."""
        return int(self._head(key)["ContentLength"])

    def children(self, prefix: str) -> Iterable[str]:
        """Return the names directly below a prefix; those that are prefixes themselves end in "/"."""
        whole = self._prefix(prefix)
        names: list[str] = []
        for page in self._pages("list", whole, Delimiter="/"):
            names += (each["Prefix"].removeprefix(whole) for each in page.get("CommonPrefixes", ()))
            names += (each["Key"].removeprefix(whole) for each in page.get("Contents", ()))
        # Other programs leave objects that stand for folders; these have no name in there.
        return [name for name in names if name.removesuffix("/")]

    def keys_after(self, prefix: str, key: str) -> Sequence[str]:
        """Return the first keys below a prefix that come after a key, at all depths; none if there are no more."""
        after = {"StartAfter": self._root + key} if key else {}
        for page in self._pages("list", self._prefix(prefix), MaxKeys=_PAGE, **after):
            keys = [each["Key"].removeprefix(self._root) for each in page.get("Contents", ())]
            if keys := [each for each in keys if each and not each.endswith("/")]:
                return keys
        return []

    def time(self) -> float:
        """Return what the store's clock says, in seconds since the epoch."""
        reply = self._client.ask(self._listing("ask for the time at", self._root, MaxKeys=1))
        try:
            told = email.utils.parsedate_to_datetime(reply["ResponseMetadata"]["HTTPHeaders"]["date"])
        except (KeyError, ValueError) as error:
            raise StorageError(f"cannot tell the time at {self.url!r}: its replies carry no date") from error
        return told.timestamp()

    # --- writing ---

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Store the buffers as one object: wholly and durably, or not at all.

        Up to the size of a part it is one request. A write that failed for want of a reply may still take place.
        """
        parts = portions(buffers, self._settings.part_bytes)
        self._send(self._writing(key, {}), next(parts), parts)

    def create(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Store a new object as `write` does, or raise `AlreadyExistsError` and change nothing."""
        parts = portions(buffers, max(self._settings.part_bytes, _CONDITIONAL))
        try:
            self._send(self._writing(key, {"IfNoneMatch": "*"}), next(parts), parts)
        except Unmet as unmet:
            raise AlreadyExistsError(f"cannot create {self._name(key)!r}: an object is there") from unmet

    def version(self, key: str) -> str:
        """Return an opaque tag that differs whenever the object was written again."""
        return _version(self._head(key))

    def replace(self, key: str, buffers: Iterable[Buffer], version: str) -> None:
        """Store the object as `write` does if its version is still that one, else raise `AlreadyExistsError`."""
        error = AlreadyExistsError(f"cannot replace {self._name(key)!r}: another writer came before")
        try:
            found = _version(self._head(key))
        except NotFoundError as missing:
            raise error from missing
        # Equal bytes have equal tags, and the store compares nothing else. Other refusals are left to it: whether it
        # heeds the condition is for others to find out.
        if _tag(found) == _tag(version) and found != version:
            raise error
        try:
            self._swap(key, portions(buffers, max(self._settings.part_bytes, _CONDITIONAL)), version)
        except Unmet as unmet:
            raise error from unmet

    def delete(self, key: str) -> None:
        """Remove an object, or with a key that ends in "/" everything below it; what is gone already is no error."""
        if key and not key.endswith("/"):
            gone = {HTTPStatus.NOT_FOUND: None}
            words = {"Key": self._key(key)}
            self._client.ask(Request(f"delete {self._name(key)!r}", "delete_object", words, answers=gone))
            return
        for page in self._pages("delete", self._prefix(key)):
            if keys := [each["Key"] for each in page.get("Contents", ())]:
                delete_all(self._client, f"s3://{self._bucket}", keys)

    # --- uploads in parts ---

    def uploads(self, prefix: str) -> Iterable[Upload]:
        """Return the unfinished uploads of keys below a prefix."""
        words: dict[str, Any] = {"Prefix": self._prefix(prefix), "EncodingType": "url"}
        found: list[Upload] = []
        while True:
            what = f"list the uploads below {self._name(prefix)!r}"
            page = self._client.ask(Request(what, "list_multipart_uploads", words))
            if page.get("Uploads") and "EncodingType" in words and page.get("EncodingType") != "url":
                # Ceph encodes keys when asked to and does not say so; others just do not. In plain words all are right.
                del words["EncodingType"]
                continue
            decoded = unquote_plus if page.get("EncodingType") == "url" else str
            for each in page.get("Uploads", ()):
                key = decoded(each["Key"]).removeprefix(self._root)
                found.append(Upload(key, each["UploadId"], each["Initiated"].timestamp()))
            if not page.get("IsTruncated"):
                return found
            words |= {"KeyMarker": decoded(_next(page, "NextKeyMarker"))}
            words |= {"UploadIdMarker": page.get("NextUploadIdMarker", "")}

    def abort_upload(self, upload: Upload) -> None:
        """Give an upload up, and remove its parts; what is gone already is no error."""
        what, words = f"abort an upload of {self._name(upload.key)!r}", {"Key": self._key(upload.key)}
        gone = {HTTPStatus.NOT_FOUND: None}
        self._client.ask(Request(what, "abort_multipart_upload", {**words, "UploadId": upload.id}, answers=gone))

    # --- the same objects by other means ---

    def kvstore(self, prefix: str) -> Mapping[str, Json] | None:
        """Return TensorStore's specification of the prefix; None where it cannot be told all that s3fs was told."""
        path = self._prefix(prefix)
        made = self._client.describe(functools.partial(specification, settings=self._settings))
        return None if made is None else {**made, "bucket": self._bucket, "path": path}

    # --- helpers ---

    @property
    def _client(self) -> Client:
        if self._process != os.getpid():
            # A child of a fork has neither its parent's threads nor anybody who would release its locks. What it
            # inherited is kept: closing it would wait for a thread that is not there.
            self._inherited.append(self._made)
            self._process, self._lock, self._made = os.getpid(), threading.Lock(), None
        with self._lock:
            if self._made is None:
                self._made = Client(self.url, self._bucket, self._settings)
            return self._made

    def _name(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _key(self, key: str) -> str:
        try:
            key.encode()
            plain = "\0" not in key and not {"", ".", ".."} & {*key.split("/")}
        except UnicodeEncodeError:
            plain = False
        if not plain:
            raise StorageError(f"cannot use the key {key!r}: it is no relative path of plain names")
        return self._root + key

    def _prefix(self, prefix: str) -> str:
        return f"{self._key(prefix.removesuffix('/'))}/" if prefix else self._root

    def _source(self, key: str, whole: str) -> _receiving.Source:
        return _receiving.Source(self._client, self._name(key), whole, self._settings.part_bytes)

    def _writing(self, key: str, condition: Mapping[str, str]) -> Writing:
        return Writing(self._client, self._name(key), self._key(key), condition)

    def _head(self, key: str) -> Reply:
        reply: Reply = self._client.ask(Request(f"read {self._name(key)!r}", "head_object", {"Key": self._key(key)}))
        return reply

    def _listing(self, verb: str, whole: str, **words: Any) -> Request:
        what = f"{verb} {f's3://{self._bucket}/{whole}'!r}"
        return Request(what, "list_objects_v2", {"Prefix": whole, **words})

    def _pages(self, verb: str, whole: str, **words: Any) -> Iterator[Reply]:
        while True:
            page = self._client.ask(self._listing(verb, whole, **words))
            yield page
            if not page.get("IsTruncated"):
                return
            words["ContinuationToken"] = _next(page, "NextContinuationToken")

    def _send(self, writing: Writing, first: memoryview, rest: Iterator[memoryview]) -> None:
        second = next(rest, None)
        if second is None:
            writing.whole(first)
        else:
            writing.parts(itertools.chain([first, second], rest))

    def _swap(self, key: str, parts: Iterator[memoryview], version: str) -> None:
        first, second = next(parts), next(parts, None)
        tag = _tag(version)
        writing = self._writing(key, {"IfMatch": tag})
        plain = tag.strip('"')
        if second is not None:
            writing.parts(itertools.chain([first, second], parts))
        elif hashlib.md5(first, usedforsecurity=False).hexdigest() == plain:
            # The same bytes once more would have the same tag, and who holds the former version could replace this one,
            # too. An upload of one part has another tag.
            writing.parts(iter([first]))
        else:
            try:
                writing.whole(first)
            except Unmet:
                # Ceph knows tags without their quotation marks only.
                if _version(self._head(key)) != version:
                    raise
                self._writing(key, {"IfMatch": plain}).whole(first)


def _next(page: Reply, word: str) -> str:
    if not page.get(word):
        raise StorageError("cannot list all: the store says that there is more, and not how to ask for it")
    return str(page[word])


def _tag(version: str) -> str:
    return version.partition(" ")[0]


def _version(reply: Reply) -> str:
    mark = reply.get("Metadata", {}).get(MARK) or reply["LastModified"].isoformat()
    return f"{reply['ETag']} {mark}"
