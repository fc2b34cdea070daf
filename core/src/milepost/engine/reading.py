"""How a checkpoint is found: by its commit object, and by nothing else.

The rule: what is visible under the name exists, whole; anything else is described as precisely as it can be, so that
whoever asked for it knows what to do next. No JAX here, and no device.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import TYPE_CHECKING, Any

from milepost import urls
from milepost.errors import (
    CheckpointNotFoundError,
    InvalidLayoutError,
    ItemNotFoundError,
    NotFoundError,
    StorageError,
    noted,
)
from milepost.manifest import Item, Manifest, decode, is_manifest
from milepost.plugins import Plugins, installed
from milepost.protocols import COMMIT_OBJECT, Storage
from milepost.routes import OpenRoute, Route, open_route, resolve

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

__all__ = ["Checkpoint", "Entry", "choose_item", "find", "list_checkpoints", "open_checkpoint", "read_manifest"]

_MANIFEST_LIMIT = 1 << 30
_RECOGNISABLE = 5
_STAGING = ".orbax-checkpoint-tmp"


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that exists: where it is, how to read it, and what it says about itself.

    `prefix` is the prefix of its files in the storage, with a slash at the end.
    """

    route: Route
    storage: Storage
    prefix: str
    manifest: Manifest

    @property
    def url(self) -> str:
        """The checkpoint's URL."""
        return self.route.url


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One name below a root: a checkpoint (with its manifest, if it could be read, else the error) or none."""

    name: str
    manifest: Manifest | None
    error: Exception | None = None


def open_checkpoint(path: str | os.PathLike[str], plugins: Plugins | None = None) -> Checkpoint:
    """Open the checkpoint at a path or URL.

    Raises `CheckpointNotFoundError`, or `InvalidLayoutError` saying what is there instead, or `ManifestError`.
    """
    plugins = plugins or installed()
    route = open_route(resolve(path, plugins), plugins)
    prefix, body = find(route)
    return Checkpoint(route.route, route.storage, prefix, read_manifest(route.route, body))


def read_manifest(route: Route, body: bytes) -> Manifest:
    """Read the body of a commit object."""
    if is_manifest(body):
        return decode(body, where=route.url)
    raise noted(
        InvalidLayoutError(
            f"cannot open {route.url!r}: it was committed by another program, its {COMMIT_OBJECT} says {body[:60]!r}"
        ),
        "checkpoints in the layout of Orbax cannot be read by this version",
    )


def find(route: OpenRoute) -> tuple[str, bytes]:
    """Return the checkpoint's prefix and the body of its commit object, or raise what explains why there is none."""
    name = route.route.name
    if _STAGING in name:
        # Its commit object may be there already, but it is not visible under its name.
        raise _explained(route.storage, route.route)
    body = _commit_object(route.storage, f"{name}/")
    if body is not None:
        return f"{name}/", body
    prefix = route.commit.recover(route.storage, name)
    if prefix is not None and (body := _commit_object(route.storage, prefix)) is not None:
        return prefix, body
    raise _explained(route.storage, route.route)


def _commit_object(storage: Storage, prefix: str) -> bytes | None:
    try:
        return bytes(storage.read(f"{prefix}{COMMIT_OBJECT}", 0, _MANIFEST_LIMIT))
    except NotFoundError:
        return None
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            return None
        raise


def _names(storage: Storage, prefix: str) -> list[str]:
    try:
        return sorted(storage.children(prefix))
    except (NotFoundError, StorageError):
        return []


def _explained(storage: Storage, route: Route) -> InvalidLayoutError:
    inside = _names(storage, f"{route.name}/")
    if inside:
        looks = _looks_like(storage, route, inside)
        return noted(InvalidLayoutError(f"cannot open {route.url!r}: {looks}"), *_near_by(storage, route))
    there = _instead(storage, route, _names(storage, ""))
    return noted(CheckpointNotFoundError(f"cannot open {route.url!r}: {there}"), *_near_by(storage, route))


def _instead(storage: Storage, route: Route, around: list[str]) -> str:
    if not around:
        return f"{route.root!r} is empty or does not exist"
    if f"{route.name}/" in around:
        return "it is an empty folder"
    if route.name not in around:
        return "nothing is there"
    return "it is a file, not a checkpoint" if _exists(storage, route.name) else "it is a link that leads nowhere"


_LOOKS: tuple[tuple[str, str], ...] = (
    (r"_METADATA|manifest\.ocdbt|_CHECKPOINT_METADATA|checkpoint", "it looks like a checkpoint of Orbax"),
    (r"zarr\.json|\.zgroup|\.zarray", "it looks like Zarr data"),
    (r".*\.safetensors", "it holds safetensors files without a manifest"),
)


def _looks_like(storage: Storage, route: Route, inside: list[str]) -> str:
    if _STAGING in route.name:
        return "it is a save that was not finished"
    if _exists_above(route):
        return "it is within a checkpoint"
    for child in (name for name in inside if name.endswith("/")):
        if _exists(storage, f"{route.name}/{child}{COMMIT_OBJECT}"):
            return f"it is no checkpoint but a folder of them, such as {child.removesuffix('/')!r}"
    for pattern, words in _LOOKS:
        if any(re.fullmatch(pattern, name) for name in inside):
            return f"it has no {COMMIT_OBJECT}: {words}"
    shown = ", ".join(map(repr, inside[:_RECOGNISABLE])) + (", ..." if len(inside) > _RECOGNISABLE else "")
    return f"it has no {COMMIT_OBJECT}: it holds {shown}"


def _near_by(storage: Storage, route: Route) -> Iterator[str]:
    if _exists_above(route):
        yield f"{route.root!r} is a checkpoint; name the item as checkpointable_name={route.name!r}"
    around = [name.removesuffix("/") for name in _names(storage, "") if name.endswith("/")]
    close = difflib.get_close_matches(route.name, around, n=3, cutoff=0.6)
    shown = [name for name in close or around[-3:] if _exists(storage, f"{name}/{COMMIT_OBJECT}")]
    if shown:
        yield "near by: " + ", ".join(repr(urls.join(route.root, name)) for name in shown)


def _exists(storage: Storage, key: str) -> bool:
    try:
        storage.size(key)
    except (NotFoundError, StorageError):
        return False
    return True


def _exists_above(route: Route) -> bool:
    try:
        above = open_route(resolve(route.root), installed())
    except Exception:  # noqa: BLE001 - this only looks for a hint; the error being explained matters more
        return False
    return _exists(above.storage, f"{above.route.name}/{COMMIT_OBJECT}")


def choose_item(manifest: Manifest, name: str, where: str) -> tuple[str, Item]:
    """Return the item of a name; "AUTO" takes "state", else the first by name.

    Raises `ItemNotFoundError`, which lists the items there are.
    """
    if name == "AUTO" and manifest.items:
        name = "state" if "state" in manifest.items else min(manifest.items)
    if name not in manifest.items:
        there = ", ".join(map(repr, manifest.items)) or "none"
        raise ItemNotFoundError(f"cannot load item {name!r} of {where!r}: it has {there}")
    return name, manifest.items[name]


def list_checkpoints(path: str | os.PathLike[str], plugins: Plugins | None = None) -> list[Entry]:
    """Return the checkpoints directly below a root, numbered names in numeric order, the others after them.

    A checkpoint whose manifest cannot be read is listed with its error. Raises `NotFoundError` if nothing is at the
    root.
    """
    root = urls.locate(path)
    route = open_route(resolve(urls.join(root, "_"), plugins), plugins or installed())
    names = sorted((name for name in route.storage.children("") if name.endswith("/")), key=_natural)
    found = [_entry(route.storage, root, name.removesuffix("/")) for name in names]
    if not names and not _names(route.storage, ""):
        raise NotFoundError(f"cannot list {root!r}: it is empty or does not exist")
    return [entry for entry in found if entry is not None]


def _entry(storage: Storage, root: str, name: str) -> Entry | None:
    body = _commit_object(storage, f"{name}/")
    if body is None or _STAGING in name:
        return None
    try:
        return Entry(name, decode(body, where=urls.join(root, name)))
    except Exception as error:  # noqa: BLE001 - one unreadable checkpoint must not hide the others
        return Entry(name, None, error)


def _natural(name: str) -> tuple[Any, ...]:
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)
