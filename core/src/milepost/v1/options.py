"""What can be asked of a save or a load, by the names of the reference.

Decides the names, the defaults, and when an option may change. The rule: option objects are plain and mutable until the
`Context` that holds them is entered; while it is active an assignment raises `RuntimeError`, so that what a save began
with cannot change under it. A name that is no option is an error, so that a misspelt one cannot be one that is quietly
off. What the engine is told of them is a frozen `milepost.settings.Settings`.

Some options describe how the reference writes files. They are accepted, so that programs move by changing an import;
each says so where it has no effect.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from milepost.config import did_you_mean
from milepost.errors import RequestError, noted
from milepost.options import AtomicityMode

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

__all__ = [
    "ArrayOptions",
    "AsyncOptions",
    "AtomicityMode",
    "AtomicityOptions",
    "CheckpointLayout",
    "CheckpointablesOptions",
    "DeletionOptions",
    "FileOptions",
    "MemoryOptions",
    "MultiprocessingOptions",
    "PathwaysOptions",
    "PyTreeOptions",
    "SafetensorsOptions",
]

_HOLDERS = "_holders"


class ActiveContextError(RequestError, RuntimeError):
    """Say that options cannot change while a context that holds them is active."""


class _UnknownOptionError(RequestError, AttributeError):
    """Say that no option has that name, and which one has a similar one."""


class Options:
    """What all option classes share: names are checked, and nothing changes while held."""

    def __setattr__(self, name: str, value: object) -> None:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        if name not in names:
            what = f"cannot set {name!r} of {type(self).__qualname__}: there is no such option"
            raise noted(_UnknownOptionError(what), did_you_mean(name, names))
        if is_held(self):
            raise noted(
                ActiveContextError(f"cannot set {name!r} of {type(self).__qualname__}: its context is active"),
                "set it before the `with` block, or copy the context: Context(context)",
            )
        object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of options that are held is held by nobody.
        return {name: value for name, value in vars(self).items() if name != _HOLDERS}


O = TypeVar("O", bound=Options)  # noqa: E741 - one letter, as type variables have


def copied(options: O) -> O:
    """Return options that share no option object, set or dict with these; other values are the same objects.

    Functions and registries are not copied: the copy of a bound method would work on a copy of its object.
    """
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    return dataclasses.replace(options, **{name: _copied_value(value) for name, value in values.items()})  # type: ignore[type-var]


def _copied_value(value: Any) -> Any:
    if isinstance(value, Options):
        return copied(value)
    return copy.copy(value) if isinstance(value, (set, dict, list)) else value


def hold(options: Options) -> None:
    """Refuse every assignment to the options, and to those within, until `release` was called as often."""
    for each in _all(options):
        # Lists grow and shrink at one instant each, so that threads may hold the same options without a lock.
        vars(each).setdefault(_HOLDERS, []).append(None)


def release(options: Options) -> None:
    """Undo one `hold`."""
    for each in _all(options):
        vars(each)[_HOLDERS].pop()


def is_held(options: Options) -> bool:
    """Say whether assignments are refused."""
    return bool(vars(options).get(_HOLDERS))


def _all(options: Options) -> list[Options]:
    inner = (getattr(options, field.name) for field in dataclasses.fields(options))  # type: ignore[arg-type]
    return [options, *(each for value in inner if isinstance(value, Options) for each in _all(value))]


@dataclasses.dataclass(kw_only=True)
class AsyncOptions(Options):
    """How saving in the background goes.

    `timeout_secs` bounds every wait for other processes, in seconds. `post_finalization_callback` is called without
    arguments after each asynchronous save that was committed; it cannot undo the commit.
    `create_directories_asynchronously` has no effect: nothing waits for a directory.
    """

    timeout_secs: int = 1200
    post_finalization_callback: Callable[[], None] | None = None
    create_directories_asynchronously: bool = True


@dataclasses.dataclass(kw_only=True)
class MultiprocessingOptions(Options):
    """Which processes take part.

    `primary_host` is the process that commits (None: each for itself), `active_processes` those that take part (None:
    all), `barrier_sync_key_prefix` keeps apart the waits of programs that share one coordination service.
    """

    primary_host: int | None = 0
    active_processes: set[int] | None = None
    barrier_sync_key_prefix: str | None = None


@dataclasses.dataclass(kw_only=True)
class FileOptions(Options):
    """How files are made.

    `path_permission_mode`, such as 0o750, is the permission of directories on local and network file systems, and its
    bits for reading and writing that of files, whatever the umask; object stores have none. `path_class` has no effect:
    paths that are handed out are `UPath`s. `skip_sync_file_validations` has no effect: what was written is always
    checked.
    """

    path_permission_mode: int | None = None
    path_class: Any = None
    skip_sync_file_validations: bool = False


@dataclasses.dataclass(kw_only=True)
class ArrayOptions(Options):
    """How arrays are written, and how they are read."""

    @dataclasses.dataclass(kw_only=True)
    class Saving(Options):
        """How arrays are written.

        `storage_options` hold for every array, those that `scoped_storage_options_creator` returns for one array are
        stronger, field by field. The route says which array writer writes; one that knows these formats takes
        `use_ocdbt`, `use_zarr3`, `use_compression` and `ocdbt_target_data_file_size` (bytes) where they differ from
        their defaults, before what the route says. No effect have `enable_post_merge_validation`,
        `enable_pinned_host_transfer`, the options of replica-parallel writing (replicas always share the work),
        `enable_write_sharding_file` (shardings are always noted) and `array_metadata_store` (the manifest is it).
        """

        @dataclasses.dataclass(kw_only=True)
        class StorageOptions(Options):
            """How one array is stored.

            `dtype` is what arrays are cast to before they are written; Python's numbers and random keys stay what they
            are. `chunk_byte_size` (bytes) bounds the chunks, and `shard_axes` are the axes divided first, by writers
            that store chunks.
            """

            dtype: np.typing.DTypeLike | None = None
            chunk_byte_size: int | None = None
            shard_axes: tuple[int, ...] | None = None

        class ScopedStorageOptionsCreator(Protocol):
            """Says how one leaf is stored."""

            def __call__(self, key: tuple[Any, ...], value: Any) -> ArrayOptions.Saving.StorageOptions | None:
                """Return options for the leaf at a JAX key path; None, and fields that are None, leave the general."""
                ...

        storage_options: StorageOptions = dataclasses.field(default_factory=StorageOptions)
        use_ocdbt: bool = True
        use_zarr3: bool = True
        use_compression: bool = True
        ocdbt_target_data_file_size: int | None = None
        enable_pinned_host_transfer: bool | None = None
        enable_post_merge_validation: bool = True
        use_replica_parallel: bool | None = None
        min_slice_bytes_for_replica_parallel: int | None = None
        max_replicas_for_replica_parallel: int | None = None
        enable_replica_parallel_separate_folder: bool = False
        enable_write_sharding_file: bool = True
        array_metadata_store: Any = None
        scoped_storage_options_creator: ScopedStorageOptionsCreator | None = None

    @dataclasses.dataclass(kw_only=True)
    class Loading(Options):
        """How arrays are read.

        With `enable_padding_and_truncation` an array takes the target's shape: each axis is cut, or filled up with
        zeros; the number of axes stays. `raise_array_data_missing_error` has no effect: data that are missing are
        always an error, never zeros. With `use_load_and_broadcast` one replica reads and gives to the others.
        """

        @dataclasses.dataclass(kw_only=True)
        class LoadAndBroadcastOptions(Options):
            """Which replica reads, and how much memory it may use to give to the others.

            `replica_axis_index` is the axis of the mesh along which replicas lie, `primary_replica_id` the replica that
            reads; `broadcast_memory_limit_bytes` (bytes; None: what is free) times `broadcast_memory_scaling_factor`
            bounds what is given at once.
            """

            replica_axis_index: int | None = 0
            primary_replica_id: int | None = 0
            broadcast_memory_limit_bytes: int | None = None
            broadcast_memory_scaling_factor: float | None = 0.75

        enable_padding_and_truncation: bool = False
        raise_array_data_missing_error: bool = True
        use_load_and_broadcast: bool = False
        load_and_broadcast_options: LoadAndBroadcastOptions = dataclasses.field(default_factory=LoadAndBroadcastOptions)

    saving: Saving = dataclasses.field(default_factory=Saving)
    loading: Loading = dataclasses.field(default_factory=Loading)


@dataclasses.dataclass(kw_only=True)
class PyTreeOptions(Options):
    """How trees are written, and how they are read."""

    @dataclasses.dataclass(kw_only=True)
    class Saving(Options):
        """How trees are written.

        `pytree_metadata_options` has no effect: the kinds of containers and keys are always kept.
        """

        pytree_metadata_options: Any = None

    @dataclasses.dataclass(kw_only=True)
    class Loading(Options):
        """How trees are read: with `partial_load`, leaves that the target lacks are left out instead of refused."""

        partial_load: bool = False

    saving: Saving = dataclasses.field(default_factory=Saving)
    loading: Loading = dataclasses.field(default_factory=Loading)


@dataclasses.dataclass(kw_only=True)
class MemoryOptions(Options):
    """How much memory saving and loading may hold beyond the state itself, in bytes.

    `write_concurrent_bytes` and `transfer_concurrent_bytes` bound a save: the smaller holds, and an asynchronous save
    returns when no more than that is left to write. `read_concurrent_bytes` bounds a load. Larger arrays are divided;
    None is automatic. With `deepcopy_host_arrays` False, an asynchronous save does not copy NumPy arrays: who sets it
    promises not to change them until the save has ended. `regulator_options`, `expected_surge_bytes`,
    `is_prioritized_key_fn` and `serialization_status_callback` have no effect.
    """

    @dataclasses.dataclass(kw_only=True)
    class RegulatorOptions(Options):
        """How the reference adapts its limit while it runs (limits in GiB); no effect, the budget is fixed."""

        max_memory_limit_gib: float
        profiler: Any
        target_ratio: float = 0.8
        min_memory_limit_gib: float = 10.0
        kp: float = 0.4
        ki: float = 0.05
        kd: float = 0.1

    write_concurrent_bytes: int | None = None
    read_concurrent_bytes: int | None = None
    transfer_concurrent_bytes: int | None = None
    regulator_options: RegulatorOptions | None = None
    expected_surge_bytes: float | None = None
    is_prioritized_key_fn: Callable[..., Any] | None = None
    serialization_status_callback: Any = None
    deepcopy_host_arrays: bool = True


@dataclasses.dataclass(kw_only=True)
class DeletionOptions(Options):
    """How checkpoints are deleted."""

    @dataclasses.dataclass(kw_only=True)
    class GcsDeletionOptions(Options):
        """How they are deleted on gs://: moved to `todelete_full_path` instead, where it is given."""

        todelete_full_path: str | None = None

    gcs_deletion_options: GcsDeletionOptions = dataclasses.field(default_factory=GcsDeletionOptions)


@dataclasses.dataclass(kw_only=True)
class CheckpointablesOptions(Options):
    """Which handlers serve what is saved: those of a registry; None means those of the process when a call is made."""

    registry: Any = None


@dataclasses.dataclass(kw_only=True)
class PathwaysOptions(Options):
    """How Pathways saves; no effect."""

    checkpointing_impl: Any = None


@dataclasses.dataclass(kw_only=True)
class SafetensorsOptions(Options):
    """How files that the safetensors library wrote are read.

    `read_chunk_bytes` (bytes) is the size of one request, and `max_over_read_ratio` how many times the wanted bytes may
    be read to join requests; None is automatic.
    """

    max_over_read_ratio: float | None = None
    read_chunk_bytes: int | None = None


@dataclasses.dataclass(kw_only=True)
class AtomicityOptions(Options):
    """How a checkpoint becomes visible at one instant: `AUTO` is what fits the storage best.

    `COMMIT_FILE` creates the commit object last, `ATOMIC_RENAME` renames a directory; what the storage cannot do is
    refused before a byte is written. `allow_legacy_atomic_rename` has no effect: a rename that is not atomic is never
    taken for one.
    """

    mode: AtomicityMode = AtomicityMode.AUTO
    allow_legacy_atomic_rename: bool = False


class CheckpointLayout(enum.Enum):
    """Which files a checkpoint consists of; `AUTO` looks at them."""

    ORBAX = "orbax"
    SAFETENSORS = "safetensors"
    AUTO = "auto"
