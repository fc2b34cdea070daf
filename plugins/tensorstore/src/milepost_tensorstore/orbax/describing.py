"""What else Orbax wants to find in a checkpoint, once the arrays are written.

The rule: our manifest stays the only truth for milepost; what is written here is for Orbax, and is as near to what it
would have written of the same object as its format allows. It is written before the commit, so that a checkpoint is for
both sides all there or not at all. All of it is small, but for one case: a tree that is one array and nothing else goes
by another name with Orbax, which costs its size again where there is no database.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from milepost.protocols import ArraySpec, ReadOptions, ReadRequest

from milepost_tensorstore import dtypes, names
from milepost_tensorstore.orbax import aliasing, checkpoints, plain, trees
from milepost_tensorstore.orbax.names import ARRAY, JAX_KEY, NUMPY_KEY
from milepost_tensorstore.orbax.trees import Entry, Facts, Key
from milepost_tensorstore.orbax.values import Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from milepost.protocols import Array, Location

__all__ = ["LARGEST", "complete"]

LARGEST = 64 << 20
"""Bytes of texts, or of random keys, up to which they are read from their arrays to be written for Orbax."""

_FIELD = 2


def complete(location: Location, checkpoint: Mapping[str, Any]) -> None:
    """Write what Orbax reads beside the arrays: `location` is the whole checkpoint's, `checkpoint` its manifest.

    Raises `UnsupportedLeafError` for a tree of which two leaves would have one name.
    """
    for item in checkpoint["items"].values():
        if item["writer"]:
            _describe(_within(location, item["prefix"]), item)
    _write(location, "", checkpoints.files(checkpoint))
    if location.url.startswith("gs://"):
        _mark(location, checkpoint["items"])


def _within(location: Location, prefix: str) -> Location:
    below = location.prefix + prefix
    return dataclasses.replace(location, prefix=below, url=f"{location.storage.url}/{below}")


def _write(location: Location, folder: str, files: Iterable[tuple[str, str | bytes]]) -> None:
    for name, body in files:
        data = body.encode() if isinstance(body, str) else body
        location.storage.write(f"{location.prefix}{folder}{name}", [data])


def _mark(location: Location, items: Mapping[str, Mapping[str, Any]]) -> None:
    """Say of every item that it is complete: on object storage Orbax asks each by itself."""
    for item in items.values():
        if item["prefix"]:
            text = f"Checkpoint commit was successful to {location.url}{item['prefix']}"
            _write(location, item["prefix"], [("commit_success.txt", text)])


def _describe(location: Location, item: Mapping[str, Any]) -> None:
    found, handler = trees.entries(item), item.get("handler")
    if handler == JAX_KEY:
        _describe_key(location, item, found)
    elif handler == NUMPY_KEY:
        _describe_state(location, item, found)
    else:
        _describe_tree(location, item, _renamed(found, ("checkpoint",) if handler == ARRAY else ()))


def _renamed(found: Sequence[Entry], keys: tuple[str, ...]) -> Sequence[Entry]:
    """Give the one leaf of a tree that has no containers the keys that Orbax gives it."""
    if len(found) == 1 and not found[0].keys:
        return [found[0]._replace(keys=tuple(Key(key, _FIELD) for key in keys))]
    return found


# --- trees -----------------------------------------------------------------------------------------------------------


def _describe_tree(location: Location, item: Mapping[str, Any], found: Sequence[Entry]) -> None:
    from milepost_tensorstore import writing

    found, texts = _texts(location, item, found)
    extra, ocdbt = trees.new_arrays(found), item["records"][0]["ocdbt"]
    lone = found[0] if len(found) == 1 and found[0].stored and found[0].milepost == "value" else None
    if lone is not None and lone.value.kind != "string" and lone.name != "value":
        aliasing.add_name(location, "value", lone.name, ocdbt=ocdbt)
    if extra:
        _check_names(found, extra, folders=not ocdbt)
        writing.add_arrays(location, item["records"], extra)
    _write(location, "", _files(found, item, texts))


def _check_names(found: Sequence[Entry], extra: Mapping[str, Array], *, folders: bool) -> None:
    """Hold what comes besides to the rules for names; arrays that milepost stores have been."""
    specs = [
        ArraySpec(entry.milepost, entry.shape, entry.dtype)
        for entry in found
        if entry.keys and (entry.stored or entry.name in extra)
    ]
    names.check(specs, folders=folders)


def _files(found: Sequence[Entry], item: Mapping[str, Any], texts: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    return trees.files(found, _facts(item), texts=texts, custom_metadata=item.get("custom_metadata"))


def _facts(item: Mapping[str, Any]) -> Facts:
    record = item["records"][0]
    chunks = {row[0]: row[3] for one in item["records"] for row in one.get("pieces", ())}
    return Facts(record["ocdbt"], record["zarr_format"], lambda entry: chunks.get(entry.milepost) or entry.shape)


def _texts(
    location: Location, item: Mapping[str, Any], found: Sequence[Entry]
) -> tuple[Sequence[Entry], dict[str, str]]:
    """Return the texts that stand in arrays, by entry; what is too much to be read remains an array of bytes."""
    long = [entry for entry in found if entry.value.long]
    if not long:
        return found, {}
    if sum(map(_size, long)) > LARGEST:
        as_bytes = Value("np.ndarray")
        return [entry._replace(value=as_bytes) if entry.value.long else entry for entry in found], {}
    arrays = _read(location, item, long)
    return found, {name: array.tobytes().decode("utf-8", "surrogatepass") for name, array in arrays.items()}


def _size(entry: Entry) -> int:
    return math.prod(entry.shape) * (known.dtype.itemsize if (known := dtypes.kind(entry.dtype)) else 1)


def _read(location: Location, item: Mapping[str, Any], wanted: Sequence[Entry]) -> dict[str, Array]:
    """Read whole arrays, by the names that Orbax has for them."""
    from milepost_tensorstore import TensorStoreArrays

    requests = [ReadRequest(entry.milepost) for entry in wanted]
    found = TensorStoreArrays().read(location, item["records"], requests, ReadOptions(LARGEST, 1))
    return {wanted[index].name: array for index, array in found}


# --- random keys -----------------------------------------------------------------------------------------------------


def _describe_key(location: Location, item: Mapping[str, Any], found: Sequence[Entry]) -> None:
    """Lay out a random key of JAX as an item of two items, as Orbax does."""
    found = _renamed(found, ("checkpoint",))
    typed = any(entry.value.key_impl is not None for entry in found)
    if all(entry.stored for entry in found):
        # Told of the implementation, Orbax would make a key of it twice.
        _write_plain(location, "jax_random_key/", item, [_as_data(entry) for entry in found])
        _write(location, "jax_random_key_metadata/", [("metadata", json.dumps({"typed": typed}))])


def _as_data(entry: Entry) -> Entry:
    return entry._replace(value=entry.value._replace(key_impl=None))


def _describe_state(location: Location, item: Mapping[str, Any], found: Sequence[Entry]) -> None:
    """Lay out the state of NumPy's random numbers likewise."""
    legacy = item["structure"] != "*" and item["structure"]["kind"] == "tuple"
    _write_plain(location, "np_random_key/", item, found)
    _write(location, "np_random_key_metadata/", [("metadata", json.dumps({"legacy": legacy}))])


def _write_plain(location: Location, folder: str, item: Mapping[str, Any], found: Sequence[Entry]) -> None:
    found, texts = _texts(location, item, found)
    stored = [entry for entry in found if entry.stored and entry.value.kind != "string"]
    if sum(map(_size, stored)) > LARGEST:
        return
    for name, array in (trees.new_arrays(found) | _read(location, item, stored)).items():
        _write(location, folder, plain.files(name, array))
    facts = Facts(ocdbt=False, zarr_format=2, chunk=lambda entry: entry.shape)
    _write(location, folder, trees.files(found, facts, texts=texts, custom_metadata=None))
