"""How what is to be saved becomes a request to the engine.

Decides which names items may have, which handler serves an object, and that a context's options reach the engine. The
rule: everything that can be refused is refused before a byte is written.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from milepost.engine.background import Background
from milepost.engine.items import OwnItem, TreeItem, Wish
from milepost.engine.saving import Save, SaveRequest
from milepost.errors import RequestError, noted
from milepost.settings import StorageRule, applied
from milepost.v1._context import current_settings
from milepost.v1._looking import located
from milepost.v1._phases import TwoPhases
from milepost.v1._registry import global_registry, handler_for_saving, no_handler, typestr
from milepost.v1.handlers import PyTreeHandler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from upath import UPath

    from milepost.engine.background import Pending
    from milepost.engine.progress import Progress
    from milepost.path._finding import PathLike
    from milepost.settings import Settings
    from milepost.v1._context import Context

__all__ = [
    "RESERVED",
    "begin_nested",
    "check_name",
    "check_value",
    "check_values",
    "items_of",
    "prepare",
    "run_callback",
    "tree_item",
]

RESERVED = frozenset({"metrics", "AUTO", "_CHECKPOINT_DELETION"})

_logger = logging.getLogger("milepost")


class UnfitError(RequestError, ValueError):
    """A name that no item can have, or nothing to save under it."""


def check_name(name: object, what: str = "save") -> str:
    """Return a name that an item can have; raise what is a `ValueError` for any other."""
    bad = not isinstance(name, str) or not name or name in RESERVED or name.startswith(".") or not name.isprintable()
    if not isinstance(name, str) or bad or set(name) & set("/\\"):
        raise noted(
            UnfitError(f"cannot {what} an item called {name!r}"),
            f"{sorted(RESERVED)} are reserved; a name has no slashes and does not begin with a dot",
        )
    return name


def tree_item(name: str, state: Any) -> dict[str, TreeItem[Any] | OwnItem]:
    """Return one tree to save, whatever its leaves are: the engine says what is wrong with them."""
    check_value(name, state)
    return {name: _tree_item(state, current_settings())}


def items_of(checkpointables: Mapping[str, Any]) -> dict[str, TreeItem[Any] | OwnItem]:
    """Return what to save for objects by name, each by the handler that serves it.

    Raises a `ValueError` for names and values that cannot be, and `NoEntryError` for an object that nobody serves.
    """
    check_values(checkpointables)
    return {name: _item(name, value) for name, value in checkpointables.items()}


def check_values(checkpointables: Mapping[str, Any]) -> None:
    """Raise what is a `ValueError` for names and values that cannot be saved, whatever handlers there are."""
    if not isinstance(checkpointables, dict) or not checkpointables:
        raise UnfitError(f"cannot save {checkpointables!r:.80}: a dict of one or more objects by name is needed")
    for name, value in checkpointables.items():
        check_value(name, value)


def check_value(name: str, value: Any) -> None:
    """Raise what is a `ValueError` for a name that no item can have, and for None."""
    check_name(name)
    if value is None:
        raise UnfitError(f"cannot save None as {name!r}: checkpointable must not be None for saving")


def _item(name: str, value: Any) -> TreeItem[Any] | OwnItem:
    settings = current_settings()
    handler = handler_for_saving(settings.registry or global_registry(), name, value)
    if handler is None:
        if _has_leaves_of_its_own(value):
            return _tree_item(value, settings)  # the engine lists the leaves that cannot be saved
        raise no_handler(name, value)
    if type(handler) is PyTreeHandler:
        return _tree_item(value, settings)

    def begin(folder: Path) -> Callable[[], object]:
        from upath import UPath

        from milepost.v1.path import PathAwaitingCreation

        return TwoPhases(lambda: handler.save(PathAwaitingCreation(UPath(folder)), value))

    return OwnItem(begin, typestr(type(handler)))


def _has_leaves_of_its_own(value: Any) -> bool:
    import jax.tree_util as jtu

    return not jtu.all_leaves([value])


def _tree_item(tree: Any, settings: Settings) -> TreeItem[Any]:
    if settings.scoped_storage is None and settings.storage == StorageRule():
        return TreeItem(tree, options=settings.array_format)
    import jax

    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    rules = [settings.storage_of(path, leaf) for path, leaf in flat]
    leaves = [_cast(leaf, rule.dtype) for (_, leaf), rule in zip(flat, rules, strict=True)]
    cast = jax.tree_util.tree_unflatten(treedef, leaves)
    return TreeItem(cast, options=settings.array_format, wishes=[_wish(rule) for rule in rules])


def _cast(leaf: Any, dtype: Any) -> Any:
    import jax
    import numpy as np

    arrays = isinstance(leaf, jax.Array | np.ndarray) and isinstance(leaf.dtype, np.dtype)
    return leaf if dtype is None or not arrays else leaf.astype(dtype)


def _wish(rule: StorageRule) -> Wish | None:
    if rule.chunk_bytes is None and not rule.shard_axes:
        return None
    return Wish(rule.chunk_bytes, tuple(rule.shard_axes or ()))


def prepare(
    path: PathLike,
    items: Mapping[str, TreeItem[Any] | OwnItem],
    *,
    lasting: bool,
    overwrite: bool = False,
    custom_metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[Save, Callable[[], None]]:
    """Begin a save under the options of the active context; return it with what completes its snapshot."""
    url = located(path)
    started = Save(SaveRequest(url, items, overwrite, custom_metadata, None, progress))
    with applied(current_settings(), url):
        return started, started.prepare(lasting=lasting)


def run_callback(callback: Callable[[], object] | None) -> None:
    """Call what was to be called after a commit; what it raises is logged, since the checkpoint is safe."""
    if callback is None:
        return
    try:
        callback()
    except Exception:
        _logger.exception("the callback after a commit failed; the checkpoint is safe")


def begin_nested(path: UPath, tree: Any, context: Context | None) -> Pending[object]:
    """Save a tree in the background, as one phase of a larger save; the tree may change when this returns."""
    settings = current_settings() if context is None else context.settings()
    url = located(path)
    started = Save(SaveRequest(url, {"state": _tree_item(tree, settings)}))
    with applied(settings, url):
        snapshot = started.prepare(lasting=True)
    pending: Pending[object] = Background().start(started.finish, f"the save of {str(path)!r}")
    snapshot()
    return pending
