"""Trees as JAX itself writes them, by `jax.experimental.array_serialization.pytree_serialization`.

The rule: a file `pytreedef.json` has the containers, as a FlatBuffers table in Base64, and for each leaf a text, null
where it is `None`; beside it is an OCDBT database `array_store`, whose arrays are called by the numbers of their
leaves. A chunk of zeros is not stored. The table is walked with every offset checked, and has no more nodes than it has
room for, so that nodes that stand in it several times cannot multiply.
"""

from __future__ import annotations

import base64
import json
import struct
from typing import TYPE_CHECKING, Any

from milepost.errors import DamagedError, MissingDataError

from milepost_tensorstore.orbax.names import Names
from milepost_tensorstore.orbax.recognising_arrays import Arrays, databases

if TYPE_CHECKING:
    from collections.abc import Iterator

    from milepost_tensorstore.documents import Document
    from milepost_tensorstore.orbax.recognising_files import Folder

__all__ = ["is_jax_tree", "item", "parse"]

_FILE = "pytreedef.json"
_STORE = "array_store"
_LEAF, _NONE, _TUPLE, _LIST, _DICT, _CUSTOM = range(6)
_KIND, _CHILDREN, _NAMES, _TYPE, _STATIC = range(5)
_ORDERED = "collections.OrderedDict"
_DEEPEST = 200
_SHOWN = 20


def is_jax_tree(folder: Folder) -> bool:
    """Say whether a folder holds such a tree, by its own files."""
    return _FILE in folder.names and f"{_STORE}/" in folder.names


def item(folder: Folder, prefix: str, handler: str) -> dict[str, Any]:
    """Return the item in a folder, as a manifest has it; raises `DamagedError` for one that cannot be read."""
    text = folder.read(_FILE) or b""
    try:
        structure, leaves = parse(text)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        where = folder.file(_FILE)
        raise DamagedError(f"cannot read the tree in {where!r}: {error or 'it is nested too deeply'}") from error
    store = folder.folder(_STORE)
    bases = databases(store)
    if not bases:
        raise MissingDataError(f"cannot read {folder.url!r}: '{_STORE}/manifest.ocdbt' is missing")
    found = Arrays(store, bases).described([str(number) for _, number in leaves], 3)
    missing = [name for name, number in leaves if str(number) not in found]
    if missing:
        shown = ", ".join(map(repr, missing[:_SHOWN]))
        raise MissingDataError(
            f"cannot read {folder.url!r}: of {len(leaves)} arrays {len(missing)} are missing: {shown}"
        )
    record = {"format": 1, "zarr_format": 3, "ocdbt": True, "base": f"{_STORE}/", "fill": True}
    record["names"] = {name: str(number) for name, number in leaves}
    return {
        "structure": structure,
        "leaves": [_leaf(found[str(number)]) for _, number in leaves],
        "shardings": [{"sharding_type": ""}],
        "writer": "tensorstore",
        "prefix": prefix,
        "records": [record | ({"databases": bases} if bases != [""] else {})],
        "handler": handler,
    }


def _leaf(array: Document) -> dict[str, Any]:
    return {"type": "jax.Array", "arrays": {"": {"shape": list(array.shape), "dtype": array.kind.name, "sharding": 0}}}


def parse(text: bytes) -> tuple[Any, list[tuple[str, int]]]:
    """Return the structure of a tree as a manifest has it, and its leaves: name in the manifest, and number.

    Raises `ValueError` and the like for what makes no sense.
    """
    document = json.loads(text)
    ids = document["__jax_leaf_ids"]
    body = base64.b64decode(document["__jax_pytreedef_repr"], validate=True)
    walker = _Walker(body, [one is not None for one in ids])
    structure = walker.node(*_root(body), ())
    if walker.count != len(ids):
        raise ValueError(f"it has {walker.count} leaves, and names for {len(ids)}")
    return structure, walker.leaves


class _Walker:
    """Makes a structure of tables, and counts the leaves; `present` says which of them are not `None`."""

    def __init__(self, body: bytes, present: list[bool]) -> None:
        self._body, self._present = body, present
        self._left = len(body) // 4
        self._names = Names()
        self.count = 0
        self.leaves: list[tuple[str, int]] = []

    def node(self, at: int, path: tuple[str, ...]) -> Any:
        """Return the structure of the node whose table is there."""
        self._left -= 1
        if self._left < 0 or len(path) > _DEEPEST:
            raise ValueError("it has more nodes than it has room for, or they stand too deep")
        kind = _byte(self._body, at, _KIND)
        if kind == _LEAF:
            return self._leaf(path)
        if kind == _NONE:
            return None
        children = list(_vector(self._body, at, _CHILDREN))
        if kind == _DICT:
            keys = [_text(self._body, key) for key in _vector(self._body, at, _NAMES)]
            return {"kind": "dict", "keys": keys, "children": self._children(children, keys, path)}
        if kind in (_TUPLE, _LIST):
            numbers = [str(number) for number in range(len(children))]
            name = "tuple" if kind == _TUPLE else "list"
            return {"kind": name, "children": self._children(children, numbers, path)}
        if kind == _CUSTOM:
            return self._custom(at, children, path)
        raise ValueError(f"it has a node of kind {kind}, which is not known")

    def _leaf(self, path: tuple[str, ...]) -> str | None:
        number, self.count = self.count, self.count + 1
        if number >= len(self._present):
            raise ValueError(f"it has more leaves than the {len(self._present)} it has names for")
        if not self._present[number]:
            return None
        self.leaves.append((self._names.of(path)[0], number))
        return "*"

    def _children(self, children: list[int], keys: list[str], path: tuple[str, ...]) -> list[Any]:
        return [self.node(child, (*path, key)) for child, key in zip(children, keys, strict=True)]

    def _custom(self, at: int, children: list[int], path: tuple[str, ...]) -> Any:
        """Return a node of a class: keys or fields where it has noted them, else it is a list of its parts."""
        name = _text(self._body, _at(self._body, at, _TYPE))
        fields = _fields(_string(self._body, _at(self._body, at, _STATIC)), len(children))
        if fields is None:
            numbers = [str(number) for number in range(len(children))]
            return {"kind": "list", "children": self._children(children, numbers, path)}
        made = self._children(children, fields, path)
        if name == _ORDERED:
            return {"kind": "OrderedDict", "keys": fields, "children": made}
        # The name is what its author chose for the file, not where the class is found.
        return {"kind": "namedtuple", "type": f":{name}", "fields": fields, "children": made}


def _fields(static: bytes, count: int) -> list[str] | None:
    try:
        found = json.loads(static)
    except (ValueError, RecursionError):
        return None
    fit = type(found) is list and len(set(map(str, found))) == count and all(type(one) is str for one in found)
    return found if fit else None


# --- FlatBuffers: tables, vectors and text at offsets that are relative to where they stand ---------------------------


def _number(body: bytes, at: int, form: str) -> int:
    if not 0 <= at <= len(body) - struct.calcsize(form):
        raise ValueError(f"it refers to byte {at} of {len(body)}")
    return int(struct.unpack_from(form, body, at)[0])


def _root(body: bytes) -> tuple[int]:
    return (_number(body, 0, "<I"),)


def _field(body: bytes, table: int, field: int) -> int | None:
    """Return where a field of a table stands, None if it has none."""
    known = table - _number(body, table, "<i")
    at = 4 + 2 * field
    if at + 2 > _number(body, known, "<H"):
        return None
    offset = _number(body, known + at, "<H")
    return table + offset if offset else None


def _byte(body: bytes, table: int, field: int) -> int:
    at = _field(body, table, field)
    return 0 if at is None else _number(body, at, "<b")


def _at(body: bytes, table: int, field: int) -> int | None:
    """Return where stands what a field of a table refers to."""
    at = _field(body, table, field)
    return None if at is None else at + _number(body, at, "<I")


def _vector(body: bytes, table: int, field: int) -> Iterator[int]:
    """Yield where stands what the elements of a vector refer to."""
    start = _at(body, table, field)
    count = 0 if start is None else _number(body, start, "<I")
    if start is None or count > len(body) // 4:
        if count:
            raise ValueError(f"it has a list of {count} in {len(body)} bytes")
        return
    for at in range(start + 4, start + 4 + 4 * count, 4):
        yield at + _number(body, at, "<I")


def _string(body: bytes, at: int | None) -> bytes:
    if at is None:
        return b""
    count = _number(body, at, "<I")
    if at + 4 + count > len(body):
        raise ValueError(f"it has a text of {count} bytes at byte {at} of {len(body)}")
    return body[at + 4 : at + 4 + count]


def _text(body: bytes, at: int | None) -> str:
    return _string(body, at).decode("utf-8")
