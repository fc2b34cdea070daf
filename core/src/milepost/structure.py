"""How the containers of a tree are written down, and built up again without JAX.

The rule: what was saved comes back as it was, keys and kinds alike (`1` is not `"1"`), also without a target. A
structure is JSON; every container is `{"kind": ..., ...}`, a leaf is "*" and `None` is null. Classes are recorded by
module and name, and looked up among the modules that are loaded already: nothing is ever imported because a file says
so. A class that cannot be found, or whose static part JSON cannot hold, comes back as a dict of its fields, a named
tuple as one made to measure.

Leaves are in JAX's order: dicts by sorted keys, everything else as it stands.
"""

from __future__ import annotations

import collections
import functools
import keyword
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from milepost.errors import UnsupportedLeafError

if TYPE_CHECKING:
    from milepost.protocols import Json

__all__ = [
    "DEEPEST",
    "LEAF",
    "Attr",
    "Key",
    "OpaqueError",
    "build",
    "child_keys",
    "class_named",
    "class_ref",
    "count_leaves",
    "decode_static",
    "encode_static",
    "key_text",
    "leaf_names",
    "leaf_paths",
    "show_path",
]

LEAF = "*"

DEEPEST = 200
"""How many containers may stand within each other: what is deeper might be saved here and not loaded elsewhere."""

Key: TypeAlias = Any
"""A key of a path: a plain value for a mapping, int for a sequence, `Attr` for a field."""

_OTHER_KINDS = (dict, list, tuple, type(None), collections.OrderedDict, collections.defaultdict)

MakeCustom: TypeAlias = Callable[[Mapping[str, Any], list[Any]], Any]


_FACTORIES = (None, bool, int, float, complex, str, bytes, list, tuple, set, dict, collections.OrderedDict)


class Attr(str):
    """The name of a field, as distinct from the same text as a key of a mapping."""

    __slots__ = ()


class OpaqueError(ValueError):
    """Say that a static value cannot be written as JSON."""


def class_ref(cls: type) -> str:
    """Return "module:qualified name" of a class that can be found again by it, or raise `OpaqueError`.

    >>> class_ref(collections.OrderedDict)
    'collections:OrderedDict'
    """
    ref = f"{cls.__module__}:{cls.__qualname__}"
    if class_named(ref) is not cls:
        raise OpaqueError(f"{cls!r} cannot be found by its name")
    return ref


def class_named(ref: str) -> type | None:
    """Return the class of that name from a module that is loaded already, else None.

    >>> class_named("collections:OrderedDict")
    <class 'collections.OrderedDict'>
    """
    module, _, qualname = ref.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        # A module may import another when it is asked for an attribute; its namespace asks nobody.
        if isinstance(found, types.ModuleType):
            found = object.__getattribute__(found, "__dict__").get(part)
        else:
            found = type.__getattribute__(found, "__dict__").get(part) if isinstance(found, type) else None
    return found if isinstance(found, type) else None


def encode_static(value: Any) -> Json:
    """Write a static value (a dict key, the static part of a node) as JSON, or raise `OpaqueError`.

    >>> encode_static((1, "1", True))
    {'tuple': [1, '1', True]}
    """
    if value is None or type(value) in (bool, int, str):
        return value  # type: ignore[no-any-return]
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is Attr:
        return {"attr": str(value)}
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return {type(value).__name__: [encode_static(part) for part in value]}
    if type(value) is dict:
        return {"dict": [[encode_static(key), encode_static(part)] for key, part in value.items()]}
    if isinstance(value, type):
        return {"class": class_ref(value)}
    raise OpaqueError(f"{type(value).__name__} {value!r:.80} cannot be written as JSON")


def decode_static(json: Any) -> Any:
    """Read what `encode_static` wrote; raise `OpaqueError` for a class that is not loaded.

    >>> decode_static({"tuple": [1, {"list": []}]})
    (1, [])
    """
    if not isinstance(json, dict):
        return json
    ((kind, value),) = json.items()
    match kind:
        case "tuple":
            return tuple(decode_static(part) for part in value)
        case "list":
            return [decode_static(part) for part in value]
        case "dict":
            return {decode_static(key): decode_static(part) for key, part in value}
        case "attr":
            return Attr(value)
        case "class":
            if (cls := class_named(value)) is None:
                raise OpaqueError(f"class {value!r} is not loaded")
            return cls
    raise OpaqueError(f"{kind!r} is no kind of static value")


# --- walking ---------------------------------------------------------------------------------------------------------


def child_keys(node: Mapping[str, Any]) -> Sequence[Key]:
    """Return the keys of a container's children, in their order."""
    match node["kind"]:
        case "dict" | "OrderedDict" | "defaultdict" | "custom":
            return [key if type(key) is str else _decode_key(key) for key in node["keys"]]
        case "namedtuple":
            return [Attr(name) for name in node["fields"]]
        case "list" | "tuple":
            return range(len(node["children"]))
    raise ValueError(f"{node['kind']!r} is no kind of container")


def _decode_key(json: Any) -> Key:
    try:
        return decode_static(json)
    except OpaqueError:
        return str(next(iter(json.values())))  # a class that is not loaded: its name stands for it


def count_leaves(structure: Any) -> int:
    """Return the number of leaves of a structure that anybody may have written.

    Raises `ValueError`, `TypeError`, `KeyError` or `AttributeError` for one that `build` could not build.

    >>> count_leaves({"kind": "list", "children": ["*", None, "*"]})
    2
    """
    count, depth, level = 0, 0, [structure]
    while level:
        count += level.count(LEAF)
        nodes = [node for node in level if node is not None and node != LEAF]
        if nodes and depth >= DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} containers deep")
        for node in nodes:
            _check_node(node)
        depth, level = depth + 1, [child for node in nodes for child in node["children"]]
    return count


def _check_node(node: Any) -> None:
    if type(node) is not dict or type(node["children"]) is not list:
        raise ValueError(f"{node!r:.60} is no container")
    keys = child_keys(node)
    distinct = len(set(keys))
    if len(keys) != len(node["children"]):
        raise ValueError(f"{len(keys)} keys for {len(node['children'])} children")
    match node["kind"]:
        case "dict" | "OrderedDict" | "defaultdict" if distinct != len(keys):
            raise ValueError(f"a {node['kind']} has a key twice")
        case "namedtuple" if type(node["fields"]) is not list or not all(type(name) is str for name in node["fields"]):
            raise ValueError(f"{node['fields']!r:.60} are no names of fields")
        case "defaultdict":
            _decode_key(node["factory"])
    if node["kind"] in ("namedtuple", "custom") and type(node["type"]) is not str:
        raise ValueError(f"{node['type']!r:.60} is no name of a class")


def leaf_paths(structure: Any) -> Iterator[tuple[Key, ...]]:
    """Yield the path of every leaf, in order.

    >>> list(leaf_paths({"kind": "dict", "keys": ["a"], "children": [{"kind": "list", "children": ["*", None, "*"]}]}))
    [('a', 0), ('a', 2)]
    """
    return _leaf_paths(structure, ())


def _leaf_paths(node: Any, path: tuple[Key, ...]) -> Iterator[tuple[Key, ...]]:
    if node == LEAF:
        yield path
    elif len(path) >= DEEPEST:
        raise UnsupportedLeafError(
            f"cannot save the tree: it is nested more than {DEEPEST} containers deep, at {show_path(path[:3])}..."
        )
    elif node is not None:
        children = node["children"]
        keys = child_keys(node)
        if len(keys) != len(children):
            raise ValueError(f"{len(keys)} keys for {len(children)} children")
        for key, child in zip(keys, children, strict=True):
            if child == LEAF:
                yield (*path, key)
            elif child is not None:
                yield from _leaf_paths(child, (*path, key))


def key_text(key: Key) -> str:
    """Return a key as the text by which trees of different classes are matched: the field `w` and the key "w" alike."""
    return str(key)


def show_path(path: Sequence[Key]) -> str:
    """Return a path for people, as Python would write it.

    >>> show_path(("params", 0, Attr("w"), 1))
    "['params'][0].w[1]"
    """
    return "".join(f".{key}" if isinstance(key, Attr) else f"[{key!r}]" for key in path) or "<root>"


def leaf_names(paths: Sequence[tuple[Key, ...]]) -> list[str]:
    """Return a name for each leaf: its keys joined by "/", escaped as in RFC 6901, and unique.

    >>> leaf_names([("a/b", 0), ("a", "b"), (1,), ("1",)])
    ['a~1b/0', 'a/b', '1', '1~2']
    """
    seen: dict[str, int] = {}
    names = []
    for path in paths:
        name = "/".join(map(str, path)) or "value"
        if "~" in name or name.count("/") >= len(path):
            name = "/".join([key_text(key).replace("~", "~0").replace("/", "~1") for key in path]) or "value"
        count = seen[name] = seen.get(name, 0) + 1
        # "~2" cannot come from escaping, so a number behind a tilde never meets another leaf's name.
        names.append(name if count == 1 else f"{name}~{count}")
    return names


# --- building --------------------------------------------------------------------------------------------------------


def plain(node: Mapping[str, Any], children: list[Any]) -> Any:
    """Build what stands for a class that is not at hand: a dict of its fields, or a list."""
    keys = child_keys(node)
    if all(isinstance(key, int) for key in keys):
        return children
    return {key_text(key): child for key, child in zip(keys, children, strict=True)}


def build(  # noqa: PLR0911 - one line for each kind of container
    structure: Any, leaves: Iterator[Any], make_custom: MakeCustom = plain
) -> Any:
    """Build the tree of a structure from its leaves, in order; `make_custom` builds nodes of registered classes."""
    if structure == LEAF:
        return next(leaves)
    if structure is None:
        return None
    children = [next(leaves) if child == LEAF else build(child, leaves, make_custom) for child in structure["children"]]
    match structure["kind"]:
        case "list":
            return children
        case "tuple":
            return tuple(children)
        case "dict":
            return dict(zip(child_keys(structure), children, strict=True))
        case "OrderedDict":
            return collections.OrderedDict(zip(child_keys(structure), children, strict=True))
        case "defaultdict":
            return _defaultdict(structure, children)
        case "namedtuple":
            return _namedtuple_class(structure["type"], tuple(structure["fields"]))(*children)
        case _ if class_named(structure["type"]) in _OTHER_KINDS:
            # JAX's own containers, called by the name of a class: it crashes on their static part where that is wrong.
            return plain(structure, children)
        case _:
            return make_custom(structure, children)


def _defaultdict(node: Mapping[str, Any], children: list[Any]) -> Any:
    items = zip(child_keys(node), children, strict=True)
    try:
        factory = decode_static(node["factory"])
    except OpaqueError:
        return dict(items)
    # The factory is called by whoever asks for a missing key, so it is nothing that does more than make a value.
    return collections.defaultdict(factory, items) if factory in _FACTORIES else dict(items)


def _namedtuple_class(ref: str, fields: tuple[str, ...]) -> Callable[..., Any]:
    found: Any = class_named(ref)
    if found is not None and issubclass(found, tuple) and getattr(found, "_fields", None) == fields:
        return lambda *values: tuple.__new__(found, values)
    name = ref.rpartition(":")[2].rpartition(".")[2]
    return _made_to_measure(name if name.isidentifier() and not keyword.iskeyword(name) else "namedtuple", fields)


@functools.cache
def _made_to_measure(name: str, fields: tuple[str, ...]) -> Callable[..., Any]:
    return collections.namedtuple(name, fields, rename=True)  # noqa: PYI024 - its fields are data
