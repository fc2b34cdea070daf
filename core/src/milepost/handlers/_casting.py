"""What `SaveArgs` change about a tree before it is saved.

The rule: a dtype is what arrays and numbers are converted to, arrays on devices there; where nothing is said, nothing
is touched. How an array is cut on storage is the array writer's business: sizes and axes are handed to it as wishes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from milepost.engine.items import TreeItem, Wish
from milepost.errors import ConfigError, MismatchError
from milepost.type_handlers import SaveArgs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["saved_by"]


def saved_by(
    item: Any,
    save_args: Any,
    typestr: str,
    custom_metadata: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> TreeItem[Any]:
    """Return what is saved of an item by its tree of save arguments; None says nothing.

    `options` are for the array writer. Raises `MismatchError` (a ValueError) if the trees differ in structure, and
    `ConfigError` (a ValueError) for leaves that are not `SaveArgs`.
    """
    if save_args is None:
        return TreeItem(item, typestr, custom_metadata, options=options or {})
    import jax.tree_util as jtu

    flat: tuple[list[Any], Any] = jtu.tree_flatten(item)
    leaves, treedef = flat
    given = _given(treedef, save_args)
    cast = jtu.tree_unflatten(
        treedef,
        [
            leaf if one is None or one.dtype is None else _cast(leaf, one.dtype)
            for leaf, one in zip(leaves, given, strict=True)
        ],
    )
    return TreeItem(cast, typestr, custom_metadata, options=options or {}, wishes=[_wish(one) for one in given])


def _given(treedef: Any, save_args: Any) -> Sequence[SaveArgs | None]:
    try:
        given: list[Any] = treedef.flatten_up_to(save_args)
    except ValueError as error:
        raise MismatchError(f"cannot save the item by its tree of save arguments: {error}") from error
    for one in given:
        if one is not None and not isinstance(one, SaveArgs):
            raise ConfigError(f"cannot save a leaf by {one!r:.60}: save arguments are SaveArgs or None")
    return given


def _wish(args: SaveArgs | None) -> Wish | None:
    if args is None or (args.chunk_byte_size is None and not args.shard_axes):
        return None
    return Wish(args.chunk_byte_size, tuple(args.shard_axes))


def _cast(leaf: Any, dtype: Any) -> Any:
    import jax
    import numpy as np

    if isinstance(leaf, jax.Array):
        return leaf.astype(dtype) if isinstance(leaf.dtype, np.dtype) else leaf
    if type(leaf) in (bool, int, float, complex):
        return np.asarray(leaf, dtype).item()
    return leaf.astype(dtype) if isinstance(leaf, np.ndarray | np.generic) else leaf
