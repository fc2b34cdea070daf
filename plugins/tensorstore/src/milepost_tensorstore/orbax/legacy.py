"""What the file `checkpoint` of Orbax up to 0.5 adds to a tree: leaves, and the tree where nothing else tells it.

The rule: where there is `_METADATA`, it says what the leaves are, and the file has the values of those that are not
stored as arrays are. Where there is none, the file is the tree. An array in the file comes back as one of NumPy, as
Orbax gave it back, which did not note whose it was.
"""

from __future__ import annotations

import base64
import dataclasses
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from milepost_tensorstore.orbax.legacy_aggregate import FILE, Elsewhere, Stored, record, scan
from milepost_tensorstore.orbax.recognising_trees import GIVEN, Entry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from milepost.protocols import Json

    from milepost_tensorstore.orbax.recognising_files import Folder

__all__ = ["Aggregate", "aggregate_of", "is_aggregate"]

_MAP = (*range(0x80, 0x90), 0xDE, 0xDF)


def is_aggregate(folder: Folder) -> bool:
    """Say whether a folder has such a file; programs of others have text in theirs."""
    return FILE in folder.names and (folder.read_quietly(FILE, 0, 1) or b"\0")[0] in _MAP


def aggregate_of(folder: Folder) -> Aggregate | None:
    """Return what the file of a folder has, None if there is none; raises `DamagedError` for what is no such file."""
    return Aggregate(scan(folder.storage, f"{folder.prefix}{FILE}")) if is_aggregate(folder) else None


class Aggregate:
    """The tree in such a file."""

    def __init__(self, tree: Any) -> None:
        self._tree = tree

    def entries(self, jax_arrays: Mapping[str, Any]) -> list[Entry]:
        """Return the leaves of the tree, and containers without any; `jax_arrays` are those known to be JAX's."""
        return [
            dataclasses.replace(entry, kind="jax.Array") if entry.name in jax_arrays else entry
            for entry in _walk(self._tree, (), ())
        ]

    def given(self, entries: Iterable[Entry]) -> tuple[list[Entry], dict[str, dict[str, Any]], Json]:
        """Say which entries the file has the values of.

        Return the entries, with such of kind `GIVEN`; their leaves as a manifest has them, by name; and what the record
        of the arrays needs to have of the file.
        """
        marked, leaves, arrays = [], {}, {}
        for entry in entries:
            value = None if entry.kind in _EMPTY else _at(self._tree, entry)
            if value is None or isinstance(value, dict | list | Elsewhere):
                marked.append(entry)
                continue
            marked.append(dataclasses.replace(entry, kind=GIVEN))
            leaves[entry.name] = _leaf(value)
            if isinstance(value, Stored):
                arrays[entry.name] = value
        return marked, leaves, record(arrays) if arrays else None


_EMPTY = ("None", "Dict", "List", "Tuple", "NamedTuple")


def _walk(value: Any, keys: tuple[str, ...], indices: tuple[bool, ...]) -> Iterator[Entry]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _walk(child, (*keys, str(key)), (*indices, False))
    elif isinstance(value, list) and value:
        for index, child in enumerate(value):
            yield from _walk(child, (*keys, str(index)), (*indices, True))
    else:
        kinds = {type(None): "None", dict: "Dict", list: "List"}
        yield Entry(keys, indices, kinds.get(type(value), "np.ndarray"))


def _at(tree: Any, entry: Entry) -> Any:
    """Return what stands at the place of an entry, None if nothing does."""
    for key in entry.keys:
        if isinstance(tree, list):
            tree = tree[int(key)] if key.isascii() and key.isdigit() and int(key) < len(tree) else None
        else:
            tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _leaf(value: Any) -> dict[str, Any]:
    """Return a leaf as a manifest has it.

    >>> _leaf(True), _leaf(1 << 64)
    ({'type': 'bool', 'value': True, 'arrays': {}}, {'type': 'int', 'hex': '0x10000000000000000', 'arrays': {}})
    >>> _leaf(0.5)
    {'type': 'float', 'value': '0.5', 'bits': '3fe0000000000000', 'arrays': {}}
    """
    if isinstance(value, Stored):
        array = {"shape": list(value.shape), "dtype": value.dtype, "sharding": None}
        return {"type": "np.ndarray", "arrays": {"": array}}
    return {**_inline(value), "arrays": {}}


def _inline(value: Any) -> dict[str, Any]:
    if isinstance(value, np.generic):
        bits = np.asarray(value).tobytes().hex()
        return {"type": "np.generic", "dtype": value.dtype.name, "value": str(value), "bits": bits}
    if isinstance(value, bytes):
        return {"type": "bytes", "value": base64.b64encode(value).decode("ascii")}
    if isinstance(value, float):
        return {"type": "float", "value": repr(value), "bits": _bits(value)}
    if isinstance(value, complex):
        return {"type": "complex", "value": repr(value), "bits": [_bits(value.real), _bits(value.imag)]}
    if type(value) is int and not -(1 << 63) <= value < 1 << 63:
        return {"type": "int", "hex": hex(value)}
    return {"type": type(value).__name__, "value": value}


def _bits(value: float) -> str:
    return struct.pack(">d", value).hex()
