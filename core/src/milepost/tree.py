"""How trees are shown as flat dicts and as plain containers, with the names and meanings of the reference's `tree`.

The rule: a leaf is known by the texts of the keys on its path, so that the field `w`, the key "w" and a list's first
element and "0" match. Where two leaves of one tree would get the same name, nothing is dropped silently: that is an
error. The registry of containers is JAX's, asked for when a function is called.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any, NamedTuple

from milepost.errors import ConfigError, MismatchError, UnsupportedLeafError, noted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy.typing as npt

__all__ = [
    "Diff",
    "deserialize_tree",
    "from_flat_dict",
    "get_param_names",
    "is_empty_node",
    "is_flat_dict",
    "placed_by",
    "serialize_tree",
    "str_keypath",
    "to_flat_dict",
    "to_shape_dtype_struct",
    "tree_difference",
]

_SHOWN = 20


class _MissingLeafError(MismatchError, KeyError):
    """Say which leaves of a target have no value; a KeyError, since that is what looking them up gives."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class Diff(NamedTuple):
    """Two values that differ at one place of two trees; None stands for a key that one of them lacks."""

    lhs: Any
    rhs: Any


def is_empty_node(x: Any) -> bool:
    """Return whether a node of a tree has neither a value nor children: None, `{}`, `[]`, `()` and their like."""
    import jax.tree_util as jtu

    return not jtu.tree_leaves(x, is_leaf=lambda node: node is not x)


def _ends(is_leaf: Callable[[Any], bool] | None, *, keep_empty_nodes: bool) -> Callable[[Any], bool] | None:
    if not keep_empty_nodes:
        return is_leaf
    return is_empty_node if is_leaf is None else lambda node: is_leaf(node) or is_empty_node(node)


def str_keypath(keypath: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the texts of the keys of one of JAX's key paths.

    Raises `UnsupportedLeafError` (a ValueError) for keys that are not of JAX's classes.

    >>> from jax.tree_util import DictKey, GetAttrKey, SequenceKey
    >>> str_keypath((DictKey("layers"), SequenceKey(0), GetAttrKey("w")))
    ('layers', '0', 'w')
    """
    return tuple([str(_plain_key(key)) for key in keypath])


def _plain_key(key: Any) -> Any:
    """Return what one of JAX's keys holds: an int for a place in a sequence, else the key or the field's name."""
    import jax.tree_util as jtu

    if isinstance(key, jtu.DictKey | jtu.FlattenedIndexKey):
        return key.key
    if isinstance(key, jtu.SequenceKey):
        return key.idx
    if isinstance(key, jtu.GetAttrKey):
        return key.name
    raise UnsupportedLeafError(
        f"cannot name the key '{key!r}' of a path: it is a {type(key).__name__}, no key of JAX's"
    )


def to_flat_dict(
    tree: Any,
    sep: str | None = None,
    keep_empty_nodes: bool = False,  # noqa: FBT001, FBT002 - the documented signature
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """Return the leaves of a tree by their paths: tuples of texts, or texts joined by `sep`.

    Empty nodes are left out, unless `keep_empty_nodes` asks for them as values. Raises `ConfigError` (a ValueError)
    where two leaves would get the same name.

    >>> to_flat_dict({"a": 1, "b": [2, {}]}, sep="/")
    {'a': 1, 'b/0': 2}
    """
    import jax.tree_util as jtu

    ends = _ends(is_leaf, keep_empty_nodes=keep_empty_nodes)
    paths = [(str_keypath(path), leaf) for path, leaf in jtu.tree_flatten_with_path(tree, is_leaf=ends)[0]]
    named: list[tuple[Any, Any]] = paths if sep is None else [(sep.join(path), leaf) for path, leaf in paths]
    flat = dict(named)
    if len(flat) != len(named):
        (twice, _), *_ = collections.Counter(name for name, _ in named).most_common(1)
        raise noted(
            ConfigError(f"cannot flatten the tree: two of its leaves would be called {twice!r}"),
            "rename a key, or flatten with another sep",
        )
    return flat


def from_flat_dict(
    flat_dict: Any,
    target: Any | None = None,
    sep: str | None = None,
    *,
    inplace: bool = False,
) -> Any:
    """Return the tree of a flat dict: nested dicts, or a tree like the target, whose values are not looked at.

    Leaves that the target does not have are left out; empty nodes of the target are kept. With `inplace` what is taken
    is removed from the flat dict, so that values are not held twice. Raises `MismatchError` (a ValueError, and here a
    KeyError, too) that lists what the target has and the flat dict lacks, and `ConfigError` (a ValueError) for keys
    that are not of the kind that `sep` tells, or that are both a leaf and a container.

    >>> from_flat_dict({"a": 1, "b/c": 2}, sep="/")
    {'a': 1, 'b': {'c': 2}}
    >>> from_flat_dict({("a",): 1, ("b", "0"): 2}, target={"a": ..., "b": (...,)})
    {'a': 1, 'b': (2,)}
    """
    take: Callable[[Any], Any] = flat_dict.pop if inplace else flat_dict.__getitem__
    if target is None:
        return _nested(_paths_of(flat_dict, sep), take)
    import jax.tree_util as jtu

    names = list(to_flat_dict(target, sep=sep))
    _refuse_missing([name for name in names if name not in flat_dict])
    return jtu.tree_unflatten(jtu.tree_structure(target), [take(name) for name in names])


def _refuse_missing(missing: Sequence[Any]) -> None:
    if missing:
        shown = ", ".join(repr(name) for name in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise _MissingLeafError(f"cannot fill the target: there is no value for {shown}{more}")


def _paths_of(flat_dict: Mapping[Any, Any], sep: str | None) -> dict[Any, tuple[Any, ...]]:
    """Return the path that each key stands for, without the empty dicts that others fill."""
    wanted = tuple if sep is None else str
    for key in flat_dict:
        if not isinstance(key, wanted):
            raise ConfigError(f"cannot make a tree of the key {key!r}: with sep={sep!r} keys are {wanted.__name__}s")
    paths = {key: key if sep is None else tuple(key.split(sep)) for key in flat_dict}
    inner = {path[:end] for path in paths.values() for end in range(len(path))}
    both = [key for key, path in paths.items() if path in inner]
    for key in both:
        if flat_dict[key] != {}:
            raise ConfigError(f"cannot make a tree of the key {key!r}: other keys go on below it, and it has a value")
    return {key: path for key, path in paths.items() if key not in both}


def _nested(paths: Mapping[Any, tuple[Any, ...]], take: Callable[[Any], Any]) -> Any:
    tree: dict[Any, Any] = {}
    for key, path in paths.items():
        if not path:
            return take(key)
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = take(key)
    return tree


def is_flat_dict(tree: Any) -> bool:
    """Return whether a tree is a dict of leaves.

    >>> is_flat_dict({("a", "b"): 1}), is_flat_dict({"a": {}}), is_flat_dict([1])
    (True, False, False)
    """
    import jax.tree_util as jtu

    return isinstance(tree, dict) and jtu.all_leaves(tree.values())


def get_param_names(item: Any, *, include_empty_nodes: bool = True) -> Any:
    """Return a tree of the same structure with each leaf's path, joined by dots, in its place.

    Empty nodes get their names, too, unless they are not to be included: then they stay as they are.

    >>> get_param_names({"a": [1, None]})
    {'a': ['a.0', 'a.1']}
    """
    import jax.tree_util as jtu

    ends = _ends(None, keep_empty_nodes=include_empty_nodes)
    return jtu.tree_map_with_path(lambda path, _: ".".join(str_keypath(path)), item, is_leaf=ends)


# --- plain containers ------------------------------------------------------------------------------------------------


def serialize_tree(tree: Any, keep_empty_nodes: bool = False) -> Any:  # noqa: FBT001, FBT002 - the documented signature
    """Return a tree of dicts and lists only: sequences and classes without names for their fields become lists.

    Raises `ConfigError` (a ValueError) where leaving empty nodes out, as is the default, leaves nothing, or holes.

    >>> serialize_tree({1: (2, {})}, keep_empty_nodes=True)
    {'1': [2, {}]}
    """
    import jax.tree_util as jtu

    ends = _ends(None, keep_empty_nodes=keep_empty_nodes)
    entries = [
        (tuple(map(_serial_key, path)), leaf) for path, leaf in jtu.tree_flatten_with_path(tree, is_leaf=ends)[0]
    ]
    if not entries:
        raise noted(ConfigError("cannot write the tree as dicts and lists: it has no leaves"), "keep its empty nodes")
    return _serialized(entries, 0)


def _serial_key(key: Any) -> str | int:
    import jax.tree_util as jtu

    plain = _plain_key(key)
    return plain if isinstance(key, jtu.SequenceKey | jtu.FlattenedIndexKey) else str(plain)


def _serialized(entries: Sequence[tuple[tuple[str | int, ...], Any]], depth: int) -> Any:
    path, leaf = entries[0]
    if len(path) == depth:
        return leaf
    groups: dict[str | int, list[tuple[tuple[str | int, ...], Any]]] = {}
    for entry in entries:
        groups.setdefault(entry[0][depth], []).append(entry)
    children = {key: _serialized(below, depth + 1) for key, below in groups.items()}
    if not isinstance(path[depth], int):
        return children
    if list(children) != list(range(len(children))):
        where = "/".join(map(str, path[:depth])) or "<root>"
        raise noted(
            ConfigError(
                f"cannot write the tree as dicts and lists: the list at '{where}' has empty nodes among its leaves"
            ),
            "keep its empty nodes",
        )
    return list(children.values())


def deserialize_tree(
    serialized: Any,
    target: Any,
    keep_empty_nodes: bool = False,  # noqa: FBT001, FBT002 - the documented signature
) -> Any:
    """Return a tree like the target, filled with what `serialize_tree` gave.

    What the target does not have is left out. Its empty nodes stay as they are; with `keep_empty_nodes` they are
    filled, too. Raises `MismatchError` (a ValueError, and here a KeyError, too) that lists what is missing.

    >>> deserialize_tree({"1": [2, 3]}, {1: (0, 0)})
    {1: (2, 3)}
    """
    import jax.tree_util as jtu

    ends = _ends(None, keep_empty_nodes=keep_empty_nodes)
    paths, treedef = jtu.tree_flatten_with_path(target, is_leaf=ends)
    found = [_value_at(serialized, tuple(map(_serial_key, path))) for path, _ in paths]
    _refuse_missing([str_keypath(path) for (path, _), value in zip(paths, found, strict=True) if value is _NOWHERE])
    return jtu.tree_unflatten(treedef, found)


_NOWHERE = object()


def _value_at(node: Any, path: Iterable[str | int]) -> Any:
    for key in path:
        if isinstance(node, list) and isinstance(key, int) and key < len(node):
            node = node[key]
        elif isinstance(node, dict) and str(key) in node:
            node = node[str(key)]
        else:
            return _NOWHERE
    return node


# --- shapes and differences ------------------------------------------------------------------------------------------


def to_shape_dtype_struct(
    arr: Any,
    dtype: npt.DTypeLike | None = None,
    scalar_dtype: type[int | float] | None = None,
    support_format: bool = False,  # noqa: FBT001, FBT002 - the documented signature
) -> Any:
    """Return shape, dtype and sharding of an array, or of what is known of one, as a `jax.ShapeDtypeStruct`.

    `dtype` takes the place of the array's own. Scalars come back as they are, converted by `scalar_dtype` if that is
    given. Random keys stay random keys, so that what comes out is a target that what went in can be loaded into. With
    `support_format` the layout on the device is kept, too. Raises `UnsupportedLeafError` (a ValueError) for what has no
    shape.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    if isinstance(arr, bool | int | float | np.number | np.bool_):
        return arr if scalar_dtype is None else scalar_dtype(arr)
    if not hasattr(arr, "shape"):
        raise UnsupportedLeafError(f"cannot tell the shape of '{arr!r:.60}': it is a {type(arr).__name__}")
    is_key = hasattr(arr, "dtype") and jnp.issubdtype(arr.dtype, jax.dtypes.prng_key)
    wanted = arr.dtype if dtype is None or is_key else dtype
    if wanted is None:
        raise noted(UnsupportedLeafError(f"cannot tell the dtype of '{arr!r:.60}': it has none"), "give a dtype")
    sharding = placed_by(arr, with_layout=support_format)
    sharding = sharding.to_jax_sharding() if hasattr(sharding, "to_jax_sharding") else sharding
    return jax.ShapeDtypeStruct(arr.shape, wanted, sharding=sharding)  # type: ignore[no-untyped-call]


def placed_by(arr: Any, *, with_layout: bool) -> Any:
    """Return the sharding of an array, or of what is known of one, with its layout if that is known and asked for."""
    sharding = getattr(arr, "sharding", None)
    laid_out = getattr(arr, "format", None) if with_layout and sharding is not None else None
    return sharding if getattr(laid_out, "layout", None) is None else laid_out


def tree_difference(
    a: Any,
    b: Any,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    leaves_equal: Callable[[Any, Any], bool] | None = None,
) -> Any:
    """Return where two trees differ, as a tree with a `Diff` at each such place, or None where they do not.

    Containers differ by class and by length, dicts by key; leaves by class, or as `leaves_equal` says.

    >>> tree_difference({"a": [1, 2], "b": 3}, {"a": [1, 2.0], "c": 3})
    {'a': [None, Diff(lhs=2, rhs=2.0)], 'b': Diff(lhs=3, rhs=None), 'c': Diff(lhs=None, rhs=3)}
    """
    same = leaves_equal if leaves_equal is not None else lambda one, other: type(one) is type(other)
    return _difference(a, b, is_leaf or (lambda _: False), same)


def _difference(a: Any, b: Any, is_leaf: Callable[[Any], bool], same: Callable[[Any, Any], bool]) -> Any:
    import jax.tree_util as jtu

    ends = [is_leaf(one) or jtu.all_leaves([one]) for one in (a, b)]
    if all(ends):
        return None if same(a, b) else Diff(a, b)
    if type(a) is not type(b):
        return Diff(type(a), type(b))
    if isinstance(a, dict):
        return _dict_difference(a, b, is_leaf, same)
    (ours, treedef), theirs = (jtu.tree_flatten(a, is_leaf=lambda node: node is not a), _children(b))
    if len(ours) != len(theirs):
        return Diff((type(a), len(ours)), (type(b), len(theirs)))
    found = [_difference(one, other, is_leaf, same) for one, other in zip(ours, theirs, strict=True)]
    return None if all(one is None for one in found) else jtu.tree_unflatten(treedef, found)


def _children(node: Any) -> list[Any]:
    import jax.tree_util as jtu

    return jtu.tree_leaves(node, is_leaf=lambda inner: inner is not node)


def _dict_difference(
    a: dict[Any, Any], b: dict[Any, Any], is_leaf: Callable[[Any], bool], same: Callable[[Any, Any], bool]
) -> Any:
    found: dict[Any, Any] = {}
    for key in (*a, *(key for key in b if key not in a)):
        if key in a and key in b:
            found[key] = _difference(a[key], b[key], is_leaf, same)
        else:
            found[key] = Diff(a.get(key), b.get(key))
    return {key: one for key, one in found.items() if one is not None} or None
