"""What the arguments of a restore ask for, as one target of the engine.

The rule: a value in a target says what becomes of what was saved: its kind, shape, dtype and place; an abstract array
without a place is one of NumPy. Who names a dtype has asked for the cast, whatever it loses. A tree that only says
which structure is wanted says nothing of its leaves: they come back as they were saved.
"""

from __future__ import annotations

import dataclasses
import types
from typing import TYPE_CHECKING, Any

from milepost.errors import ConfigError, MismatchError
from milepost.metadata import ArrayMetadata, Metadata, ShardingMetadata, TreeMetadata
from milepost.type_handlers import ArrayRestoreArgs, RestoreArgs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from milepost.engine.choosing import LoadRules

__all__ = [
    "Path",
    "Wish",
    "asked_by",
    "like_values",
    "lists_of_paths",
    "plain_rules",
    "restore_args_by_path",
    "tree_of",
]

Path = tuple[str, ...]
"""The texts of the keys that lead to a leaf."""

_SHOWN = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Wish:
    """A target of the engine, and the rules by which it is filled."""

    target: Any
    rules: LoadRules


def plain_rules(fallback: Any = None) -> LoadRules:
    """Return the rules of a restore without a target: dicts stand in for registered classes."""
    from milepost.engine.choosing import LoadRules

    return LoadRules(classes=False, fallback=fallback)


def like_values(item: Any, *, strict: bool = True, fallback: Any = None) -> Wish:
    """Ask for leaves like those of the item; without `strict`, arrays are cut or filled with zeros to their shapes."""
    from milepost.engine.choosing import LoadRules

    return Wish(_mapped(item, lambda _, leaf: _like(leaf, fit=not strict)), LoadRules(fallback=fallback))


def tree_of(item: Any, by_path: Mapping[Path, RestoreArgs | None] | None, *, partial: bool = False) -> Wish:
    """Ask for the structure of the item, each leaf as its restore arguments say, or without any as it was saved.

    With `partial`, leaves that were not saved keep the item's values, and saved ones that it lacks are left out.
    Raises `MismatchError` (a ValueError) where the trees of item and arguments differ.
    """
    from milepost.engine.choosing import LoadRules

    if by_path is not None:
        _check_same(lists_of_paths(item), by_path)
    own: dict[int, Any] = {}

    def ask(path: Path, leaf: Any) -> Any:
        target = _structural(leaf) if by_path is None else _beside(leaf, by_path.get(path))
        own[id(target)] = leaf
        return target

    target = _mapped(item, ask)
    if not partial:
        return Wish(target, LoadRules())
    return Wish(target, LoadRules(missing=lambda _, leaf: own.get(id(leaf), leaf), extra="ignore"))


def lists_of_paths(item: Any) -> dict[Path, Any]:
    """Return the leaves of a tree by their paths, `None`s among them."""
    from milepost.trees import matching, target_leaves

    found = target_leaves(_tree(item))
    return {matching(path): leaf for path, leaf in zip(found.paths, found.leaves, strict=True)}


def restore_args_by_path(restore_args: Any) -> dict[Path, RestoreArgs | None]:
    """Return restore arguments by the paths of their leaves.

    Raises `ConfigError` (a ValueError) for a leaf that is neither `RestoreArgs` nor None.
    """
    found = lists_of_paths(restore_args)
    for path, leaf in found.items():
        if leaf is not None and not isinstance(leaf, RestoreArgs):
            raise ConfigError(f"cannot restore '{'/'.join(path)}' by its restore arguments: they are {leaf!r:.60}")
    return found


def asked_by(args: RestoreArgs | None) -> Any:
    """Return what restore arguments ask for.

    Raises a `ValueError` for shardings that cannot be had here, since they were asked for by name.
    """
    import numpy as np

    from milepost.engine.placing import LeafTarget

    if args is None:
        return LeafTarget()
    kind, dtype = args.restore_type, args.dtype
    if isinstance(args, ArrayRestoreArgs):
        return LeafTarget(
            kind,
            None if args.global_shape is None else tuple(args.global_shape),
            dtype,
            _place(args),
            fit=not args.strict,
            any_cast=dtype is not None,
        )
    if kind is types.EllipsisType:
        return ...
    if kind in (str, bytes):
        return kind()
    if dtype is None and isinstance(kind, type) and issubclass(kind, np.generic) and _is_concrete(kind):
        dtype = kind
    return LeafTarget(kind, dtype=dtype, any_cast=dtype is not None)


def _is_concrete(kind: type) -> bool:
    import numpy as np

    return not kind.__subclasses__() or kind in (np.float64, np.complex128)


def _place(args: ArrayRestoreArgs) -> Any:
    import jax

    if args.mesh is not None and args.mesh_axes is not None:
        return jax.sharding.NamedSharding(args.mesh, args.mesh_axes)
    sharding: Any = args.sharding
    if isinstance(sharding, ShardingMetadata):
        return sharding.to_jax_sharding()
    # A layout comes with its sharding.
    return sharding if sharding is None or isinstance(sharding, jax.sharding.Sharding) else sharding.sharding


# --- from leaves -----------------------------------------------------------------------------------------------------


def _tree(item: Any) -> Any:
    return item.tree if isinstance(item, TreeMetadata) else item


def _mapped(item: Any, ask: Callable[[Path, Any], Any]) -> Any:
    from milepost.trees import matching, target_leaves

    found = target_leaves(_tree(item))
    return found.unflatten([ask(matching(path), leaf) for path, leaf in zip(found.paths, found.leaves, strict=True)])


def _structural(leaf: Any) -> Any:
    from milepost.engine.placing import LeafTarget

    if leaf is None or leaf is ...:
        return leaf
    return _like_metadata(leaf) if isinstance(leaf, Metadata) else LeafTarget()


def _beside(leaf: Any, args: RestoreArgs | None) -> Any:
    return leaf if leaf is None or leaf is ... else asked_by(args)


def _like_metadata(leaf: Metadata) -> Any:
    from milepost.engine.placing import LeafTarget

    if not isinstance(leaf, ArrayMetadata):
        return LeafTarget()
    return LeafTarget(shape=tuple(leaf.shape), dtype=leaf.dtype)


def _like(leaf: Any, *, fit: bool) -> Any:
    import jax
    import numpy as np

    from milepost.engine.placing import LeafTarget

    if isinstance(leaf, Metadata):
        return _like_metadata(leaf)
    if type(leaf) in (bool, int, float, complex):
        return LeafTarget(type(leaf), any_cast=True)
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None or dtype is None or not _has_numbers(dtype):
        # Random keys, strings, and what only the engine can judge.
        return leaf
    if isinstance(leaf, np.ndarray):
        return LeafTarget(np.ndarray, shape, dtype, fit=fit, any_cast=True)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        place = _place_of(leaf)
        return LeafTarget(np.ndarray if place is None else jax.Array, shape, dtype, place, fit=fit, any_cast=True)
    return LeafTarget(type(leaf), (), dtype, any_cast=True) if isinstance(leaf, np.generic) else leaf


def _has_numbers(dtype: Any) -> bool:
    import numpy as np

    return isinstance(dtype, np.dtype)


def _place_of(leaf: Any) -> Any:
    import jax

    from milepost.engine.placing import DEFAULT_DEVICE

    sharding = leaf.sharding
    if isinstance(leaf, jax.Array) and not getattr(leaf, "committed", True):
        return DEFAULT_DEVICE
    # Abstract arrays that tracing gives may say how they are split, but not over which devices.
    return None if isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh) else sharding


def _check_same(item: Mapping[Path, Any], by_path: Mapping[Path, Any]) -> None:
    missing = [path for path, leaf in item.items() if path not in by_path and leaf is not None and leaf is not ...]
    extra = [path for path, args in by_path.items() if path not in item and args is not None]
    if missing or extra:
        lines = [f"  {'/'.join(path) or '<root>'}: no restore arguments" for path in missing]
        lines += [f"  {'/'.join(path) or '<root>'}: no leaf" for path in extra]
        more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        listed = "\n".join(lines[:_SHOWN])
        raise MismatchError(
            f"cannot restore by the tree of restore arguments: it differs from the item:\n{listed}{more}"
        )
