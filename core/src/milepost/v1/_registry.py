"""Which handler serves what.

Decides the order in which handlers are asked: the one bound to the name; on loading the one that saved it; then those
that say they can, the latest registered first. The rule: whoever registers last is preferred, and nothing registered
is ever replaced.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, final

from milepost.errors import ItemNotFoundError, RequestError, noted

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "AlreadyExistsError",
    "CheckpointableHandlerRegistry",
    "NoEntryError",
    "NotHandleableError",
    "RegistryEntry",
    "global_registry",
    "handler_for_loading",
    "handler_for_saving",
    "local_registry",
    "register_handler",
    "typestr",
]

HandlerType: TypeAlias = type[Any]
H = TypeVar("H", bound=type[Any])


class AlreadyExistsError(RequestError, ValueError):
    """Say that a handler, or a name, is registered already."""


class NoEntryError(ItemNotFoundError):
    """Say that no handler is registered that serves an object or a name."""


class NotHandleableError(RequestError, ValueError):
    """Say that the handler bound to a name cannot serve the object."""


class RegistryEntry(NamedTuple):
    """A registered handler, and the name it is bound to, if any."""

    handler_type: HandlerType
    checkpointable_name: str | None


def typestr(handler_type: HandlerType) -> str:
    """Return the name by which a checkpoint remembers what saved an item."""
    # What a checkpoint remembers must not depend on where the code of milepost lies.
    module = "milepost.v1.handlers" if handler_type.__module__.startswith("milepost.v1.") else handler_type.__module__
    return f"{module}.{handler_type.__qualname__}"


@final
class CheckpointableHandlerRegistry:
    """Handlers by the names they are bound to, and in the order of their registration. Safe to use from any thread."""

    def __init__(self, entries: Sequence[RegistryEntry] = ()) -> None:
        self._lock = threading.Lock()
        self._entries: list[RegistryEntry] = list(entries)
        self._secondary: dict[HandlerType, list[str]] = {}

    def add(
        self,
        handler_type: HandlerType,
        *,
        checkpointable_name: str | None = None,
        secondary_typestrs: Sequence[str] | None = None,
    ) -> CheckpointableHandlerRegistry:
        """Register a handler class, which is made without arguments; return the registry.

        With a name it serves the objects saved under that name, and no others. `secondary_typestrs` are further names
        by which checkpoints may know it. Raises `AlreadyExistsError` for a name that is bound, and without a name for a
        class that is registered.
        """
        with self._lock:
            if checkpointable_name is not None and self._bound(checkpointable_name) is not None:
                raise AlreadyExistsError(
                    f"cannot bind a handler to {checkpointable_name!r}: another one is bound to it"
                )
            if checkpointable_name is None and (handler_type, None) in self._entries:
                raise AlreadyExistsError(f"cannot register {typestr(handler_type)!r}: it is registered already")
            self._entries.append(RegistryEntry(handler_type, checkpointable_name))
            if secondary_typestrs is not None:
                self._secondary[handler_type] = list(secondary_typestrs)
        return self

    def get(self, checkpointable_name: str) -> HandlerType:
        """Return the handler bound to a name; `NoEntryError` (a `KeyError`) if none is."""
        found = self._bound(checkpointable_name)
        if found is None:
            raise NoEntryError(f"cannot find a handler for {checkpointable_name!r}: none is bound to that name")
        return found

    def has(self, checkpointable_name: str) -> bool:
        """Say whether a handler is bound to a name."""
        return self._bound(checkpointable_name) is not None

    def get_all_entries(self) -> Sequence[RegistryEntry]:
        """Return what is registered, in order."""
        return list(self._entries)

    def get_secondary_typestrs(self, handler_type: HandlerType) -> Sequence[str]:
        """Return the further names by which checkpoints may know a handler."""
        return list(self._secondary.get(handler_type, ()))

    def _bound(self, name: str) -> HandlerType | None:
        return next((entry.handler_type for entry in self._entries if entry.checkpointable_name == name), None)

    def __repr__(self) -> str:
        listed = ", ".join(
            typestr(kind) + (f" for {name!r}" if name is not None else "") for kind, name in self._entries
        )
        return f"CheckpointableHandlerRegistry({listed})"


@functools.cache
def global_registry() -> CheckpointableHandlerRegistry:
    """Return the registry of this process, with the handlers that come with milepost."""
    from milepost.v1 import _iterators, handlers

    registry = CheckpointableHandlerRegistry()
    for kind in (_iterators.IteratorHandler, handlers.ProtoHandler, handlers.JsonHandler, _iterators.StatefulHandler):
        registry.add(kind, secondary_typestrs=kind.also_known_as)
    registry.add(handlers.PyTreeHandler)
    return registry.add(handlers.PyTreeHandler, checkpointable_name="state")


def local_registry(
    other_registry: CheckpointableHandlerRegistry | None = None, *, include_global_registry: bool = True
) -> CheckpointableHandlerRegistry:
    """Return a registry of one's own, with what is registered in another one, and in that of the process, by now."""
    made = CheckpointableHandlerRegistry()
    for source in (global_registry() if include_global_registry else None, other_registry):
        for kind, name in source.get_all_entries() if source is not None else ():
            taken = made.has(name) if name is not None else (kind, None) in made.get_all_entries()
            if not taken:
                made.add(kind, checkpointable_name=name, secondary_typestrs=source.get_secondary_typestrs(kind))  # type: ignore[union-attr]
    return made


def register_handler(
    cls: H, *, checkpointable_name: str | None = None, secondary_typestrs: Sequence[str] | None = None
) -> H:
    """Register a handler class in the registry of this process, and return it; also as a decorator."""
    global_registry().add(cls, checkpointable_name=checkpointable_name, secondary_typestrs=secondary_typestrs)
    return cls


def handler_for_saving(registry: CheckpointableHandlerRegistry, name: str, value: Any) -> Any:
    """Return a handler for an object; raise `NotHandleableError` or `NoEntryError` if there is none."""
    if registry.has(name):
        handler = registry.get(name)()
        if name == "state" and typestr(type(handler)) == _TREES:
            return handler  # whose errors say which leaf it is
        if not handler.is_handleable(value):
            raise NotHandleableError(
                f"cannot save {name!r}: {typestr(type(handler))}, bound to that name, takes no {_kind(value)}"
            )
        return handler
    for handler in _unbound(registry):
        if handler.is_handleable(value):
            return handler
    return None


_TREES = "milepost.v1.handlers.PyTreeHandler"


def handler_for_loading(registry: CheckpointableHandlerRegistry, name: str, saved_by: str, abstract: Any) -> Any:
    """Return a handler for a saved object; None if there is none."""
    if registry.has(name):
        return registry.get(name)()
    for kind, _ in reversed(registry.get_all_entries()):
        if saved_by and saved_by in (typestr(kind), *registry.get_secondary_typestrs(kind)):
            return kind()
    if abstract is None:
        return None
    return next((handler for handler in _unbound(registry) if handler.is_abstract_handleable(abstract)), None)


def no_handler(name: str, value: Any) -> NoEntryError:
    """Return the error for an object that no handler serves."""
    return noted(
        NoEntryError(f"cannot find a handler for {name!r}: none that is registered takes a {_kind(value)}"),
        "register one: milepost.v1.handlers.register_handler, or a registry in the context's checkpointables options",
    )


def _unbound(registry: CheckpointableHandlerRegistry) -> list[Any]:
    return [kind() for kind, name in reversed(registry.get_all_entries()) if name is None]


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
