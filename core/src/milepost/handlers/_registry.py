"""Which handler takes an item, as far as the caller has said so beforehand.

The rule: an entry is for one class of arguments, and either for one item or for all. It is found by exactly what it was
registered for, and is never replaced; who looks for an item of his own asks for what holds for all next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from milepost.args import get_registered_handler_cls
from milepost.errors import ConfigError, ItemNotFoundError, noted

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from milepost.args import CheckpointArgs
    from milepost.handlers._interface import CheckpointHandler

__all__ = [
    "AlreadyExistsError",
    "CheckpointHandlerRegistry",
    "DefaultCheckpointHandlerRegistry",
    "NoEntryError",
    "create_default_handler_registry",
]

_Entry: TypeAlias = "tuple[str | None, type[CheckpointArgs]]"


class AlreadyExistsError(ConfigError):
    """Say that there is an entry for this item and these arguments (a ValueError)."""


class NoEntryError(ItemNotFoundError):
    """Say that there is no entry for an item and arguments (a KeyError)."""


@runtime_checkable
class CheckpointHandlerRegistry(Protocol):
    """Finds the handler of an item by its name and by the class of its arguments."""

    def add(
        self,
        item: str | None,
        args: type[CheckpointArgs] | CheckpointArgs,
        handler: CheckpointHandler | type[CheckpointHandler] | None = None,
        **kwargs: Any,
    ) -> None:
        """Register a handler for an item, or with None for all, and for arguments of a class."""
        ...

    def get(self, item: str | None, args: type[CheckpointArgs] | CheckpointArgs) -> CheckpointHandler:
        """Return the handler for an item and arguments; raise `NoEntryError` (a KeyError) if there is none."""
        ...

    def has(self, item: str | None, args: type[CheckpointArgs] | CheckpointArgs) -> bool:
        """Say whether there is an entry for exactly this item and these arguments."""
        ...

    def get_all_entries(self) -> MutableMapping[tuple[str | None, type[CheckpointArgs]], CheckpointHandler]:
        """Return the handlers by item and class of arguments."""
        ...


class DefaultCheckpointHandlerRegistry(CheckpointHandlerRegistry):
    """A registry of handlers; begins with the entries of another one if that is given.

    A class is made an instance at once, without parameters. Without a handler it is the one that takes such arguments.
    """

    def __init__(self, other_registry: CheckpointHandlerRegistry | None = None) -> None:
        self._entries: dict[_Entry, CheckpointHandler] = dict(
            other_registry.get_all_entries() if other_registry else {}
        )

    def add(
        self,
        item: str | None,
        args: type[CheckpointArgs] | CheckpointArgs,
        handler: CheckpointHandler | type[CheckpointHandler] | None = None,
        **kwargs: Any,
    ) -> None:
        """Register a handler for an item, or with None for all, and for arguments of a class.

        Raises `AlreadyExistsError` (a ValueError) where there is an entry.
        """
        del kwargs
        if self.has(item, args):
            raise AlreadyExistsError(
                f"cannot register a handler for item {item!r} and {_class_of(args).__name__}: there is one already"
            )
        found = get_registered_handler_cls(args) if handler is None else handler
        self._entries[item, _class_of(args)] = found() if isinstance(found, type) else found

    def get(self, item: str | None, args: type[CheckpointArgs] | CheckpointArgs) -> CheckpointHandler:
        """Return the handler for exactly this item, or with None for all, and these arguments.

        Raises `NoEntryError` (a KeyError) if there is none.
        """
        cls = _class_of(args)
        found = self._entries.get((item, cls))
        if found is None:
            there = ", ".join(f"({name!r}, {one.__name__})" for name, one in self._entries) or "none"
            raise noted(
                NoEntryError(f"no handler is registered for item {item!r} and {cls.__name__}: there are {there}"),
                "add one; with None as the item it holds for all that have none of their own",
            )
        return found

    def has(self, item: str | None, args: type[CheckpointArgs] | CheckpointArgs) -> bool:
        """Say whether there is an entry for exactly this item and these arguments."""
        return (item, _class_of(args)) in self._entries

    def get_all_entries(self) -> MutableMapping[tuple[str | None, type[CheckpointArgs]], CheckpointHandler]:
        """Return the handlers by item and class of arguments; changing it changes nothing here."""
        return dict(self._entries)


def create_default_handler_registry(
    **items_to_handlers: CheckpointHandler | tuple[CheckpointHandler, type[CheckpointArgs], type[CheckpointArgs]],
) -> DefaultCheckpointHandlerRegistry:
    """Return a registry with a handler for each item: for its registered arguments, or for those given with it."""
    from milepost.args import get_registered_args_cls

    registry = DefaultCheckpointHandlerRegistry()
    for item, given in items_to_handlers.items():
        handler, *classes = given if isinstance(given, tuple) else (given, *get_registered_args_cls(given))
        for cls in dict.fromkeys(classes):
            registry.add(item, cls, handler)
    return registry


def _class_of(args: type[CheckpointArgs] | CheckpointArgs) -> type[CheckpointArgs]:
    return args if isinstance(args, type) else type(args)
