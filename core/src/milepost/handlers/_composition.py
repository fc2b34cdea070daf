"""Which handler saves and restores which item of a checkpoint.

The rule, for an item and its arguments: what the registry has for this item; else the handler the item is bound to, if
it takes such arguments; else what the registry has for all items; else the handler class that the arguments name, made
without parameters. A save binds: an item is not saved in two ways by one composition. Without arguments it is the
bound handler, else the one that the checkpoint names: one of ours, or one in a module that is loaded already. Nothing
is ever imported because a file says so.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from milepost.args import CheckpointArgs, Composite, get_registered_args_cls, get_registered_handler_cls
from milepost.args import has_registered_args as has_args
from milepost.errors import ConfigError, ItemNotFoundError, RequestError, noted
from milepost.handlers._interface import CheckpointHandler
from milepost.handlers._items import StoredItem, adapted
from milepost.protocols import COMMIT_OBJECT
from milepost.structure import class_named

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from milepost.engine.items import OwnItem, TreeItem
    from milepost.engine.reading import Checkpoint
    from milepost.handlers._registry import CheckpointHandlerRegistry
    from milepost.manifest import Item
    from milepost.plugins import Plugins

__all__ = ["Composition"]


class Composition:
    """The items of a checkpoint, and the handler of each.

    With `names` only items of these names are saved, so that a slip of the pen is not an item of its own.

    One object, one user: its methods are called from one thread at a time.
    """

    def __init__(
        self,
        item_handlers: Mapping[str, CheckpointHandler] | None = None,
        registry: CheckpointHandlerRegistry | None = None,
        *,
        names: Collection[str] | None = None,
    ) -> None:
        self._bound: dict[str, CheckpointHandler] = dict(item_handlers or {})
        self._registry = registry
        self._names = names

    @property
    def bound(self) -> Mapping[str, CheckpointHandler]:
        """The handlers by item, as far as they were given or have saved or restored something."""
        return dict(self._bound)

    def to_items(self, args: Mapping[str, CheckpointArgs]) -> dict[str, TreeItem[Any] | OwnItem]:
        """Say what is saved, by item.

        Raises a `ValueError` for names that no item can have, for items without arguments, and for arguments that no
        handler takes or the item's does not, and whatever the handlers raise for what cannot be saved.
        """
        for name in args:
            _check_name(name)
            if self._names is not None and name not in self._names:
                there = ", ".join(map(repr, self._names))
                raise _ItemNameError(f"cannot save an item called {name!r}: the items there are to be are {there}")
        handlers = {name: self._to_save(name, arg) for name, arg in args.items()}
        found = {name: adapted(handler).to_item(args[name]) for name, handler in handlers.items()}
        self._bound |= handlers
        return found

    def from_items(
        self,
        checkpoint: Checkpoint,
        plugins: Plugins,
        args: Mapping[str, CheckpointArgs | None] | None = None,
        *,
        skip: Collection[str] = (),
    ) -> Composite:
        """Restore items of an open checkpoint: those that have arguments, or without any all, but for those to skip.

        Raises `ItemNotFoundError` (a KeyError) for an item that is not there, and a `ValueError` for one whose handler
        is not known.
        """
        there = checkpoint.manifest.items
        wanted = dict.fromkeys(name for name in there if name not in skip) if args is None else dict(args)
        for name in wanted:
            if name not in there:
                shown = ", ".join(map(repr, there)) or "none"
                raise ItemNotFoundError(f"cannot restore item {name!r} of {checkpoint.url!r}: it has {shown}")
        handlers = {name: self._to_restore(name, arg, there[name]) for name, arg in wanted.items()}
        return Composite(
            **{
                name: adapted(handler).from_item(StoredItem(checkpoint, name, plugins), wanted[name])
                for name, handler in handlers.items()
            }
        )

    def metadata(
        self, checkpoint: Checkpoint, plugins: Plugins, *, skip: Collection[str] = ()
    ) -> dict[str, Any | None]:
        """Return what is known of each item without restoring it; None where its handler is not known."""
        found: dict[str, Any | None] = {}
        for name, item in checkpoint.manifest.items.items():
            if name not in skip:
                handler = self._bound.get(name) or self._named(item)
                found[name] = adapted(handler).item_metadata(StoredItem(checkpoint, name, plugins)) if handler else None
        return found

    def close(self) -> None:
        """Let all handlers give back what they hold."""
        for handler in self._all():
            handler.close()

    # --- finding handlers ---

    def _to_save(self, name: str, arg: CheckpointArgs | None) -> CheckpointHandler:
        if arg is None:
            raise ConfigError(f"cannot save item {name!r}: its arguments are None")
        handler = self._taking(name, arg)
        if handler is not None:
            return handler
        bound = self._bound.get(name)
        if bound is not None:
            raise noted(
                ConfigError(
                    f"cannot save item {name!r} with {type(arg).__name__}: its handler is a {type(bound).__name__}, "
                    "which does not take them"
                ),
                *_takes_what(bound),
            )
        return _made(get_registered_handler_cls(arg))

    def _to_restore(self, name: str, arg: CheckpointArgs | None, item: Item) -> CheckpointHandler:
        if arg is None:
            handler = self._bound.get(name) or self._named(item)
            if handler is None:
                raise _unknown(name, item)
        else:
            handler = self._taking(name, arg) or _made(get_registered_handler_cls(arg))
        self._bound.setdefault(name, handler)
        return handler

    def _taking(self, name: str, arg: CheckpointArgs) -> CheckpointHandler | None:
        """Return the handler that was given for such an item or such arguments, None if none takes them."""
        registry, bound = self._registry, self._bound.get(name)
        if registry is not None and registry.has(name, type(arg)):
            return registry.get(name, type(arg))
        if bound is not None:
            if _takes(bound, arg):
                return bound
        elif registry is not None and registry.has(None, type(arg)):
            return registry.get(None, type(arg))
        return None

    def _named(self, item: Item) -> CheckpointHandler | None:
        """Return a handler of the kind that the checkpoint names, None if there is none at hand."""
        for handler in self._all():
            if handler.typestr() == item.handler:
                return handler
        from milepost import handlers

        if not item.handler:
            # Saved without handlers, by `milepost.save`: a tree is a tree.
            return handlers.StandardCheckpointHandler() if item.writer else None
        module, _, name = item.handler.rpartition(".")
        ours = getattr(handlers, name, None) if module == handlers.__name__ else _loaded(item.handler)
        return _made(ours) if isinstance(ours, type) and issubclass(ours, CheckpointHandler) else None

    def _all(self) -> list[CheckpointHandler]:
        registered = self._registry.get_all_entries().values() if self._registry is not None else ()
        return list({id(handler): handler for handler in (*self._bound.values(), *registered)}.values())


def _takes(handler: CheckpointHandler, arg: CheckpointArgs) -> bool:
    # One without registered arguments takes what its author says; it is the one to refuse them.
    return not has_args(handler) or isinstance(arg, get_registered_args_cls(handler))


def _takes_what(handler: CheckpointHandler) -> list[str]:
    return [f"it takes {' and '.join(cls.__name__ for cls in get_registered_args_cls(handler))}"]


def _made(cls: type[CheckpointHandler]) -> CheckpointHandler:
    try:
        return cls()
    except TypeError as error:
        raise noted(
            ConfigError(f"cannot make a '{cls.__name__}' without parameters: {error}"),
            "give the item's handler: `item_handlers` of a manager, or a registry",
        ) from error


def _loaded(typestr: str) -> type | None:
    """Return the class of that name from a module that is loaded already."""
    parts = typestr.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if module in sys.modules:
            return class_named(f"{module}:{'.'.join(parts[end:])}")
    return None


def _unknown(name: str, item: Item) -> ConfigError:
    what = f"it was saved with {item.handler!r}" if item.handler else "the checkpoint does not say what saved it"
    return noted(
        ConfigError(f"cannot restore item {name!r}: {what}, which is not known here"),
        "pass arguments for the item, or give its handler: `item_handlers` of a manager, or a registry",
    )


class _ItemNameError(RequestError, ValueError):
    """A name that no item can have."""


def _check_name(name: str) -> None:
    if not name or name == COMMIT_OBJECT or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
        raise noted(
            _ItemNameError(f"cannot save an item called {name!r}"),
            f"a name has no slashes, does not begin with a dot, and is not {COMMIT_OBJECT!r}",
        )
