"""What the metadata of a group says: `zarr.json` of every array and group, all of them again in that of the root.

The rule: the documents are those that zarr-python writes for the same arrays; dimensions are named after their array,
because xarray demands names, and that those of one name be of one length. What the tree holds besides arrays stands in
the attributes of the root, for people and programs that know nothing of milepost; no load reads it.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from milepost_zarr import naming
from milepost_zarr.dtypes import Kind, kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from milepost.protocols import ArraySpec, Json

    from milepost_zarr.codecs import Codec
    from milepost_zarr.grid import Grid

__all__ = ["DOCUMENT", "array_document", "documents", "encoded", "with_attributes"]

DOCUMENT = "zarr.json"

_LARGEST = 1 << 63
_BINARY: list[Json] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def documents(arrays: Sequence[tuple[ArraySpec, Grid]], codec: Codec) -> dict[str, dict[str, Any]]:
    """Return the documents of a group by path: its arrays, the groups they are in, and last the root, as ""."""
    found = {naming.path_of(spec.name): array_document(spec, grid, codec) for spec, grid in arrays}
    naming.check(found)
    arrays_at = set(found)
    for path in sorted(naming.groups(found)):
        found.setdefault(path, {"attributes": {}, "zarr_format": 3, "node_type": "group"})
    # An array that stands where a group is hides what is below from readers that list: it is found by its path alone.
    hidden = {path for path in found if any(above in arrays_at for above in naming.groups([path]))}
    inside = {path: _consolidated(found[path]) for path in sorted(found) if path not in hidden}
    found[""] = {
        "attributes": {},
        "zarr_format": 3,
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": inside},
        "node_type": "group",
    }
    return found


def _consolidated(document: dict[str, Any]) -> dict[str, Any]:
    if document["node_type"] == "array":
        return document
    empty = {"kind": "inline", "must_understand": False, "metadata": {}}
    return {**document, "consolidated_metadata": empty}


def array_document(spec: ArraySpec, grid: Grid, codec: Codec) -> dict[str, Any]:
    """Return the document of an array."""
    found = kind(spec.dtype)
    assert found is not None  # noqa: S101 checked for all arrays at once, for one error that names them all
    path = naming.path_of(spec.name)
    attributes = {} if found.native else {"milepost_dtype": spec.dtype}
    if path != spec.name:
        attributes["milepost_name"] = spec.name
    codecs = codec.documents(found.stored)
    if grid.sharded:
        inner: dict[str, Json] = {"chunk_shape": list(grid.chunk), "codecs": codecs}
        inner |= {"index_codecs": _BINARY, "index_location": "end"}
        codecs = [{"name": "sharding_indexed", "configuration": inner}]
    return {
        "shape": list(grid.shape),
        "data_type": found.stored.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(grid.file)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": _fill(found),
        "codecs": codecs,
        "attributes": attributes,
        "dimension_names": [f"{path}:{axis}" for axis in range(len(grid.shape))],
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _fill(found: Kind) -> Json:
    zero: Json = found.stored.type(0).item() if found.stored.kind != "c" else [0.0, 0.0]
    return zero


def encoded(document: Mapping[str, Any]) -> bytes:
    """Return a document as it is stored."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")


# --- what is no array ------------------------------------------------------------------------------------------------


def with_attributes(root: bytes, item: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> bytes:
    """Return the root's document with an item's small values, by path, and what the caller noted, as attributes."""
    document = json.loads(root)
    attributes = dict(_values(item["structure"], item["leaves"]))
    noted = {
        "milepost_custom_metadata": checkpoint.get("custom_metadata"),
        "milepost_item_metadata": item.get("custom_metadata"),
        "milepost_metrics": checkpoint.get("metrics"),
    }
    document["attributes"] = attributes | {key: value for key, value in noted.items() if value is not None}
    return encoded(document)


def _values(structure: Any, leaves: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Json]]:
    for path, leaf in zip(_paths(structure, ()), leaves, strict=True):
        if "value" in leaf and "arrays" not in leaf and leaf["type"] != "bytes":
            yield "/".join(path) or "value", _plain(leaf)


def _paths(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if node == "*":
        yield path
    elif node is not None:
        for key, child in zip(_keys(node), node["children"], strict=True):
            yield from _paths(child, (*path, key))


def _keys(node: Mapping[str, Any]) -> list[str]:
    keys = node.get("keys", node.get("fields"))
    return [_text(key) for key in keys] if keys is not None else [str(at) for at in range(len(node["children"]))]


def _text(key: Json) -> str:
    if isinstance(key, dict):
        key = next(iter(key.values()))
    return key if isinstance(key, str) else json.dumps(key)


def _plain(leaf: Mapping[str, Any]) -> Json:
    """Return the number that a leaf's text says, where JSON has it; else the text."""
    value: Json = leaf["value"]
    if not isinstance(value, str) or leaf["type"] not in ("float", "np.generic"):
        return value
    name = leaf.get("dtype", "float64")
    try:
        number = value == "True" if name == "bool" else int(value) if "int" in name else float(value)
    except ValueError:
        return value
    return number if -_LARGEST <= number < 2 * _LARGEST and math.isfinite(number) else value
