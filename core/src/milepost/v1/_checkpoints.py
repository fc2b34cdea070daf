"""One checkpoint at one path: saved, loaded, looked at."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from milepost.errors import InvalidLayoutError, RequestError, noted
from milepost.v1._metadata import CheckpointMetadata

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from milepost.engine.saving import Save

__all__ = ["AsyncResponse", "CheckpointMetadata", "load", "load_async", "metadata", "save", "save_async"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_RESERVED = frozenset({"metrics", "AUTO", "_CHECKPOINT_DELETION"})
_UNSET: Any = object()


class AsyncResponse(Protocol[T_co]):
    """What will be the result of an asynchronous call."""

    def result(self, timeout: float | None = None) -> T_co:
        """Wait, then return the result or raise the failure; `TimeoutError` after so many seconds."""
        ...

    def done(self) -> bool:
        """Say whether the work has ended, well or not."""
        ...

    def on_complete(self, callback: Callable[[Any], object]) -> None:
        """Have a function called with this object when the work has ended."""
        ...

    def __enter__(self) -> Any:
        """Return itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Wait; raise the failure unless another exception is on its way, which then gets a note."""
        ...


def _item_name(name: str) -> str:
    if not name or name in _RESERVED or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
        raise noted(
            _ItemNameError(f"cannot save an item called {name!r}"),
            f"{sorted(_RESERVED)} are reserved; a name has no slashes and does not begin with a dot",
        )
    return name


class _ItemNameError(RequestError, ValueError):
    """A name that no item can have."""


def save(
    path: str | os.PathLike[str],
    state: Any,
    *,
    checkpointable_name: str = "state",
    overwrite: bool = False,
    custom_metadata: Mapping[str, Any] | None = None,
) -> None:
    """Save a tree; on return the checkpoint is durable and visible, whole.

    Args:
        path: a local path, relative or absolute, or a URL.
        state: any tree of leaves milepost knows.
        checkpointable_name: the name of the tree within the checkpoint.
        overwrite: replace the checkpoint at the path; at every moment the old or the new one can be loaded.
        custom_metadata: a dict with string keys that JSON can hold, kept with the checkpoint.

    Raises:
        AlreadyExistsError: something is at the path (a `ValueError` and a `FileExistsError`).
        UnsupportedLeafError: lists every leaf that cannot be saved; nothing was written.
        StorageError: the storage refused; nothing was changed.
    """
    _raise_failures()
    started = _prepare(path, state, checkpointable_name, overwrite=overwrite, custom_metadata=custom_metadata)
    started.prepare(lasting=False)
    started.finish()


def save_async(
    path: str | os.PathLike[str],
    state: Any,
    *,
    checkpointable_name: str = "state",
    overwrite: bool = False,
    custom_metadata: Mapping[str, Any] | None = None,
) -> AsyncResponse[None]:
    """Save a tree in the background; returns when the caller may donate or overwrite anything.

    Arguments and errors are those of `save`: what can be refused is raised at once, what fails later by `result()`,
    else by the next call, else when the process ends, which then fails. A save waits for the one before.
    """
    from milepost.engine.background import of_this_process

    _raise_failures()
    started = _prepare(path, state, checkpointable_name, overwrite=overwrite, custom_metadata=custom_metadata)
    of_this_process().wait()
    snapshot = started.prepare(lasting=True)
    pending = of_this_process().start(lambda: _finish(started), f"the save of {os.fspath(path)!r}")
    snapshot()
    return pending


def _finish(started: Save) -> None:
    started.finish()


def _prepare(
    path: str | os.PathLike[str],
    state: Any,
    name: str,
    *,
    overwrite: bool,
    custom_metadata: Mapping[str, Any] | None,
) -> Save:
    from milepost.engine.items import TreeItem
    from milepost.engine.saving import Save, SaveRequest

    if state is None:
        raise _ItemNameError("cannot save None: checkpointable must not be None for saving")
    return Save(
        SaveRequest(path, {_item_name(name): TreeItem(state)}, overwrite=overwrite, custom_metadata=custom_metadata),
    )


def _raise_failures() -> None:
    from milepost.engine.background import of_this_process

    of_this_process().check()


def load(
    path: str | os.PathLike[str], abstract_state: Any = _UNSET, *, checkpointable_name: str | None = "AUTO"
) -> Any:
    """Load a tree: as it was saved, or into a target.

    Args:
        path: where the checkpoint is.
        abstract_state: a tree of the same structure; its leaves say what each becomes: `jax.ShapeDtypeStruct`, arrays,
            numbers, or `PLACEHOLDER` for one that is not loaded. A `CheckpointMetadata` stands for its tree. Without it
            every leaf comes back as it was saved, on its saved sharding where those devices exist here.
        checkpointable_name: the name of the tree; "AUTO" takes "state", else the first by name.

    Raises:
        CheckpointNotFoundError, InvalidLayoutError: no checkpoint is there; the message says what is.
        MismatchError: the whole difference between checkpoint and target (a `ValueError`).
        DamagedError: the checkpoint cannot be believed; names the file and the leaf.
    """
    from milepost.engine.loading import AS_SAVED
    from milepost.engine.loading import load as load_item

    if checkpointable_name is None:
        raise InvalidLayoutError(f"cannot load {os.fspath(path)!r} as a flat tree: items of a checkpoint have names")
    target = abstract_state.metadata if isinstance(abstract_state, CheckpointMetadata) else abstract_state
    return load_item(path, AS_SAVED if target is _UNSET or target is None else target, item=checkpointable_name)


def load_async(
    path: str | os.PathLike[str], abstract_state: Any = _UNSET, *, checkpointable_name: str = "state"
) -> AsyncResponse[Any]:
    """Load a tree in the background; arguments and errors are those of `load`."""
    from milepost.engine.background import Background

    what = f"the load of {os.fspath(path)!r}"
    return Background().start(lambda: load(path, abstract_state, checkpointable_name=checkpointable_name), what)


def metadata(path: str | os.PathLike[str], checkpointable_name: str | None = "AUTO") -> CheckpointMetadata[Any]:
    """Return what is known of a checkpoint without loading it; touches no device and needs no JAX.

    `metadata` of the result is the saved tree with, for each leaf, an `ArrayMetadata` or `NumpyMetadata`, or for
    Python's scalars and strings a value of their type. Raises what `load` raises for a path that is no checkpoint.
    """
    from upath import UPath

    from milepost.engine.reading import choose_item, open_checkpoint
    from milepost.metadata.leaf import leaves_metadata
    from milepost.structure import build

    checkpoint = open_checkpoint(path)
    _, item = choose_item(checkpoint.manifest, checkpointable_name or "AUTO", checkpoint.url)
    custom: Any = checkpoint.manifest.custom_metadata
    return CheckpointMetadata(
        UPath(checkpoint.url.removeprefix("file://")),
        metadata=build(item.structure, leaves_metadata(item)),
        init_timestamp_nsecs=checkpoint.manifest.init_timestamp_nsecs,
        commit_timestamp_nsecs=checkpoint.manifest.commit_timestamp_nsecs,
        custom_metadata=custom,
    )
