"""How every file of a checkpoint comes to be in its manifest: whatever is written through here is measured on the way.

The rule: size and checksum are taken from the bytes as they pass, never from what was read back, so that the manifest
says what was meant to be stored. Of files that a native driver writes behind the storage's back only the size is taken;
whether their bytes are right, the array writer's record says.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from milepost.checksums import Running
from milepost.manifest import FileEntry
from milepost.protocols import KeepsFolders, NamesDriver, PrefersLargeRequests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from milepost.protocols import Buffer, Json, Storage

__all__ = ["RecordingStorage", "recording"]


def recording(
    storage: Storage, prefix: str, data: str, progress: Callable[[int], object] = lambda _: None
) -> RecordingStorage:
    """Return a storage that records what is written below a prefix, and can be passed by native drivers as before."""
    # By its class: a wrapper that passes on what it does not know must not be bypassed by a native driver.
    if isinstance(storage, KeepsFolders) and hasattr(type(storage), "folder"):
        return _RecordingFolders(storage, prefix, data, progress)
    if isinstance(storage, NamesDriver) and hasattr(type(storage), "kvstore"):
        return _RecordingDriver(storage, prefix, data, progress)
    return RecordingStorage(storage, prefix, data, progress)


class RecordingStorage:
    """A storage that keeps the name, size and checksum of every object written below a prefix."""

    def __init__(
        self, storage: Storage, prefix: str, data: str, progress: Callable[[int], object] = lambda _: None
    ) -> None:
        self._storage = storage
        self._progress = progress
        self._prefix = prefix
        self._data = data
        self._lock = threading.Lock()
        self._files: dict[str, FileEntry] = {}

    @property
    def url(self) -> str:
        """The root of the storage underneath."""
        return self._storage.url

    @property
    def commit(self) -> str:
        """The commit strategy that fits the storage underneath."""
        return self._storage.commit

    @property
    def request_bytes(self) -> int:
        """How many bytes a request to the storage underneath should move."""
        return self._storage.request_bytes if isinstance(self._storage, PrefersLargeRequests) else 1

    @property
    def writes_at_once(self) -> int:
        """How many objects to write at once at the most."""
        return self._storage.writes_at_once if isinstance(self._storage, PrefersLargeRequests) else sys.maxsize

    def files(self) -> list[FileEntry]:
        """Return what was written so far."""
        with self._lock:
            return sorted(self._files.values(), key=lambda file: file.path)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """Read from the storage underneath."""
        return self._storage.read(key, start, stop)

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Write to the storage underneath, and take note."""
        running = Running()
        self._storage.write(key, _measured(buffers, running, self._progress))
        path = self._data + key.removeprefix(self._prefix)
        with self._lock:
            self._files[path] = FileEntry(path, running.size, running.fingerprint())

    def note(self, key: str) -> None:
        """Take note of an object that was written behind the storage's back."""
        path = self._data + key.removeprefix(self._prefix)
        entry = FileEntry(path, self._storage.size(key), "")
        with self._lock:
            self._files[path] = entry
        self._progress(entry.size)

    def children(self, prefix: str) -> Iterable[str]:
        """List the storage underneath."""
        return self._storage.children(prefix)

    def delete(self, key: str) -> None:
        """Delete from the storage underneath, and forget what was noted."""
        self._storage.delete(key)
        path = self._data + key.removeprefix(self._prefix)
        with self._lock:
            gone = [one for one in self._files if one == path or (path.endswith("/") and one.startswith(path))]
            for one in gone:
                del self._files[one]

    def size(self, key: str) -> int:
        """Return the size of an object underneath."""
        return self._storage.size(key)


class _RecordingFolders(RecordingStorage):
    def folder(self, prefix: str) -> Path:
        """Return the folder of a prefix in the storage underneath."""
        storage = self._storage
        assert isinstance(storage, KeepsFolders)  # noqa: S101 - `recording` chose this class by it
        return storage.folder(prefix)


class _RecordingDriver(RecordingStorage):
    def kvstore(self, prefix: str) -> Mapping[str, Json] | None:
        """Return the specification of a prefix in the storage underneath."""
        storage = self._storage
        assert isinstance(storage, NamesDriver)  # noqa: S101 - `recording` chose this class by it
        return storage.kvstore(prefix)


def _measured(buffers: Iterable[Buffer], running: Running, progress: Callable[[int], object]) -> Iterator[Buffer]:
    for buffer in buffers:
        running.update(buffer)
        yield buffer
        progress(len(buffer))
