"""Decide what an object store does: every verb happens at one instant, and a condition is judged in that instant.

The rule: one lock, held for every look and every change, so that whatever clients do at once has an order. Nothing is
visible of an upload until it is completed. Bytes are kept as they came: nobody may change what was put here.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import threading
import time
from typing import TYPE_CHECKING

from milepost.testing.objects import digests
from milepost.testing.objects.values import ALWAYS, PLAIN, Page, Part, RefusedError, Stored, Upload

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from milepost.testing.objects.values import Condition, Traits, Window

__all__ = ["Store"]

_LEAST_PART = 5 << 20  # bytes of every part but the last, where S3's rules are asked for
_FIRST_GENERATION = 1_700_000_000_000_000  # as long as those of Google Cloud Storage, which clients take for 64 bits


class _Bucket:
    """Objects, and their keys in the order of their UTF-8 bytes, which is that of Python's strings."""

    def __init__(self, objects: Mapping[str, Stored] | None = None) -> None:
        self.objects: dict[str, Stored] = dict(objects or {})
        self.keys: list[str] = sorted(self.objects)

    def put(self, key: str, stored: Stored) -> None:
        if key not in self.objects:
            bisect.insort(self.keys, key)
        self.objects[key] = stored

    def remove(self, key: str) -> None:
        del self.objects[key]
        del self.keys[bisect.bisect_left(self.keys, key)]

    def page(self, window: Window) -> Page:
        objects: list[tuple[str, Stored]] = []
        prefixes: list[str] = []
        at = bisect.bisect_left(self.keys, max(window.start, window.prefix))
        while at < len(self.keys):
            key = self.keys[at]
            if not key.startswith(window.prefix) or (window.end and key >= window.end):
                break
            if len(objects) + len(prefixes) == window.limit:
                return Page(objects, prefixes, key)
            common = _common(key, window)
            if common:
                prefixes.append(common)
                at = bisect.bisect_left(self.keys, _behind(common), at)
            else:
                objects.append((key, self.objects[key]))
                at += 1
        return Page(objects, prefixes, None)


class Store:
    """Buckets of objects, for any number of threads.

    `weak` names what this store does badly, for tests of those who find it out: "if-none-match" and "if-match" are not
    judged, and with "list" new objects are not listed. `skew` is by how many seconds its clock is wrong.
    """

    def __init__(self, buckets: Iterable[str] = ("bucket",)) -> None:
        self.skew: float = 0.0
        self._names = tuple(buckets)
        self._lock = threading.RLock()
        self._weak: frozenset[str] = frozenset()
        self._stale: dict[str, _Bucket] = {}
        self._numbers = itertools.count(1)
        self.clear()

    @property
    def weak(self) -> frozenset[str]:
        """What is done badly; may be set at any time."""
        return self._weak

    @weak.setter
    def weak(self, weak: Iterable[str]) -> None:
        with self._lock:
            self._weak = frozenset(weak)
            stale = self._buckets if "list" in self._weak else {}
            self._stale = {name: _Bucket(bucket.objects) for name, bucket in stale.items()}

    def now(self) -> float:
        """Return the time by this store's clock."""
        return time.time() + self.skew

    def clear(self) -> None:
        """Forget all objects and uploads."""
        with self._lock:
            self._buckets = {name: _Bucket() for name in self._names}
            self._stale = {}
            self._uploads: dict[str, Upload] = {}
            self._finished: dict[str, Stored] = {}

    # --- objects -----------------------------------------------------------------------------------------------------

    def check(self, bucket: str) -> None:
        """Raise unless there is such a bucket."""
        self._bucket(bucket)

    def get(self, bucket: str, key: str) -> bytes:
        """Return the bytes of an object, or raise a `KeyError`."""
        return self.find(bucket, key).data

    def find(self, bucket: str, key: str) -> Stored:
        """Return an object, or raise a `KeyError`."""
        with self._lock:
            return _present(self._bucket(bucket).objects.get(key), key)

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Return the keys that begin with a prefix, in the order of their UTF-8 bytes."""
        with self._lock:
            return [key for key in self._bucket(bucket).keys if key.startswith(prefix)]

    def page(self, bucket: str, window: Window) -> Page:
        """List."""
        with self._lock:
            return (self._stale.get(bucket) or self._bucket(bucket)).page(window)

    def put(
        self, bucket: str, key: str, data: bytes, *, condition: Condition = ALWAYS, traits: Traits = PLAIN
    ) -> Stored:
        """Store an object if the condition holds, or raise `RefusedError`."""
        digest = digests.md5(data)
        with self._lock:
            return self._put(bucket, key, data, digest, condition, traits)

    def delete(self, bucket: str, key: str, condition: Condition = ALWAYS) -> bool:
        """Remove an object if the condition holds; return whether there was one."""
        with self._lock:
            within = self._bucket(bucket)
            found = within.objects.get(key)
            if found is not None or condition.etag is not None:
                self._judge(found, condition, key)
            if found is None:
                return False
            within.remove(key)
            if bucket in self._stale and key in self._stale[bucket].objects:
                self._stale[bucket].remove(key)
            return True

    # --- uploads -----------------------------------------------------------------------------------------------------

    def uploads(self, bucket: str) -> list[Upload]:
        """Return the uploads that were neither completed nor aborted, by key and then by age."""
        with self._lock:
            self._bucket(bucket)
            found = [upload for upload in self._uploads.values() if upload.bucket == bucket]
            return sorted(found, key=lambda upload: (upload.key, upload.started, upload.id))

    def begin(
        self, bucket: str, key: str, condition: Condition = ALWAYS, traits: Traits = PLAIN, *, resumable: bool = False
    ) -> Upload:
        """Begin an upload, in parts or by appending; the condition is judged now and, if resumable, at the end."""
        with self._lock:
            self._judge(self._bucket(bucket).objects.get(key), condition, key)
            number = f"upload-{next(self._numbers):08d}"
            self._uploads[number] = Upload(number, bucket, key, self.now(), condition, traits, resumable)
            return self._uploads[number]

    def upload(self, identity: str, bucket: str = "", key: str = "") -> Upload:
        """Return an upload that goes on, of that key if one is given."""
        with self._lock:
            found = self._uploads.get(identity)
            if found is None or (bucket and (found.bucket, found.key) != (bucket, key)):
                raise RefusedError(
                    404, "NoSuchUpload", f"there is no upload {identity!r}: completed, aborted or never begun"
                )
            return found

    def finished(self, identity: str) -> Stored | None:
        """Return what an upload became, if it was completed by appending."""
        with self._lock:
            return self._finished.get(identity)

    def add_part(self, upload: Upload, number: int, data: bytes) -> Part:
        """Keep a part under its number, in place of one that came before."""
        part = Part(data, digests.md5(data), self.now())
        with self._lock:
            self.upload(upload.id).parts[number] = part
        return part

    def append(self, upload: Upload, start: int, data: bytes) -> int:
        """Add bytes that begin at `start`, less those that are there already; return how many there are."""
        with self._lock:
            size = self.upload(upload.id).size
            if start > size:
                raise RefusedError(503, "ServiceUnavailable", f"cannot append at {start}: there are {size} bytes")
            if start + len(data) > size:
                upload.parts[len(upload.parts)] = Part(data[size - start :], "", self.now())
            return upload.size

    def finish(self, upload: Upload) -> Stored:
        """Make an object of what was appended, if the condition still holds."""
        data = b"".join(part.data for part in upload.parts.values())
        if name := digests.wrong(data, upload.traits.checksums):
            raise RefusedError(400, "BadDigest", f"{name} is not that of the {len(data)} bytes that came")
        digest = digests.md5(data)
        with self._lock:
            del self._uploads[self.upload(upload.id).id]  # a condition that is false now ends the upload, too
            stored = self._put(upload.bucket, upload.key, data, digest, upload.condition, upload.traits)
            self._finished[upload.id] = stored
            return stored

    def complete(self, upload: Upload, parts: Sequence[tuple[int, str]], condition: Condition = ALWAYS) -> Stored:
        """Make an object of the parts of these numbers and ETags, by the rules of S3."""
        with self._lock:
            chosen = _chosen(self.upload(upload.id), parts)
            data = b"".join(part.data for part in chosen)
            digest = hashlib.md5(b"".join(bytes.fromhex(part.etag) for part in chosen), usedforsecurity=False)
            etag = f"{digest.hexdigest()}-{len(chosen)}"
            stored = self._put(upload.bucket, upload.key, data, etag, condition, upload.traits)
            del self._uploads[upload.id]
            return stored

    def abort(self, upload: Upload) -> None:
        """Give an upload up."""
        with self._lock:
            del self._uploads[self.upload(upload.id).id]

    def _put(self, bucket: str, key: str, data: bytes, etag: str, condition: Condition, traits: Traits) -> Stored:
        within = self._bucket(bucket)
        self._judge(within.objects.get(key), condition, key)
        stored = Stored(data, _FIRST_GENERATION + next(self._numbers), etag, self.now(), traits)
        within.put(key, stored)
        return stored

    def _bucket(self, name: str) -> _Bucket:
        found = self._buckets.get(name)
        if found is None:
            raise RefusedError(404, "NoSuchBucket", f"there is no bucket {name!r}")
        return found

    def _judge(self, found: Stored | None, condition: Condition, key: str) -> None:
        if condition.absent and found is not None and "if-none-match" not in self._weak:
            raise RefusedError(412, "PreconditionFailed", f"there is an object {key!r} already", "If-None-Match")
        if "if-match" in self._weak:
            return
        if condition.etag is not None and condition.etag not in {"*", _present(found, key).etag}:
            raise RefusedError(412, "PreconditionFailed", f"the ETag of {key!r} is another", "If-Match")
        if condition.generation not in {None, found.generation if found else 0}:
            raise RefusedError(412, "PreconditionFailed", f"the generation of {key!r} is another", "If-Match")


def _present(found: Stored | None, key: str) -> Stored:
    if found is None:
        raise RefusedError(404, "NoSuchKey", f"there is no object {key!r}")
    return found


def _common(key: str, window: Window) -> str:
    if not window.delimiter:
        return ""
    end = key.find(window.delimiter, len(window.prefix))
    return "" if end < 0 else key[: end + len(window.delimiter)]


def _behind(prefix: str) -> str:
    # The first string after everything that begins with the prefix.
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _chosen(upload: Upload, parts: Sequence[tuple[int, str]]) -> list[Part]:
    numbers = [number for number, _ in parts]
    if not parts:
        raise RefusedError(400, "MalformedXML", "an upload is completed with at least one part")
    if numbers != sorted(set(numbers)):
        raise RefusedError(400, "InvalidPartOrder", f"the parts are not in ascending order: {numbers}")
    for number, etag in parts:
        if number not in upload.parts or upload.parts[number].etag != etag:
            raise RefusedError(400, "InvalidPart", f"there is no part {number} with the ETag {etag!r}")
    if any(len(upload.parts[number].data) < _LEAST_PART for number in numbers[:-1]):
        raise RefusedError(400, "EntityTooSmall", f"every part but the last must have {_LEAST_PART} bytes")
    return [upload.parts[number] for number in numbers]
