"""How what is handed to a manager becomes the items of a step, and what it hands back.

The rule: a step is one object, kept as the item "default", or several items by name; a manager never mixes the two.
Which of them is said by the manager's parameters or by its first call, and where neither has, by the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from milepost.args import CheckpointArgs, Composite, get_registered_args_cls, has_registered_args
from milepost.errors import ConfigError, ItemNotFoundError, noted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milepost.checkpointers import AbstractCheckpointer
    from milepost.engine.reading import Checkpoint
    from milepost.handlers import CheckpointHandler, CheckpointHandlerRegistry
    from milepost.handlers._items import Call
    from milepost.plugins import Plugins

__all__ = ["DEFAULT_ITEM", "METRICS", "Items", "items_of"]

DEFAULT_ITEM = "default"
"""The item of a manager whose steps are one object each."""

METRICS = "metrics"
"""What no item can be called."""


class _NoDefaultItemError(ItemNotFoundError, ValueError):
    """Say that a step is not one object."""


class Items:
    """The items of a manager's steps: how the caller's arguments become items, and items what the caller gets.

    `single` says whether a step is one object without a name; None: the first call will tell.
    """

    def __init__(self, handlers: Mapping[str, CheckpointHandler], registry: CheckpointHandlerRegistry | None) -> None:
        from milepost.handlers import Composition

        self.composition = Composition(handlers, registry)
        self.single: bool | None = None
        self.declared: frozenset[str] | None = None
        self.lasting = True
        self._handlers = handlers

    def for_save(self, items: Any, kwargs: Any, args: Any) -> Mapping[str, Any]:
        """Return what is to be saved, by item; raise a `ValueError` for what does not fit the manager."""
        if isinstance(items, CheckpointArgs):
            raise noted(ConfigError("cannot save: arguments are given as items"), "pass them as args=...")
        if args is None and items is None:
            raise noted(ConfigError("cannot save: nothing is given"), "pass args=StandardSave(tree), for example")
        given = self._by_name(args) if args is not None else self._of_objects(items, kwargs, 0)
        for name in given:
            _check_name(name)
            if self.declared is not None and name not in self.declared:
                raise ConfigError(f"cannot save item {name!r}: the manager was made for {sorted(self.declared)}")
        if not given:
            raise ConfigError("cannot save a step without items: the composite is empty")
        return given

    def for_restore(self, items: Any, kwargs: Any, args: Any) -> Mapping[str, Any] | None:
        """Return what is to be restored, by item, None for all there is."""
        if isinstance(items, CheckpointArgs):
            raise noted(ConfigError("cannot restore: arguments are given as items"), "pass them as args=...")
        if args is not None:
            return self._by_name(args)
        return None if items is None and kwargs is None else self._of_objects(items, kwargs, 1)

    def _by_name(self, args: Any) -> Mapping[str, Any]:
        if not isinstance(args, CheckpointArgs):
            raise noted(
                ConfigError(f"cannot take args of type {type(args).__name__}: they are no CheckpointArgs"),
                "wrap what is saved: args=StandardSave(tree)",
            )
        single = not isinstance(args, Composite)
        if self.single is None:
            self.single = single
        if single != self.single:
            raise ConfigError(
                f"cannot take a {type(args).__name__}: the steps of this manager are "
                f"{'one object each' if self.single else 'several items each, a Composite'}"
            )
        return args if isinstance(args, Composite) else {DEFAULT_ITEM: args}

    def _of_objects(self, items: Any, kwargs: Any, which: int) -> dict[str, Any]:
        """Return the arguments that objects become, as the manager's checkpointers take them."""
        if not self._handlers:
            raise noted(
                ConfigError("cannot take objects as items: the manager was made without checkpointers"),
                "pass args=StandardSave(tree) or args=Composite(...)",
            )
        if self.single:
            items, kwargs = {DEFAULT_ITEM: items}, {DEFAULT_ITEM: kwargs}
        items, kwargs = items or {}, kwargs or {}
        names = dict.fromkeys([*items, *kwargs])
        for name in names:
            if name not in self._handlers:
                raise ConfigError(f"cannot take item {name!r}: there are checkpointers for {sorted(self._handlers)}")
        return {
            name: _arguments(self._handlers[name], items.get(name), kwargs.get(name) or {}, which) for name in names
        }

    def restored(self, checkpoint: Checkpoint, plugins: Plugins, given: Mapping[str, Any] | None) -> Any:
        """Return what is asked for of an open checkpoint."""
        if not self._is_single(checkpoint):
            return self.composition.from_items(checkpoint, plugins, given, skip={METRICS} if given is None else ())
        _check_single(checkpoint)
        found = self.composition.from_items(checkpoint, plugins, given or {DEFAULT_ITEM: None})
        return found[DEFAULT_ITEM]

    def described(self, checkpoint: Checkpoint, plugins: Plugins) -> Any:
        """Return what is known of the items of an open checkpoint."""
        found = self.composition.metadata(checkpoint, plugins, skip={METRICS})
        if not self._is_single(checkpoint):
            missing = dict.fromkeys(sorted((self.declared or frozenset()) - found.keys()))
            return Composite(**found, **missing)
        _check_single(checkpoint)
        return found[DEFAULT_ITEM]

    def _is_single(self, checkpoint: Checkpoint) -> bool:
        return DEFAULT_ITEM in checkpoint.manifest.items if self.single is None else self.single


def _check_single(checkpoint: Checkpoint) -> None:
    if DEFAULT_ITEM not in checkpoint.manifest.items:
        there = ", ".join(map(repr, checkpoint.manifest.items))
        raise noted(
            _NoDefaultItemError(f"cannot restore {checkpoint.url!r} as one object: it has the items {there}"),
            "restore it with args=Composite(...), or with a manager that was not used for single objects",
        )


def _check_name(name: str) -> None:
    if name == METRICS:
        raise noted(
            ConfigError(f"cannot have an item {name!r}: that is where the reference keeps the metrics of a step"),
            "choose another name; metrics are given as metrics=...",
        )


def _arguments(handler: CheckpointHandler, item: Any, kwargs: Mapping[str, Any], which: int) -> CheckpointArgs | Call:
    from milepost.handlers._items import Call

    if has_registered_args(handler):
        cls: Any = get_registered_args_cls(handler)[which]
        made: CheckpointArgs = cls(item, **kwargs)
        return made
    return Call((item,), kwargs)


def items_of(
    checkpointers: AbstractCheckpointer | Mapping[str, AbstractCheckpointer] | None,
    item_names: Sequence[str] | None,
    item_handlers: CheckpointHandler | Mapping[str, CheckpointHandler] | None,
    registry: CheckpointHandlerRegistry | None,
) -> Items:
    """Return the items that a manager is made for; raise ConfigError (a ValueError) for what excludes each other."""
    given = {
        "checkpointers": checkpointers,
        "item_handlers": item_handlers,
        "item_names": item_names,
        "handler_registry": registry,
    }
    named = [name for name, value in given.items() if value]
    if len(named) > 1 and named != ["item_handlers", "item_names"]:
        raise ConfigError(f"{named[0]} and {named[1]} exclude each other: both are given")
    several: Any = item_handlers if checkpointers is None else _handlers_of(checkpointers)
    single = several is not None and not isinstance(several, Mapping)
    if single and item_names:
        raise ConfigError("item_names and a handler of a single object exclude each other: both are given")
    handlers: dict[str, Any] = {DEFAULT_ITEM: several} if single else dict(several or {})
    names = [*handlers, *(item_names or ())]
    for name in names:
        _check_name(name)
    items = Items(handlers, registry)
    if names:
        items.single = single
        items.declared = frozenset(names)
    items.lasting = checkpointers is None or _any_async(checkpointers)
    return items


def _handlers_of(checkpointers: Any) -> Any:
    if isinstance(checkpointers, Mapping):
        return {name: checkpointer.handler for name, checkpointer in checkpointers.items()}
    return checkpointers.handler


def _any_async(checkpointers: Any) -> bool:
    from milepost.checkpointers import AsyncCheckpointer

    several = checkpointers.values() if isinstance(checkpointers, Mapping) else [checkpointers]
    return any(isinstance(one, AsyncCheckpointer) for one in several)
