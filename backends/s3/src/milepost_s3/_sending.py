"""How the bytes of one object go to the store: one request, or an upload in parts, several of them at once.

Decides what is in memory while an object is written, and when it exists. The rule: buffers are copied once, into parts;
of parts at most 128 MiB wait for the store, or two where they are larger. An object appears when its one request
succeeds, or the completion of its upload; whatever else happens, the upload is aborted. Each write has an id of its
own, which the object keeps as metadata: by it a writer that lost a reply recognises its own success.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import secrets
import zlib
from typing import TYPE_CHECKING, Any, Final

from milepost.errors import MilepostError, NotFoundError, StorageError

from milepost_s3._client import Request, Unmet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from concurrent.futures import Future

    from milepost.protocols import Buffer

    from milepost_s3._client import Client, Reply

__all__ = ["MARK", "Writing", "portions"]

MARK: Final = "milepost-write"
"""The name of the metadata that say which write made an object."""

_CONDITIONAL: Final = frozenset({404, 412})
_WAITING: Final = 128 << 20
_MOST_WAITING: Final = 8
_DOUBLED_EVERY: Final = 1000  # parts, so that the ten thousand that S3 allows hold five terabytes and more


def portions(buffers: Iterable[Buffer], size: int) -> Iterator[memoryview]:
    """Copy buffers into parts of a size that doubles now and then; at least one, and only the last one is smaller.

    >>> [bytes(part) for part in portions([b"1", b"2345", b"67"], 3)]
    [b'123', b'456', b'7']
    """
    part = bytearray()
    done = 0
    for buffer in buffers:
        rest = memoryview(buffer)
        while len(part) + len(rest) > size:
            cut = size - len(part)
            part += rest[:cut]
            yield memoryview(part)
            rest, part, done = rest[cut:], bytearray(), done + 1
            size *= 1 if done % _DOUBLED_EVERY else 2
        part += rest
        del rest  # the caller may reuse the buffer, and a view of it would keep it from being resized
    yield memoryview(part)


class Writing:
    """One object that is being written; its appearing may depend on a condition, the parameters of which are given."""

    def __init__(self, client: Client, name: str, key: str, condition: Mapping[str, Any]) -> None:
        self._client = client
        self._name = name
        self._key = key
        self._condition = condition
        self._mark = secrets.token_hex(16)

    def whole(self, data: memoryview) -> None:
        """Send the object in one request; `Unmet` where the condition does not hold."""
        words = {"Key": self._key, "Body": data, "Metadata": {MARK: self._mark}, **self._checksum(data)}
        # Without a condition there is nothing to be expected: a missing bucket is no missing object.
        expected = _CONDITIONAL if self._condition else frozenset[int]()
        self._decide(Request(f"write {self._name!r}", "put_object", {**words, **self._condition}, expected))

    def parts(self, parts: Iterator[memoryview]) -> None:
        """Send the object as an upload in parts; `Unmet` where the condition does not hold."""
        words: dict[str, Any] = {"Key": self._key, "Metadata": {MARK: self._mark}}
        if self._client.checksums:
            words["ChecksumAlgorithm"] = "CRC32"
        what = f"write {self._name!r}"
        upload = self._client.ask(Request(what, "create_multipart_upload", words))["UploadId"]
        words = {"Key": self._key, "UploadId": upload}
        try:
            sent = self._sent(parts, words)
            completion = {**words, "MultipartUpload": {"Parts": sent}, **self._condition}
            self._decide(Request(what, "complete_multipart_upload", completion, _CONDITIONAL))
        except BaseException:
            # What cannot be aborted now is found by `FindsUploads`.
            with contextlib.suppress(MilepostError, Unmet):
                self._client.ask(Request(f"abort {self._name!r}", "abort_multipart_upload", words))
            raise

    def _sent(self, parts: Iterator[memoryview], upload: Mapping[str, Any]) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        waiting: collections.deque[tuple[Future[Reply], int]] = collections.deque()
        try:
            for number, data in enumerate(parts, 1):
                entry = {"PartNumber": number, **self._checksum(data)}
                request = Request(f"write {self._name!r}", "upload_part", {"Body": data, **entry, **upload})
                waiting.append((self._client.start(request), len(data)))
                sent.append(entry)
                while _crowded([size for _, size in waiting], self._client.concurrency):
                    sent[-len(waiting)]["ETag"] = waiting[0][0].result()["ETag"]
                    waiting.popleft()
            while waiting:
                sent[-len(waiting)]["ETag"] = waiting[0][0].result()["ETag"]
                waiting.popleft()
        except BaseException:
            self._client.drop([future for future, _ in waiting])
            raise
        return sent

    def _checksum(self, data: memoryview) -> dict[str, str]:
        # Said here, in a header: botocore would compute the same in the thread of all requests, and on TLS append it to
        # the body in a way that few compatible stores know.
        if not self._client.checksums:
            return {}
        return {"ChecksumCRC32": base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()}

    def _decide(self, request: Request) -> None:
        try:
            self._client.ask(request)
        except Unmet as unmet:
            gone = unmet.code == "NoSuchUpload"
            # A reply that was lost makes the second try fail by the success of the first.
            if (gone or unmet.tries > 1) and self._is_ours():
                return
            if gone:
                raise StorageError(f"cannot write {self._name!r}: its upload was aborted by somebody else") from unmet
            raise

    def _is_ours(self) -> bool:
        try:
            found = self._client.ask(Request(f"read {self._name!r}", "head_object", {"Key": self._key}))
        except NotFoundError:
            return False
        return bool(found.get("Metadata", {}).get(MARK) == self._mark)


def _crowded(sizes: list[int], concurrency: int) -> bool:
    return len(sizes) >= min(concurrency, _MOST_WAITING) or (len(sizes) > 1 and sum(sizes) >= _WAITING)
