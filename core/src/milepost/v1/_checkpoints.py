"""One checkpoint at one path: saved, loaded, looked at, deleted."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from milepost.errors import ItemNotFoundError
from milepost.v1._responses import AsyncResponse, in_background

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Unpack

    from milepost.engine.choosing import Missing
    from milepost.engine.items import OwnItem, TreeItem
    from milepost.engine.progress import Progress
    from milepost.path._finding import PathLike
    from milepost.v1._metadata import CheckpointMetadata

__all__ = [
    "checkpointables_metadata",
    "delete",
    "delete_async",
    "is_orbax_checkpoint",
    "load",
    "load_async",
    "load_checkpointables",
    "load_checkpointables_async",
    "load_pytree",
    "load_pytree_async",
    "metadata",
    "pytree_metadata",
    "save",
    "save_async",
    "save_checkpointables",
    "save_checkpointables_async",
    "save_pytree",
    "save_pytree_async",
]


# --- saving ----------------------------------------------------------------------------------------------------------


def save(
    path: PathLike,
    state: Any,
    *,
    checkpointable_name: str = "state",
    overwrite: bool = False,
    custom_metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Save a tree; on return the checkpoint is durable and visible, whole.

    Args:
        path: a local path, relative or absolute, or a URL.
        state: any tree of leaves milepost knows.
        checkpointable_name: the name of the tree within the checkpoint.
        overwrite: replace the checkpoint at the path; at every moment the old or the new one can be loaded.
        custom_metadata: a dict with string keys that JSON can hold, kept with the checkpoint.
        progress: called with the bytes written so far and the bytes there are, from any thread.

    Raises:
        AlreadyExistsError: something is at the path (a `ValueError` and a `FileExistsError`).
        UnsupportedLeafError: lists every leaf that cannot be saved; nothing was written.
        StorageError: the storage refused; nothing was changed.
    """
    from milepost.v1._saving import tree_item

    _raise_failures()
    items = tree_item(checkpointable_name, state)
    _save(path, items, overwrite=overwrite, custom_metadata=custom_metadata, progress=progress)


def save_async(
    path: PathLike,
    state: Any,
    *,
    checkpointable_name: str = "state",
    overwrite: bool = False,
    custom_metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> AsyncResponse[None]:
    """Save a tree in the background; returns when the caller may donate or overwrite anything.

    Arguments and errors are those of `save`: what can be refused is raised at once, what fails later by `result()`,
    else by the next call, else when the process ends, which then fails. A save waits for the one before.
    """
    from milepost.v1._saving import tree_item

    _raise_failures()
    items = tree_item(checkpointable_name, state)
    return _save_async(path, items, overwrite=overwrite, custom_metadata=custom_metadata, progress=progress)


def save_checkpointables(
    path: PathLike,
    checkpointables: dict[str, Any],
    *,
    overwrite: bool = False,
    custom_metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Save objects by name, as one checkpoint: trees, JSON, messages, iterators, and whatever a handler takes.

    The other arguments and errors are those of `save`. Raises `NoEntryError` (a `KeyError`) for an object that no
    handler takes, and a `ValueError` for a name that cannot be, or no objects at all.
    """
    from milepost.v1._saving import items_of

    _raise_failures()
    items = items_of(checkpointables)
    _save(path, items, overwrite=overwrite, custom_metadata=custom_metadata, progress=progress)


def save_checkpointables_async(
    path: PathLike,
    checkpointables: dict[str, Any],
    *,
    overwrite: bool = False,
    custom_metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> AsyncResponse[None]:
    """Save objects by name in the background, as `save_async` does with a tree."""
    from milepost.v1._saving import items_of

    _raise_failures()
    items = items_of(checkpointables)
    return _save_async(path, items, overwrite=overwrite, custom_metadata=custom_metadata, progress=progress)


def _save(path: PathLike, items: Mapping[str, TreeItem[Any] | OwnItem], **how: Any) -> None:
    from milepost.v1._saving import prepare

    started, _ = prepare(path, items, lasting=False, **how)
    started.finish()


def _save_async(path: PathLike, items: Mapping[str, TreeItem[Any] | OwnItem], **how: Any) -> AsyncResponse[None]:
    from milepost.engine.background import of_this_process
    from milepost.v1._context import current_settings
    from milepost.v1._saving import prepare, run_callback

    of_this_process().wait()
    started, snapshot = prepare(path, items, lasting=True, **how)
    callback = current_settings().on_committed

    def finish() -> None:
        started.finish()
        run_callback(callback)

    pending = of_this_process().start(finish, f"the save of {str(path)!r}")
    snapshot()
    return pending


def _raise_failures() -> None:
    from milepost.engine.background import of_this_process

    of_this_process().check()


# --- loading ---------------------------------------------------------------------------------------------------------


class LoadKeywords(TypedDict, total=False):
    """What `load` takes beyond the reference's arguments."""

    include: Sequence[str] | str
    exclude: Sequence[str] | str
    missing: Missing
    extra: Literal["error", "ignore"]
    progress: Progress | None
    sharding: Any


def load(  # noqa: PLR0913 - the documented signature, and what it lacks
    path: PathLike,
    abstract_state: Any = None,
    *,
    checkpointable_name: str | None = "AUTO",
    include: Sequence[str] | str = (),
    exclude: Sequence[str] | str = (),
    missing: Missing = "error",
    extra: Literal["error", "ignore"] = "error",
    progress: Progress | None = None,
    sharding: Any = None,
) -> Any:
    """Load a tree: as it was saved, or into a target.

    Args:
        path: where the checkpoint is.
        abstract_state: a tree of the same structure; its leaves say what each becomes: `jax.ShapeDtypeStruct`, arrays,
            numbers, or `PLACEHOLDER` for one that is not loaded. A `CheckpointMetadata` stands for its tree. Without it
            every leaf comes back as it was saved, on its saved sharding where those devices exist here.
        checkpointable_name: the name of the tree; "AUTO" takes "state", else the first by name.
        include: patterns of paths such as "params/**": only what one of them names is loaded.
        exclude: patterns of what is not loaded. What is not loaded keeps the target's value; without a target it is
            left out.
        missing: what becomes of leaves of the target that were not saved: "error", "keep" the target's value, or a
            function of the path and the target's leaf that returns the value.
        extra: what becomes of saved leaves that the target does not have: "error" or "ignore".
        progress: called with the bytes read so far and the bytes there are, from any thread.
        sharding: where arrays go for which the target does not say it: a sharding, a function from the path and a
            `jax.ShapeDtypeStruct` to one (None: as saved), or `numpy.ndarray` for arrays in host memory. Without a
            target it is for arrays that were saved from devices.

    Raises:
        CheckpointNotFoundError, InvalidLayoutError: no checkpoint is there; the message says what is.
        MismatchError: the whole difference between checkpoint and target (a `ValueError`).
        DamagedError: the checkpoint cannot be believed; names the file and the leaf.
    """
    from milepost.v1._loading import LoadOptions, load_tree

    options = LoadOptions(
        include=include, exclude=exclude, missing=missing, extra=extra, progress=progress, sharding=sharding
    )
    return load_tree(path, abstract_state, checkpointable_name, options)


def load_async(
    path: PathLike,
    abstract_state: Any = None,
    *,
    checkpointable_name: str | None = "state",
    **options: Unpack[LoadKeywords],
) -> AsyncResponse[Any]:
    """Load a tree in the background; arguments, also those not named here, and errors are those of `load`."""
    return in_background(
        lambda: load(path, abstract_state, checkpointable_name=checkpointable_name, **options),
        f"the load of {str(path)!r}",
    )


def load_checkpointables(  # noqa: PLR0913 - the documented signature, and what it lacks
    path: PathLike,
    abstract_checkpointables: dict[str, Any] | CheckpointMetadata[dict[str, Any]] | None = None,
    *,
    include: Sequence[str] | str = (),
    exclude: Sequence[str] | str = (),
    missing: Missing = "error",
    extra: Literal["error", "ignore"] = "error",
    progress: Progress | None = None,
    sharding: Any = None,
) -> dict[str, Any]:
    """Load objects by name: all of them, or those that the dict has, each into what stands for it there.

    None stands for an object that is loaded as it was saved. Objects with a state of their own, such as iterators, are
    given theirs in place. The other arguments, which are for trees, and the errors are those of `load`. Raises
    `ItemNotFoundError` (a `KeyError`) for a name that the checkpoint does not have.
    """
    from milepost.v1._loading import LoadOptions, load_items

    options = LoadOptions(
        include=include, exclude=exclude, missing=missing, extra=extra, progress=progress, sharding=sharding
    )
    return load_items(path, abstract_checkpointables, options)


def load_checkpointables_async(
    path: PathLike,
    abstract_checkpointables: dict[str, Any] | CheckpointMetadata[dict[str, Any]] | None = None,
    **options: Unpack[LoadKeywords],
) -> AsyncResponse[dict[str, Any]]:
    """Load objects in the background; arguments, also those not named here, are those of `load_checkpointables`."""
    return in_background(
        lambda: load_checkpointables(path, abstract_checkpointables, **options), f"the load of {str(path)!r}"
    )


# --- looking ---------------------------------------------------------------------------------------------------------


def metadata(path: PathLike, checkpointable_name: str | None = "AUTO") -> CheckpointMetadata[Any]:
    """Return what is known of a checkpoint without loading it; touches no device and needs no JAX.

    `metadata` of the result is the saved tree with, for each leaf, an `ArrayMetadata` or `NumpyMetadata`, or for
    Python's scalars and strings a value of their type. Raises what `load` raises for a path that is no checkpoint.
    """
    from milepost.v1._looking import describe

    return describe(path, checkpointable_name)


def checkpointables_metadata(path: PathLike) -> CheckpointMetadata[dict[str, Any]]:
    """Return what is known of a checkpoint without loading it: in `metadata`, what is known of each object by name.

    None stands for objects of which nothing is known, such as JSON and iterators.
    """
    from milepost.v1._looking import describe_all

    return describe_all(path)


def is_orbax_checkpoint(path: PathLike) -> bool:
    """Say whether a finished checkpoint is at a path, milepost's or Orbax's; False for a path at which nothing is."""
    from milepost.v1._looking import is_checkpoint

    return is_checkpoint(path)


# --- deleting --------------------------------------------------------------------------------------------------------


def delete(path: PathLike, *, checkpointable_name: str | None = None, missing_ok: bool = False) -> bool:
    """Delete a checkpoint, or one item of it; say whether there was one. What was cut off is completed by a new call.

    Raises `FileNotFoundError` if there is none, unless `missing_ok`; `InvalidLayoutError` for what is no checkpoint;
    and a `ValueError` for a name that no item can have, and for the only item of a checkpoint.
    """
    from milepost.engine import deleting
    from milepost.settings import applied
    from milepost.v1._context import current_settings
    from milepost.v1._looking import located, no_item, opened
    from milepost.v1._saving import check_name

    url = located(path)
    with applied(current_settings(), url):
        if checkpointable_name is None:
            return deleting.delete(url, missing_ok=missing_ok)
        name = check_name(checkpointable_name, "delete")
        try:
            return deleting.delete_item(url, name, missing_ok=missing_ok)
        except ItemNotFoundError as error:
            raise no_item(opened(url), name) from error


def delete_async(
    path: PathLike, *, checkpointable_name: str | None = None, missing_ok: bool = False
) -> AsyncResponse[bool]:
    """Delete in the background; arguments and errors are those of `delete`."""
    return in_background(
        lambda: delete(path, checkpointable_name=checkpointable_name, missing_ok=missing_ok),
        f"the deletion of {str(path)!r}",
    )


# --- former names ----------------------------------------------------------------------------------------------------


def save_pytree(*args: Any, **kwargs: Any) -> None:
    """Deprecated: the former name of `save`."""
    warn_of_former_name("save")
    save(*args, **kwargs)


def save_pytree_async(*args: Any, **kwargs: Any) -> AsyncResponse[None]:
    """Deprecated: the former name of `save_async`."""
    warn_of_former_name("save_async")
    return save_async(*args, **kwargs)


def load_pytree(*args: Any, **kwargs: Any) -> Any:
    """Deprecated: the former name of `load`."""
    warn_of_former_name("load")
    return load(*args, **kwargs)


def load_pytree_async(*args: Any, **kwargs: Any) -> AsyncResponse[Any]:
    """Deprecated: the former name of `load_async`."""
    warn_of_former_name("load_async")
    return load_async(*args, **kwargs)


def pytree_metadata(*args: Any, **kwargs: Any) -> CheckpointMetadata[Any]:
    """Deprecated: the former name of `metadata`."""
    warn_of_former_name("metadata")
    return metadata(*args, **kwargs)


def warn_of_former_name(name: str) -> None:
    """Tell the caller of a deprecated function what it is called now."""
    warnings.warn(f"use `{name}` instead", DeprecationWarning, stacklevel=3)
