"""What `metadata()` returns for a saved tree, in the words of the checkpointers and managers.

The rule: the tree as it was saved, with what is known of each leaf in its place. Containers keep their kinds and keys;
a class that was registered with JAX is shown as a dict of its fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from typing import TYPE_CHECKING, Any, ClassVar, final

from milepost.dtypes import known_dtypes
from milepost.metadata.sharding import from_saved
from milepost.metadata.value import ArrayMetadata, Metadata, ScalarMetadata, StringMetadata
from milepost.structure import build, key_text, leaf_paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from upath import UPath

    from milepost.manifest import ArrayLeaf, Item
    from milepost.metadata.sharding import ShardingMetadata

__all__ = ["TreeMetadata", "register", "tree_metadata"]


@final
class TreeMetadata:
    """A tree of leaf metadata, and what was noted with it.

    What can be done to the tree can be done to this: it is indexed and walked like its outermost container, and is a
    pytree with the same leaves. JAX is told so as soon as it is loaded and something here is touched.
    """

    def __init__(self, *, tree: Any, custom_metadata: Any = None, use_zarr3: bool = False) -> None:
        self._tree = tree
        self._custom_metadata = custom_metadata
        self._use_zarr3 = use_zarr3
        _register_where_jax_is_loaded()

    @classmethod
    def build(cls, tree: Any, *, custom_metadata: Any = None, use_zarr3: bool = False) -> TreeMetadata:
        """Return the metadata of a tree."""
        return cls(tree=tree, custom_metadata=custom_metadata, use_zarr3=use_zarr3)

    @property
    def tree(self) -> Any:
        """The tree of leaf metadata."""
        _register_where_jax_is_loaded()
        return self._tree

    @property
    def custom_metadata(self) -> Any:
        """What the caller of the save noted with the tree."""
        return self._custom_metadata

    @property
    def use_zarr3(self) -> bool:
        """Whether the arrays are stored as Zarr version 3."""
        return self._use_zarr3

    def __getitem__(self, key: Any) -> Any:
        return self.tree[key]

    def __contains__(self, key: object) -> bool:
        return key in self.tree

    def __len__(self) -> int:
        return len(self.tree)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tree)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return what is under a key of the outermost mapping, or the default."""
        return self.tree.get(key, default)

    def keys(self) -> Any:
        """Return the keys of the outermost mapping."""
        return self.tree.keys()

    def values(self) -> Any:
        """Return what stands under the keys of the outermost mapping."""
        return self.tree.values()

    def items(self) -> Any:
        """Return keys and what stands under them, of the outermost mapping."""
        return self.tree.items()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TreeMetadata):
            return NotImplemented
        mine = (self._tree, self._custom_metadata, self._use_zarr3)
        return mine == (other.tree, other.custom_metadata, other.use_zarr3)

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"TreeMetadata(\n  custom_metadata={self._custom_metadata!r}\n"
            f"  tree={self._tree!r}\n  use_zarr3={self._use_zarr3!r}\n)"
        )


# --- for JAX ---------------------------------------------------------------------------------------------------------


def _register_where_jax_is_loaded() -> None:
    if "jax" in sys.modules:
        register()


@functools.cache
def register() -> None:
    """Tell JAX that `TreeMetadata` is a pytree."""
    from jax.tree_util import register_pytree_with_keys

    with contextlib.suppress(ValueError):  # another thread was faster
        register_pytree_with_keys(TreeMetadata, _flatten, _unflatten)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What stays the same when a function is mapped over the leaves."""

    treedef: Any
    custom_metadata: Any = dataclasses.field(hash=False)
    use_zarr3: bool


def _flatten(metadata: TreeMetadata) -> tuple[list[tuple[Any, Any]], _Static]:
    from jax.tree_util import GetAttrKey, tree_flatten_with_path

    tree = metadata.tree
    children, treedef = tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    keyed = [(path[0] if path else GetAttrKey("tree"), child) for path, child in children]
    return keyed, _Static(treedef, metadata.custom_metadata, metadata.use_zarr3)


def _unflatten(static: _Static, children: Iterable[Any]) -> TreeMetadata:
    tree = static.treedef.unflatten(children)
    return TreeMetadata(tree=tree, custom_metadata=static.custom_metadata, use_zarr3=static.use_zarr3)


# --- from a manifest -------------------------------------------------------------------------------------------------

_PYTHON = {"bool": "bool", "int": "int64", "float": "float64", "complex": "complex128"}


def tree_metadata(
    item: Item,
    directory: UPath | Path | None = None,
    *,
    custom_metadata: Any = None,
    use_zarr3: bool = False,
) -> TreeMetadata:
    """Return what a manifest says about one saved tree.

    Arrays (random keys by their data) become `ArrayMetadata`, numbers `ScalarMetadata`, strings `StringMetadata`, all
    else `Metadata`. A dtype that is not known here is None, as is a sharding that was noted only by its kind.
    """
    shardings = [from_saved(saved) for saved in item.shardings]
    names = (".".join(map(key_text, path)) for path in leaf_paths(item.structure))
    leaves = (_leaf(leaf, name, directory, shardings) for leaf, name in zip(item.leaves, names, strict=True))
    tree = build(item.structure, leaves)
    return TreeMetadata(tree=tree, custom_metadata=custom_metadata, use_zarr3=use_zarr3)


def _leaf(
    leaf: Mapping[str, Any], name: str, directory: UPath | Path | None, shardings: list[ShardingMetadata | None]
) -> Metadata:
    kind = leaf["type"]
    dtypes = known_dtypes()
    if kind in ("jax.Array", "np.ndarray"):
        array: ArrayLeaf = leaf["arrays"][""]
        sharding = None if array.sharding is None else shardings[array.sharding]
        return ArrayMetadata(name, directory, array.shape, sharding, dtypes.get(array.dtype))
    if kind == "np.generic":
        return ScalarMetadata(name, directory, dtype=dtypes.get(str(leaf["dtype"])))
    if kind in _PYTHON:
        # An int beyond 64 bits has no dtype.
        return ScalarMetadata(name, directory, dtype=None if "hex" in leaf else dtypes[_PYTHON[kind]])
    return StringMetadata(name, directory) if kind == "str" else Metadata(name, directory)
