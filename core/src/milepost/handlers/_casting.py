"""What `SaveArgs` change about a tree before it is saved.

The rule: a dtype is what arrays and numbers are converted to, arrays on devices there; where nothing is said, nothing
is touched. How an array is cut on storage is the array writer's business: sizes and axes are taken, and have no effect.
"""

from __future__ import annotations

from typing import Any

from milepost.errors import ConfigError, MismatchError
from milepost.type_handlers import SaveArgs

__all__ = ["cast_by"]


def cast_by(item: Any, save_args: Any) -> Any:
    """Return the item with its leaves converted as the tree of save arguments says; None says nothing.

    Raises `MismatchError` (a ValueError) if the trees differ in structure, and `ConfigError` (a ValueError) for leaves
    that are not `SaveArgs`.
    """
    import jax.tree_util as jtu

    if save_args is None:
        return item
    flat: tuple[list[Any], Any] = jtu.tree_flatten(item)
    leaves, treedef = flat
    try:
        given: list[Any] = treedef.flatten_up_to(save_args)
    except ValueError as error:
        raise MismatchError(f"cannot save the item by its tree of save arguments: {error}") from error
    for one in given:
        if one is not None and not isinstance(one, SaveArgs):
            raise ConfigError(f"cannot save a leaf by {one!r:.60}: save arguments are SaveArgs or None")
    return jtu.tree_unflatten(
        treedef,
        [
            leaf if one is None or one.dtype is None else _cast(leaf, one.dtype)
            for leaf, one in zip(leaves, given, strict=True)
        ],
    )


def _cast(leaf: Any, dtype: Any) -> Any:
    import jax
    import numpy as np

    if isinstance(leaf, jax.Array):
        return leaf.astype(dtype) if isinstance(leaf.dtype, np.dtype) else leaf
    if type(leaf) in (bool, int, float, complex):
        return np.asarray(leaf, dtype).item()
    return leaf.astype(dtype) if isinstance(leaf, np.ndarray | np.generic) else leaf
