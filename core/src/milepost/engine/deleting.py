"""How a checkpoint, or one item of it, ceases to exist.

The rule: the commit object goes first, or loses the item first, by one write; only then the files. So whatever is cut
off leaves nothing that can be found and not be read, and calling it again completes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING

from milepost import manifest as manifests
from milepost.attempts import parse_attempt
from milepost.engine.reading import Checkpoint, find, open_checkpoint
from milepost.errors import (
    AlreadyExistsError,
    CheckpointNotFoundError,
    DamagedError,
    InvalidLayoutError,
    ItemNotFoundError,
    RequestError,
    noted,
)
from milepost.hookspecs import CheckpointEvent
from milepost.manifest import is_manifest
from milepost.plugins import Plugins, installed
from milepost.protocols import COMMIT_OBJECT, ReplacesObjects
from milepost.routes import OpenRoute, open_route, resolve

if TYPE_CHECKING:
    import os

    from milepost.manifest import Manifest

__all__ = ["LastItemError", "delete", "delete_item"]


class LastItemError(RequestError, ValueError):
    """An item that cannot be deleted alone, because nothing would be left of the checkpoint."""


def delete(path: str | os.PathLike[str], *, missing_ok: bool = False, plugins: Plugins | None = None) -> bool:
    """Delete a checkpoint, also one that cannot be read any more; say whether there was one.

    Raises `CheckpointNotFoundError` if nothing is there, unless `missing_ok`, and `InvalidLayoutError` for what is no
    checkpoint.
    """
    plugins = plugins or installed()
    began = time.perf_counter()
    route = open_route(resolve(path, plugins), plugins)
    try:
        foreign = not is_manifest(find(route)[1])
    except CheckpointNotFoundError:
        route.commit.delete(route.storage, route.route.name)  # what a deletion that was cut off left behind
        if missing_ok:
            return False
        raise
    except InvalidLayoutError:
        _mark_foreign(route, plugins)
        foreign = True
    route.commit.delete(route.storage, route.route.name)
    if foreign:
        _delete_foreign(route)
    plugins.tell("deleted", CheckpointEvent(route.route.url, seconds={"delete": time.perf_counter() - began}))
    return True


def _mark_foreign(route: OpenRoute, plugins: Plugins) -> None:
    """Give a checkpoint that others laid out without a commit object one, which goes first when it is deleted.

    Raises `InvalidLayoutError` for what no installed layout knows.
    """
    with contextlib.suppress(DamagedError):
        open_checkpoint(route.route.url, plugins)
    route.storage.write(f"{route.route.name}/{COMMIT_OBJECT}", [b"recognised as a checkpoint, to be deleted"])


def _delete_foreign(route: OpenRoute) -> None:
    """Delete what a strategy leaves of a checkpoint that it did not write; attempts of ours are its own."""
    prefix = f"{route.route.name}/"
    for child in list(route.storage.children(prefix)):
        if parse_attempt(child.removesuffix("/")) is None:
            route.storage.delete(f"{prefix}{child}")


def delete_item(
    path: str | os.PathLike[str], item: str, *, missing_ok: bool = False, plugins: Plugins | None = None
) -> bool:
    """Delete one item of a checkpoint; say whether there was one.

    Raises `ItemNotFoundError` if the checkpoint has no such item, unless `missing_ok`, and `LastItemError` if it has no
    other.
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
