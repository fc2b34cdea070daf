"""What can be saved besides arrays, and who does it.

Decides the protocols that objects and handlers follow, and the handlers that come with milepost. The rule: a handler is
given a directory of this machine and knows nothing of checkpoints; that what it writes becomes visible at one instant,
on any storage, is the business of whoever calls it. A save has two phases: when `save` has been awaited the object may
change, and what it gives is awaited until the files are complete.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from milepost.errors import ConfigError, DamagedError, MissingDataError, RequestError
from milepost.v1._registry import (
    AlreadyExistsError,
    CheckpointableHandlerRegistry,
    NoEntryError,
    NotHandleableError,
    global_registry,
    local_registry,
    register_handler,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from upath import UPath

    from milepost.engine.background import Pending
    from milepost.v1._context import Context
    from milepost.v1.path import PathAwaitingCreation

__all__ = [
    "AbstractCheckpointable",
    "AlreadyExistsError",
    "Checkpointable",
    "CheckpointableHandler",
    "CheckpointableHandlerRegistry",
    "JsonHandler",
    "NoEntryError",
    "NotHandleableError",
    "ProtoHandler",
    "PyTreeHandler",
    "StatefulCheckpointable",
    "global_registry",
    "local_registry",
    "register_handler",
]

T = TypeVar("T")
A = TypeVar("A")


class Checkpointable(Protocol):
    """An object that some handler can save; structurally, anything."""


class AbstractCheckpointable(Protocol):
    """What says how a saved object is to be loaded; structurally, anything."""


@runtime_checkable
class StatefulCheckpointable(Protocol):
    """An object that saves itself, and that is loaded by being given back its state."""

    async def save(self, directory: PathAwaitingCreation) -> Awaitable[None]:
        """Take note of the state; what is returned is awaited until the files in the directory are complete."""
        ...

    async def load(self, directory: UPath) -> Awaitable[None]:
        """Begin to read; what is returned is awaited until this object has the state that was saved."""
        ...


class CheckpointableHandler(Protocol[T, A]):
    """How objects of one kind are saved and loaded."""

    def is_handleable(self, checkpointable: Any) -> bool:
        """Say whether this handler can save an object."""
        ...

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Say whether this handler can load into an abstract object; None: it needs none."""
        ...

    async def save(self, directory: PathAwaitingCreation, checkpointable: T) -> Awaitable[None]:
        """Take note of an object; what is returned is awaited until the files in the directory are complete."""
        ...

    async def load(self, directory: UPath, abstract_checkpointable: A | None = None) -> Awaitable[T]:
        """Begin to read an object; what is returned gives it. Nothing in the directory may be changed."""
        ...

    async def metadata(self, directory: UPath) -> A:
        """Return what is known of a saved object without loading it."""
        ...


class _FileError(RequestError, TypeError, ValueError):
    """An object that the file of its handler cannot hold."""


class PyTreeHandler:
    """Saves and loads trees of arrays and the like.

    Registered, it stands for the engine itself. Called by another handler, it saves a tree into the directory that one
    was given, as a checkpoint within. `context` says by which options; None: by the active ones.
    `array_metadata_validator` has no effect, and `leaf_handler_registry` must be None: leaf handlers are offered by
    packages. With `partial_save_mode` nothing is different: `milepost.v1.partial` saves in parts.
    """

    def __init__(
        self,
        *,
        context: Context | None = None,
        array_metadata_validator: Any = None,  # noqa: ARG002 - the documented signature
        leaf_handler_registry: Any = None,
        partial_save_mode: bool = False,  # noqa: ARG002 - the documented signature
    ) -> None:
        if leaf_handler_registry is not None:
            raise ConfigError("cannot take a leaf_handler_registry: leaf handlers come from the group milepost.plugins")
        self.context = context

    def is_handleable(self, checkpointable: Any) -> bool:
        """Say whether all leaves of a tree can be saved."""
        import jax.tree_util as jtu

        from milepost.plugins import installed
        from milepost.trees import handlers_of

        known = handlers_of(installed())
        return all(known.of(leaf) is not None for leaf in jtu.tree_leaves(checkpointable))

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
        """Say whether all leaves of a tree say how a leaf is loaded."""
        import jax.tree_util as jtu

        return self.is_handleable(
            [leaf for leaf in jtu.tree_leaves(abstract_checkpointable) if not _says_how_to_load(leaf)]
        )

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        """Save a tree as a checkpoint within a directory."""
        import asyncio

        from milepost.v1._saving import begin_nested

        path = await directory.await_creation()
        pending = await asyncio.to_thread(begin_nested, path / _TREE, checkpointable, self.context)
        return _ended(pending)

    async def load(self, directory: UPath, abstract_checkpointable: Any = None) -> Awaitable[Any]:
        """Load a tree that `save` saved into a directory."""
        import asyncio

        from milepost.v1._loading import LoadOptions, load_tree

        return asyncio.to_thread(load_tree, directory / _TREE, abstract_checkpointable, "AUTO", LoadOptions())

    async def metadata(self, directory: UPath) -> Any:
        """Return the tree with what is known of each leaf."""
        from milepost.v1._looking import describe

        return describe(directory / _TREE, "AUTO").metadata


_TREE = "tree"


async def _ended(pending: Pending[object]) -> None:
    import asyncio

    await asyncio.to_thread(pending.result)


def _says_how_to_load(leaf: Any) -> bool:
    return (
        leaf is ... or leaf in (bool, int, float, complex, str, bytes)
        if isinstance(leaf, type) or leaf is ...
        else (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))
    )


class JsonHandler:
    """Saves and loads what JSON can hold, as text in a file (`data.json`)."""

    also_known_as: ClassVar[tuple[str, ...]] = ("milepost.handlers.JsonCheckpointHandler",)

    def __init__(self, filename: str | None = None) -> None:
        self._filename = filename or "data.json"

    def is_handleable(self, checkpointable: Any) -> bool:
        """Say whether JSON can hold an object."""
        try:
            json.dumps(checkpointable)
        except (TypeError, ValueError, RecursionError):
            return False
        return True

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Return None: JSON is loaded as it is."""
        del abstract_checkpointable
        return None

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        """Save an object; an error that is both a `TypeError` and a `ValueError` if JSON cannot hold it."""
        try:
            text = json.dumps(checkpointable)
        except (TypeError, ValueError, RecursionError) as error:
            raise _FileError(f"cannot save a {type(checkpointable).__qualname__} as JSON: {error}") from error
        return _write(directory, self._filename, text)

    async def load(self, directory: UPath, abstract_checkpointable: None = None) -> Awaitable[Any]:
        """Load an object."""
        del abstract_checkpointable

        async def read() -> Any:
            text = _read(directory, (self._filename, "metadata"))
            try:
                return json.loads(text)
            except ValueError as error:
                raise DamagedError(f"cannot load {self._filename!r} of {directory}: it is no JSON") from error

        return read()

    async def metadata(self, directory: UPath) -> None:
        """Return None: nothing is known of JSON but what is in it."""


class ProtoHandler:
    """Saves and loads messages of protocol buffers, as text in a file."""

    also_known_as: ClassVar[tuple[str, ...]] = ("milepost.handlers.ProtoCheckpointHandler",)

    def __init__(self, filename: str = "proto.pbtxt") -> None:
        self._filename = filename

    def is_handleable(self, checkpointable: Any) -> bool:
        """Say whether an object is a message."""
        message = _message_class()
        return message is not None and isinstance(checkpointable, message)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
        """Say whether an abstract object is a class of messages."""
        message = _message_class()
        kind = abstract_checkpointable
        return message is not None and isinstance(kind, type) and issubclass(kind, message)

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        """Save a message."""
        from google.protobuf import text_format  # type: ignore[import-untyped,unused-ignore]

        return _write(directory, self._filename, text_format.MessageToString(checkpointable))

    async def load(self, directory: UPath, abstract_checkpointable: Any = None) -> Awaitable[Any]:
        """Load a message of the given class; `ConfigError` (a `ValueError`) without one."""
        if abstract_checkpointable is None:
            raise ConfigError(f"cannot load {self._filename!r} of {directory}: which class of messages was not said")

        async def read() -> Any:
            from google.protobuf import text_format

            return text_format.Parse(_read(directory, (self._filename,)), abstract_checkpointable())

        return read()

    async def metadata(self, directory: UPath) -> None:
        """Return None: the class of a message is not kept with it."""


def _message_class() -> Any:
    import sys

    # Who has a message at hand has imported this.
    module = sys.modules.get("google.protobuf.message")
    return None if module is None else module.Message


async def _write(directory: PathAwaitingCreation, name: str, text: str) -> None:
    path = await directory.await_creation()
    (path / name).write_text(text, encoding="utf-8")


def _read(directory: UPath, names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return str((directory / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
    raise MissingDataError(f"cannot load {str(directory)!r}: it has no file {names[0]!r}")


def __dir__() -> list[str]:
    return list(__all__)
