"""Storages on which things go wrong at a chosen moment: the power is cut, a reply is lost, another writer is quicker.

The rule: a fault sits between two changes of the storage, and every such place is tried; nothing is left to luck or to
sleeping. Wrappers offer exactly the extension protocols of the storage they wrap. Removing everything below a prefix is
one change per object, because that is what most stores make of it.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import threading
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from milepost.errors import NotFoundError, StorageError
from milepost.protocols import (
    CreatesOnly,
    ExchangesPrefixes,
    FindsUploads,
    ListsInOrder,
    MapsFiles,
    PrefersLargeRequests,
    ReadsInto,
    RenamesPrefixes,
    ReplacesObjects,
    Storage,
    SyncsPrefixes,
    TellsTime,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, Self

    from milepost.protocols import Buffer, Upload

__all__ = [
    "CuttingStorage",
    "LostReplyStorage",
    "PowerCut",
    "Turnstile",
    "TurnstileStorage",
    "WrappedStorage",
    "emptied",
    "interleave",
    "keys",
    "orders",
]

T = TypeVar("T")

_PATIENCE = 60.0  # seconds until a test that waits for ever fails instead


class PowerCut(BaseException):
    """End a process as a power cut does: no handler of errors takes part."""


def keys(storage: Storage, prefix: str = "") -> list[str]:
    """Return all keys below a prefix, in order."""
    found: list[str] = []
    for child in sorted(storage.children(prefix)):
        found.extend(keys(storage, prefix + child) if child.endswith("/") else [prefix + child])
    return found


class _Everything(
    Storage,
    CreatesOnly,
    ReplacesObjects,
    RenamesPrefixes,
    ExchangesPrefixes,
    SyncsPrefixes,
    ReadsInto,
    MapsFiles,
    ListsInOrder,
    FindsUploads,
    TellsTime,
    PrefersLargeRequests,
    Protocol,
):
    """A storage as far as its wrapper asks for more only where it knows that there is more."""


class WrappedStorage:
    """A storage that passes everything on, through `ask` and `change`; an instance has the wrapped one's extensions."""

    def __new__(cls, storage: Storage, *_args: object, **_options: object) -> Self:
        """Make an instance of a subclass that has the extension protocols of the storage."""
        base: Any = cls
        made: Self = object.__new__(_extended(base, tuple(kind for kind in _EXTENSIONS if isinstance(storage, kind))))
        return made

    def __init__(self, storage: Storage) -> None:
        self.wrapped: _Everything = cast("_Everything", storage)
        self.url: str = storage.url
        self.commit: str = storage.commit

    def ask(self, act: Callable[[], T]) -> T:
        """Do what changes nothing."""
        return act()

    def change(self, act: Callable[[], T]) -> T:
        """Do what changes something, at one instant."""
        return act()

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """Pass on."""
        return self.ask(lambda: self.wrapped.read(key, start, stop))

    def children(self, prefix: str) -> Iterable[str]:
        """Pass on."""
        return self.ask(lambda: list(self.wrapped.children(prefix)))

    def size(self, key: str) -> int:
        """Pass on."""
        return self.ask(lambda: self.wrapped.size(key))

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Pass on."""
        self.change(lambda: self.wrapped.write(key, buffers))

    def delete(self, key: str) -> None:
        """Remove one object after the other, then what may be left of the prefix."""
        if not key or key.endswith("/"):
            for each in keys(self.wrapped, key):
                self.change(functools.partial(self.wrapped.delete, each))
        self.change(lambda: self.wrapped.delete(key))


class _Creates(WrappedStorage):
    def create(self, key: str, buffers: Iterable[Buffer]) -> None:
        self.change(lambda: self.wrapped.create(key, buffers))


class _Replaces(WrappedStorage):
    def version(self, key: str) -> str:
        return self.ask(lambda: self.wrapped.version(key))

    def replace(self, key: str, buffers: Iterable[Buffer], version: str) -> None:
        self.change(lambda: self.wrapped.replace(key, buffers, version))


class _Renames(WrappedStorage):
    def rename(self, source: str, target: str) -> None:
        self.change(lambda: self.wrapped.rename(source, target))


class _Exchanges(WrappedStorage):
    def exchange(self, one: str, other: str) -> bool:
        return self.change(lambda: self.wrapped.exchange(one, other))


class _Syncs(WrappedStorage):
    def sync(self, prefix: str) -> None:
        self.ask(lambda: self.wrapped.sync(prefix))


class _ReadsInto(WrappedStorage):
    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        return self.ask(lambda: self.wrapped.read_into(key, start, buffer))


class _Maps(WrappedStorage):
    def map(self, key: str) -> memoryview:
        return self.ask(lambda: self.wrapped.map(key))


class _Lists(WrappedStorage):
    def keys_after(self, prefix: str, key: str) -> Sequence[str]:
        return self.ask(lambda: self.wrapped.keys_after(prefix, key))


class _FindsUploads(WrappedStorage):
    def uploads(self, prefix: str) -> Iterable[Upload]:
        return self.ask(lambda: list(self.wrapped.uploads(prefix)))

    def abort_upload(self, upload: Upload) -> None:
        self.change(lambda: self.wrapped.abort_upload(upload))


class _TellsTime(WrappedStorage):
    def time(self) -> float:
        return self.ask(self.wrapped.time)


class _PrefersLargeRequests(WrappedStorage):
    @property
    def request_bytes(self) -> int:
        return self.wrapped.request_bytes

    @property
    def writes_at_once(self) -> int:
        return self.wrapped.writes_at_once


_EXTENSIONS: dict[type, type] = {
    CreatesOnly: _Creates,
    ReplacesObjects: _Replaces,
    RenamesPrefixes: _Renames,
    ExchangesPrefixes: _Exchanges,
    SyncsPrefixes: _Syncs,
    ReadsInto: _ReadsInto,
    MapsFiles: _Maps,
    ListsInOrder: _Lists,
    FindsUploads: _FindsUploads,
    TellsTime: _TellsTime,
    PrefersLargeRequests: _PrefersLargeRequests,
}


@functools.cache
def _extended(cls: type, kinds: tuple[type, ...]) -> type[Any]:
    mixins = [_EXTENSIONS[kind] for kind in kinds]
    # What a wrapper of somebody's own overrides comes first; the base of all has to come last.
    return type(cls.__name__, (*mixins, cls) if cls is WrappedStorage else (cls, *mixins), {})


class CuttingStorage(WrappedStorage):
    """A storage whose power is cut before change number `at`, counted from 0; without one it only counts."""

    def __init__(self, storage: Storage, at: int | None = None) -> None:
        super().__init__(storage)
        self.changes: int = 0
        self._at = at

    def ask(self, act: Callable[[], T]) -> T:
        """Answer while there is power."""
        if self.changes == self._at:
            raise PowerCut
        return act()

    def change(self, act: Callable[[], T]) -> T:
        """Count, and die in time."""
        self.ask(lambda: None)
        self.changes += 1
        if self.changes - 1 == self._at:
            self.changes -= 1
            raise PowerCut
        return act()


class LostReplyStorage(WrappedStorage):
    """A storage that carries out change number `at`, counted from 0, and then says that it failed."""

    def __init__(self, storage: Storage, at: int | None = None) -> None:
        super().__init__(storage)
        self.changes: int = 0
        self._at = at

    def change(self, act: Callable[[], T]) -> T:
        """Do it, and perhaps deny it."""
        done = act()
        self.changes += 1
        if self.changes - 1 == self._at:
            raise StorageError("the connection was closed before the reply came")
        return done


class Turnstile:
    """Lets several threads take steps in a given order; between two steps nobody else runs."""

    def __init__(self, order: Sequence[int], count: int) -> None:
        self._order = collections.deque(order)
        self._running = set(range(count))
        self._waiting: set[int] = set()
        self._changed = threading.Condition()

    def step(self, who: int) -> None:
        """Wait until it is this one's turn."""
        with self._changed:
            self._waiting.add(who)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._next() == who, _PATIENCE):
                raise TimeoutError(f"actor {who} waited {_PATIENCE} seconds for its turn")
            self._waiting.remove(who)
            if self._order:
                self._order.popleft()

    def leave(self, who: int) -> None:
        """Take no more steps."""
        with self._changed:
            self._running.remove(who)
            self._changed.notify_all()

    def _next(self) -> int | None:
        if self._waiting != self._running:
            return None  # somebody is still in the middle of a step
        while self._order and self._order[0] not in self._running:
            self._order.popleft()
        return self._order[0] if self._order else min(self._waiting)


class TurnstileStorage(WrappedStorage):
    """A storage on which each change, or with `every_call` each call, is a step through a turnstile."""

    def __init__(self, storage: Storage, turnstile: Turnstile, who: int, *, every_call: bool = False) -> None:
        super().__init__(storage)
        self._turnstile = turnstile
        self._who = who
        self._every_call = every_call

    def ask(self, act: Callable[[], T]) -> T:
        """Answer, perhaps in turn."""
        if self._every_call:
            self._turnstile.step(self._who)
        return act()

    def change(self, act: Callable[[], T]) -> T:
        """Change in turn."""
        self._turnstile.step(self._who)
        return act()


def orders(first: int, second: int) -> Iterator[tuple[int, ...]]:
    """Return every order in which two actors can take so many steps.

    >>> sorted(orders(2, 1))
    [(0, 0, 1), (0, 1, 0), (1, 0, 0)]
    """
    steps = range(first + second)
    for chosen in itertools.combinations(steps, first):
        yield tuple(0 if step in chosen else 1 for step in steps)


def interleave(
    storage: Storage, order: Sequence[int], *acts: Callable[[Storage], object], every_call: bool = False
) -> list[Exception | None]:
    """Let each act run in a thread of its own, stepping in that order; return what each raised."""
    turnstile = Turnstile(order, len(acts))
    raised: list[Exception | None] = [None] * len(acts)

    def run(who: int) -> None:
        try:
            acts[who](TurnstileStorage(storage, turnstile, who, every_call=every_call))
        except Exception as error:  # noqa: BLE001 - handed to the caller, who knows which are expected
            raised[who] = error
        finally:
            turnstile.leave(who)

    threads = [threading.Thread(target=run, args=(who,), daemon=True) for who in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def emptied(storage: Storage) -> Storage:
    """Remove everything, so that the next case starts afresh."""
    for child in list(storage.children("")):
        with contextlib.suppress(NotFoundError):
            storage.delete(child)
    return storage
