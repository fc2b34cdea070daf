"""What saves and restores one object, or one composite, at a path: the checkpointers of the reference.

The rule: thin. The handler says what is saved and what is asked for, the engine does it: whatever storage the path is
on, a checkpoint exists whole or not at all, and one that is replaced can be loaded, old or new, at every moment. A save
in the background that failed is raised by the next call, by `close`, or at the latest when the process ends; once, and
never in the place of an exception that is on its way already.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING, Any, Protocol

from milepost import args as a
from milepost.errors import ConfigError, RequestError, noted
from milepost.handlers import CompositeCheckpointHandler, PyTreeCheckpointHandler, StandardCheckpointHandler
from milepost.handlers._folders import reading_checkpoint
from milepost.handlers._items import Call, EngineHandler, StoredItem, adapted
from milepost.options import AsyncOptions, AtomicityMode, FileOptions, MultiprocessingOptions

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from milepost.engine.items import OwnItem, TreeItem
    from milepost.engine.reading import Checkpoint
    from milepost.engine.saving import Save
    from milepost.handlers import CheckpointHandler
    from milepost.metadata import MetadataStore, StepMetadata
    from milepost.options import AtomicityOptions
    from milepost.plugins import Plugins
    from milepost.settings import Settings

__all__ = ["AbstractCheckpointer", "AsyncCheckpointer", "Checkpointer", "PyTreeCheckpointer", "StandardCheckpointer"]

_logger = logging.getLogger("milepost")

_ITEM = "state"
"""The name of a checkpoint's one item, by which `milepost.load` finds it."""


class AbstractCheckpointer(abc.ABC):
    """Saves and restores a single object, at one instant."""

    @abc.abstractmethod
    def save(self, directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save an object at a path; the arguments are those of the handler."""

    @abc.abstractmethod
    def restore(self, directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Return the object that was saved at a path; the arguments are those of the handler."""

    def structure(self, directory: str | os.PathLike[str]) -> Any | None:
        """Return the structure of what was saved, None where that is not known; deprecated, use `metadata`."""
        del directory
        return None

    def metadata(self, directory: str | os.PathLike[str]) -> Any | None:
        """Return what is known of what was saved without restoring it, None where nothing is."""
        del directory
        return None

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back what the checkpointer holds."""


class _ClosedError(RequestError, RuntimeError):
    """A checkpointer was used after it was closed."""


class Checkpointer(AbstractCheckpointer):
    """Saves and restores with a handler; when `save` returns, the checkpoint is durable and visible, whole.

    Arguments are given as an object of the handler's class of arguments, or as what that class takes. The object of a
    handler becomes the item "state" of the checkpoint, each item of a composite one of its own.

    `file_options.path_permission_mode` is the mode of directories on a file system, `atomicity_options` say by what a
    checkpoint becomes visible. `checkpoint_metadata_store` and `temporary_path_class` have no effect: the commit object
    holds the metadata, and the storage's commit strategy says where is written until then. Nor have, in a job of one
    process, `multiprocessing_options`.

    Leaving it as a context manager closes it. Used after that it raises a `RuntimeError`.
    """

    def __init__(
        self,
        handler: CheckpointHandler,
        *,
        multiprocessing_options: MultiprocessingOptions = MultiprocessingOptions(),  # noqa: B008 - the documented default; never changed
        file_options: FileOptions = FileOptions(),  # noqa: B008 - the documented default; frozen
        atomicity_options: AtomicityOptions | None = None,
        checkpoint_metadata_store: MetadataStore | None = None,
        temporary_path_class: type[Any] | None = None,
    ) -> None:
        del multiprocessing_options, checkpoint_metadata_store, temporary_path_class
        self._handler = handler
        self._items: _Items = _Several(handler) if isinstance(handler, CompositeCheckpointHandler) else _Single(handler)
        self._settings = _settings(file_options, atomicity_options)
        self._closed = False

    @property
    def handler(self) -> CheckpointHandler:
        """The handler."""
        return self._handler

    def save(
        self,
        directory: str | os.PathLike[str],
        *args: Any,
        force: bool = False,
        custom_metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save an object at a path or URL.

        With `force` a checkpoint that is there is replaced; at every moment the old or the new one can be loaded.
        `custom_metadata`, with string keys and JSON values, comes back in `metadata`. Raises a `ValueError` if
        something is at the path, or if the object cannot be saved; then nothing was written.
        """
        from milepost.settings import applied

        self._check_open()
        save = self._new_save(
            directory, self._given(_SAVE, args, kwargs), overwrite=force, custom_metadata=custom_metadata
        )
        with applied(self._settings, directory):
            save.prepare(lasting=False)
        save.finish()

    def _new_save(
        self,
        directory: str | os.PathLike[str],
        given: _Given,
        *,
        overwrite: bool,
        custom_metadata: dict[str, Any] | None,
    ) -> Save:
        from milepost.engine.saving import Save, SaveRequest

        items = self._items.to_items(given)
        return Save(SaveRequest(directory, items, overwrite=overwrite, custom_metadata=custom_metadata))

    def restore(self, directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Return the object that was saved at a path or URL, as the handler's arguments for restoring say.

        Raises an error that is a `FileNotFoundError` and a `ValueError` if there is no checkpoint, a `ValueError` for
        something else, such as a save that was not finished, and one that shows the whole difference between the
        checkpoint and what is asked for.
        """
        self._check_open()
        given = self._given(_RESTORE, args, kwargs)
        return reading_checkpoint(
            directory, lambda checkpoint, plugins, item: self._items.from_items(checkpoint, plugins, item, given)
        )

    def metadata(self, directory: str | os.PathLike[str]) -> StepMetadata:
        """Return what is known of a checkpoint without restoring it; raises what `restore` raises for the path.

        Its `item_metadata` is what the handler says of its object, for a composite by item; None where it cannot say.
        """
        from milepost.engine.reading import open_checkpoint
        from milepost.metadata.step import step_metadata
        from milepost.plugins import installed

        checkpoint = open_checkpoint(directory)
        found = step_metadata(checkpoint.manifest)
        return self._items.described(found, checkpoint, installed())

    def structure(self, directory: str | os.PathLike[str]) -> Any | None:
        """Return what the handler says of the structure, None where it says nothing; deprecated, use `metadata`."""
        if isinstance(self._handler, EngineHandler | CompositeCheckpointHandler):
            return None
        return reading_checkpoint(
            directory, lambda checkpoint, _, item: _structure(self._handler, checkpoint, _chosen(checkpoint, item))
        )

    def close(self) -> None:
        """Close the handler; more than once does no harm."""
        if not self._closed:
            self._closed = True
            self._handler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise noted(_ClosedError(f"cannot use this {type(self).__name__}: it was closed"), "make a new one")

    def _given(self, which: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Given:
        """Return the arguments for the handler, made of its class for them where they are not of it already."""
        handler = type(self._handler)
        given = next((one for one in (*args, *kwargs.values()) if isinstance(one, a.CheckpointArgs)), None)
        if not a.has_registered_args(handler):
            return Call(args, kwargs) if given is None else given
        cls = a.get_registered_args_cls(handler)[which]
        if given is None:
            return cls(*args, **_renamed(cls, kwargs))
        if not isinstance(given, cls):
            raise noted(
                ConfigError(f"cannot hand a {type(given).__name__} to a {handler.__name__}: it takes {cls.__name__}"),
                f"pass args={cls.__name__}(...)",
            )
        return given


_Given = a.CheckpointArgs | Call
_SAVE, _RESTORE = 0, 1


def _renamed(cls: type[a.CheckpointArgs], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Call the object `item` where the documentation calls it `state`."""
    fields = {field.name for field in dataclasses.fields(cls)}
    rename = "state" in kwargs and "state" not in fields and "item" in fields
    return {"item" if rename and name == "state" else name: value for name, value in kwargs.items()}


def _settings(file_options: FileOptions | None, atomicity: AtomicityOptions | None) -> Settings:
    from milepost.settings import Settings

    commit = {AtomicityMode.COMMIT_FILE: "create", AtomicityMode.ATOMIC_RENAME: "rename"}
    return Settings(
        directory_mode=None if file_options is None else file_options.path_permission_mode,
        commit=None if atomicity is None else commit.get(AtomicityMode(atomicity.mode)),
    )


# --- one item or several ---------------------------------------------------------------------------------------------


class _Items(Protocol):
    """The items of a checkpoint, as its handler sees them."""

    def to_items(self, given: Any) -> Mapping[str, TreeItem[Any] | OwnItem]: ...
    def from_items(self, checkpoint: Checkpoint, plugins: Plugins, item: str, given: Any) -> Any: ...
    def described(self, found: StepMetadata, checkpoint: Checkpoint, plugins: Plugins) -> StepMetadata: ...


class _Single:
    """The one item of a handler."""

    def __init__(self, handler: CheckpointHandler) -> None:
        self._handler = adapted(handler)
        self._typestr = handler.typestr()

    def to_items(self, given: Any) -> Mapping[str, TreeItem[Any] | OwnItem]:
        return {_ITEM: dataclasses.replace(self._handler.to_item(given), flat=True)}

    def from_items(self, checkpoint: Checkpoint, plugins: Plugins, item: str, given: Any) -> Any:
        return self._handler.from_item(StoredItem(checkpoint, _chosen(checkpoint, item, self._typestr), plugins), given)

    def described(self, found: StepMetadata, checkpoint: Checkpoint, plugins: Plugins) -> StepMetadata:
        name = _chosen(checkpoint, "AUTO", self._typestr)
        found.item_metadata = self._handler.item_metadata(StoredItem(checkpoint, name, plugins))
        found.item_handlers = checkpoint.manifest.items[name].handler or None
        return found


class _Several:
    """The items of a composite."""

    def __init__(self, handler: CompositeCheckpointHandler) -> None:
        self._composition = handler.composition

    def to_items(self, given: Any) -> Mapping[str, TreeItem[Any] | OwnItem]:
        return self._composition.to_items(given)

    def from_items(self, checkpoint: Checkpoint, plugins: Plugins, item: str, given: Any) -> Any:
        del item
        return self._composition.from_items(checkpoint, plugins, given or None)

    def described(self, found: StepMetadata, checkpoint: Checkpoint, plugins: Plugins) -> StepMetadata:
        found.item_metadata = a.Composite(**self._composition.metadata(checkpoint, plugins))
        return found


def _chosen(checkpoint: Checkpoint, item: str, typestr: str = "") -> str:
    """Return the name of the item that a single handler restores: its own, else the only one that was saved with it."""
    from milepost.engine.reading import choose_item

    there = checkpoint.manifest.items
    if item == "AUTO" and _ITEM not in there:
        alike = [name for name, one in there.items() if one.handler == typestr]
        item = alike[0] if len(alike) == 1 else item
    name, _ = choose_item(checkpoint.manifest, item, checkpoint.url)
    return name


def _structure(handler: CheckpointHandler, checkpoint: Checkpoint, name: str) -> Any | None:
    from upath import UPath

    from milepost.engine.items import folder_of

    with folder_of(checkpoint, checkpoint.manifest.items[name]) as folder:
        try:
            return handler.structure(UPath(folder))
        except NotImplementedError:
            return None


# --- in the background -----------------------------------------------------------------------------------------------


class AsyncCheckpointer(Checkpointer):
    """Saves in the background: `save` returns as soon as the caller may change, donate or delete what is saved.

    One save at a time: the next waits for the one before. A save that failed raises its error once: from the next
    `save` or `restore`, `wait_until_finished`, `check_for_errors` or `close`, or when the process ends, which then
    fails. `timeout_secs` takes the place of `async_options.timeout_secs`, and bounds how long processes wait for each
    other, in seconds. `async_options.post_finalization_callback` is called when the checkpoint is committed; what it
    raises is logged, and cannot undo that.
    """

    def __init__(  # noqa: PLR0913 - the documented signature
        self,
        handler: CheckpointHandler,
        timeout_secs: int | None = None,
        *,
        async_options: AsyncOptions = AsyncOptions(),  # noqa: B008 - the documented default; never changed
        multiprocessing_options: MultiprocessingOptions = MultiprocessingOptions(),  # noqa: B008 - the documented default; never changed
        file_options: FileOptions = FileOptions(),  # noqa: B008 - the documented default; frozen
        atomicity_options: AtomicityOptions | None = None,
        checkpoint_metadata_store: MetadataStore | None = None,
        temporary_path_class: type[Any] | None = None,
    ) -> None:
        from milepost.engine.background import Background

        timeout = async_options.timeout_secs if timeout_secs is None else timeout_secs
        if timeout <= 0:
            raise ConfigError(f"cannot wait for {timeout} seconds: a timeout is more than 0")
        super().__init__(
            handler,
            multiprocessing_options=multiprocessing_options,
            file_options=file_options,
            checkpoint_metadata_store=checkpoint_metadata_store,
            temporary_path_class=temporary_path_class,
            atomicity_options=atomicity_options,
        )
        self._committed = async_options.post_finalization_callback
        self._saves = Background(at_exit=True)
        self._last: Save | None = None

    def save(
        self,
        directory: str | os.PathLike[str],
        *args: Any,
        force: bool = False,
        custom_metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save an object at a path or URL, in the background, once the save before has ended.

        Arguments and errors are those of `Checkpointer.save`: what can be refused is raised at once.
        """
        from milepost.settings import applied

        self._check_open()
        self._saves.wait()
        save = self._new_save(
            directory, self._given(_SAVE, args, kwargs), overwrite=force, custom_metadata=custom_metadata
        )
        with applied(self._settings, directory):
            snapshot = save.prepare(lasting=True)
        self._last = save
        self._saves.start(lambda: self._finish(save), f"the save of {str(directory)!r}")
        snapshot()

    def _finish(self, save: Save) -> None:
        save.finish()
        if self._committed is None:
            return
        try:
            self._committed()
        except Exception:
            _logger.exception("the callback after a commit failed; the checkpoint is safe")

    def restore(self, directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Return the object that was saved at a path or URL, once the save under way has ended."""
        self._check_open()
        self._saves.wait()
        return super().restore(directory, *args, **kwargs)

    def wait_until_finished(self) -> None:
        """Wait for the save under way, and raise its error, or the one of a save before, unless it was raised."""
        self._saves.wait()

    def check_for_errors(self) -> None:
        """Raise the error of a save that has ended, unless it was raised already; never waits."""
        self._saves.check()

    def cancel(self) -> None:
        """Give up the save under way, and wait until it has ended; one that is at its commit point is committed."""
        from milepost.errors import AbortedError

        if self._last is not None:
            self._last.cancel()
        with contextlib.suppress(AbortedError):
            self._saves.wait()

    def close(self) -> None:
        """Wait for the save under way, close the handler, and raise the save's error unless it was raised already."""
        failure = self._end()
        if failure is not None:
            raise failure

    def _end(self) -> BaseException | None:
        try:
            return self._saves.close()
        finally:
            super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = self._end()
        if failure is None:
            return
        if error is None:
            raise failure
        error.add_note(f"and a save in the background failed: {failure}")
        _logger.error("a save failed, while another error was on its way", exc_info=failure)


class StandardCheckpointer(AsyncCheckpointer):
    """Saves and restores a tree in the background, without classes of arguments.

    `kwargs` are those of `StandardCheckpointHandler`, all else as for `AsyncCheckpointer`.
    """

    def __init__(
        self,
        *,
        async_options: AsyncOptions = AsyncOptions(),  # noqa: B008 - the documented default; never changed
        multiprocessing_options: MultiprocessingOptions = MultiprocessingOptions(),  # noqa: B008 - the documented default; never changed
        file_options: FileOptions = FileOptions(),  # noqa: B008 - the documented default; frozen
        atomicity_options: AtomicityOptions | None = None,
        checkpoint_metadata_store: MetadataStore | None = None,
        temporary_path_class: type[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            StandardCheckpointHandler(multiprocessing_options=multiprocessing_options, **kwargs),
            async_options=async_options,
            multiprocessing_options=multiprocessing_options,
            file_options=file_options,
            checkpoint_metadata_store=checkpoint_metadata_store,
            temporary_path_class=temporary_path_class,
            atomicity_options=atomicity_options,
        )

    def save(  # type: ignore[override]  # the documented signature
        self,
        directory: str | os.PathLike[str],
        state: Any,
        *,
        save_args: Any | None = None,
        force: bool = False,
        custom_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Save a tree at a path or URL, in the background.

        `save_args` is a tree of the same structure with `SaveArgs`, or None where nothing is to be said. All else as
        for `AsyncCheckpointer.save`.
        """
        super().save(directory, args=a.StandardSave(state, save_args), force=force, custom_metadata=custom_metadata)

    def restore(self, directory: str | os.PathLike[str], target: Any | None = None, *, strict: bool = True) -> Any:
        """Return the tree that was saved at a path or URL, like a target, or as it was saved.

        The target's leaves are values, which are restored as what they are, or `jax.ShapeDtypeStruct`s: with a
        sharding for an array there, without one for an array of NumPy. Classes come back as those of the target, and
        without a target as dicts. Without `strict` arrays of another shape are cut, or filled with zeros.
        """
        return super().restore(directory, args=a.StandardRestore(target, strict=strict))


class PyTreeCheckpointer(Checkpointer):
    """Saves and restores a tree with a `PyTreeCheckpointHandler`; the parameters have no effect, as there."""

    def __init__(
        self,
        primary_host: int | None = 0,
        use_ocdbt: bool = True,  # noqa: FBT001, FBT002 - the documented signature
        use_zarr3: bool = False,  # noqa: FBT001, FBT002 - the documented signature
        use_compression: bool = True,  # noqa: FBT001, FBT002 - the documented signature
    ) -> None:
        super().__init__(
            PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3, use_compression=use_compression),
            multiprocessing_options=MultiprocessingOptions(primary_host=primary_host),
        )
