"""How trees are taken apart into leaves, and put together again; the one place that knows JAX's tree registry.

The rule: everything is found out before a byte moves. A tree with leaves that cannot be saved gives one error with all
of them, by path; a target that does not fit a checkpoint gives one error with the whole difference.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import TYPE_CHECKING, Any

import jax.tree_util as jtu

from milepost.errors import MismatchError, UnsupportedLeafError, noted
from milepost.structure import (
    DEEPEST,
    LEAF,
    Attr,
    Key,
    OpaqueError,
    child_keys,
    class_named,
    class_ref,
    decode_static,
    encode_static,
    key_text,
    leaf_names,
    leaf_paths,
    plain,
    show_path,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from milepost.plugins import Plugins
    from milepost.protocols import LeafHandler, Parts

__all__ = ["Handlers", "Taken", "Target", "difference", "handlers_of", "make_custom", "take_apart", "target_leaves"]

_logger = logging.getLogger("milepost")

_SHOWN = 50


class Handlers:
    """The leaf handlers at hand: found by the class of a leaf on saving, by name on loading."""

    def __init__(self, handlers: Iterable[LeafHandler]) -> None:
        # Later registrations win: a package may handle better what the built-ins handle well enough.
        self._handlers = tuple(handlers)[::-1]
        self.by_name: dict[str, LeafHandler] = {handler.name: handler for handler in self._handlers[::-1]}
        self._of_class = functools.cache(self._nearest)

    def of(self, leaf: object) -> LeafHandler | None:
        """Return the handler for a leaf, None if there is none."""
        cls: Any = type(leaf)
        # Tracers are arrays by isinstance alone; they must reach the handler that can say what they are.
        return self._of_class(cls) or next((one for one in self._handlers if isinstance(leaf, one.types)), None)

    def _nearest(self, cls: type) -> LeafHandler | None:
        for base in cls.__mro__[:-1]:
            for handler in self._handlers:
                if base in handler.types:
                    return handler
        # Abstract classes such as jax.Array stand in nobody's MRO.
        return next((handler for handler in self._handlers if issubclass(cls, handler.types)), None)


@functools.cache
def handlers_of(plugins: Plugins) -> Handlers:
    """Return the leaf handlers that packages offer; asked for once, since they never change."""
    return Handlers(plugins.leaf_handlers())


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """A tree taken apart: its structure, and for each leaf its unique name, its handler's name and its parts."""

    structure: Any
    names: list[str]
    types: list[str]
    parts: list[Parts]


def take_apart(tree: Any, handlers: Handlers) -> Taken:
    """Take a tree apart, or raise one `UnsupportedLeafError` that lists all leaves and keys that cannot be saved."""
    encoder = _Encoder(tree)
    try:
        leaves, treedef = jtu.tree_flatten(tree)
        structure = encoder.encode(treedef)
    except (RecursionError, SystemError) as error:  # JAX's own recursion ends in the one or the other
        if isinstance(error, SystemError) and not isinstance(error.__cause__, RecursionError):
            raise
        raise UnsupportedLeafError(f"cannot save the tree: it is nested more than {DEEPEST} containers deep") from None
    paths = list(leaf_paths(structure))
    types, parts, refused = [], [], list(encoder.refused)
    for leaf, path in zip(leaves, paths, strict=True):
        handler = handlers.of(leaf)
        if handler is None:
            refused.append(f"{show_path(path)}: {_kind(leaf)} is no kind of leaf that can be saved")
            continue
        try:
            parts.append(handler.take_apart(leaf))
        except ValueError as error:
            refused.append(f"{show_path(path)}: {error}")
        types.append(handler.name)
    if refused:
        raise _refusal(refused)
    return Taken(structure, leaf_names(paths), types, parts)


def _kind(leaf: object) -> str:
    what = f"{type(leaf).__module__}.{type(leaf).__qualname__}".removeprefix("builtins.")
    return f"a {what} (callable)" if callable(leaf) else f"a {what}"


def _refusal(refused: list[str]) -> UnsupportedLeafError:
    listed = "\n".join(f"  {line}" for line in refused[:_SHOWN])
    more = f"\n  and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    return noted(
        UnsupportedLeafError(f"cannot save the tree: {len(refused)} of its leaves cannot be written:\n{listed}{more}"),
        "nothing was written; take these leaves out of the tree, or install a package with a leaf handler for them",
    )


class _Encoder:
    """Writes one treedef as a structure; counts leaves and empty nodes, to find the key paths of registered classes."""

    def __init__(self, tree: Any) -> None:
        self._tree = tree
        self._ends = 0
        self.refused: list[str] = []

    @functools.cached_property
    def _key_paths(self) -> list[tuple[Any, ...]]:
        return [path for path, _ in jtu.tree_flatten_with_path(self._tree, is_leaf=_is_empty)[0]]

    def encode(self, treedef: Any, depth: int = 0) -> Any:
        data = treedef.node_data()
        if data is None:
            self._ends += 1
            return LEAF
        cls, static = data
        if cls is type(None):
            self._ends += 1
            return None
        node = self._node(cls, static)
        if node["kind"] == "custom":
            return self._custom(node, treedef, depth)
        self._ends += not treedef.num_nodes > 1
        if treedef.num_leaves == treedef.num_nodes - 1:
            # Leaves and nothing else: the case of many leaves, where asking each is most of the work.
            self._ends += treedef.num_leaves
            node["children"] = [LEAF] * treedef.num_leaves
            return node
        node["children"] = [self.encode(child, depth + 1) for child in treedef.children()]
        return node

    def _node(self, cls: type, static: Any) -> dict[str, Any]:
        if cls in (list, tuple):
            return {"kind": cls.__name__}
        fields = getattr(cls, "_fields", None)
        if issubclass(cls, tuple) and fields is not None:
            return {"kind": "namedtuple", "type": _name_of(cls), "fields": list(fields)}
        match cls.__name__ if cls.__module__ in ("builtins", "collections") else "":
            case "dict" | "OrderedDict" as kind:
                return {"kind": kind, "keys": self._keys(static)}
            case "defaultdict":
                factory, keys = static
                return {"kind": "defaultdict", "keys": self._keys(keys), "factory": _or_opaque(factory)}
        node: dict[str, Any] = {"kind": "custom", "type": _name_of(cls)}
        try:
            return node | {"static": encode_static(static)}
        except OpaqueError as error:
            _logger.debug("without a target, %s comes back as plain containers: %s", node["type"], error)
            return node

    def _keys(self, keys: Iterable[Any]) -> list[Any]:
        encoded = []
        for key in keys:
            try:
                encoded.append(encode_static(key))
            except OpaqueError as error:
                self.refused.append(f"key {key!r}: {error}")
                encoded.append(repr(key))
        return encoded

    def _custom(self, node: dict[str, Any], treedef: Any, depth: int) -> dict[str, Any]:
        keys, children = [], []
        for index, child in enumerate(treedef.children()):
            first = self._ends
            children.append(self.encode(child, depth + 1))
            # A registered class without children appears in no key path; its number is all that is known of it.
            keys.append(encode_static(_key(self._key_paths[first][depth])) if self._ends > first else index)
        return node | {"keys": keys, "children": children}


def _is_empty(node: Any) -> bool:
    return node is None or (isinstance(node, tuple | list | dict) and not node)


def _name_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _or_opaque(factory: Any) -> Any:
    try:
        return {"class": class_ref(factory)} if isinstance(factory, type) else encode_static(factory)
    except OpaqueError:
        return {"opaque": repr(factory)}


def _key(entry: Any) -> Key:
    if type(entry) is jtu.DictKey and type(entry.key) is str:  # nearly all of them
        return entry.key
    match entry:
        case jtu.DictKey(key=key):
            return key if type(key) in (str, int) else str(key)
        case jtu.GetAttrKey(name=name):
            return Attr(name)
        case jtu.SequenceKey(idx=index) | jtu.FlattenedIndexKey(key=index):
            return index
    return str(entry)


# --- putting together ------------------------------------------------------------------------------------------------


def make_custom(node: Mapping[str, Any], children: list[Any]) -> Any:
    """Build a node of a registered class if its module is loaded and its static part known; else plain containers."""
    cls = class_named(node["type"])
    if cls is None or "static" not in node:
        return plain(node, children)
    try:
        static = decode_static(node["static"])
        if dataclasses.is_dataclass(cls) and not _fits(cls, child_keys(node), static):
            return plain(node, children)
        treedef = _treedef(cls, static, len(children))
        return jtu.tree_unflatten(treedef, children)
    except Exception:
        # Code of the class itself runs here; what it refuses is still readable without it.
        _logger.debug("cannot rebuild a %s; plain containers stand in", node["type"], exc_info=True)
        return plain(node, children)


def _fits(cls: type, keys: Sequence[Key], static: Any) -> bool:
    """Say whether a dataclass still has the fields that were saved, in that order.

    JAX fills them by position: one that has moved would silently get another's value, and one that is missing crashes
    the process.
    """
    known, statics = _fields_of(cls)
    if statics is not None and not (isinstance(static, tuple) and len(static) == statics):
        return False
    return len(known) == len(keys) and all(
        isinstance(key, int) or key_text(key) == name for key, name in zip(keys, known, strict=True)
    )


@functools.cache
def _fields_of(cls: type) -> tuple[list[str], int | None]:
    """Return the names of a registered dataclass's children, and how many values its static part has, if it is a tuple.

    JAX is asked, with an instance that nobody has initialised.
    """
    empty: Any = object.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(empty, field.name, object())
    flattened: Any = jtu.tree_flatten_with_path(empty, is_leaf=lambda node: node is not empty)
    found, treedef = flattened
    _, static = treedef.node_data()
    return [key_text(_key(path[0])) for path, _ in found], len(static) if isinstance(static, tuple) else None


def _treedef(cls: type, static: Any, children: int) -> Any:
    """Return the treedef of one node of a registered class with leaves below it."""
    kind: Any = jtu.PyTreeDef
    return kind.from_node_data_and_children(jtu.default_registry, (cls, static), [jtu.tree_structure(0)] * children)


# --- targets ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A target taken apart: its leaves, `None`s among them, the texts of their paths, and how to put it together."""

    leaves: list[Any]
    paths: list[tuple[Key, ...]]
    treedef: Any

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Put the target's containers around new leaves."""
        return jtu.tree_unflatten(self.treedef, leaves)


def target_leaves(target: Any) -> Target:
    """Take a target apart."""
    found, treedef = jtu.tree_flatten_with_path(target, is_leaf=lambda leaf: leaf is None)
    return Target([leaf for _, leaf in found], [tuple(map(_key, path)) for path, _ in found], treedef)


def matching(path: Sequence[Key]) -> tuple[str, ...]:
    """Return what two paths must have in common to name the same leaf."""
    return tuple(map(key_text, path))


def difference(lines: Iterator[str] | Sequence[str], where: str) -> MismatchError | None:
    """Return one error for all lines of a difference; None if there are none."""
    found = list(lines)
    if not found:
        return None
    listed = "\n".join(f"  {line}" for line in found[:_SHOWN])
    more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return MismatchError(
        f"cannot load {where!r} into the target: they do not match in {len(found)} places:\n{listed}{more}"
    )
