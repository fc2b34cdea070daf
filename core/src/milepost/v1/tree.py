"""What counts as a tree, and how trees become one.

Decides when two trees can be joined. The rule: nothing is lost unless the caller says so. Where two trees both have
something, containers of one kind are joined and everything else is a conflict; one error shows all conflicts, by path.
With `overwrite` the later tree wins instead. Keys are compared as they are: `1` is not `"1"`.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np

from milepost.errors import MismatchError, noted
from milepost.v1.arrays import AbstractArray, AbstractScalar, AbstractShardedArray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import jax

    Leaf: TypeAlias = jax.Array | np.ndarray | int | float | np.number | bytes | bool | str
    PyTreeKey: TypeAlias = Any  # for type checkers JAX's keys are variables, not classes
    PyTreeKeyPath: TypeAlias = tuple[PyTreeKey, ...]

__all__ = ["AbstractLeaf", "JsonType", "Leaf", "PyTree", "PyTreeKey", "PyTreeKeyPath", "PyTreeOf", "merge"]

T_co = TypeVar("T_co", covariant=True)

JsonType: TypeAlias = "list[Any] | dict[str, Any]"
"""What a JSON text describes: a list or a dict."""

AbstractLeaf: TypeAlias = AbstractArray | AbstractShardedArray | AbstractScalar | str
"""What is known of a leaf, and what it is loaded as."""


class PyTree(Protocol):
    """A tree of containers that JAX knows; structurally, anything."""


class PyTreeOf(Protocol[T_co]):
    """A tree whose leaves are of one type."""


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # These name classes of JAX, which is not imported before somebody asks for them.
        if name not in {"Leaf", "PyTreeKey", "PyTreeKeyPath"}:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import jax
        import jax.tree_util as jtu

        if name == "Leaf":
            return jax.Array | np.ndarray | int | float | np.number | bytes | bool | str
        key = jtu.SequenceKey | jtu.DictKey | jtu.GetAttrKey | jtu.FlattenedIndexKey
        return key if name == "PyTreeKey" else tuple[key, ...]


def merge(*trees: Any, overwrite: bool = False, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Join trees into one; none of them is changed, but the result shares their leaves.

    Mappings of one class get the keys of both; lists, tuples and other containers of one class and length are joined
    child by child. With `overwrite` the later tree wins everywhere else, except that None never replaces anything; keys
    of mappings are joined whatever their classes. What `is_leaf` is true of is taken as it is. Without trees the result
    is an empty dict. Raises `MismatchError` (a `ValueError`) that lists all conflicts; sequences of different lengths
    are one also with `overwrite`.

    >>> merge({"a": {"x": 1}}, {"a": {"y": 2}, "b": 3})
    {'a': {'x': 1, 'y': 2}, 'b': 3}
    >>> merge({"a": 1}, {"a": 2}, overwrite=True)
    {'a': 2}
    """
    if not trees:
        return {}
    merger = _Merger(overwrite=overwrite, is_leaf=is_leaf or (lambda _: False))
    merged = functools.reduce(lambda one, other: merger.join(one, other, ""), trees)
    if merger.conflicts:
        listed = "\n".join(f"  {line}" for line in merger.conflicts)
        error = MismatchError(f"cannot merge the trees: they conflict in {len(merger.conflicts)} places:\n{listed}")
        raise error if overwrite else noted(error, "pass overwrite=True to let the later tree win")
    return merged


class _Merger:
    """Joins two trees, and notes what conflicts."""

    def __init__(self, *, overwrite: bool, is_leaf: Callable[[Any], bool]) -> None:
        self._overwrite = overwrite
        self._is_leaf = is_leaf
        self.conflicts: list[str] = []

    def join(self, one: Any, other: Any, path: str) -> Any:
        """Return both as one."""
        if self._is_leaf(one) or self._is_leaf(other):
            return self._later(one, other, path)
        alike = type(one) is type(other)
        if isinstance(one, Mapping) and isinstance(other, Mapping) and (alike or self._overwrite):
            return self._join_mappings(one, other, path)
        if alike and isinstance(one, (list, tuple)):
            return self._join_sequences(one, other, path)
        return self._join_registered(one, other, path) if alike else self._later(one, other, path)

    def _join_mappings(self, one: Mapping[Any, Any], other: Mapping[Any, Any], path: str) -> Any:
        joined = {**one, **other}
        for key in one.keys() & other.keys():
            joined[key] = self.join(one[key], other[key], f"{path}[{key!r}]")
        if not isinstance(other, MutableMapping):
            make: Any = type(other)
            return make(joined)
        new = copy.copy(other)  # a defaultdict keeps its factory
        new.clear()
        new.update(joined)
        return new

    def _join_sequences(self, one: Any, other: Any, path: str) -> Any:
        if len(one) != len(other):
            self.conflicts.append(f"{path or '<root>'}: a {type(one).__name__} of {len(one)} and one of {len(other)}")
            return other
        names = getattr(one, "_fields", None)
        keys = [f"{path}[{at}]" for at in range(len(one))] if names is None else [f"{path}.{name}" for name in names]
        return _rebuilt(other, map(self.join, one, other, keys))

    def _join_registered(self, one: Any, other: Any, path: str) -> Any:
        ours, theirs = _children(one), _children(other)
        if ours is None or theirs is None or not (self._overwrite or ours[1] == theirs[1]):
            return self._later(one, other, path)
        if len(ours[0]) != len(theirs[0]):
            return self._later(one, other, path)
        joined = [self.join(mine, its, path + key) for (key, mine), (_, its) in zip(ours[0], theirs[0], strict=True)]
        return theirs[1].unflatten(joined)

    def _later(self, one: Any, other: Any, path: str) -> Any:
        if not self._overwrite:
            both = " and ".join(type(each).__name__ for each in (one, other))
            self.conflicts.append(f"{path or '<root>'}: both have something there: {both}")
        return one if other is None else other


def _rebuilt(like: Any, children: Iterable[Any]) -> Any:
    return type(like)(*children) if hasattr(like, "_fields") else type(like)(children)


def _children(node: Any) -> tuple[list[tuple[str, Any]], Any] | None:
    """Return the children of a registered class with their keys, and what makes one of them; None for a leaf."""
    if node is None or "jax" not in sys.modules:
        return None
    import jax.tree_util as jtu

    children, made = jtu.tree_flatten_with_path(node, is_leaf=lambda each: each is not node)
    if jtu.treedef_is_leaf(made):
        return None
    return [(jtu.keystr(path), child) for path, child in children], made
