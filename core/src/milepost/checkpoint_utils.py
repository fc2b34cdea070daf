"""What helps with calling checkpointers: restore arguments made from a tree like the one to restore, and waiting.

The rule: a value says by itself how another one like it is restored: arrays on devices by their sharding, arrays of
NumPy and scalars by their class. Whatever can be saved can be asked for in this way.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from milepost.errors import MismatchError, UnsupportedLeafError, noted
from milepost.path._waiting import checkpoints_iterator, wait_for_new_checkpoint
from milepost.tree import placed_by
from milepost.type_handlers import ArrayRestoreArgs, RestoreArgs

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

__all__ = ["PLACEHOLDER", "checkpoints_iterator", "construct_restore_args", "wait_for_new_checkpoint"]

PLACEHOLDER = ...
"""A leaf of a target that is not restored: it comes back as it is."""

_SHOWN = 20


def construct_restore_args(
    target: Any,
    sharding_tree: Any | None = None,
    set_global_shape: bool = True,  # noqa: FBT001, FBT002 - the documented signature
    support_layout: bool = False,  # noqa: FBT001, FBT002 - the documented signature
    strict: bool = True,  # noqa: FBT001, FBT002 - the documented signature
) -> Any:
    """Return a tree of `RestoreArgs`, by which leaves are restored like those of the target.

    Leaves may be values, `jax.ShapeDtypeStruct`s or metadata. `sharding_tree`, of the same structure, takes the place
    of their own shardings; None in it means no sharding, which makes an abstract array one of NumPy. Without
    `set_global_shape` arrays get the shape that was saved. With `support_layout` layouts of arrays are taken, too.
    `strict` as for `ArrayRestoreArgs`. Raises `UnsupportedLeafError` (a ValueError) that lists all leaves that cannot
    be restored, by path, and `MismatchError` (a ValueError) if the trees differ in structure.
    """
    import jax.tree_util as jtu

    def array_args(leaf: Any, sharding: Any) -> RestoreArgs:
        shape = leaf.shape if set_global_shape and not _is_key(leaf) else None
        return ArrayRestoreArgs(dtype=leaf.dtype, sharding=sharding, global_shape=shape, strict=strict)

    paths, treedef = jtu.tree_flatten_with_path(target)
    leaves = [_key_data(leaf) for _, leaf in paths]
    if sharding_tree is None:
        shardings = [placed_by(leaf, with_layout=support_layout) for leaf in leaves]
    else:
        shardings = _flat_shardings(sharding_tree, treedef)
    made = [_restore_args(leaf, sharding, array_args) for leaf, sharding in zip(leaves, shardings, strict=True)]
    _refuse([entry for entry, one in zip(paths, made, strict=True) if one is None])
    return jtu.tree_unflatten(treedef, made)


def _is_key(leaf: Any) -> bool:
    import jax
    import jax.numpy as jnp

    return leaf.dtype is not None and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    """Return the array of numbers below an array of random keys, any other leaf as it is."""
    import jax

    return jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and _is_key(leaf) else leaf


def _flat_shardings(sharding_tree: Any, treedef: Any) -> list[Any]:
    try:
        shardings: list[Any] = treedef.flatten_up_to(sharding_tree)
    except ValueError as error:
        raise MismatchError(f"cannot place the target by the tree of shardings: {error}") from error
    return shardings


def _refuse(refused: list[tuple[Any, Any]]) -> None:
    import jax.tree_util as jtu

    if refused:
        listed = "\n".join(f"  {jtu.keystr(path) or '<root>'}: {type(leaf)}" for path, leaf in refused[:_SHOWN])
        more = f"\n  and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise noted(
            UnsupportedLeafError(
                f"cannot restore {len(refused)} leaves of the target, by their types:\n{listed}{more}"
            ),
            "leaves are arrays, scalars, strings, metadata or `jax.ShapeDtypeStruct`s",
        )


def _restore_args(leaf: Any, sharding: Any, array_args: Callable[[Any, Any], RestoreArgs]) -> RestoreArgs | None:
    """Return how a leaf is restored, None for what cannot be restored."""
    import jax
    import numpy as np

    from milepost.metadata import ArrayMetadata, ScalarMetadata, StringMetadata

    if isinstance(leaf, ScalarMetadata):
        return RestoreArgs(_scalar_class(leaf.dtype), leaf.dtype)
    if isinstance(leaf, StringMetadata):
        return RestoreArgs(str)
    if isinstance(leaf, jax.Array):
        return array_args(leaf, sharding)
    if isinstance(leaf, jax.ShapeDtypeStruct | ArrayMetadata):
        return RestoreArgs(np.ndarray, leaf.dtype) if sharding is None else array_args(leaf, sharding)
    if isinstance(leaf, np.ndarray):
        return RestoreArgs(np.ndarray, leaf.dtype)
    return RestoreArgs(type(leaf)) if _is_scalar(leaf) else None


def _is_scalar(leaf: Any) -> bool:
    import numpy as np

    from milepost.dtypes import known_dtypes

    scalars = (int, float, complex, str, bytes, types.EllipsisType, np.generic)
    # Not all scalars of ml_dtypes derive from NumPy's.
    return isinstance(leaf, scalars) or any(type(leaf) is dtype.type for dtype in known_dtypes().values())


def _scalar_class(dtype: npt.DTypeLike | None) -> type | None:
    """Return Python's class of scalars for a dtype, None (as it was saved) where the dtype is not known."""
    import numpy as np

    if dtype is None:
        return None
    kinds: dict[str, type] = {"b": bool, "i": int, "u": int, "c": complex}
    return kinds.get(np.dtype(dtype).kind, float)
