"""How every file of a checkpoint comes to be in its manifest: whatever is written through here is measured on the way.

The rule: size and checksum are taken from the bytes as they pass, never from what was read back, so that the manifest
says what was meant to be stored.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from milepost.checksums import Running
from milepost.manifest import FileEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from milepost.protocols import Buffer, Storage

__all__ = ["RecordingStorage"]


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

    def children(self, prefix: str) -> Iterable[str]:
        """List the storage underneath."""
        return self._storage.children(prefix)

    def delete(self, key: str) -> None:
        """Delete from the storage underneath."""
        self._storage.delete(key)

    def size(self, key: str) -> int:
        """Return the size of an object underneath."""
        return self._storage.size(key)


def _measured(buffers: Iterable[Buffer], running: Running, progress: Callable[[int], object]) -> Iterator[Buffer]:
    for buffer in buffers:
        running.update(buffer)
        yield buffer
        progress(len(buffer))
