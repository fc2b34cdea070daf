"""What is known of a checkpoint without loading it; no JAX here, and no device.

Decides which tree a name means: "AUTO" is "state", else the first tree by name. The rule: what is not there is an error
that says what is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from milepost import urls
from milepost.engine.reading import open_checkpoint
from milepost.errors import InvalidLayoutError, ItemNotFoundError, NotFoundError, StorageError, noted
from milepost.metadata.leaf import leaves_metadata
from milepost.protocols import COMMIT_OBJECT
from milepost.settings import applied
from milepost.structure import build
from milepost.v1._context import current_settings
from milepost.v1._metadata import CheckpointMetadata

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from milepost.engine.reading import Checkpoint
    from milepost.manifest import Item
    from milepost.path._finding import PathLike

__all__ = ["describe", "describe_all", "is_checkpoint", "located", "no_item", "opened", "tree_name"]


class _NoItemError(ItemNotFoundError, NotFoundError, InvalidLayoutError):
    """Say that the checkpoint has no item of that name: what the reference raises in three ways."""


def no_item(checkpoint: Checkpoint, name: str) -> ItemNotFoundError:
    """Return the error for a name that the checkpoint does not have."""
    there = ", ".join(map(repr, checkpoint.manifest.items)) or "none"
    return _NoItemError(f"cannot find item {name!r} of {checkpoint.url!r}: it has {there}")


def located(path: PathLike) -> str:
    """Return the one spelling of a path or URL; a `UPath` of a remote storage is no `os.PathLike`."""
    return urls.locate(cast("str", path))


def opened(path: PathLike) -> Checkpoint:
    """Open a checkpoint under the options of the active context."""
    url = located(path)
    with applied(current_settings(), url):
        return open_checkpoint(url)


def tree_name(checkpoint: Checkpoint, name: str | None) -> str:
    """Return which item a name means, which must be a tree."""
    items = checkpoint.manifest.items
    if name is None and len(items) == 1:
        ((only, item),) = items.items()
        name = None if item.prefix.endswith(f"{only}/") else only  # its files are not in a folder of its name
    if name is None:
        raise noted(
            InvalidLayoutError(f"cannot load {checkpoint.url!r} as a flat tree: its items have names"),
            f"there are: {', '.join(map(repr, items))}",
        )
    if name == "AUTO" and items:
        # Without a tree, the error is about an item that is there.
        trees = [each for each, item in items.items() if item.writer] or items
        name = "state" if "state" in trees else min(trees)
    if name not in items:
        raise no_item(checkpoint, name)
    if not items[name].writer:
        raise noted(
            InvalidLayoutError(f"cannot load item {name!r} of {checkpoint.url!r} as a tree: it wrote its own files"),
            f"it was saved by {items[name].handler or 'a handler that gave no name'}: load it with that handler's"
            " checkpointer, or with load_checkpointables",
        )
    return name


def describe(path: PathLike, name: str | None) -> CheckpointMetadata[Any]:
    """Return what is known of a checkpoint and one of its trees."""
    checkpoint = opened(path)
    return of_checkpoint(checkpoint, tree_metadata(checkpoint.manifest.items[tree_name(checkpoint, name)]))


def describe_all(path: PathLike) -> CheckpointMetadata[dict[str, Any]]:
    """Return what is known of a checkpoint and all its items."""
    checkpoint = opened(path)
    return of_checkpoint(checkpoint, all_metadata(checkpoint))


def tree_metadata(item: Item) -> Any:
    """Return the tree of an item with what is known of each leaf."""
    return build(item.structure, leaves_metadata(item))


def all_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what is known of each item; None for one whose handler knows nothing, or is not registered."""
    return {name: _item_metadata(checkpoint, name, item) for name, item in sorted(checkpoint.manifest.items.items())}


def _item_metadata(checkpoint: Checkpoint, name: str, item: Item) -> Any:
    if item.writer:
        return tree_metadata(item)
    from milepost.engine.items import folder_of
    from milepost.v1._phases import awaited
    from milepost.v1._registry import global_registry, handler_for_loading

    handler = handler_for_loading(current_settings().registry or global_registry(), name, item.handler, None)
    if handler is None:
        return None
    with folder_of(checkpoint, item) as folder:
        from upath import UPath

        return awaited(lambda: handler.metadata(UPath(folder)))


def of_checkpoint(checkpoint: Checkpoint, metadata: Any) -> CheckpointMetadata[Any]:
    """Return the metadata of a checkpoint around that of its items."""
    from upath import UPath

    manifest = checkpoint.manifest
    custom: Mapping[str, Any] | Any = manifest.custom_metadata
    return CheckpointMetadata(
        UPath(checkpoint.url.removeprefix("file://")),
        metadata=metadata,
        init_timestamp_nsecs=manifest.init_timestamp_nsecs or None,  # a foreign layout may not know
        commit_timestamp_nsecs=manifest.commit_timestamp_nsecs or None,
        custom_metadata=custom,
    )


_OF_THE_REFERENCE = ("_CHECKPOINT_METADATA", "orbax.checkpoint")


def is_checkpoint(path: PathLike) -> bool:
    """Say whether a finished checkpoint is there, ours or in the reference's layout, whether or not it can be read."""
    from milepost.names import is_temporary
    from milepost.routes import open_route, resolve

    url = located(path)
    with applied(current_settings(), url):
        route = open_route(resolve(url))
    storage, name = route.storage, route.route.name
    if is_temporary(name):
        return False
    if _exists(lambda: storage.size(f"{name}/{COMMIT_OBJECT}")) or route.commit.recover(storage, name) is not None:
        return True
    return all(_exists(lambda file=file: storage.size(f"{name}/{file}")) for file in _OF_THE_REFERENCE)  # type: ignore[misc]


def _exists(look: Callable[[], int]) -> bool:
    try:
        look()
    except NotFoundError:
        return False
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            return False
        raise
    return True
