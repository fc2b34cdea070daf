"""What is said about a checkpoint: pure functions from a manifest to plain documents and rows.

The rule: bytes are computed from shapes and dtypes, never taken from what somebody wrote down; what does not make sense
is shown as it stands, since a look at a checkpoint must not fail for the sake of one leaf.
"""

from __future__ import annotations

import datetime as dt
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from milepost.cli.printing import size_text
from milepost.dtypes import known_dtypes
from milepost.structure import LEAF, child_keys, leaf_paths, show_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from milepost.manifest import ArrayLeaf, Item, Manifest

__all__ = [
    "Row",
    "array_bytes",
    "checkpoint_bytes",
    "item_document",
    "leaf_bytes",
    "leaf_text",
    "manifest_document",
    "row_cells",
    "rows",
    "sharding_text",
    "utc",
    "when",
]

_VALUE = 60
_BRACKETS = {"list": "[]", "tuple": "()", "dict": "{}"}


class Row(NamedTuple):
    """One line of a tree: how deep it is, its key, what it is, and its leaf if it is one."""

    depth: int
    key: str
    kind: str
    leaf: Mapping[str, Any] | None


def utc(nsecs: int) -> str:
    """Return a timestamp in nanoseconds since the epoch as text.

    >>> utc(0)
    '1970-01-01T00:00:00Z'
    """
    return f"{dt.datetime.fromtimestamp(nsecs // 10**9, dt.UTC):%Y-%m-%dT%H:%M:%SZ}"


def when(nsecs: int) -> str | None:
    """Return what `utc` does; None for 0, by which a layout of others says that nobody knows.

    >>> when(0)
    """
    return utc(nsecs) if nsecs else None


def array_bytes(array: ArrayLeaf) -> int | None:
    """Return the bytes of an array in memory; None for a dtype that is not known here.

    >>> from milepost.manifest import ArrayLeaf
    >>> array_bytes(ArrayLeaf((2, 3), "bfloat16", None))
    12
    """
    dtype = known_dtypes().get(array.dtype)
    return None if dtype is None else math.prod(array.shape) * dtype.itemsize


def leaf_bytes(leaf: Mapping[str, Any]) -> int | None:
    """Return the bytes of all arrays of a leaf; None where one of them is not known."""
    sizes = [array_bytes(array) for array in leaf["arrays"].values()]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def checkpoint_bytes(manifest: Manifest, layout: str) -> int:
    """Return the bytes of a checkpoint: of its files; for one that others laid out, of its arrays and unread files."""
    if not layout:
        return manifest.data_bytes
    own = tuple(item.prefix for item in manifest.items.values() if not item.writer)
    arrays = sum(leaf_bytes(leaf) or 0 for item in manifest.items.values() for leaf in item.leaves)
    return arrays + sum(file.size for file in manifest.files if file.path.startswith(own))


def sharding_text(sharding: Mapping[str, Any]) -> str:
    """Return a saved sharding in short.

    >>> sharding_text({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"})
    'cpu:0'
    >>> mesh = {"shape": [4, 2], "platform": "tpu"}
    >>> sharding_text({"sharding_type": "NamedSharding", "partition_spec": ["x", None]} | mesh)
    "P('x', None) on 4x2 tpu"
    """
    match sharding:
        case {"sharding_type": "SingleDeviceSharding", "device_str": device}:
            return str(device)
        case {"sharding_type": "NamedSharding", "shape": [*shape], "partition_spec": [*spec], "platform": platform}:
            parts = (repr(tuple(part) if isinstance(part, list) else part) for part in spec)
            return f"P({', '.join(parts)}) on {'x'.join(map(str, shape))} {platform}"
    return str(sharding.get("sharding_type", ""))


# --- documents -------------------------------------------------------------------------------------------------------


def manifest_document(manifest: Manifest, layout: str = "") -> dict[str, Any]:
    """Return what a manifest says of the checkpoint as a whole, or what a layout of others made of it."""
    return {
        "attempt": manifest.attempt,
        "began": when(manifest.init_timestamp_nsecs),
        "committed": when(manifest.commit_timestamp_nsecs),
        "seconds": (manifest.commit_timestamp_nsecs - manifest.init_timestamp_nsecs) / 1e9,
        "written_by": dict(manifest.written_by),
        "format_version": manifest.version,
        "layout": layout or "milepost",
        "bytes": checkpoint_bytes(manifest, layout),
        "files": [{"path": file.path, "size": file.size, "checksum": file.checksum} for file in manifest.files],
        "custom_metadata": manifest.custom_metadata,
        "metrics": manifest.metrics,
    }


def item_document(item: Item) -> dict[str, Any]:
    """Return what a manifest says of one item, leaf by leaf."""
    leaves = [
        {"path": show_path(path), **_leaf_document(leaf, item)}
        for path, leaf in zip(leaf_paths(item.structure), item.leaves, strict=True)
    ]
    return {
        "writer": item.writer,
        "handler": item.handler,
        "bytes": sum(leaf["bytes"] or 0 for leaf in leaves),
        "leaves": leaves,
    }


def _leaf_document(leaf: Mapping[str, Any], item: Item) -> dict[str, Any]:
    arrays = {
        part: {
            "shape": list(array.shape),
            "dtype": array.dtype,
            "bytes": array_bytes(array),
            "sharding": None if array.sharding is None else item.shardings[array.sharding],
        }
        for part, array in leaf["arrays"].items()
    }
    return {**leaf, "arrays": arrays, "bytes": leaf_bytes(leaf)}


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(item: Item) -> Iterator[Row]:
    """Yield the lines of an item's tree, containers and leaves in order."""
    yield from _rows(item.structure, "<root>", 0, iter(item.leaves))


def _rows(node: Any, key: str, depth: int, leaves: Iterator[Mapping[str, Any]]) -> Iterator[Row]:
    if node == LEAF:
        leaf = next(leaves)
        yield Row(depth, key, leaf_text(leaf), leaf)
    elif node is None:
        yield Row(depth, key, "None", None)
    else:
        yield Row(depth, key, _container_text(node), None)
        for child_key, child in zip(child_keys(node), node["children"], strict=True):
            yield from _rows(child, show_path((child_key,)), depth + 1, leaves)


def _container_text(node: Mapping[str, Any]) -> str:
    kind = node["kind"]
    if not node["children"]:
        return f"{kind} {_BRACKETS.get(kind, '')}".rstrip() + ", empty"
    return str(node["type"]).rpartition(":")[2] if "type" in node else str(kind)


def leaf_text(leaf: Mapping[str, Any]) -> str:
    """Return a leaf in short: dtype and shape of its arrays, or its value."""
    if "key_impl" in leaf and "" in leaf["arrays"]:
        return f"key<{leaf['key_impl']}>[{', '.join(map(str, leaf['arrays'][''].shape[:-1]))}]"
    if leaf["arrays"]:
        shown = (
            f"{f'{part}: ' if part else ''}{array.dtype}[{', '.join(map(str, array.shape))}]"
            for part, array in leaf["arrays"].items()
        )
        return ", ".join(shown)
    value = leaf.get("value", leaf.get("hex", ""))
    shown_value = repr(value) if leaf["type"] == "str" else str(value)
    if len(shown_value) > _VALUE:
        shown_value = shown_value[:_VALUE] + "..."
    return f"{leaf.get('dtype', '')} {shown_value}".strip()


def row_cells(row: Row, item: Item) -> tuple[str, str, str, str, str]:
    """Return a line's cells: key, content, bytes, type of leaf, sharding."""
    key = "  " * row.depth + row.key
    if row.leaf is None:
        return key, row.kind, "", "", ""
    size = leaf_bytes(row.leaf)
    numbers = dict.fromkeys(array.sharding for array in row.leaf["arrays"].values() if array.sharding is not None)
    spread = "; ".join(sharding_text(item.shardings[number]) for number in numbers)
    shown = "" if not row.leaf["arrays"] else "?" if size is None else size_text(size)
    return key, row.kind, shown, row.leaf["type"], spread
