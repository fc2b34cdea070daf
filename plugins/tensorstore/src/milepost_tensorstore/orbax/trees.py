"""How a tree of ours stands in Orbax's files: `_METADATA`, `_sharding`, `array_metadatas` and `_strings.json`.

The rule: pure functions of the manifest, which holds all there is to say. Orbax rebuilds a tree from the keys of its
leaves alone, so that empty containers and `None` are entries of their own, every mapping is a dict with texts for keys,
and every sequence a list.
"""

from __future__ import annotations

import base64
import functools
import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from milepost.errors import ManifestError, UnsupportedLeafError, noted

from milepost_tensorstore.orbax.names import Names, key_text
from milepost_tensorstore.orbax.values import Value, Values, of_array

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from milepost.protocols import Array

__all__ = ["Entry", "Facts", "Key", "entries", "files", "new_arrays"]

_FIELD, _INDEX = 2, 1
_EMPTY = MappingProxyType(
    {"dict": "Dict", "OrderedDict": "Dict", "defaultdict": "Dict", "list": "List", "tuple": "Tuple"}
)
_MANY = 20


class Key(NamedTuple):
    """One key of a path: its text, and whether it is an index."""

    text: str
    kind: int


class Entry(NamedTuple):
    """One entry of a tree for Orbax: a leaf, or an empty container.

    `milepost` is milepost's name for it; `shape` and `dtype` are those of its array, if one is `stored`.
    """

    keys: tuple[Key, ...]
    value: Value
    milepost: str = ""
    stored: bool = False
    shape: tuple[int, ...] = ()
    dtype: str = ""

    @property
    def name(self) -> str:
        """What Orbax calls it: the texts of its keys, joined by dots."""
        return ".".join([key.text for key in self.keys])


def entries(item: Mapping[str, Any]) -> list[Entry]:
    """Return what Orbax is told of an item, in order; raises `UnsupportedLeafError` where it would mix up two leaves.

    >>> [entry.name for entry in entries({"structure": {"kind": "list", "children": ["*", None]}, "shardings": [],
    ...                                   "leaves": [{"type": "bool", "value": True}]})]
    ['0', '1']
    """
    leaves, names, values = iter(item["leaves"]), Names(), Values(item["shardings"])
    found: list[Entry] = []
    for keys, node in _walk(item["structure"], ()):
        if node == "*":
            leaf = next(leaves, None)
            if leaf is None:
                raise ManifestError("cannot describe an item to Orbax: its structure has more leaves than there are")
            found += _leaf(keys, leaf, values, names)
        else:
            found.append(Entry(keys, Value("None" if node is None else _EMPTY.get(node["kind"], "None"))))
    _refuse_twins(found)
    return found


def _walk(node: Any, keys: tuple[Key, ...]) -> Iterator[tuple[tuple[Key, ...], Any]]:
    if node is None or node == "*" or not node["children"]:
        yield keys, node
        return
    for key, child in zip(_keys(node), node["children"], strict=True):
        yield from _walk(child, (*keys, key))


def _keys(node: Mapping[str, Any]) -> Sequence[Key]:
    match node["kind"]:
        case "list" | "tuple":
            return [Key(str(index), _INDEX) for index in range(len(node["children"]))]
        case "namedtuple":
            return [Key(name, _FIELD) for name in node["fields"]]
        case "custom" if node["keys"] == list(range(len(node["keys"]))):
            return [Key(str(index), _INDEX) for index in node["keys"]]
    return [Key(key_text(key), _FIELD) for key in node["keys"]]


def _leaf(keys: tuple[Key, ...], leaf: Mapping[str, Any], values: Values, names: Names) -> Iterator[Entry]:
    name, number = names.of([key.text for key in keys])
    # A name that came before has a number behind it, in milepost as for Orbax.
    arrays = leaf.get("arrays") or {"": None}
    for part, array in arrays.items():
        suffix = number + (f"~.{part}" if part else "")
        alone = {"type": "", "arrays": {"": array}} if part else leaf
        mine = _with_suffix(keys, suffix) if suffix else keys
        value = values.of(alone)
        full = name + (f"~.{part}" if part else "")
        if array is None:
            yield Entry(mine, value, full)
        else:
            yield Entry(mine, value, full, True, tuple(of_array(array, "shape")), of_array(array, "dtype"))


def _with_suffix(keys: tuple[Key, ...], suffix: str) -> tuple[Key, ...]:
    last = keys[-1] if keys else Key("value", _FIELD)
    return (*keys[:-1], Key(last.text + suffix, _FIELD))


def _refuse_twins(found: Iterable[Entry]) -> None:
    seen: set[str] = set()
    twins: list[str] = []
    for entry in found:
        name = entry.name
        if name in seen:
            twins.append(name)
        seen.add(name)
    if twins:
        shown = ", ".join(map(repr, twins[:_MANY])) + (", ..." if len(twins) > _MANY else "")
        raise noted(
            UnsupportedLeafError(f"cannot save in the format of Orbax: it would have one name for two leaves: {shown}"),
            "Orbax joins keys by dots: rename keys that have dots in them, or choose another array writer",
        )


def new_arrays(found: Iterable[Entry]) -> dict[str, Array]:
    """Return the arrays that Orbax needs and milepost does not: of values that stand in the manifest."""
    return {entry.name: entry.value.array for entry in found if entry.value.array is not None}


# --- files -----------------------------------------------------------------------------------------------------------


class Facts(NamedTuple):
    """How the arrays of an item are stored; `chunk` returns the shape of the chunks of an entry's array."""

    ocdbt: bool
    zarr_format: int
    chunk: Callable[[Entry], tuple[int, ...]]


def files(
    found: Sequence[Entry], facts: Facts, *, texts: Mapping[str, str], custom_metadata: Mapping[str, Any] | None
) -> Iterator[tuple[str, str]]:
    """Yield name and text of every file that Orbax has beside the arrays of an item.

    `texts` are those that stand in arrays, by the name of their entry.
    """
    arrays = [entry for entry in found if entry.value.kind == "jax.Array"]
    about = {
        "use_ocdbt": facts.ocdbt,
        "use_zarr3": facts.zarr_format == 3,  # noqa: PLR2004 - the name of a format
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": custom_metadata,
    }
    tree = {repr(tuple([key.text for key in entry.keys])): _tree_entry(entry) for entry in found}
    yield (
        "_METADATA",
        _joined({"tree_metadata": _joined(tree)} | {name: json.dumps(one) for name, one in about.items()}),
    )
    # The text of a sharding is JSON within JSON, and the same for very many arrays.
    quoted = functools.cache(json.dumps)
    shardings = {
        _coded(entry.name): quoted(entry.value.sharding) for entry in arrays if entry.value.sharding is not None
    }
    if shardings:
        yield "_sharding", _joined(shardings)
    if arrays:
        described = ", ".join([_array_entry(entry, facts.chunk(entry)) for entry in arrays])
        yield "array_metadatas/process_0", f'{{"array_metadatas": [{described}]}}'
    strings = {entry.name: entry.value.text for entry in found if entry.value.text is not None} | dict(texts)
    if strings:
        yield "_strings.json", json.dumps(strings)


def _joined(members: Mapping[str, str]) -> str:
    """Return a JSON object of members that are JSON: of tens of thousands the encoder makes many objects."""
    return "{" + ", ".join([f"{json.dumps(name)}: {text}" for name, text in members.items()]) + "}"


def _tree_entry(entry: Entry) -> str:
    keys = ", ".join(map(_key_json, entry.keys))
    return f'{{"key_metadata": [{keys}], "value_metadata": {_value_json(entry.value.kind, entry.value.box)}}}'


@functools.lru_cache(4096)
def _key_json(key: Key) -> str:
    return json.dumps({"key": key.text, "key_type": key.kind})


@functools.lru_cache(4096)
def _value_json(kind: str, box: tuple[int, ...] | None) -> str:
    described: dict[str, Any] = {"value_type": kind, "skip_deserialize": kind in _SKIPPED}
    return json.dumps(described if box is None else described | {"write_shape": box})


_SKIPPED = frozenset({"None", *_EMPTY.values()})


def _array_entry(entry: Entry, chunk: Sequence[int]) -> str:
    shapes = _shapes_json(entry.value.box or (), tuple(chunk), entry.value.key_impl)
    return f'{{"array_metadata": {{"param_name": {json.dumps(entry.name)}, {shapes}}}}}'


@functools.lru_cache(4096)
def _shapes_json(box: tuple[int, ...], chunk: tuple[int, ...], key_impl: str | None) -> str:
    more = None if key_impl is None else {"random_key_impl": key_impl}
    return json.dumps({"write_shape": box, "chunk_shape": chunk, "ext_metadata": more})[1:-1]


def _coded(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode("utf-8", "surrogatepass")).decode("ascii")
