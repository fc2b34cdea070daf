"""What a storage is: the protocol, carried out on a dictionary under a lock.

This module decides nothing. It says in the fewest words what every storage has to do, and may be read as the
specification of `Storage` and of its extension protocols; where another storage differs, the other one is wrong. The
rule: one lock around everything, so that each method happens at one instant.

`memory://bucket/path` lives as long as the process. All storages of a process share one namespace, so that a
checkpoint saved below `memory://a/b` is found by whoever opens `memory://a`.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import threading
from typing import TYPE_CHECKING

from milepost.errors import AlreadyExistsError, NotFoundError
from milepost.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from milepost.hookspecs import RegisterStorage
    from milepost.protocols import Buffer

__all__ = ["MemoryStorage", "register_storage"]

_PAGE = 1000  # keys at once, as object stores have it


@hookimpl
def register_storage(register: RegisterStorage) -> None:
    """Offer the storage for `memory://` URLs."""
    register("memory", MemoryStorage)


@dataclasses.dataclass(frozen=True, slots=True)
class _Namespace:
    """All objects by full name, each with its version, and the lock that guards them."""

    objects: dict[str, tuple[memoryview, int]] = dataclasses.field(default_factory=dict)
    versions: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)


@functools.cache
def _namespace() -> _Namespace:
    return _Namespace()


class MemoryStorage:
    """Objects in the memory of this process, gone with it.

    >>> storage = MemoryStorage("memory://doc/example")
    >>> storage.write("7/a", [b"12", b"345"])
    >>> bytes(storage.read("7/a", 1, 3))
    b'23'
    >>> sorted(MemoryStorage("memory://doc").children("example/"))
    ['7/']
    """

    def __init__(self, url: str) -> None:
        self.url: str = url.rstrip("/")
        self.commit = "create"
        path = self.url.partition("://")[2].strip("/")
        self._root = f"{path}/" if path else ""
        self._all = _namespace()

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """Return the bytes `[start, stop)` of an object; fewer where it ends before `stop`."""
        return self._find(key)[0][start:stop]

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        """Fill the buffer with the bytes from `start` on; return how many there were before the object ended."""
        found = self.read(key, start, start + len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def size(self, key: str) -> int:
        """Return the size of an object in bytes."""
        return len(self._find(key)[0])

    def version(self, key: str) -> str:
        """Return a tag that differs whenever the object was written again."""
        return str(self._find(key)[1])

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Store the buffers as one object; all are taken before anything changes."""
        self._put(key, _gathered(buffers))

    def create(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Store a new object, or raise `AlreadyExistsError` and change nothing."""
        data = _gathered(buffers)
        with self._all.lock:
            if self._root + key in self._all.objects:
                raise AlreadyExistsError(f"cannot create {self._name(key)!r}: an object is there")
            self._put(key, data)

    def replace(self, key: str, buffers: Iterable[Buffer], version: str) -> None:
        """Store the object if its version is still that one, else raise `AlreadyExistsError` and change nothing."""
        data = _gathered(buffers)
        with self._all.lock:
            if self.version(key) != version:
                raise AlreadyExistsError(f"cannot replace {self._name(key)!r}: it was written again meanwhile")
            self._put(key, data)

    def children(self, prefix: str) -> Iterable[str]:
        """Return the names directly below a prefix; those that are prefixes themselves end in "/"."""
        parts = (key.removeprefix(self._root + prefix).partition("/") for key in self._below(prefix))
        return {name + slash for name, slash, _ in parts}

    def keys_after(self, prefix: str, key: str) -> Sequence[str]:
        """Return the first thousand keys below a prefix that come after a key, in the order of their UTF-8 bytes."""
        keys = (name.removeprefix(self._root) for name in self._below(prefix))
        # Strings are in the order of their code points, which is that of their UTF-8 bytes.
        return heapq.nsmallest(_PAGE, (each for each in keys if each > key))

    def delete(self, key: str) -> None:
        """Remove an object, or with a key that ends in "/" everything below it; what is gone already is no error."""
        with self._all.lock:
            for name in [self._root + key] if key and not key.endswith("/") else self._below(key):
                self._all.objects.pop(name, None)

    def rename(self, source: str, target: str) -> None:
        """Rename prefix `source` to prefix `target`, which must be free."""
        with self._all.lock:
            if self._below(target):
                raise AlreadyExistsError(f"cannot rename {source!r} to {self._name(target)!r}: something is there")
            if not self._below(source):
                raise NotFoundError(f"cannot rename {self._name(source)!r}: nothing is there")
            self._move({source: target})

    def exchange(self, one: str, other: str) -> bool:
        """Swap two prefixes, both of which must exist."""
        with self._all.lock:
            for prefix in (one, other):
                if not self._below(prefix):
                    raise NotFoundError(f"cannot exchange {self._name(prefix)!r}: nothing is there")
            self._move({one: other, other: one})
        return True

    def _name(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _find(self, key: str) -> tuple[memoryview, int]:
        with self._all.lock:
            found = self._all.objects.get(self._root + key)
        if found is None:
            raise NotFoundError(f"cannot read {self._name(key)!r}: no such object")
        return found

    def _put(self, key: str, data: memoryview) -> None:
        with self._all.lock:
            self._all.objects[self._root + key] = (data, next(self._all.versions))

    def _below(self, prefix: str) -> list[str]:
        with self._all.lock:
            return [name for name in self._all.objects if name.startswith(self._root + prefix)]

    def _move(self, names: dict[str, str]) -> None:
        moved = [(self._root + new, name, self._root + old) for old, new in names.items() for name in self._below(old)]
        objects = [(new + name.removeprefix(old), self._all.objects.pop(name)) for new, name, old in moved]
        self._all.objects.update(objects)


def _gathered(buffers: Iterable[Buffer]) -> memoryview:
    # Each buffer is copied before the next is taken: the producer may reuse it (`b"".join` would take them all first).
    data = bytearray()
    for buffer in buffers:
        data += buffer
    return memoryview(data).toreadonly()
