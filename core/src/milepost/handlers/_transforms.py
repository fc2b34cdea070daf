"""How a saved tree is restored into another structure, by transforms or by a function of the caller's.

The rule: what is needed is found out from names alone; just that is read, each leaf as the restore arguments of the
leaf it becomes say; then the functions are called.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from milepost.errors import ConfigError, noted
from milepost.handlers._targets import Path, asked_by, lists_of_paths, restore_args_by_path
from milepost.structure import build, leaf_paths
from milepost.transform_utils import RestoreTransform, Source, Transform, plan_transformations
from milepost.type_handlers import RestoreArgs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from milepost.args import PyTreeRestore
    from milepost.handlers._items import StoredItem

__all__ = ["ParamInfo", "restore_by_function", "restore_by_transforms"]

_SEP = "/"


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """Stands for a saved leaf, in a tree that a function of the caller's rearranges; `name` is its keys, by dots."""

    name: str
    keypath: Path


class _Saved:
    """The leaves of a stored tree, to be read some at a time."""

    def __init__(self, stored: StoredItem) -> None:
        from milepost.engine.choosing import without_classes
        from milepost.trees import matching

        self._stored = stored
        self._structure = without_classes(stored.item.structure)
        self.paths = [matching(path) for path in leaf_paths(self._structure)]
        self.by_name = dict(zip((_SEP.join(path) for path in self.paths), self.paths, strict=True))
        if len(self.by_name) != len(self.paths):
            raise noted(
                ConfigError("cannot transform the saved tree: two of its leaves have the same name"),
                f"names are keys joined by {_SEP!r}",
            )

    def tree(self, leaves: Mapping[Path, Any]) -> Any:
        """Return the tree as it was saved, of dicts and lists, with these leaves, and `...` for all others."""
        return build(self._structure, (leaves.get(path, ...) for path in self.paths))

    def load(self, asked: Mapping[Path, Any]) -> Any:
        """Return the tree with the leaves that are asked for, and `...` for all others."""
        from milepost.engine.loading import load_item

        stored = self._stored
        return load_item(stored.checkpoint, stored.name, stored.plugins, target=self.tree(asked))


def restore_by_transforms(stored: StoredItem, args: PyTreeRestore) -> Any:
    """Restore into the structure of the item, as the transforms say."""
    if args.item is None:
        raise ConfigError("cannot restore by transforms: there is no item, whose structure they fill")
    saved, new = _Saved(stored), lists_of_paths(args.item)
    by_path = restore_args_by_path(args.restore_args) if args.restore_args is not None else {}
    by_name = {_SEP.join(path): path for path in new}
    plan = plan_transformations(
        saved.by_name, args.transforms, by_name, default_to_original=args.transforms_default_to_original
    )
    sources = {by_name[name]: source for name, source in plan.items()}
    values = _originals(saved, sources, by_path)
    from milepost.trees import target_leaves

    made = [
        leaf if leaf is None else _made(path, leaf, sources[path], saved, values, by_path.get(path))
        for path, leaf in new.items()
    ]
    return target_leaves(args.item).unflatten(made)


def _originals(
    saved: _Saved, sources: Mapping[Path, Source], by_path: Mapping[Path, RestoreArgs | None]
) -> dict[Path, Any]:
    """Return what each new leaf takes from the saved tree, read as its own restore arguments say.

    A saved leaf that becomes several is read once for each way in which it is asked for.
    """
    left = {
        path: (saved.by_name[source.original_key], by_path.get(path))
        for path, source in sources.items()
        if source.original_key is not None
    }
    values: dict[Path, Any] = {}
    while left:
        now: dict[Path, RestoreArgs | None] = {}
        for original, args in left.values():
            now.setdefault(original, args)
        loaded = lists_of_paths(saved.load({path: asked_by(args) for path, args in now.items()}))
        done = {path: original for path, (original, args) in left.items() if now[original] is args}
        values |= {path: loaded[original] for path, original in done.items()}
        left = {path: one for path, one in left.items() if path not in done}
    return values


def _made(
    path: Path, leaf: Any, source: Source, saved: _Saved, values: Mapping[Path, Any], args: RestoreArgs | None
) -> Any:
    transform = source.transform
    extra = (args or RestoreArgs(),) if isinstance(transform, RestoreTransform) else ()
    if source.whole_tree and transform is not None and transform.multi_value_fn is not None:
        return transform.multi_value_fn(_SEP.join(path), saved.load(_inputs(saved, transform)), *extra)
    if source.original_key is None:
        return leaf
    value_fn = None if transform is None else transform.value_fn
    if value_fn is None:
        return values[path]
    return value_fn(values[path], *(extra if _needs_two(value_fn) else ()))


def _needs_two(function: Callable[..., Any]) -> bool:
    """Say whether a function cannot be called with a value alone: it is written for the restore arguments, too."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in positional and one.default is one.empty for one in parameters) > 1


def _inputs(saved: _Saved, transform: Transform) -> dict[Path, Any]:
    if not isinstance(transform, RestoreTransform):
        return {path: asked_by(None) for path in saved.paths}
    given = transform.multi_value_fn_input_args
    if given is None:
        raise ConfigError("cannot restore by a RestoreTransform with multi_value_fn: multi_value_fn_input_args is None")
    for name in given:
        if name not in saved.by_name:
            raise ConfigError(f"cannot restore by multi_value_fn_input_args: there is no saved leaf {name!r}")
    return {saved.by_name[name]: asked_by(args) for name, args in given.items()}


def restore_by_function(stored: StoredItem, args: PyTreeRestore) -> Any:
    """Restore what a function returns: it is given the item, the saved structure, and what stands for saved leaves.

    It returns a tree of the wanted structure, and one like it of what is to be restored where.
    """
    from milepost.metadata import tree_metadata
    from milepost.trees import matching, target_leaves

    if args.legacy_transform_fn is None:
        raise ConfigError("cannot restore by a function: legacy_transform_fn is None")
    saved = _Saved(stored)
    infos = saved.tree({path: ParamInfo(".".join(path), path) for path in saved.paths})
    known = lists_of_paths(tree_metadata(stored.item).tree)
    _, wanted = args.legacy_transform_fn(args.item, saved.tree(known), infos)
    by_path = restore_args_by_path(args.restore_args) if args.restore_args is not None else {}
    found = target_leaves(wanted)
    sources = {
        matching(path): Source(_SEP.join(info.keypath))
        for path, info in zip(found.paths, found.leaves, strict=True)
        if isinstance(info, ParamInfo)
    }
    values = _originals(saved, sources, by_path)
    return found.unflatten(
        [values.get(matching(path), leaf) for path, leaf in zip(found.paths, found.leaves, strict=True)]
    )
