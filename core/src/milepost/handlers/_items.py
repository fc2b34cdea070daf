"""How handlers and the engine meet.

The rule: a handler that knows the engine says what item it saves, and takes apart what was loaded; any other handler is
given a folder, by `adapted`, and is an item that writes its own files. Above this module there is one kind of handler.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from milepost.engine.items import OwnItem, TreeItem, folder_of
from milepost.handlers._interface import AsyncCheckpointHandler, CheckpointHandler

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from pathlib import Path

    from upath import UPath

    from milepost.args import CheckpointArgs
    from milepost.engine.reading import Checkpoint
    from milepost.manifest import Item
    from milepost.plugins import Plugins

__all__ = ["Call", "EngineHandler", "StoredItem", "adapted", "run"]


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """Arguments of a handler that has no class of arguments: they are handed on as they were given."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredItem:
    """One item of an open checkpoint."""

    checkpoint: Checkpoint
    name: str
    plugins: Plugins

    @property
    def item(self) -> Item:
        """What the manifest says of it."""
        return self.checkpoint.manifest.items[self.name]


@runtime_checkable
class EngineHandler(Protocol):
    """A handler that leaves reading and writing to the engine."""

    def to_item(self, args: Any) -> TreeItem[Any] | OwnItem:
        """Say what is saved; raise at once for what cannot be."""
        ...

    def from_item(self, stored: StoredItem, args: Any) -> Any:
        """Load an item; `args` None: as it was saved."""
        ...

    def item_metadata(self, stored: StoredItem) -> Any | None:
        """Return what is known of an item without loading it."""
        ...


def adapted(handler: CheckpointHandler) -> EngineHandler:
    """Return a handler as the engine needs it.

    One that was derived from a handler that knows the engine, and saves or restores in its own way, is given a folder.
    """
    return handler if isinstance(handler, EngineHandler) and not _goes_its_own_way(handler) else _Adapter(handler)


def _goes_its_own_way(handler: object) -> bool:
    mro = type(handler).__mro__
    nearest = {name: next((at for at, cls in enumerate(mro) if name in vars(cls)), len(mro)) for name in _VERBS}
    return min(nearest["save"], nearest["restore"], nearest["async_save"]) < nearest["to_item"]


_VERBS = ("save", "restore", "async_save", "to_item")


class _Adapter:
    """A handler that reads and writes files, as an item of its own."""

    def __init__(self, handler: CheckpointHandler) -> None:
        self._handler = handler

    def to_item(self, args: CheckpointArgs | Call) -> OwnItem:
        """Give the handler a folder to save into."""
        return OwnItem(lambda folder: self._begin(folder, args), self._handler.typestr())

    def _begin(self, folder: Path, args: CheckpointArgs | Call) -> Callable[[], object]:
        directory, call = _directory(folder), args if isinstance(args, Call) else Call((), {"args": args})
        if not isinstance(self._handler, AsyncCheckpointHandler):
            self._handler.save(directory, *call.args, **call.kwargs)
            return lambda: self._handler.finalize(directory)
        futures = run(self._handler.async_save(directory, *call.args, **call.kwargs)) or []

        def complete() -> None:
            for future in futures:
                future.result()
            self._handler.finalize(directory)

        return complete

    def from_item(self, stored: StoredItem, args: CheckpointArgs | Call | None) -> Any:
        """Give the handler the folder it saved into."""
        call = args if isinstance(args, Call) else Call((), {} if args is None else {"args": args})
        with folder_of(stored.checkpoint, stored.item) as folder:
            return self._handler.restore(_directory(folder), *call.args, **call.kwargs)

    def item_metadata(self, stored: StoredItem) -> Any | None:
        """Ask the handler, if it can answer."""
        with folder_of(stored.checkpoint, stored.item) as folder:
            try:
                return self._handler.metadata(_directory(folder))
            except NotImplementedError:
                return None


def _directory(folder: Path) -> UPath:
    from upath import UPath

    return UPath(folder)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end; never on this thread, on which an event loop may be running already."""
    with concurrent.futures.ThreadPoolExecutor(1, "milepost-async") as pool:
        return pool.submit(asyncio.run, work).result()
