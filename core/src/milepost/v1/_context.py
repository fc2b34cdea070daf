"""Which options hold for a call.

Decides that the innermost active `Context` of this thread and task does, whole; where none is active, the defaults. The
rule: nothing is inherited silently. A context that is nested in another one begins with the defaults, and a new thread
does, too; who wants to start from another context passes it. What is active cannot be changed.
"""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import numpy as np

from milepost.dtypes import dtype_name, known_dtypes
from milepost.errors import ConfigError, RequestError, noted
from milepost.settings import Broadcast, Settings, StorageRule
from milepost.v1 import options as o

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

__all__ = ["Context", "current_context", "current_settings"]

_ACTIVE: contextvars.ContextVar[tuple[Context, ...]] = contextvars.ContextVar("milepost.v1.context", default=())

T = TypeVar("T", bound=o.Options)


class _OptionTypeError(RequestError, TypeError):
    """Say that a context was given something else than the options it asks for."""


class Context:
    """The options that hold inside a `with` block.

    ```
    with ocp.Context(pytree_options=ocp.options.PyTreeOptions(...)):
        ocp.load(path, target)
    ```

    Options are given as objects, which are copied, or set on the context's own: `context.pytree.loading.partial_load =
    True`, until it is entered. While it is active, assigning raises `RuntimeError`. A nested context begins with the
    defaults, not with the options around it; `Context(outer)` begins with a copy of those of `outer`. A context holds
    for the thread and the task that entered it, as `contextvars` says: a new thread starts with the defaults, a new
    task with what held where it was made. It can be entered again, also by several threads at once.
    """

    __slots__ = ("__weakref__", "_layout", "_options")

    def __init__(  # noqa: PLR0913 - the documented signature
        self,
        context: Context | None = None,
        *,
        pytree_options: o.PyTreeOptions | None = None,
        array_options: o.ArrayOptions | None = None,
        async_options: o.AsyncOptions | None = None,
        multiprocessing_options: o.MultiprocessingOptions | None = None,
        file_options: o.FileOptions | None = None,
        checkpointables_options: o.CheckpointablesOptions | None = None,
        pathways_options: o.PathwaysOptions | None = None,
        checkpoint_layout: o.CheckpointLayout | str | None = None,
        deletion_options: o.DeletionOptions | None = None,
        memory_options: o.MemoryOptions | None = None,
        safetensors_options: o.SafetensorsOptions | None = None,
        atomicity_options: o.AtomicityOptions | None = None,
    ) -> None:
        begin = context._options if context is not None else {}  # noqa: SLF001 - its own class's
        given: dict[type[o.Options], o.Options | None] = {
            o.PyTreeOptions: pytree_options,
            o.ArrayOptions: array_options,
            o.AsyncOptions: async_options,
            o.MultiprocessingOptions: multiprocessing_options,
            o.FileOptions: file_options,
            o.CheckpointablesOptions: checkpointables_options,
            o.PathwaysOptions: pathways_options,
            o.DeletionOptions: deletion_options,
            o.MemoryOptions: memory_options,
            o.SafetensorsOptions: safetensors_options,
            o.AtomicityOptions: atomicity_options,
        }
        self._options: dict[type[o.Options], o.Options] = {
            kind: _own(kind, value, begin.get(kind)) for kind, value in given.items()
        }
        layout = context.checkpoint_layout if context is not None else o.CheckpointLayout.ORBAX
        self._layout = layout if checkpoint_layout is None else _as_layout(checkpoint_layout)

    def _of(self, kind: type[T]) -> T:
        return cast("T", self._options[kind])

    @property
    def pytree(self) -> o.PyTreeOptions:
        """How trees are written and read."""
        return self._of(o.PyTreeOptions)

    @property
    def pytree_options(self) -> o.PyTreeOptions:
        """The same as `pytree`."""
        return self.pytree

    @property
    def array(self) -> o.ArrayOptions:
        """How arrays are written and read."""
        return self._of(o.ArrayOptions)

    @property
    def array_options(self) -> o.ArrayOptions:
        """The same as `array`."""
        return self.array

    @property
    def asynchronous(self) -> o.AsyncOptions:
        """How saving in the background goes."""
        return self._of(o.AsyncOptions)

    @property
    def async_options(self) -> o.AsyncOptions:
        """The same as `asynchronous`."""
        return self.asynchronous

    @property
    def multiprocessing(self) -> o.MultiprocessingOptions:
        """Which processes take part."""
        return self._of(o.MultiprocessingOptions)

    @property
    def multiprocessing_options(self) -> o.MultiprocessingOptions:
        """The same as `multiprocessing`."""
        return self.multiprocessing

    @property
    def file(self) -> o.FileOptions:
        """How files are made."""
        return self._of(o.FileOptions)

    @property
    def file_options(self) -> o.FileOptions:
        """The same as `file`."""
        return self.file

    @property
    def checkpointables(self) -> o.CheckpointablesOptions:
        """Which handlers serve what is saved."""
        return self._of(o.CheckpointablesOptions)

    @property
    def checkpointables_options(self) -> o.CheckpointablesOptions:
        """The same as `checkpointables`."""
        return self.checkpointables

    @property
    def pathways(self) -> o.PathwaysOptions:
        """How Pathways saves."""
        return self._of(o.PathwaysOptions)

    @property
    def pathways_options(self) -> o.PathwaysOptions:
        """The same as `pathways`."""
        return self.pathways

    @property
    def deletion(self) -> o.DeletionOptions:
        """How checkpoints are deleted."""
        return self._of(o.DeletionOptions)

    @property
    def deletion_options(self) -> o.DeletionOptions:
        """The same as `deletion`."""
        return self.deletion

    @property
    def memory(self) -> o.MemoryOptions:
        """How much memory saving and loading may hold."""
        return self._of(o.MemoryOptions)

    @property
    def memory_options(self) -> o.MemoryOptions:
        """The same as `memory`."""
        return self.memory

    @property
    def safetensors(self) -> o.SafetensorsOptions:
        """How files that the safetensors library wrote are read."""
        return self._of(o.SafetensorsOptions)

    @property
    def safetensors_options(self) -> o.SafetensorsOptions:
        """The same as `safetensors`."""
        return self.safetensors

    @property
    def atomicity(self) -> o.AtomicityOptions:
        """How a checkpoint becomes visible at one instant."""
        return self._of(o.AtomicityOptions)

    @property
    def atomicity_options(self) -> o.AtomicityOptions:
        """The same as `atomicity`."""
        return self.atomicity

    @property
    def checkpoint_layout(self) -> o.CheckpointLayout:
        """Which files a checkpoint consists of; can be set to a member or its value."""
        return self._layout

    @checkpoint_layout.setter
    def checkpoint_layout(self, layout: o.CheckpointLayout | str) -> None:
        if any(map(o.is_held, self._options.values())):
            raise o.ActiveContextError("cannot set 'checkpoint_layout': the context is active")
        self._layout = _as_layout(layout)

    def settings(self) -> Settings:
        """Return what the engine is told; raises `ConfigError` for an option that cannot be right."""
        loading, memory, saving = self.array.loading, self.memory, self.array.saving
        budgets = (
            _positive("write_concurrent_bytes", memory.write_concurrent_bytes),
            _positive("transfer_concurrent_bytes", memory.transfer_concurrent_bytes),
        )
        active = self.multiprocessing.active_processes
        return Settings(
            save_budget=min((budget for budget in budgets if budget is not None), default=None),
            load_budget=_positive("read_concurrent_bytes", memory.read_concurrent_bytes),
            directory_mode=self.file.path_permission_mode,
            commit=_commit(self.atomicity.mode),
            trash=self.deletion.gcs_deletion_options.todelete_full_path,
            array_format=_array_format(saving),
            storage=_storage_rule(saving.storage_options),
            scoped_storage=_scoped(saving.scoped_storage_options_creator),
            copy_host_arrays=memory.deepcopy_host_arrays,
            on_committed=self.asynchronous.post_finalization_callback,
            layout=self.checkpoint_layout.value,
            partial=self.pytree.loading.partial_load,
            resize=loading.enable_padding_and_truncation,
            broadcast=_broadcast(loading.load_and_broadcast_options) if loading.use_load_and_broadcast else None,
            read_chunk_bytes=_positive("read_chunk_bytes", self.safetensors.read_chunk_bytes),
            over_read=self.safetensors.max_over_read_ratio,
            registry=self.checkpointables.registry,
            timeout=self.asynchronous.timeout_secs,
            primary_host=self.multiprocessing.primary_host,
            active_processes=None if active is None else frozenset(active),
            barrier_prefix=self.multiprocessing.barrier_sync_key_prefix,
        )

    def __enter__(self) -> Self:
        for options in self._options.values():
            o.hold(options)
        _ACTIVE.set((*_ACTIVE.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        active = list(_ACTIVE.get())
        # The last of them: blocks of one context may be nested, and a generator may close its block out of order.
        for at in reversed(range(len(active))):
            if active[at] is self:
                del active[at]
                break
        _ACTIVE.set(tuple(active))
        for options in self._options.values():
            o.release(options)


def current_context() -> Context:
    """Return the innermost active context of this thread and task, or a new one with the defaults."""
    active = _ACTIVE.get()
    return active[-1] if active else Context()


def current_settings() -> Settings:
    """Return what holds for a call made now; raises `ConfigError` for an option that cannot be right."""
    active = _ACTIVE.get()
    return active[-1].settings() if active else Settings()


def _own(kind: type[o.Options], given: o.Options | None, begin: o.Options | None) -> o.Options:
    if given is None:
        return kind() if begin is None else o.copied(begin)
    if not isinstance(given, kind):
        what = f"{type(given).__module__}.{type(given).__qualname__}"
        raise _OptionTypeError(f"cannot make a context: a {what} stands where {kind.__name__} are needed")
    return o.copied(given)


def _as_layout(layout: o.CheckpointLayout | str) -> o.CheckpointLayout:
    try:
        return o.CheckpointLayout(layout)
    except ValueError:
        known = ", ".join(repr(each.value) for each in o.CheckpointLayout)
        raise noted(ConfigError(f"cannot set the layout {layout!r}: there is none"), f"there are: {known}") from None


def _commit(mode: o.AtomicityMode) -> str | None:
    return {o.AtomicityMode.COMMIT_FILE: "create", o.AtomicityMode.ATOMIC_RENAME: "rename"}.get(o.AtomicityMode(mode))


def _broadcast(options: o.ArrayOptions.Loading.LoadAndBroadcastOptions) -> Broadcast:
    return Broadcast(
        axis=options.replica_axis_index,
        replica=options.primary_replica_id,
        limit=_positive("broadcast_memory_limit_bytes", options.broadcast_memory_limit_bytes),
        scale=options.broadcast_memory_scaling_factor,
    )


def _array_format(saving: o.ArrayOptions.Saving) -> Mapping[str, Any]:
    """Return what is said of the format in words of the array writer; what is left at its default says nothing."""
    said: dict[str, Any] = {}
    if not saving.use_ocdbt:
        said["ocdbt"] = False
    if not saving.use_zarr3:
        said["zarr_format"] = 2
    if not saving.use_compression:
        said["compression"] = "none"
    size = _positive("ocdbt_target_data_file_size", saving.ocdbt_target_data_file_size)
    return said if size is None else {**said, "target_file_bytes": size}


def _scoped(
    creator: o.ArrayOptions.Saving.ScopedStorageOptionsCreator | None,
) -> Callable[[tuple[Any, ...], Any], StorageRule | None] | None:
    if creator is None:
        return None

    def scoped(path: tuple[Any, ...], value: Any) -> StorageRule | None:
        options = creator(path, value)
        return None if options is None else _storage_rule(options)

    return scoped


def _storage_rule(options: o.ArrayOptions.Saving.StorageOptions) -> StorageRule:
    return StorageRule(
        dtype=_dtype(options.dtype),
        chunk_bytes=_positive("chunk_byte_size", options.chunk_byte_size),
        shard_axes=None if options.shard_axes is None else tuple(options.shard_axes),
    )


def _dtype(given: Any) -> np.dtype[Any] | None:
    if given is None:
        return None
    try:
        found = known_dtypes().get(given) if isinstance(given, str) else None
        found = np.dtype(given) if found is None else found
        dtype_name(found)
    except (TypeError, ValueError) as cause:
        raise ConfigError(f"cannot store arrays with dtype {given!r}: JAX has none like it") from cause
    return found


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise noted(ConfigError(f"cannot use {name}={value!r}: it must be 1 or more"), "None is automatic")
    return value
