"""How a checkpoint, or one item of it, ceases to exist.

The rule: the commit object goes first, or loses the item first, by one write; only then the files. So whatever is cut
off leaves nothing that can be found and not be read, and calling it again completes it. What others laid out goes only
if its layout is certain of the whole folder. Where it cannot vanish by one rename, a tombstone is put into it first,
and taken out last: from then on it is no checkpoint here, whatever is left of it.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from milepost import manifest as manifests
from milepost.engine.reading import Checkpoint, exists, find, is_within_ours, open_checkpoint
from milepost.errors import (
    AlreadyExistsError,
    CheckpointNotFoundError,
    InvalidLayoutError,
    ItemNotFoundError,
    RequestError,
    noted,
)
from milepost.hookspecs import CheckpointEvent
from milepost.manifest import is_manifest
from milepost.names import is_temporary
from milepost.path._foreign import TOMBSTONE, erase, owner, recognised
from milepost.plugins import Plugins, installed
from milepost.protocols import COMMIT_OBJECT, RenamesPrefixes, ReplacesObjects
from milepost.routes import OpenRoute, open_route, resolve

if TYPE_CHECKING:
    import os

    from milepost.manifest import Manifest

__all__ = ["LastItemError", "NotOursToDeleteError", "delete", "delete_item"]


class LastItemError(RequestError, ValueError):
    """An item that cannot be deleted alone, because nothing would be left of the checkpoint."""


class NotOursToDeleteError(InvalidLayoutError):
    """A checkpoint that others laid out, in a folder that may hold more than it."""


def delete(path: str | os.PathLike[str], *, missing_ok: bool = False, plugins: Plugins | None = None) -> bool:
    """Delete a checkpoint, also one that cannot be read any more; say whether there was one.

    Raises `CheckpointNotFoundError` if nothing is there, unless `missing_ok`, and `InvalidLayoutError` for what is no
    checkpoint, or one of others whose folder may hold more than it.
    """
    plugins = plugins or installed()
    began = time.perf_counter()
    route = open_route(resolve(path, plugins), plugins)
    try:
        ours, missing = is_manifest(find(route, plugins)[1]), None
    except CheckpointNotFoundError:
        if not exists(route.storage, route.route.name):
            route.commit.delete(route.storage, route.route.name)  # what a deletion that was cut off left behind
        if missing_ok:
            return False
        raise
    except InvalidLayoutError as error:
        if _is_completed(route):
            if missing_ok:
                return False
            raise CheckpointNotFoundError(
                f"cannot delete {route.route.url!r}: it was deleted before, and what was left of it is removed now"
            ) from error
        ours, missing = False, error
    if ours:
        route.commit.delete(route.storage, route.route.name)
    else:
        _check_owned(route, plugins, missing)
        _delete_foreign(route, committed=missing is None)
    plugins.tell("deleted", CheckpointEvent(route.route.url, seconds={"delete": time.perf_counter() - began}))
    return True


def _is_completed(route: OpenRoute) -> bool:
    """Go on with a deletion that was cut off; say whether nothing is left."""
    name, inside = route.route.name, set(route.storage.children(f"{route.route.name}/"))
    # Where checkpoints vanish by one rename, what is without a commit object was never one of ours.
    if RenamesPrefixes in route.commit.needs or not inside or COMMIT_OBJECT in inside:
        return False
    route.commit.delete(route.storage, name)
    return not any(True for _ in route.storage.children(f"{name}/"))


def _check_owned(route: OpenRoute, plugins: Plugins, error: InvalidLayoutError | None) -> None:
    """Raise unless a folder is for certain a checkpoint of a layout, or what is left of one.

    `error` says that it has no commit object, which makes it one even if no layout knows it.
    """
    storage, prefix, what = route.storage, f"{route.route.name}/", f"cannot delete {route.route.url!r}"
    names = sorted(storage.children(prefix))
    if TOMBSTONE in names:
        return
    layout = recognised(storage, prefix, names, plugins)
    if error is not None and (layout is None or is_temporary(route.route.name) or is_within_ours(route.route)):
        raise error
    if owner(storage, "", sorted(storage.children("")), plugins) is not None:
        raise NotOursToDeleteError(f"{what}: it is within a checkpoint, of which it is a part") from None
    if layout is None:
        return
    if owner(storage, prefix, names, plugins) is None:
        raise noted(
            NotOursToDeleteError(f"{what}: it is of the layout {layout!r}, and its folder may hold more than that"),
            "if all that is in it may go, remove the folder yourself",
        ) from None


def _delete_foreign(route: OpenRoute, *, committed: bool) -> None:
    """Delete what a strategy cannot, or leaves; attempts of ours are its own."""
    storage, prefix = route.storage, f"{route.route.name}/"
    renames = RenamesPrefixes in route.commit.needs
    if not renames:
        storage.write(f"{prefix}{TOMBSTONE}", [b"this was a checkpoint, and is being deleted"])
    elif not committed:
        # Such a strategy makes anything vanish at one instant, as long as it holds a commit object.
        storage.write(f"{prefix}{COMMIT_OBJECT}", [b"recognised as a checkpoint, to be deleted"])
    route.commit.delete(storage, route.route.name)
    if not renames:
        erase(storage, prefix)


def delete_item(
    path: str | os.PathLike[str], item: str, *, missing_ok: bool = False, plugins: Plugins | None = None
) -> bool:
    """Delete one item of a checkpoint; say whether there was one.

    Raises `ItemNotFoundError` if the checkpoint has no such item, unless `missing_ok`, `LastItemError` if it has no
    other, and `InvalidLayoutError` for one of others, whose own files would go on naming the item.
    """
    plugins = plugins or installed()
    route = open_route(resolve(path, plugins), plugins)
    checkpoint = open_checkpoint(path, plugins)
    if item not in checkpoint.manifest.items:
        if missing_ok:
            return False
        there = ", ".join(map(repr, checkpoint.manifest.items))
        raise ItemNotFoundError(f"cannot delete item {item!r} of {checkpoint.url!r}: it has {there}")
    if len(checkpoint.manifest.items) == 1:
        raise noted(
            LastItemError(f"cannot delete item {item!r} of {checkpoint.url!r}: it is the only one"),
            "delete the checkpoint instead",
        )
    if checkpoint.foreign:
        raise noted(
            NotOursToDeleteError(
                f"cannot delete item {item!r} of {checkpoint.url!r}: it is of the layout {checkpoint.layout!r}"
            ),
            "delete the whole checkpoint, or copy it with milepost cp and delete the item of the copy",
        )
    gone = checkpoint.manifest.items[item].prefix
    _replace(route, checkpoint, manifests.encode(_without(checkpoint.manifest, item)))
    route.storage.delete(checkpoint.prefix + gone)
    return True


def _without(manifest: Manifest, item: str) -> Manifest:
    gone = manifest.items[item].prefix
    return dataclasses.replace(
        manifest,
        items={name: kept for name, kept in manifest.items.items() if name != item},
        files=tuple(file for file in manifest.files if not file.path.startswith(gone)),
    )


def _replace(route: OpenRoute, checkpoint: Checkpoint, body: bytes) -> None:
    storage, key = route.storage, f"{checkpoint.prefix}{COMMIT_OBJECT}"
    if not isinstance(storage, ReplacesObjects):
        storage.write(key, [body])
        return
    version = storage.version(key)
    if open_checkpoint(checkpoint.url).manifest.attempt != checkpoint.manifest.attempt:
        raise AlreadyExistsError(f"cannot change {checkpoint.url!r}: another save has replaced it meanwhile")
    storage.replace(key, [body], version)
