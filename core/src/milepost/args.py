"""What is handed to checkpointers and managers: one class for each way to save or restore, and a composite of them.

The rule: arguments are values that know nothing of handlers; which handler takes them is written on the classes
themselves. A handler class names its arguments by two attributes of its own (never an inherited one),
`_milepost_save_args` and `_milepost_restore_args`; a class of arguments names its handler by `_milepost_handler`, the
class, or where to find it (`"module:Name"`), which is looked up when somebody asks. So there is no registry, and
nothing to fill it with at import; `register_with_handler` writes these attributes for classes of one's own.
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

from milepost.errors import ConfigError, ItemNotFoundError, noted

if TYPE_CHECKING:
    from collections.abc import Callable

    import jax
    import numpy as np

    from milepost.type_handlers import RestoreArgs, SaveArgs

__all__ = [
    "ArrayRestore",
    "ArraySave",
    "CheckpointArgs",
    "Composite",
    "JaxRandomKeyRestore",
    "JaxRandomKeySave",
    "JsonRestore",
    "JsonSave",
    "NumpyRandomKeyRestore",
    "NumpyRandomKeySave",
    "ProtoRestore",
    "ProtoSave",
    "PyTreeRestore",
    "PyTreeSave",
    "StandardRestore",
    "StandardSave",
    "get_registered_args_cls",
    "get_registered_handler_cls",
    "has_registered_args",
    "register_with_handler",
]

_SAVE, _RESTORE, _HANDLER = "_milepost_save_args", "_milepost_restore_args", "_milepost_handler"


@dataclasses.dataclass
class CheckpointArgs:
    """Be the base of all arguments of handlers; derived classes are dataclasses."""


Args = TypeVar("Args", bound=CheckpointArgs)


# --- which handler takes which arguments -----------------------------------------------------------------------------


def register_with_handler(
    handler_cls: type,
    for_save: bool = False,  # noqa: FBT001, FBT002 - the documented signature
    for_restore: bool = False,  # noqa: FBT001, FBT002 - the documented signature
) -> Callable[[type[Args]], type[Args]]:
    """Return a decorator that makes a class the arguments of a handler class, for saving, for restoring, or both.

    A later one takes the place of an earlier one. Raises `ConfigError` (a ValueError) if it is for neither, and the
    decorator a TypeError for a class that is not derived from `CheckpointArgs`.
    """
    if not (for_save or for_restore):
        raise ConfigError(f"cannot register arguments with '{handler_cls.__name__}': for neither save nor restore")

    def register(cls: type[Args]) -> type[Args]:
        if not issubclass(cls, CheckpointArgs):
            raise TypeError(f"cannot register '{cls.__name__}' with a handler: it is not derived from CheckpointArgs")
        for wanted, attribute in ((for_save, _SAVE), (for_restore, _RESTORE)):
            if wanted:
                setattr(handler_cls, attribute, cls)
        setattr(cls, _HANDLER, handler_cls)
        return cls

    return register


def has_registered_args(handler: object) -> bool:
    """Return whether a handler, or a class of handlers, has arguments both for saving and for restoring."""
    own = vars(_class_of(handler))
    return _SAVE in own and _RESTORE in own


def get_registered_args_cls(handler: object) -> tuple[type[CheckpointArgs], type[CheckpointArgs]]:
    """Return a handler's, or a class of handlers', arguments for saving and for restoring.

    Raises `ConfigError` (a ValueError) if it lacks the one or the other.
    """
    cls = _class_of(handler)
    own = vars(cls)
    for attribute, what in ((_SAVE, "saving"), (_RESTORE, "restoring")):
        if attribute not in own:
            raise noted(
                ConfigError(f"cannot tell the arguments of '{cls.__name__}': it has none registered for {what}"),
                "decorate a class of arguments with `register_with_handler`; a handler does not inherit them",
            )
    return own[_SAVE], own[_RESTORE]


def get_registered_handler_cls(arg: CheckpointArgs | type[CheckpointArgs]) -> type[Any]:
    """Return the class of handlers that takes some arguments, or a class of arguments.

    Raises `ConfigError` (a ValueError) if there is none.
    """
    cls = _class_of(arg)
    found = vars(cls).get(_HANDLER)
    if found is None:
        raise noted(
            ConfigError(f"cannot tell which handler takes '{cls.__name__}': it is registered with none"),
            "decorate it with `register_with_handler`",
        )
    handler: type[Any] = pkgutil.resolve_name(found) if isinstance(found, str) else found
    return handler


def _class_of(one: object) -> type:
    return one if isinstance(one, type) else type(one)


# --- several items ---------------------------------------------------------------------------------------------------


class _NoSuchItemError(ItemNotFoundError, AttributeError):
    """Say that a composite has no such item; an AttributeError, too, since items are read as attributes."""


class Composite(CheckpointArgs, Mapping[str, Any]):
    """An ordered mapping of items by name, which cannot be changed; items are attributes, too, where no method is.

    `a & b` keeps the items of `a` whose names `b` has, too; `a | b` has those of both, and of `b` where both have one.
    Either may be combined with any mapping. Raises `ConfigError` (a ValueError) for names that begin with two
    underscores and for attempts to change it, and `ItemNotFoundError` (a KeyError, and here an AttributeError, too) for
    other names.

    >>> items = Composite(state=1, data=2)
    >>> items.state, items["data"], items.get("metrics"), list(items)
    (1, 2, None, ['state', 'data'])
    >>> items | {"data": 3}
    Composite({'state': 1, 'data': 3})
    """

    _milepost_handler: ClassVar[str] = "milepost.handlers:CompositeCheckpointHandler"
    _items: Mapping[str, Any]

    def __init__(self, /, **items: Any) -> None:
        for name in items:
            if name.startswith("__"):
                raise ConfigError(f"cannot name an item '{name}': it begins with two underscores")
        object.__setattr__(self, "_items", items)

    def __getitem__(self, key: str) -> Any:
        if key not in self._items:
            raise _NoSuchItemError(f"no item '{key}': there are {', '.join(self._items) or 'none'}")
        return self._items[key]

    def __getattr__(self, key: str) -> Any:
        # Looked up when copying or unpickling, before there are items.
        if key.startswith("__") or key == "_items":
            raise AttributeError(key)
        return self[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    # The dataclass brings one that compares its fields, of which there are none: all would be equal.
    def __eq__(self, other: object) -> bool:
        return Mapping.__eq__(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Mapping[str, Any]) -> Composite:
        if not isinstance(other, Mapping):
            return NotImplemented
        return Composite(**{name: item for name, item in self.items() if name in other})

    def __or__(self, other: Mapping[str, Any]) -> Composite:
        if not isinstance(other, Mapping):
            return NotImplemented
        return Composite(**{**self, **other})

    def __setattr__(self, key: str, value: Any) -> NoReturn:
        raise self._unchangeable(key)

    def __delattr__(self, key: str) -> NoReturn:
        raise self._unchangeable(key)

    def _unchangeable(self, key: str) -> ConfigError:
        return noted(ConfigError(f"cannot change '{key}' of a Composite: it is immutable"), "join two with `|`")

    def __repr__(self) -> str:
        return f"Composite({dict(self._items)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Composite, **self._items), ()


# --- one class for each way to save or restore -----------------------------------------------------------------------


@dataclasses.dataclass
class StandardSave(CheckpointArgs):
    """Save a tree; `save_args` is a tree of the same structure with `SaveArgs`, `custom_metadata` a JSON value."""

    _milepost_handler: ClassVar[str] = "milepost.handlers:StandardCheckpointHandler"

    item: Any
    save_args: Any | None = None
    custom_metadata: Any | None = None


@dataclasses.dataclass
class StandardRestore(CheckpointArgs):
    """Restore a tree into the structure, classes, dtypes and shardings of `item`, or as it was saved.

    With `strict` shapes have to be those that were saved; otherwise arrays are cut, or filled with zeros. With
    `support_layout` the layouts of the item's arrays are taken, too. `fallback_sharding` places arrays whose saved
    sharding cannot be had here.
    """

    _milepost_handler: ClassVar[str] = "milepost.handlers:StandardCheckpointHandler"

    item: Any | None = None
    strict: bool = True
    support_layout: bool = False
    fallback_sharding: jax.sharding.Sharding | None = None


@dataclasses.dataclass
class PyTreeSave(CheckpointArgs):
    """Save a tree; `save_args` is a tree of the same structure with `SaveArgs`, `custom_metadata` a JSON value.

    `ocdbt_target_data_file_size` is a hint, in bytes, for how large files should be.
    """

    _milepost_handler: ClassVar[str] = "milepost.handlers:PyTreeCheckpointHandler"

    item: Any
    save_args: Any | None = None
    ocdbt_target_data_file_size: int | None = None
    custom_metadata: Any | None = None


@dataclasses.dataclass
class PyTreeRestore(CheckpointArgs):
    """Restore a tree into the structure of `item`, leaf by leaf as the tree `restore_args` says.

    `transforms` is a tree of transforms from the saved tree to the item's structure, with
    `transforms_default_to_original` as for `apply_transformations`; `legacy_transform_fn` is a function that does all
    of that. With `partial_restore` the item's leaves are restored, and others left out.
    """

    _milepost_handler: ClassVar[str] = "milepost.handlers:PyTreeCheckpointHandler"

    item: Any | None = None
    restore_args: Any | None = None
    transforms: Any | None = None
    transforms_default_to_original: bool = True
    legacy_transform_fn: Callable[..., Any] | None = None
    partial_restore: bool = False


@dataclasses.dataclass
class ArraySave(CheckpointArgs):
    """Save a single array or scalar."""

    _milepost_handler: ClassVar[str] = "milepost.handlers:ArrayCheckpointHandler"

    item: jax.Array | np.ndarray[Any, Any] | float
    save_args: SaveArgs | None = None


@dataclasses.dataclass
class ArrayRestore(CheckpointArgs):
    """Restore a single array or scalar, like `item`, or as `restore_args` says."""

    _milepost_handler: ClassVar[str] = "milepost.handlers:ArrayCheckpointHandler"

    item: Any | None = None
    restore_args: RestoreArgs | None = None


@dataclasses.dataclass
class JsonSave(CheckpointArgs):
    """Save a JSON value."""

    _milepost_handler: ClassVar[str] = "milepost.handlers:JsonCheckpointHandler"

    item: Mapping[str, Any]


@dataclasses.dataclass
class JsonRestore(CheckpointArgs):
    """Restore a JSON value; `item` has no effect."""

    _milepost_handler: ClassVar[str] = "milepost.handlers:JsonCheckpointHandler"

    item: bytes | None = None


@dataclasses.dataclass
class ProtoSave(CheckpointArgs):
    """Save a protocol buffer message."""

    _milepost_handler: ClassVar[str] = "milepost.handlers:ProtoCheckpointHandler"

    item: Any


@dataclasses.dataclass
class ProtoRestore(CheckpointArgs):
    """Restore a protocol buffer message; `item` is its class."""

    _milepost_handler: ClassVar[str] = "milepost.handlers:ProtoCheckpointHandler"

    item: type[Any]


@dataclasses.dataclass
class JaxRandomKeySave(CheckpointArgs):
    """Save a random key of JAX's, typed or not."""

    _milepost_handler: ClassVar[str] = "milepost.handlers:JaxRandomKeyCheckpointHandler"

    item: jax.Array
    save_args: SaveArgs | None = None


@dataclasses.dataclass
class JaxRandomKeyRestore(CheckpointArgs):
    """Restore a random key of JAX's."""

    _milepost_handler: ClassVar[str] = "milepost.handlers:JaxRandomKeyCheckpointHandler"

    restore_args: RestoreArgs | None = None


@dataclasses.dataclass
class NumpyRandomKeySave(CheckpointArgs):
    """Save the state of NumPy's random numbers, as `numpy.random.get_state` gives it."""

    _milepost_handler: ClassVar[str] = "milepost.handlers:NumpyRandomKeyCheckpointHandler"

    item: Any


@dataclasses.dataclass
class NumpyRandomKeyRestore(CheckpointArgs):
    """Restore the state of NumPy's random numbers."""

    _milepost_handler: ClassVar[str] = "milepost.handlers:NumpyRandomKeyCheckpointHandler"
