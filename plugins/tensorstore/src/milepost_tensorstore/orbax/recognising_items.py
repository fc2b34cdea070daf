"""What each item of a foreign checkpoint is, and how a manifest describes it.

The rule: an item is what its files make it; the handler that saved it, where the checkpoint names one, decides only
what files alone cannot say. Trees go through the array reader; JSON, messages, and whatever a handler of others wrote
are files of their own, which the handler reads.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from milepost.errors import DamagedError, MissingDataError

from milepost_tensorstore.database import MANIFEST
from milepost_tensorstore.orbax import legacy_jax
from milepost_tensorstore.orbax.legacy import aggregate_of, is_aggregate
from milepost_tensorstore.orbax.names import ARRAY, HANDLERS, JAX_KEY, NUMPY_KEY
from milepost_tensorstore.orbax.recognising_arrays import Arrays, databases
from milepost_tensorstore.orbax.recognising_files import Folder, checked
from milepost_tensorstore.orbax.recognising_trees import (
    Entry,
    Tree,
    entries_by_name,
    entries_of,
    known_of,
    tree_of,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from milepost_tensorstore.documents import Document

__all__ = ["Recognise", "is_tree", "our_handler", "recognised", "single_file"]

Recognise: TypeAlias = Callable[[Folder, str, str], "dict[str, Any] | None"]
"""Makes an item, or None for what is none, from its folder, its prefix within the checkpoint, and its handler."""

_METADATA = "_METADATA"
_UNSAFE = re.compile(r"/\.{0,2}/|[\\\0]")
_CHECKPOINT = "checkpoint"
_V3 = 3
_OURS: Mapping[str, str] = {theirs.rpartition(".")[2]: ours for ours, theirs in reversed(list(HANDLERS.items()))}
_TREES = ("milepost.v1.handlers.PyTreeHandler",)
_JAX_KEY = "jax_random_key"
_NUMPY_KEY = "np_random_key"
_KEY_IMPLS = {2: "threefry2x32", 4: "rbg"}
_FILES: Mapping[str, str] = {
    "metadata": "milepost.handlers.JsonCheckpointHandler",
    "data.json": "milepost.v1.handlers.JsonHandler",
    "proto.pbtxt": "milepost.handlers.ProtoCheckpointHandler",
}
"""What an item is that has such a file, where nothing says what saved it."""


def our_handler(theirs: str) -> str:
    """Return the name of our handler for what theirs has saved; its own name where there is none, "" for a plain tree.

    >>> our_handler("orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler")
    'milepost.handlers.JsonCheckpointHandler'
    >>> our_handler("my.own.Handler")
    'my.own.Handler'
    """
    if not theirs.startswith("orbax."):
        return theirs
    ours = _OURS.get(theirs.rpartition(".")[2], theirs)
    return "" if ours in _TREES else ours


def is_tree(folder: Folder, *, certain: bool = False) -> bool:
    """Say whether a folder holds a tree, by its own files; with `certain`, by files that nobody else has."""
    known = _METADATA in folder.names or MANIFEST in folder.names or bool(databases(folder))
    return known or legacy_jax.is_jax_tree(folder) or (not certain and is_aggregate(folder))


def single_file(names: Collection[str]) -> str | None:
    """Return the name of our handler of an item that is one file, by that file's name; None if there is none.

    >>> single_file({"metadata"}), single_file({"weights"})
    ('milepost.handlers.JsonCheckpointHandler', None)
    """
    return next((ours for file, ours in _FILES.items() if file in names), None)


def recognised(folder: Folder, prefix: str, handler: str) -> dict[str, Any] | None:
    """Return the item in a folder; None if it is none that can be told, and nothing says what saved it."""
    ours = our_handler(handler)
    find = _finder(folder, ours)
    return None if find is None else find(folder, prefix, ours)


def _finder(folder: Folder, ours: str) -> Recognise | None:
    names = folder.names
    for known, find in ((f"{_JAX_KEY}/" in names, _jax_key), (f"{_NUMPY_KEY}/" in names, _numpy_key)):
        if known:
            return find
    if ours == ARRAY:
        return _array
    if legacy_jax.is_jax_tree(folder):
        return legacy_jax.item
    if is_tree(folder):
        return _tree
    if single_file(names) is not None or ours:
        return _own_files
    return _unlabelled if any(folder.folders()) else None


# --- trees -----------------------------------------------------------------------------------------------------------


def _tree(folder: Folder, prefix: str, handler: str) -> dict[str, Any]:
    metadata = folder.read_object(_METADATA)
    bases = databases(folder)
    if bases == [""]:
        folder.read(MANIFEST)  # for the identity: every save makes another one
    aggregate = aggregate_of(folder)
    if metadata is None and aggregate is None:
        return _by_names(folder, prefix, handler, bases)
    if metadata is not None and not bases and metadata.get("use_ocdbt") is True:
        raise MissingDataError(f"cannot read {folder.url!r}: {MANIFEST!r} is missing, which tells where the arrays are")
    known = known_of(folder, {})
    entries, kinds = entries_of(folder, metadata) if metadata is not None else ([], {})
    given: dict[str, dict[str, Any]] = {}
    part = None
    if aggregate is not None:
        entries, given, part = aggregate.given(entries or aggregate.entries(known.shardings))
    said = metadata or {}
    version, arrays = _arrays(folder, entries, 3 if said.get("use_zarr3") is True else 2, bases)
    tree = tree_of(folder, entries, dataclasses.replace(known, arrays=arrays, given=given), kinds)
    custom = said.get("custom_metadata")
    if custom is not None:
        checked(custom, dict, "'custom_metadata'", folder.file(_METADATA))
    record = _record(tree, version, bases) | ({} if part is None else {"aggregate": part})
    if version == _V3 and said.get("store_array_data_equal_to_fill_value") is not True:
        record["fill"] = True  # up to 0.9 Orbax left chunks of zeros out
    return _item(tree, prefix, handler, record) | {"custom_metadata": custom}


def _arrays(folder: Folder, entries: list[Entry], version: int, bases: list[str]) -> tuple[int, dict[str, Document]]:
    names = [entry.name for entry in entries if entry.stored]
    if not bases:
        _check_inside(folder, names)
    arrays = Arrays(folder, bases)
    found = arrays.described(names, version)
    if names and not found:
        # Older releases did not say which version of Zarr it is.
        other = arrays.described(names, 5 - version)
        return (5 - version, other) if other else (version, found)
    return version, found


def _check_inside(folder: Folder, names: list[str]) -> None:
    for name in names:
        if _UNSAFE.search(f"/{name}/") and name:
            raise DamagedError(f"cannot believe {folder.url!r}: the array {name!r:.80} cannot be a folder in it")


def _by_names(folder: Folder, prefix: str, handler: str, bases: list[str]) -> dict[str, Any]:
    """Return a tree of which only the arrays are known."""
    arrays = Arrays(folder, bases)
    versions = arrays.names()
    if not versions:
        raise MissingDataError(f"cannot read {folder.url!r}: it has neither a '{_METADATA}' nor an array")
    version, names = min(versions.items())
    known = known_of(folder, arrays.described(names, version))
    tree = tree_of(folder, entries_by_name(names, known.shardings), known)
    item = _item(tree, prefix, handler, _record(tree, version, bases))
    # Releases that did not note who saved an item had no other tree of one array by this name.
    return _single(item) | {"handler": ARRAY} if names == [_CHECKPOINT] and not handler else item


def _unlabelled(folder: Folder, prefix: str, handler: str) -> dict[str, Any] | None:
    """Return a tree of plain arrays in a folder that has nothing else; None if there is anything else, or nothing."""
    if any(not name.endswith("/") for name in folder.names if name not in ("commit_success.txt", "_sharding")):
        return None
    return _by_names(folder, prefix, handler, []) if Arrays(folder, []).names() else None


def _record(tree: Tree, version: int, bases: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"format": 1, "zarr_format": version, "ocdbt": bool(bases)}
    if tree.names:
        record["names"] = tree.names
    return record | ({"databases": bases} if bases and bases != [""] else {})


def _item(tree: Tree, prefix: str, handler: str, record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "structure": tree.structure,
        "leaves": tree.leaves,
        "shardings": tree.shardings,
        "writer": "tensorstore",
        "prefix": prefix,
        "records": [record],
        "handler": handler,
    }


# --- single leaves ---------------------------------------------------------------------------------------------------


def _array(folder: Folder, prefix: str, handler: str) -> dict[str, Any]:
    """Return an item that is one leaf, which Orbax keeps as a tree with one key."""
    item = _tree(folder, prefix, handler)
    structure = item["structure"]
    if structure != {"kind": "dict", "keys": [_CHECKPOINT], "children": ["*"]}:
        raise DamagedError(f"cannot believe {folder.url!r}: it was saved as one array, and is a tree of others")
    return _single(item)


def _single(item: dict[str, Any]) -> dict[str, Any]:
    item["structure"] = "*"
    item["records"][0]["names"] = {"value": _CHECKPOINT}
    return item


def _jax_key(folder: Folder, prefix: str, handler: str) -> dict[str, Any]:
    item = _array(folder.folder(_JAX_KEY), f"{prefix}{_JAX_KEY}/", handler or JAX_KEY)
    leaf = item["leaves"][0]
    if leaf["type"] == "jax.Array" and _said(folder, _JAX_KEY, "typed"):
        # Which kind of keys it is stands nowhere: Orbax itself takes it from how many numbers a key has.
        shape = leaf["arrays"][""]["shape"]
        leaf.setdefault("key_impl", _KEY_IMPLS.get(shape[-1] if shape else 0, "threefry2x32"))
    return item


def _numpy_key(folder: Folder, prefix: str, handler: str) -> dict[str, Any]:
    item = _tree(folder.folder(_NUMPY_KEY), f"{prefix}{_NUMPY_KEY}/", handler or NUMPY_KEY)
    structure = item["structure"]
    if structure["kind"] == "list" and _said(folder, _NUMPY_KEY, "legacy"):
        item["structure"] = structure | {"kind": "tuple"}
    return item


def _said(folder: Folder, name: str, what: str) -> bool:
    return (folder.folder(f"{name}_metadata").read_object("metadata") or {}).get(what) is True


# --- files -----------------------------------------------------------------------------------------------------------


def _own_files(folder: Folder, prefix: str, handler: str) -> dict[str, Any]:
    handler = handler or single_file(folder.names) or ""
    tree = Tree(None, [], [], {})
    return _item(tree, prefix, handler, {}) | {"writer": "", "records": []}
