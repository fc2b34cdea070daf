"""Small JSON documents beside checkpoints, on any storage.

The rule: a document is there whole or not at all. What cannot be read is an error and not an empty document, since the
next update would make the loss final.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from milepost.errors import DamagedError, NotFoundError, StorageError

if TYPE_CHECKING:
    import os
    from concurrent.futures import Future

    from milepost.protocols import Storage
    from milepost.routes import OpenRoute

__all__ = ["MetadataStore", "metadata_store", "opened", "read_body", "read_document"]

_LIMIT = 1 << 30
"""No document is larger than this many bytes."""


@runtime_checkable
class MetadataStore(Protocol):
    """Reads and writes JSON objects by the path or URL of their file."""

    def is_blocking_writer(self) -> bool:
        """Say whether a document is written when `write` returns."""
        ...

    def write(self, file_path: str | os.PathLike[str], metadata: dict[str, Any]) -> None:
        """Write a document, in place of what is there."""
        ...

    def read(self, file_path: str | os.PathLike[str]) -> dict[str, Any] | None:
        """Return a document as last written, None if there is none; `DamagedError` if it cannot be read."""
        ...

    def update(self, file_path: str | os.PathLike[str], **kwargs: Any) -> None:
        """Set some of the keys of a document, which is made if there is none."""
        ...

    def wait_until_finished(self) -> None:
        """Wait until all is written; raise what failed."""
        ...

    def close(self) -> None:
        """Wait until all is written, raise what failed, and take no more."""
        ...


def metadata_store(*, enable_write: bool, blocking_write: bool = False) -> MetadataStore:
    """Return a store of small JSON documents.

    Without `enable_write` it reads only, and whatever it is told to write is left out, as befits a host that is not the
    first. Without `blocking_write` it writes in the background, one after another; failures are raised by
    `wait_until_finished` and `close`.
    """
    if not enable_write:
        return _Reader()
    return _Writer() if blocking_write else _BackgroundWriter()


def read_document(file_path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the JSON object in a file, None if there is no such file; `DamagedError` for anything else."""
    route = opened(file_path)
    body = read_body(route.storage, route.route.name)
    if body is None:
        return None
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"cannot read {route.route.url!r}: it holds {body[:60]!r}, which is no JSON") from error
    if not isinstance(document, dict):
        raise DamagedError(f"cannot read {route.route.url!r}: it holds {body[:60]!r}, which is no JSON object")
    return document


def opened(path: str | os.PathLike[str]) -> OpenRoute:
    """Open the storage of a path or URL."""
    # Finding plugins is no part of `import milepost`.
    from milepost.routes import open_route, resolve

    return open_route(resolve(path))


def read_body(storage: Storage, key: str) -> bytes | None:
    """Return what is stored under a key, None if nothing is."""
    try:
        return bytes(storage.read(key, 0, _LIMIT))
    except NotFoundError:
        return None
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            return None
        raise


class _Reader:
    def is_blocking_writer(self) -> bool:
        return False

    def write(self, file_path: str | os.PathLike[str], metadata: dict[str, Any]) -> None:
        """Leave it to the host that writes."""

    def read(self, file_path: str | os.PathLike[str]) -> dict[str, Any] | None:
        return read_document(file_path)

    def update(self, file_path: str | os.PathLike[str], **kwargs: Any) -> None:
        """Leave it to the host that writes."""

    def wait_until_finished(self) -> None:
        """Nothing is ever under way."""

    def close(self) -> None:
        """Nothing is ever under way."""


class _Writer:
    def __init__(self) -> None:
        self._lock = threading.Lock()

    def is_blocking_writer(self) -> bool:
        return True

    def write(self, file_path: str | os.PathLike[str], metadata: dict[str, Any]) -> None:
        body = json.dumps(metadata).encode()
        with self._lock:
            _write(file_path, body)

    def read(self, file_path: str | os.PathLike[str]) -> dict[str, Any] | None:
        with self._lock:
            return read_document(file_path)

    def update(self, file_path: str | os.PathLike[str], **kwargs: Any) -> None:
        with self._lock:
            document = read_document(file_path) or {}
            _write(file_path, json.dumps(document | kwargs).encode())

    def wait_until_finished(self) -> None:
        """Nothing is under way between calls."""

    def close(self) -> None:
        """Nothing is under way between calls."""


def _write(file_path: str | os.PathLike[str], body: bytes) -> None:
    route = opened(file_path)
    route.storage.write(route.route.name, [body])


class _BackgroundWriter:
    def __init__(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._writer = _Writer()
        self._thread = ThreadPoolExecutor(1, "milepost-metadata")
        self._pending: list[Future[None]] = []

    def is_blocking_writer(self) -> bool:
        return False

    def write(self, file_path: str | os.PathLike[str], metadata: dict[str, Any]) -> None:
        # What the caller changes from now on must not reach the file.
        copied = json.loads(json.dumps(metadata))
        self._pending.append(self._thread.submit(self._writer.write, file_path, copied))

    def read(self, file_path: str | os.PathLike[str]) -> dict[str, Any] | None:
        from concurrent.futures import wait

        wait(self._pending)
        return self._writer.read(file_path)

    def update(self, file_path: str | os.PathLike[str], **kwargs: Any) -> None:
        copied = json.loads(json.dumps(kwargs))
        self._pending.append(self._thread.submit(self._writer.update, file_path, **copied))

    def wait_until_finished(self) -> None:
        from concurrent.futures import wait

        pending, self._pending = self._pending, []
        wait(pending)
        for written in pending:
            written.result()

    def close(self) -> None:
        self._thread.shutdown()
        self.wait_until_finished()
