"""How zarr-python is told what a group holds: its arrays, the groups they are in, and values that are no arrays.

The rule: zarr-python makes every document. Dimensions are named after their array, because xarray demands names, and
that those of one name be of one length. What the tree holds besides arrays stands in the attributes of the root, for
people and programs that know nothing of milepost; no load reads it.
"""

from __future__ import annotations

import json
import math
import warnings
from typing import TYPE_CHECKING, Any

from milepost_zarr import naming
from milepost_zarr.dtypes import kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from milepost.protocols import ArraySpec, Json
    from zarr import AsyncArray

    from milepost_zarr.codecs import Codec
    from milepost_zarr.grid import Grid
    from milepost_zarr.store import GroupStore

__all__ = ["attributes", "make_group", "open_arrays", "set_attributes"]

_LARGEST = 1 << 63


async def make_group(store: GroupStore, arrays: Sequence[tuple[ArraySpec, Grid]], codec: Codec) -> None:
    """Make the documents of a group: its arrays, the groups they are in, and the root, which has all of them again."""
    from zarr.api import asynchronous as zarr

    paths = {naming.path_of(spec.name): (spec, grid) for spec, grid in arrays}
    naming.check(paths)
    hidden = naming.hidden(paths)
    await zarr.create_group(store=store, zarr_format=3)
    for path in sorted(paths.keys() - hidden):
        await _make_array(store, path, *paths[path], codec)
    with warnings.catch_warnings():
        # That the specification has no word of it yet: who does not know it reads the documents one by one.
        warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")
        await zarr.consolidate_metadata(store, zarr_format=3)
    for path in sorted(hidden):
        # Nobody who lists looks below an array, and zarr-python makes nothing there: it is found by its path alone.
        aside = store.aside()
        await _make_array(aside, path, *paths[path], codec)
        store.adopt(aside)


async def open_arrays(store: GroupStore, names: Iterable[str]) -> dict[str, AsyncArray[Any]]:
    """Return arrays of a group that was made, by name, ready to be written."""
    from zarr import AsyncArray
    from zarr.api import asynchronous as zarr

    store.fetch(naming.DOCUMENT)
    group = await zarr.open_group(store, mode="r+", zarr_format=3)
    found: dict[str, AsyncArray[Any]] = {}
    for name in names:
        path = naming.path_of(name)
        try:
            node = await group.getitem(path)
        except KeyError:
            store.fetch(f"{path}/{naming.DOCUMENT}")
            node = await zarr.open_array(store=store, path=path, zarr_format=3)
        assert isinstance(node, AsyncArray)  # noqa: S101 nothing but arrays was asked for
        # A chunk of zeros must be there, too: to milepost, one that is not there is lost.
        found[name] = AsyncArray(node.metadata, node.store_path, config={"write_empty_chunks": True})
    return found


async def _make_array(store: GroupStore, path: str, spec: ArraySpec, grid: Grid, codec: Codec) -> None:
    """Make the document of an array, and of the groups it is in."""
    from zarr.api import asynchronous as zarr

    found = kind(spec.dtype)
    assert found is not None  # noqa: S101 checked for all arrays at once, for one error that names them all
    attributes: dict[str, Any] = {} if found.native else {"milepost_dtype": spec.dtype}
    if path != spec.name:
        attributes["milepost_name"] = spec.name
    await zarr.create_array(
        store,
        name=path,
        shape=grid.shape,
        dtype=found.stored,
        chunks=grid.chunk,
        shards=grid.file if grid.sharded else None,
        filters=None,
        compressors=codec.compressors(),
        fill_value=found.stored.type(0),
        zarr_format=3,
        attributes=attributes,
        # With dots, not slashes: every folder that need not be made is one that need not be made durable.
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=[f"{path}:{axis}" for axis in range(len(grid.shape))],
    )


# --- what is no array ------------------------------------------------------------------------------------------------


async def set_attributes(store: GroupStore, item: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Add an item's small values, by path, and what the caller noted, to the root's document."""
    from zarr.api import asynchronous as zarr

    store.fetch(naming.DOCUMENT)
    group = await zarr.open_group(store, mode="r+", zarr_format=3)
    await group.update_attributes(attributes(item, checkpoint))


def attributes(item: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, Json]:
    """Return an item's small values, by path, and what the caller noted."""
    noted = {
        "milepost_custom_metadata": checkpoint.get("custom_metadata"),
        "milepost_item_metadata": item.get("custom_metadata"),
        "milepost_metrics": checkpoint.get("metrics"),
    }
    values = dict(_values(item["structure"], item["leaves"]))
    return values | {key: value for key, value in noted.items() if value is not None}


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
