"""How a checkpoint is found: by its commit object, and by nothing else.

The rule: what is visible under the name exists, whole; anything else is described as precisely as it can be, so that
whoever asked for it knows what to do next. What others laid out in their own way is read by whichever installed layout
knows it, as if it had a manifest of ours. No JAX here, and no device.
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
from milepost.fixed import CLAIM
from milepost.manifest import Item, Manifest, decode, from_document, is_manifest
from milepost.path._foreign import TOMBSTONE, is_excluded, layouts
from milepost.plugins import HINTS, LAYOUTS, Plugins, installed
from milepost.protocols import COMMIT_OBJECT, Storage
from milepost.routes import OpenRoute, Route, open_route, resolve

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

__all__ = [
    "Checkpoint",
    "Entry",
    "choose_item",
    "exists",
    "find",
    "is_within_ours",
    "list_checkpoints",
    "open_checkpoint",
    "open_ours",
    "read_manifest",
]

_MANIFEST_LIMIT = 1 << 30
_RECOGNISABLE = 5
_STAGING = ".orbax-checkpoint-tmp"


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that exists: where it is, how to read it, and what it says about itself.

    `prefix` is the prefix of its files in the storage, with a slash at the end. The manifest of a `foreign` one is what
    a layout made of it, which has the name `layout`; it does not list all files.
    """

    route: Route
    storage: Storage
    prefix: str
    manifest: Manifest
    layout: str = ""

    @property
    def foreign(self) -> bool:
        """Whether others laid it out."""
        return self.layout != ""

    @property
    def url(self) -> str:
        """The checkpoint's URL."""
        return self.route.url


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One name below a root: a checkpoint (with its manifest, if it could be read, else the error) or none.

    `layout` is the name of that of a checkpoint that others laid out.
    """

    name: str
    manifest: Manifest | None
    error: Exception | None = None
    layout: str = ""


def open_checkpoint(path: str | os.PathLike[str], plugins: Plugins | None = None) -> Checkpoint:
    """Open the checkpoint at a path or URL.

    Raises `CheckpointNotFoundError`, or `InvalidLayoutError` saying what is there instead, or `DamagedError`.
    """
    plugins = plugins or installed()
    opened = open_route(resolve(path, plugins), plugins)
    route, storage = opened.route, opened.storage
    try:
        prefix, body = find(opened, plugins)
        return Checkpoint(route, storage, prefix, read_manifest(route, body, plugins))
    except (_NotOursError, CheckpointNotFoundError) as error:
        if _STAGING in route.name:
            raise
        found = _foreign_file(opened, plugins, error)
        if found is None and isinstance(error, _NotOursError) and not is_within_ours(route):
            found = _foreign(opened, plugins, error)
        if found is None:
            raise
        return found


def open_ours(path: str | os.PathLike[str], plugins: Plugins | None = None) -> Checkpoint | None:
    """Open the checkpoint at a path or URL if it is one of ours; None for anything else, whatever it is."""
    plugins = plugins or installed()
    opened = open_route(resolve(path, plugins), plugins)
    found = None if _STAGING in opened.route.name else _found(opened)
    if found is None or not is_manifest(found[1]):
        return None
    return Checkpoint(opened.route, opened.storage, found[0], decode(found[1], where=opened.route.url))


class _NotOursError(InvalidLayoutError):
    """Say that something is there, and no manifest of ours."""


def _foreign(opened: OpenRoute, plugins: Plugins, error: InvalidLayoutError) -> Checkpoint | None:
    prefix = f"{opened.route.name}/"
    names = _names(opened.storage, prefix)
    return None if is_excluded(names) else _asked(opened, prefix, names, plugins, error)


def _foreign_file(opened: OpenRoute, plugins: Plugins, error: InvalidLayoutError) -> Checkpoint | None:
    """Return the checkpoint that is a single file."""
    name = opened.route.name
    if not isinstance(error, CheckpointNotFoundError) or not exists(opened.storage, name):
        return None
    above, slash, file = name.rpartition("/")
    return _asked(opened, above + slash, [file], plugins, error)


def _asked(
    opened: OpenRoute, prefix: str, names: list[str], plugins: Plugins, error: InvalidLayoutError
) -> Checkpoint | None:
    """Ask the installed layouts; what hinders one of them is noted at the error that is raised if none knows it."""
    for name, layout in layouts(
        plugins, broken=lambda name, problem: noted(error, f"not read by layout {name!r}: {problem}")
    ):
        document = layout.read(opened.storage, prefix, names)
        if document is not None:
            manifest = from_document(document, where=opened.route.url)
            return Checkpoint(opened.route, opened.storage, prefix, manifest, layout=name)
    return None


def read_manifest(route: Route, body: bytes, plugins: Plugins | None = None) -> Manifest:
    """Read the body of a commit object."""
    if is_manifest(body):
        return decode(body, where=route.url)
    raise noted(
        _NotOursError(
            f"cannot open {route.url!r}: it was committed by another program, its {COMMIT_OBJECT} says {body[:60]!r}"
        ),
        *_missing("orbax", plugins or installed()),
    )


def find(route: OpenRoute, plugins: Plugins | None = None) -> tuple[str, bytes]:
    """Return the checkpoint's prefix and the body of its commit object, or raise what explains why there is none."""
    plugins = plugins or installed()
    # In a staging folder a commit object may be there already, but it is not visible under its name.
    found = None if _STAGING in route.route.name else _found(route)
    if found is None:
        raise _explained(route.storage, route.route, plugins)
    return found


def _found(route: OpenRoute) -> tuple[str, bytes] | None:
    name = route.route.name
    body = _commit_object(route.storage, f"{name}/")
    if body is not None:
        return f"{name}/", body
    prefix = route.commit.recover(route.storage, name)
    if prefix is not None and (body := _commit_object(route.storage, prefix)) is not None:
        return prefix, body
    return None


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


def _explained(storage: Storage, route: Route, plugins: Plugins) -> InvalidLayoutError:
    inside = _names(storage, f"{route.name}/")
    if inside:
        looks, layout = _looks_like(storage, route, inside, plugins)
        hints = (*_missing(layout, plugins), *_near_by(storage, route))
        return noted(_NotOursError(f"cannot open {route.url!r}: {looks}"), *hints)
    there = _instead(storage, route, _names(storage, ""))
    return noted(CheckpointNotFoundError(f"cannot open {route.url!r}: {there}"), *_near_by(storage, route))


def _instead(storage: Storage, route: Route, around: list[str]) -> str:
    if not around:
        return f"{route.root!r} is empty or does not exist"
    if f"{route.name}/" in around:
        return "it is an empty folder"
    if route.name not in around:
        return "nothing is there"
    return "it is a file, not a checkpoint" if exists(storage, route.name) else "it is a link that leads nowhere"


_LOOKS: tuple[tuple[str, str, str], ...] = (
    (r"_METADATA|manifest\.ocdbt|_CHECKPOINT_METADATA|checkpoint", "it looks like a checkpoint of Orbax", "orbax"),
    (r"zarr\.json|\.zgroup|\.zarray", "it looks like Zarr data", ""),
    (r".*\.safetensors", "it holds safetensors files without a manifest", "huggingface"),
)
_TELLING = "huggingface"
"""A layout that, where it is installed, leaves files that match for milepost's own."""


def _looks_like(storage: Storage, route: Route, inside: list[str], plugins: Plugins) -> tuple[str, str]:
    """Return what a folder looks like, and the layout that would know better if it were installed."""
    if _STAGING in route.name or CLAIM in inside:
        return f"it is a save{' or a deletion' if CLAIM in inside else ''} that was not finished", ""
    if TOMBSTONE in inside:
        return "it was being deleted, which was not finished: delete it again", ""
    if _exists_above(route):
        return "it is within a checkpoint", ""
    for child in (name for name in inside if name.endswith("/")):
        if exists(storage, f"{route.name}/{child}{COMMIT_OBJECT}"):
            return f"it is no checkpoint but a folder of them, such as {child.removesuffix('/')!r}", ""
    for pattern, words, layout in _LOOKS:
        # What an installed layout does not know as its own, does not look like it either.
        known = layout != _TELLING and _is_installed(layout, plugins)
        if not known and any(re.fullmatch(pattern, name) for name in inside):
            return f"it has no {COMMIT_OBJECT}: {words}", layout
    shown = ", ".join(map(repr, inside[:_RECOGNISABLE])) + (", ..." if len(inside) > _RECOGNISABLE else "")
    return f"it has no {COMMIT_OBJECT}: it holds {shown}", ""


def _is_installed(layout: str, plugins: Plugins) -> bool:
    return any(claim.name == layout for claim in plugins.claims(LAYOUTS))


def _missing(layout: str, plugins: Plugins) -> Iterator[str]:
    """Yield what is missing to read a layout, if anything is."""
    if layout and not _is_installed(layout, plugins):
        yield f"such checkpoints are read by a package of their own: pip install {HINTS[LAYOUTS, layout]}"


def _near_by(storage: Storage, route: Route) -> Iterator[str]:
    if _exists_above(route):
        yield f"{route.root!r} is a checkpoint; name the item as checkpointable_name={route.name!r}"
    around = [name.removesuffix("/") for name in _names(storage, "") if name.endswith("/")]
    close = difflib.get_close_matches(route.name, around, n=3, cutoff=0.6)
    shown = [name for name in close or around[-3:] if exists(storage, f"{name}/{COMMIT_OBJECT}")]
    if shown:
        yield "near by: " + ", ".join(repr(urls.join(route.root, name)) for name in shown)


def exists(storage: Storage, key: str) -> bool:
    """Say whether there is an object of a key; False also where that cannot be told."""
    try:
        storage.size(key)
    except (NotFoundError, StorageError):
        return False
    return True


def _exists_above(route: Route) -> bool:
    return _commit_object_above(route) is not None


def is_within_ours(route: Route) -> bool:
    """Say whether a folder is part of a checkpoint of ours."""
    # The manifest knows the item better than whatever files of another format are beside its arrays.
    return is_manifest(_commit_object_above(route) or b"")


def _commit_object_above(route: Route) -> bytes | None:
    try:
        above = open_route(resolve(route.root), installed())
        return _commit_object(above.storage, f"{above.route.name}/")
    except Exception:  # noqa: BLE001 - this only looks for a hint; the error being explained matters more
        return None


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
    root, plugins = urls.locate(path), plugins or installed()
    opened = open_route(resolve(urls.join(root, "_"), plugins), plugins)
    names = sorted((name for name in opened.storage.children("") if name.endswith("/")), key=_natural)
    found = [_entry(opened, root, name.removesuffix("/"), plugins) for name in names]
    if not names and not _names(opened.storage, ""):
        raise NotFoundError(f"cannot list {root!r}: it is empty or does not exist")
    return [entry for entry in found if entry is not None]


def _entry(opened: OpenRoute, root: str, name: str, plugins: Plugins) -> Entry | None:
    if _STAGING in name:
        return None
    route = dataclasses.replace(opened.route, url=urls.join(root, name), name=name)
    child = dataclasses.replace(opened, route=route)
    body = _commit_object(opened.storage, f"{name}/")
    try:
        if body is not None and is_manifest(body):
            return Entry(name, decode(body, where=route.url))
        error = _NotOursError(f"cannot open {route.url!r}: it was committed by another program")
        found = _foreign(child, plugins, error)
    except Exception as problem:  # noqa: BLE001 - one unreadable checkpoint must not hide the others
        return Entry(name, None, problem)
    if found is not None:
        return Entry(name, found.manifest, layout=found.layout)
    return None if body is None else Entry(name, None, noted(error, *_missing("orbax", plugins)))


def _natural(name: str) -> tuple[Any, ...]:
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)
