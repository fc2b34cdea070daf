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
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from upath import UPath

    from milepost.args import CheckpointArgs
    from milepost.engine.reading import Checkpoint
    from milepost.manifest import Item
    from milepost.plugins import Plugins

__all__ = ["EngineHandler", "StoredItem", "adapted", "run"]


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
    """Return a handler as the engine needs it."""
    return handler if isinstance(handler, EngineHandler) else _Adapter(handler)


class _Adapter:
    """A handler that reads and writes files, as an item of its own."""

    def __init__(self, handler: CheckpointHandler) -> None:
        self._handler = handler

    def to_item(self, args: CheckpointArgs) -> OwnItem:
        """Give the handler a folder to save into."""
        return OwnItem(lambda folder: self._begin(folder, args), self._handler.typestr())

    def _begin(self, folder: Path, args: CheckpointArgs) -> Callable[[], object]:
        directory = _directory(folder)
        if not isinstance(self._handler, AsyncCheckpointHandler):
            self._handler.save(directory, args=args)
            return lambda: self._handler.finalize(directory)
        futures = run(self._handler.async_save(directory, args=args)) or []

        def complete() -> None:
            for future in futures:
                future.result()
            self._handler.finalize(directory)

        return complete

    def from_item(self, stored: StoredItem, args: CheckpointArgs | None) -> Any:
        """Give the handler the folder it saved into."""
        with folder_of(stored.checkpoint, stored.item) as folder:
            if args is None:
                return self._handler.restore(_directory(folder))
            return self._handler.restore(_directory(folder), args=args)

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
