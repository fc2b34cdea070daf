"""What a handler that leaves reading and writing to the engine does when it is handed a folder after all.

The rule: what it saves there is a whole checkpoint of its own, in a folder below, so that nothing else is touched, and
a save that fails leaves nothing. What it restores from is whatever of ours the folder can be: one that holds such a
checkpoint, a checkpoint itself, or the folder of one item within a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from milepost import urls
from milepost.handlers._items import StoredItem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from milepost.engine.items import OwnItem, TreeItem
    from milepost.engine.reading import Checkpoint
    from milepost.handlers._interface import Directory
    from milepost.plugins import Plugins

__all__ = ["INNER", "reading_checkpoint", "reading_folder", "save_into", "saving_into", "stored_in"]

INNER = "tree"
"""The name of the checkpoint within a handler's folder."""

T = TypeVar("T")


def _url(directory: Directory) -> str:
    path: Any = directory
    return urls.locate(path)


def save_into(directory: Directory, items: Mapping[str, TreeItem[Any] | OwnItem]) -> None:
    """Save items as a checkpoint within a folder."""
    from milepost.engine.saving import Save, SaveRequest

    save = Save(SaveRequest(urls.join(_url(directory), INNER), items))
    save.prepare(lasting=False)
    save.finish()


def saving_into(directory: Directory, items: Mapping[str, TreeItem[Any] | OwnItem]) -> Future[Any]:
    """Save items as a checkpoint within a folder; return when the caller may change what is saved."""
    from milepost.engine.background import Background
    from milepost.engine.saving import Save, SaveRequest

    url = urls.join(_url(directory), INNER)
    save = Save(SaveRequest(url, items))
    snapshot = save.prepare(lasting=True)
    pending = Background().start(save.finish, f"the save of {url!r}")
    snapshot()
    return pending.future


def reading_folder(directory: Directory, act: Callable[[Checkpoint, Plugins, str], T]) -> T:
    """Let `act` read the checkpoint that belongs to a folder; it is told the name of the item, or "AUTO".

    Raises `CheckpointNotFoundError` or `InvalidLayoutError`, which say what is there instead.
    """
    inner = urls.join(_url(directory), INNER)
    return reading_checkpoint(inner if _is_checkpoint(inner) else directory, act)


def reading_checkpoint(directory: Directory, act: Callable[[Checkpoint, Plugins, str], T]) -> T:
    """Let `act` read the checkpoint at a path, or around it if it is the folder of an item, as which it is then told.

    Raises `CheckpointNotFoundError` or `InvalidLayoutError`, which say what is there instead.
    """
    from milepost.engine.loading import reading

    url = _url(directory)
    if not _is_checkpoint(url):
        above, item = urls.split(url)
        if _is_checkpoint(above, item):
            return reading(above, lambda checkpoint, plugins: act(checkpoint, plugins, item))
    return reading(url, lambda checkpoint, plugins: act(checkpoint, plugins, "AUTO"))


def _is_checkpoint(url: str, item: str = "") -> bool:
    from milepost.engine.reading import open_checkpoint
    from milepost.errors import RequestError

    try:
        there = open_checkpoint(url).manifest.items
    except RequestError:
        return False
    return not item or item in there


def stored_in(directory: Directory, act: Callable[[StoredItem], T]) -> T:
    """Let `act` read the one item that belongs to a folder."""
    from milepost.engine.reading import choose_item

    def chosen(checkpoint: Checkpoint, plugins: Plugins, item: str) -> T:
        name, _ = choose_item(checkpoint.manifest, item, checkpoint.url)
        return act(StoredItem(checkpoint, name, plugins))

    return reading_folder(directory, chosen)
