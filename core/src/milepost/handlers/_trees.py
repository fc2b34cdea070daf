"""The handlers whose object is a tree, or a single leaf: arrays, numbers, random keys.

The rule: they leave reading and writing to the engine, and say only what is saved and what is asked for. Handed a
folder, as handlers of others do that build on them, they keep a whole checkpoint in it.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar

from milepost import args as a
from milepost.engine.items import TreeItem
from milepost.errors import ConfigError
from milepost.handlers._casting import saved_by
from milepost.handlers._folders import save_into, saving_into, stored_in
from milepost.handlers._interface import AsyncCheckpointHandler, Directory
from milepost.options import MultiprocessingOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from milepost.args import CheckpointArgs
    from milepost.handlers._items import StoredItem
    from milepost.handlers._targets import Wish
    from milepost.metadata import TreeMetadata
    from milepost.options import MemoryLimitOptions
    from milepost.type_handlers import RestoreArgs

__all__ = [
    "ArrayCheckpointHandler",
    "BasePyTreeCheckpointHandler",
    "JaxRandomKeyCheckpointHandler",
    "NumpyRandomKeyCheckpointHandler",
    "PyTreeCheckpointHandler",
    "StandardCheckpointHandler",
    "public_typestr",
]


def public_typestr(cls: type) -> str:
    """Return the name by which a checkpoint remembers a handler: of ours the public one, where it is found again."""
    package = __name__.rpartition(".")[0]
    module = package if cls.__module__.startswith(f"{package}._") else cls.__module__
    return f"{module}.{cls.__qualname__}"


class _EngineTree(AsyncCheckpointHandler):
    """What all of them share: one item, by way of the engine, or within a folder."""

    @abc.abstractmethod
    def to_item(self, args: Any) -> TreeItem[Any]:
        """Say what is saved; raise at once for what cannot be."""

    @abc.abstractmethod
    def from_item(self, stored: StoredItem, args: Any) -> Any:
        """Load an item; `args` None: as it was saved."""

    def item_metadata(self, stored: StoredItem) -> Any:
        """Return a `TreeMetadata`: what is known of each leaf, in the saved structure."""
        return _metadata_of(stored)

    def save(self, directory: Directory, *args: Any, **kwargs: Any) -> None:
        """Save into a folder, as a checkpoint of its own within it.

        Takes an object of the handler's class for saving as `args`, or what that class takes.
        """
        save_into(directory, {"state": self.to_item(self._given(0, args, kwargs))})

    async def async_save(
        self, directory: Directory, item: Any | None = None, save_args: Any | None = None, args: Any | None = None
    ) -> list[Future[Any]]:
        """Save into a folder as `save` does; what it returns is done when all is written."""
        given = {
            name: one for name, one in (("item", item), ("save_args", save_args), ("args", args)) if one is not None
        }
        return [saving_into(directory, {"state": self.to_item(self._given(0, (), given))})]

    def restore(self, directory: Directory, *args: Any, **kwargs: Any) -> Any:
        """Restore from a folder that was saved into, a checkpoint, or the folder of an item within one."""
        given = self._given(1, args, kwargs) if args or kwargs else None
        return stored_in(directory, lambda stored: self.from_item(stored, given))

    def metadata(self, directory: Directory) -> Any:
        """Return what is known of what was saved into a folder."""
        return stored_in(directory, self.item_metadata)

    def _given(self, which: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CheckpointArgs:
        cls = a.get_registered_args_cls(_with_args(type(self)))[which]
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, a.CheckpointArgs)]
        if given:
            return given[0]
        return cls(*args, **{name: value for name, value in kwargs.items() if name != "args"})

    @classmethod
    def typestr(cls) -> str:
        """Return the name that the checkpoint keeps of what saved an item."""
        return public_typestr(cls)


def _with_args(cls: type) -> type:
    # A class derived from one of ours takes what ours takes, as long as it does not say otherwise.
    return next((one for one in cls.__mro__ if a.has_registered_args(one)), cls)


def format_options(*, ocdbt: bool, zarr3: bool = False, compression: bool = True) -> dict[str, Any]:
    """Return what is said of the format in words of the array writer; what is left at its default says nothing.

    >>> format_options(ocdbt=True, zarr3=True)
    {'zarr_format': 3}
    """
    said: dict[str, Any] = {} if ocdbt else {"ocdbt": False}
    if zarr3:
        said["zarr_format"] = 3
    return said if compression else {**said, "compression": "none"}


def _present(item: Any) -> Any:
    if item is None:
        raise ConfigError("cannot save None: there is no item")
    return item


def _load(stored: StoredItem, wish: Wish) -> Any:
    from milepost.engine.loading import load_item

    return load_item(stored.checkpoint, stored.name, stored.plugins, target=wish.target, rules=wish.rules)


def _load_plain(stored: StoredItem, fallback: Any = None) -> Any:
    from milepost.engine.loading import AS_SAVED
    from milepost.handlers._targets import Wish, plain_rules

    return _load(stored, Wish(AS_SAVED, plain_rules(fallback)))


def _metadata_of(stored: StoredItem) -> TreeMetadata:
    from milepost.metadata import tree_metadata
    from milepost.path._finding import as_path

    folder = as_path(f"{stored.checkpoint.url}/{stored.name}")
    return tree_metadata(stored.item, folder, custom_metadata=stored.item.custom_metadata)


class StandardCheckpointHandler(_EngineTree):
    """Saves a tree of arrays, numbers and strings; restores it like a tree of values, abstract or real.

    `save_concurrent_gb` and `restore_concurrent_gb` have no effect: the budgets of the route say how much memory saving
    and loading may hold. Nor has `pytree_metadata_options`: the metadata always tell the saved structure. The array
    writer is chosen by the route; one that can do without OCDBT does if `use_ocdbt` is False.
    `multiprocessing_options` are those of the checkpointer.
    """

    _milepost_save_args: ClassVar[type] = a.StandardSave
    _milepost_restore_args: ClassVar[type] = a.StandardRestore

    def __init__(
        self,
        *,
        save_concurrent_gb: int = 96,
        restore_concurrent_gb: int = 96,
        multiprocessing_options: MultiprocessingOptions = MultiprocessingOptions(),  # noqa: B008 - the documented default; never changed
        pytree_metadata_options: Any = None,
        use_ocdbt: bool = True,
    ) -> None:
        del save_concurrent_gb, restore_concurrent_gb, multiprocessing_options, pytree_metadata_options
        self._writer_options = format_options(ocdbt=use_ocdbt)

    def to_item(self, args: a.StandardSave) -> TreeItem[Any]:
        """Say what is saved; raises a `ValueError` that lists all leaves that cannot be."""
        return saved_by(_present(args.item), args.save_args, self.typestr(), args.custom_metadata, self._writer_options)

    def restore(self, directory: Directory, item: Any | None = None, args: a.StandardRestore | None = None) -> Any:
        """Restore from a folder that was saved into, a checkpoint, or the folder of an item within one."""
        return super().restore(directory, item=item, args=args)

    def from_item(self, stored: StoredItem, args: a.StandardRestore | None) -> Any:
        """Restore like the item of the arguments; without one dicts stand in for registered classes."""
        from milepost.handlers._targets import like_values

        if args is None or args.item is None:
            return _load_plain(stored, None if args is None else args.fallback_sharding)
        value = _load(stored, like_values(args.item, strict=args.strict, fallback=args.fallback_sharding))
        return _laid_out(value, args.item) if args.support_layout else value


def _laid_out(value: Any, item: Any) -> Any:
    """Give the arrays the layouts of the item's, where those are known."""
    import jax
    from jax.sharding import Sharding

    from milepost.tree import placed_by

    def lay_out(leaf: Any, array: Any) -> Any:
        place = placed_by(leaf, with_layout=True)
        return array if place is None or isinstance(place, Sharding) else jax.device_put(array, place)

    return jax.tree.map(lay_out, item, value)


class PyTreeCheckpointHandler(_EngineTree):
    """Saves a tree; restores it leaf by leaf as a tree of `RestoreArgs` says, wholly, in part, or transformed.

    Which array writer writes, and how much memory saving and loading may hold, is what the route says, and the metadata
    always tell the saved structure. An array writer that knows these formats takes `use_ocdbt`, `use_zarr3` and
    `use_compression` where they differ from their defaults, before what the route says. All else has no effect.
    """

    _milepost_save_args: ClassVar[type] = a.PyTreeSave
    _milepost_restore_args: ClassVar[type] = a.PyTreeRestore

    def __init__(  # noqa: PLR0913 - the documented signature
        self,
        aggregate_filename: str | None = None,
        *,
        save_concurrent_gb: int | None = None,
        restore_concurrent_gb: int | None = None,
        save_device_host_concurrent_gb: int | str | None = None,
        memory_limit_options: MemoryLimitOptions | None = None,
        use_ocdbt: bool = True,
        use_zarr3: bool = False,
        use_compression: bool = True,
        multiprocessing_options: MultiprocessingOptions = MultiprocessingOptions(),  # noqa: B008 - the documented default; never changed
        type_handler_registry: Any = None,
        handler_impl: Any = None,
        pytree_metadata_options: Any = None,
        array_metadata_validator: Any = None,
        enable_pinned_host_transfer: bool | None = None,
        is_prioritized_key_fn: Any = None,
    ) -> None:
        del aggregate_filename, save_concurrent_gb, restore_concurrent_gb, save_device_host_concurrent_gb
        del memory_limit_options, multiprocessing_options, type_handler_registry, handler_impl, pytree_metadata_options
        del array_metadata_validator, enable_pinned_host_transfer, is_prioritized_key_fn
        self._writer_options = format_options(ocdbt=use_ocdbt, zarr3=use_zarr3, compression=use_compression)

    def to_item(self, args: a.PyTreeSave) -> TreeItem[Any]:
        """Say what is saved; raises a `ValueError` that lists all leaves that cannot be."""
        options = dict(self._writer_options)
        if args.ocdbt_target_data_file_size is not None:
            options["target_file_bytes"] = args.ocdbt_target_data_file_size
        return saved_by(_present(args.item), args.save_args, self.typestr(), args.custom_metadata, options)

    def save(
        self,
        directory: Directory,
        item: Any | None = None,
        save_args: Any | None = None,
        args: a.PyTreeSave | None = None,
    ) -> None:
        """Save into a folder, as a checkpoint of its own within it."""
        super().save(directory, item=item, save_args=save_args, args=args)

    def restore(  # noqa: PLR0913, PLR0917 - the documented signature
        self,
        directory: Directory,
        item: Any | None = None,
        restore_args: Any | None = None,
        transforms: Any | None = None,
        transforms_default_to_original: bool = True,  # noqa: FBT001, FBT002 - the documented signature
        legacy_transform_fn: Callable[..., Any] | None = None,
        args: a.PyTreeRestore | None = None,
    ) -> Any:
        """Restore from a folder that was saved into, a checkpoint, or the folder of an item within one."""
        return super().restore(
            directory,
            item=item,
            restore_args=restore_args,
            transforms=transforms,
            transforms_default_to_original=transforms_default_to_original,
            legacy_transform_fn=legacy_transform_fn,
            args=args,
        )

    def from_item(self, stored: StoredItem, args: a.PyTreeRestore | None) -> Any:
        """Restore as the arguments say; without an item dicts stand in for registered classes."""
        from milepost.handlers._targets import restore_args_by_path, tree_of
        from milepost.handlers._transforms import restore_by_function, restore_by_transforms

        if args is None:
            return _load_plain(stored)
        if args.legacy_transform_fn is not None:
            if args.transforms is not None:
                raise ConfigError("cannot restore by transforms: legacy_transform_fn is given, too")
            return restore_by_function(stored, args)
        if args.transforms is not None:
            return restore_by_transforms(stored, args)
        by_path = None if args.restore_args is None else restore_args_by_path(args.restore_args)
        if args.item is not None:
            return _load(stored, tree_of(args.item, by_path, partial=args.partial_restore))
        return _load_plain(stored) if by_path is None else _load(stored, tree_of(_saved_structure(stored), by_path))


class BasePyTreeCheckpointHandler(PyTreeCheckpointHandler):
    """The same under another name, with budgets in bytes; its parameters have no effect either."""

    _milepost_save_args: ClassVar[type] = a.PyTreeSave
    _milepost_restore_args: ClassVar[type] = a.PyTreeRestore

    def __init__(  # noqa: PLR0913 - the documented signature
        self,
        *,
        save_concurrent_bytes: int | None = None,
        restore_concurrent_bytes: int | None = None,
        save_device_host_concurrent_bytes: int | str | None = None,
        memory_limit_options: MemoryLimitOptions | None = None,
        use_ocdbt: bool = True,
        use_zarr3: bool = False,
        use_compression: bool = True,
        multiprocessing_options: MultiprocessingOptions = MultiprocessingOptions(),  # noqa: B008 - the documented default; never changed
        type_handler_registry: Any = None,
        enable_post_merge_validation: bool = True,
        pytree_metadata_options: Any = None,
        array_metadata_validator: Any = None,
        enable_pinned_host_transfer: bool | None = None,
        is_prioritized_key_fn: Any = None,
    ) -> None:
        super().__init__(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3, use_compression=use_compression)
        del save_concurrent_bytes, restore_concurrent_bytes, save_device_host_concurrent_bytes, memory_limit_options
        del multiprocessing_options, type_handler_registry, enable_post_merge_validation, pytree_metadata_options
        del array_metadata_validator, enable_pinned_host_transfer, is_prioritized_key_fn

    def get_param_names(self, item: Any) -> Any:
        """Return a tree of the same structure with each leaf's path, joined by dots, in its place."""
        from milepost.tree import get_param_names

        return get_param_names(item)


def _saved_structure(stored: StoredItem) -> Any:
    from milepost.engine.choosing import without_classes
    from milepost.structure import build

    return build(without_classes(stored.item.structure), iter([True] * len(stored.item.leaves)))


class _EngineLeaf(_EngineTree):
    """What the handlers of a single leaf share."""

    def item_metadata(self, stored: StoredItem) -> Any:
        """Return what is known of the leaf."""
        return _metadata_of(stored).tree


class ArrayCheckpointHandler(_EngineLeaf):
    """Saves a single array or number. `checkpoint_name` has no effect: the item has a name."""

    _milepost_save_args: ClassVar[type] = a.ArraySave
    _milepost_restore_args: ClassVar[type] = a.ArrayRestore

    def __init__(self, checkpoint_name: str | None = None) -> None:
        del checkpoint_name

    def to_item(self, args: a.ArraySave) -> TreeItem[Any]:
        """Say what is saved; raises a `ValueError`, and a `TypeError`, for what is no array and no number."""
        import jax.tree_util as jtu

        from milepost.errors import UnsupportedLeafError

        item = _present(args.item)
        if not jtu.all_leaves([item]) or isinstance(item, str | bytes):
            raise UnsupportedLeafError(f"cannot save a {type(item).__name__}: it is neither an array nor a number")
        return saved_by(item, args.save_args, self.typestr())

    def restore(
        self,
        directory: Directory,
        item: Any | None = None,
        restore_args: RestoreArgs | None = None,
        args: a.ArrayRestore | None = None,
    ) -> Any:
        """Restore from a folder that was saved into, a checkpoint, or the folder of an item within one."""
        return super().restore(directory, item=item, restore_args=restore_args, args=args)

    def from_item(self, stored: StoredItem, args: a.ArrayRestore | None) -> Any:
        """Restore like the item of the arguments, or as their `restore_args` say, or as it was saved."""
        from milepost.handlers._targets import like_values, tree_of

        if args is not None and args.restore_args is not None:
            return _load(stored, tree_of(True, {(): args.restore_args}))
        if args is not None and args.item is not None:
            return _load(stored, like_values(args.item))
        return _load_plain(stored)


class JaxRandomKeyCheckpointHandler(_EngineLeaf):
    """Saves a random key of JAX's, typed or not, or an array of them. `key_name` has no effect."""

    _milepost_save_args: ClassVar[type] = a.JaxRandomKeySave
    _milepost_restore_args: ClassVar[type] = a.JaxRandomKeyRestore

    def __init__(self, key_name: str | None = None) -> None:
        del key_name

    def to_item(self, args: a.JaxRandomKeySave) -> TreeItem[Any]:
        """Say what is saved; raises a `ValueError`, and a `TypeError`, for what is no array of JAX's."""
        import jax

        from milepost.errors import UnsupportedLeafError

        item = _present(args.item)
        if not isinstance(item, jax.Array):
            raise UnsupportedLeafError(f"cannot save a {type(item).__name__} as a random key: it is no jax.Array")
        return TreeItem(item, self.typestr())

    def from_item(self, stored: StoredItem, args: a.JaxRandomKeyRestore | None) -> Any:
        """Restore the key, with the implementation it was saved with, placed as the `restore_args` say."""
        from milepost.handlers._targets import tree_of

        if args is None or args.restore_args is None:
            return _load_plain(stored)
        return _load(stored, tree_of(True, {(): args.restore_args}))


class NumpyRandomKeyCheckpointHandler(_EngineLeaf):
    """Saves the state of NumPy's random numbers, a tuple or a dict. `key_name` has no effect."""

    _milepost_save_args: ClassVar[type] = a.NumpyRandomKeySave
    _milepost_restore_args: ClassVar[type] = a.NumpyRandomKeyRestore

    def __init__(self, key_name: str | None = None) -> None:
        del key_name

    def to_item(self, args: a.NumpyRandomKeySave) -> TreeItem[Any]:
        """Say what is saved; raises a `ValueError`, and a `TypeError`, for what is neither a tuple nor a dict."""
        from milepost.errors import UnsupportedLeafError

        item = _present(args.item)
        if not isinstance(item, tuple | dict):
            raise UnsupportedLeafError(
                f"cannot save a {type(item).__name__} as the state of random numbers: it is neither a tuple nor a dict"
            )
        return TreeItem(item, self.typestr())

    def from_item(self, stored: StoredItem, args: a.NumpyRandomKeyRestore | None) -> Any:
        """Restore the state."""
        del args
        return _load_plain(stored)
