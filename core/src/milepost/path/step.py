"""How steps are named, found and told from one another, with the names and meanings of the reference.

This module decides what a name format must do, and what the helpers promise. The rules: a step is listed if its name is
one that the format writes *and* it is committed (`milepost.path._finding` says what that means on a storage); files,
links that lead nowhere, unfinished checkpoints and folders of somebody else are never steps and never errors; nothing
is read of a step to find it. All of this holds for every storage, and a path may be a `str`, a `PathLike`, a `UPath` or
a URL, relative or absolute. Paths that are handed out are `UPath`s.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import datetime as dt
import functools
import os
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, runtime_checkable

from milepost.attempts import new_attempt
from milepost.errors import CheckpointNotFoundError, ConfigError, InvalidLayoutError, NotFoundError, RequestError, noted
from milepost.hosts import OneHost
from milepost.names import StandardNames, any_step, parse_temporary, step_of, underscored
from milepost.path._finding import PathLike, Root, as_path, open_root, open_root_of, timestamps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from upath import UPath

__all__ = [
    "Metadata",
    "MetadataT",
    "NameFormat",
    "TemporaryPath",
    "all_temporary_paths",
    "any_checkpoint_step",
    "build_step_metadatas",
    "build_step_path",
    "checkpoint_steps",
    "checkpoint_steps_paths",
    "cleanup_tmp_directories",
    "composite_name_format",
    "create_tmp_directory",
    "find_step_path",
    "get_save_directory",
    "get_tmp_directory",
    "is_checkpoint_finalized",
    "is_gcs_path",
    "is_path_finalized",
    "is_path_temporary",
    "is_standard_name_format",
    "is_tmp_checkpoint",
    "latest_step_metadata",
    "maybe_find_step_metadata",
    "single_host_load_and_broadcast_name_format",
    "standard_name_format",
    "step_from_checkpoint_name",
    "step_metadata_of_checkpoint_path",
    "step_prefix_with_underscore",
    "tmp_checkpoints",
]


class _StepNameError(RequestError, ValueError):
    """A name or path that is not that of a step."""


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Metadata:
    """One step: its number and its path. Equal and hashed by these two; making one looks at no storage.

    Timestamps are in nanoseconds since the epoch, by the clock of the process that saved. They are read once for each
    instance, when first asked for: from the commit object, else from the step's `_CHECKPOINT_METADATA`.
    """

    step: int
    path: UPath

    @property
    def init_timestamp_nsecs(self) -> int | None:
        """When the save began; None where the checkpoint does not say."""
        return self._timestamps[0]

    @property
    def commit_timestamp_nsecs(self) -> int | None:
        """When the checkpoint came to exist; None where it does not say."""
        return self._timestamps[1]

    @property
    def commit_timestamp(self) -> dt.datetime:
        """When the checkpoint came to exist, in UTC; where it does not say, when its directory was last changed.

        Raises `NotFoundError` if nothing tells.
        """
        nsecs = self.commit_timestamp_nsecs
        return dt.datetime.fromtimestamp(_modified(self.path) if nsecs is None else nsecs / 1e9, dt.UTC)

    @functools.cached_property
    def _timestamps(self) -> tuple[int | None, int | None]:
        return timestamps(self.path)


MetadataT = TypeVar("MetadataT", bound=Metadata)
MetadataT_co = TypeVar("MetadataT_co", bound=Metadata, covariant=True)


@runtime_checkable
class NameFormat(Protocol[MetadataT_co]):
    """How steps are named, and found again by their names. What is not committed does not exist for any method."""

    @abc.abstractmethod
    def build_name(self, step: int) -> str:
        """Return the name of a step; a format that is for reading only may raise."""
        ...

    @abc.abstractmethod
    def build_metadata(self, step_path: UPath, *args: Any, **kwargs: Any) -> MetadataT_co | None:
        """Return the metadata of the step at a path; None if no step of this format is there."""
        ...

    @abc.abstractmethod
    def find_metadata(self, base_path: PathLike, step: int, *args: Any, **kwargs: Any) -> MetadataT_co | None:
        """Return the metadata of a step below a root; None if it is not there."""
        ...

    def find_all(self, base_path: PathLike) -> Iterator[MetadataT_co]:
        """Yield the metadata of all steps below a root, in no order, none of them if there is no such root.

        Unless overridden, `build_metadata` is asked about every committed checkpoint there.
        """
        base, root = as_path(base_path), open_root(base_path)
        paths = (base / name for name in root.committed(root.folders()))
        return build_step_metadatas(paths, self.build_metadata)

    def find_step(self, base_path: PathLike, step: int) -> MetadataT_co:
        """Return the metadata of a step below a root; raise `ValueError` if it is not there.

        Unless overridden, `find_metadata` is asked.
        """
        found = self.find_metadata(base_path, step)
        if found is None:
            raise _missing_step(self, base_path, step)
        return found


def build_step_metadatas(
    step_paths: Iterator[UPath], build_metadata: Callable[[UPath], MetadataT | None]
) -> Iterator[MetadataT]:
    """Yield what the function returns for each path, in order, as it is asked for, without `None`."""
    for path in step_paths:
        metadata = build_metadata(path)
        if metadata is not None:
            yield metadata


# --- formats ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _StandardNameFormat(NameFormat[Metadata]):
    step_prefix: str | None = None
    step_format_fixed_length: int | None = None

    def __post_init__(self) -> None:
        self._names()  # refuses a prefix that could never be found again

    def __str__(self) -> str:
        return f'StandardNameFormat("{self.build_name(1234)}")'

    def build_name(self, step: int) -> str:
        return self._names().build_name(step)

    def build_metadata(
        self,
        step_path: UPath,
        step: int | None = None,
        *args: Any,  # noqa: ARG002 - the protocol's
        **kwargs: Any,  # noqa: ARG002 - the protocol's
    ) -> Metadata | None:
        path = as_path(step_path)
        if step is None:
            step = self._names().parse(path.name)
        return Metadata(step, path) if step is not None and is_path_finalized(path) else None

    def find_metadata(self, base_path: PathLike, step: int, *args: Any, **kwargs: Any) -> Metadata | None:
        return self.build_metadata(build_step_path(base_path, self, step), step, *args, **kwargs)

    def find_all(self, base_path: PathLike) -> Iterator[Metadata]:
        yield from self.among(open_root(base_path), base_path)

    def among(self, root: Root, base_path: PathLike, *, only: str = "", newest: bool = False) -> Iterator[Metadata]:
        """Yield the steps below an opened root by number: only the one of a name, or the newest first."""
        names = self._names()
        folders = [only] if only else root.folders()
        steps = {name: step for name in folders if (step := names.parse(name)) is not None}
        base = as_path(base_path)
        if only:
            committed: Iterable[str] = filter(root.is_committed, steps)
        else:
            committed = root.committed(sorted(steps, key=lambda name: steps[name], reverse=newest))
        for name in committed:
            yield Metadata(steps[name], base / name)

    def steps_among(self, folders: Iterable[str]) -> dict[int, str]:
        """Return by number those of some names that are of this format."""
        parse = self._names().parse
        return {step: name for name in folders if (step := parse(name)) is not None}

    def _names(self) -> StandardNames:
        return StandardNames(self.step_prefix, self.step_format_fixed_length)


@dataclasses.dataclass(frozen=True)
class _CompositeNameFormat(NameFormat[Metadata]):
    write_name_format: NameFormat[Metadata]
    read_name_formats: tuple[NameFormat[Metadata], ...]

    def __str__(self) -> str:
        return f"Composite([{','.join(map(str, self.read_name_formats))}])"

    def build_name(self, step: int) -> str:
        return self.write_name_format.build_name(step)

    def build_metadata(self, step_path: UPath, *args: Any, **kwargs: Any) -> Metadata | None:
        found = (one.build_metadata(step_path, *args, **kwargs) for one in self.read_name_formats)
        return next((metadata for metadata in found if metadata is not None), None)

    def find_metadata(self, base_path: PathLike, step: int, *args: Any, **kwargs: Any) -> Metadata | None:  # noqa: ARG002 - the protocol's
        with contextlib.suppress(ValueError):
            return self.find_step(base_path, step)
        return None

    def find_all(self, base_path: PathLike) -> Iterator[Metadata]:
        # One step may have a name in several formats; it is one step all the same.
        seen: set[int] = set()
        for one in self.read_name_formats:
            for metadata in one.find_all(base_path):
                if metadata.step not in seen:
                    seen.add(metadata.step)
                    yield metadata

    def find_step(self, base_path: PathLike, step: int) -> Metadata:
        misses: list[str] = []
        for one in self.read_name_formats:
            # A storage that fails is no miss: a step must not seem to be gone because nobody could look.
            try:
                return one.find_step(base_path, step)
            except (ValueError, LookupError, FileNotFoundError) as error:
                misses.append(str(error))
        raise CheckpointNotFoundError("\n".join(misses))


def standard_name_format(
    step_prefix: str | None = None,
    step_format_fixed_length: int | None = None,
    *,
    single_host_load_and_broadcast: bool = False,
) -> NameFormat[Metadata]:
    """Return the format that names step 23 `23`, or `step_23` with a prefix, or `0023` with a fixed length of 4.

    A longer number is not cut. `single_host_load_and_broadcast` is accepted for the reference's sake. Raises
    `ConfigError` (a `ValueError`) for a prefix that no folder's name can begin with.

    >>> standard_name_format("step", 4).build_name(23)
    'step_0023'
    """
    del single_host_load_and_broadcast
    return _StandardNameFormat(step_prefix, step_format_fixed_length)


def composite_name_format(
    write_name_format: NameFormat[Metadata], read_name_formats: Sequence[NameFormat[Metadata]]
) -> NameFormat[Metadata]:
    """Return a format that writes one format's names and reads those of several, the preferred ones first.

    A step that is there under several names is found once, under the name of the format that comes first. Raises
    `ConfigError` (a `ValueError`) unless the format for writing is among those for reading.

    >>> both = composite_name_format(
    ...     standard_name_format("step"), [standard_name_format("step"), standard_name_format()]
    ... )
    >>> both.build_name(23)
    'step_23'
    """
    if write_name_format not in read_name_formats:
        shown = ", ".join(map(str, read_name_formats))
        raise noted(
            ConfigError(f"cannot write names by {write_name_format}: the formats for reading are [{shown}]"),
            "what is saved must be found again: put the format for writing among those for reading",
        )
    return _CompositeNameFormat(write_name_format, tuple(read_name_formats))


def step_names(name_format: NameFormat[Any], root: Root) -> dict[int, list[str]]:
    """Return by number the names that a format finds in one listing of a root, the preferred first.

    Whether they are committed is not looked at. A format that anybody else wrote is asked for what it finds.
    """
    formats = name_format.read_name_formats if isinstance(name_format, _CompositeNameFormat) else (name_format,)
    found: dict[int, list[str]] = {}
    folders: list[str] | None = None
    for one in formats:
        if isinstance(one, _StandardNameFormat):
            folders = root.folders() if folders is None else folders
            names = one.steps_among(folders)
        else:
            names = {metadata.step: metadata.path.name for metadata in one.find_all(root.url)}
        for step, name in names.items():
            found.setdefault(step, []).append(name)
    return found


def single_host_load_and_broadcast_name_format(name_format: NameFormat[MetadataT]) -> NameFormat[MetadataT]:
    """Return the format itself: whoever looks for several hosts lets one look and tells the others."""
    return name_format


def is_standard_name_format(name_format: NameFormat[Any]) -> bool:
    """Say whether a format is one that `standard_name_format` made."""
    return isinstance(name_format, _StandardNameFormat)


def step_prefix_with_underscore(step_prefix: str | None) -> str:
    """Return the prefix with an underscore; nothing for None.

    >>> step_prefix_with_underscore("step"), step_prefix_with_underscore(None)
    ('step_', '')
    """
    return underscored(step_prefix)


# --- finding ---------------------------------------------------------------------------------------------------------


def build_step_path(base_path: PathLike, name_format: NameFormat[Any], step: int) -> UPath:
    """Return where a step is or would be below a root; looks at no storage."""
    return as_path(base_path) / name_format.build_name(step)


def checkpoint_steps_paths(checkpoint_dir: PathLike) -> list[UPath]:
    """Return the paths of all committed steps that have a name of any standard format, by number."""
    base, root = as_path(checkpoint_dir), open_root(checkpoint_dir)
    return [base / name for name in root.committed(_steps_by_number(root))]


def checkpoint_steps(
    checkpoint_dir: PathLike,
    single_host_load_and_broadcast: bool = False,  # noqa: FBT001, FBT002 - the documented signature
) -> list[int]:
    """Return the numbers of the steps that `checkpoint_steps_paths` returns, one for each path, in order.

    `single_host_load_and_broadcast` is accepted for the reference's sake.
    """
    del single_host_load_and_broadcast
    root = open_root(checkpoint_dir)
    steps = _steps_by_number(root)
    return [steps[name] for name in root.committed(steps)]


def any_checkpoint_step(checkpoint_dir: PathLike) -> int | None:
    """Return the number of some committed step; None if there is none.

    Stops at the first one, so that the others cost nothing. Raises `NotFoundError` if the directory does not exist.
    """
    root = open_root(checkpoint_dir)
    steps = {name: step for name in root.folders() if (step := any_step(name)) is not None}
    found = next(root.committed(steps), None)
    if found is None and root.is_missing():
        raise NotFoundError(f"cannot look for steps below {root.url!r}: no such directory")
    return None if found is None else steps[found]


def latest_step_metadata(root_path: PathLike, name_format: NameFormat[MetadataT]) -> MetadataT | None:
    """Return the metadata of the step with the largest number; None if there is none, or no such root.

    With the formats of this module that is one listing for each format, whatever the number of steps.
    """
    return _latest(name_format, open_root(root_path), root_path)


def step_metadata_of_checkpoint_path(checkpoint_path: PathLike, name_format: NameFormat[MetadataT]) -> MetadataT:
    """Return the metadata of the step at a path; raise `ValueError` if the format does not know one there."""
    path = as_path(checkpoint_path)
    root, name = open_root_of(checkpoint_path)
    found: MetadataT | None = next(_named(name_format, root, path.parent, name), None)
    if found is not None:
        return found
    names = sorted(metadata.path.name for metadata in name_format.find_all(path.parent))
    shown = f"{', '.join(map(repr, names[-5:]))}{' and others' if names[5:] else ''}" if names else "none"
    raise CheckpointNotFoundError(
        f"cannot tell the step of '{path}': {name!r} is no committed step by {name_format}; there are: {shown}"
    )


def maybe_find_step_metadata(base_path: PathLike, name_format: NameFormat[MetadataT], *, step: int) -> MetadataT | None:
    """Return the metadata of a step below a root; None if it is not there."""
    with contextlib.suppress(ValueError):
        return name_format.find_step(base_path, step)
    return None


def find_step_path(
    base_path: PathLike, name_format: NameFormat[Any], *, step: int, include_uncommitted: bool = False
) -> UPath:
    """Return the path of a step below a root.

    With `include_uncommitted`, a checkpoint of that step which is being written, or was left unfinished, comes first:
    the newest one where there are several. Raises `ValueError` if nothing is there.
    """
    if include_uncommitted:
        base, root = as_path(base_path), open_root(base_path)
        name = name_format.build_name(step)
        if not root.renames and any(True for _ in root.storage.children(f"{name}/")):
            return base / name
        made = {folder: parse_temporary(folder) for folder in root.folders()}
        unfinished = [folder for folder, one in made.items() if one and one.final == name and not one.ended]
        if unfinished:
            return base / max(unfinished)
    return as_path(name_format.find_step(base_path, step).path)


def step_from_checkpoint_name(name: str) -> int:
    """Return the step of a finished or unfinished checkpoint's name; raise `ValueError` for any other name.

    >>> step_from_checkpoint_name("ckpt_23"), step_from_checkpoint_name("23.orbax-checkpoint-tmp-0")
    (23, 23)
    """
    step = step_of(name)
    if step is None:
        raise noted(
            _StepNameError(f"no step can be told from {name!r}: it is no number, and none stands after an underscore"),
            "names of standard formats look like '23', '0023' and 'step_23'",
        )
    return step


# --- one checkpoint --------------------------------------------------------------------------------------------------


def is_gcs_path(path: PathLike) -> bool:
    """Say whether a path is a URL of Google Cloud Storage; looks at no storage.

    >>> is_gcs_path("gs://bucket/7"), is_gcs_path("/bucket/7")
    (True, False)
    """
    return (os.fspath(path) if isinstance(path, (str, os.PathLike)) else str(path)).startswith("gs://")


def is_checkpoint_finalized(path: PathLike) -> bool:
    """Say whether a directory is a committed checkpoint.

    Where checkpoints appear by a rename, that is any directory whose name is not that of an unfinished one
    (`7.orbax-checkpoint-tmp-...`); elsewhere one that holds `commit_success.txt`. Raises `ValueError` if no directory
    is there.
    """
    root, name = open_root_of(path)
    if root.is_committed(name):
        return True
    found = root.kind(name)
    if found is None:
        raise CheckpointNotFoundError(f"cannot tell whether '{path}' is finished: nothing is there")
    if found == "file":
        raise InvalidLayoutError(f"cannot tell whether '{path}' is finished: it is a file, not a directory")
    return False


def is_path_finalized(path: PathLike) -> bool:
    """Say whether a committed checkpoint is at a path; False also if nothing is there, or a file."""
    root, name = open_root_of(path)
    return root.is_committed(name)


def is_tmp_checkpoint(path: PathLike) -> bool:
    """Say whether a directory is that of an unfinished checkpoint: it is being written, or was left.

    That is known by its name or, where checkpoints are written in place, by what was written there when the checkpoint
    was begun. False if nothing is there, or a file, or a directory of another kind.
    """
    root, name = open_root_of(path)
    return any(True for _ in root.unfinished([name])) and root.kind(name) == "folder"


def is_path_temporary(path: PathLike) -> bool:
    """Say what `is_tmp_checkpoint` says."""
    return is_tmp_checkpoint(path)


def get_save_directory(  # noqa: PLR0913, PLR0917 - the documented signature
    step: int,
    directory: PathLike,
    name: str | None = None,
    step_prefix: str | None = None,
    override_directory: PathLike | None = None,
    step_format_fixed_length: int | None = None,
    step_name_format: NameFormat[Any] | None = None,
) -> UPath:
    """Return the directory of one item of a step; looks at no storage.

    Args:
        step: the number of the step.
        directory: the root of all steps; `ValueError` if it is None.
        name: the name of the item; None for the directory of the step itself.
        step_prefix: what the step's name begins with.
        override_directory: the directory of the step, in place of what the other arguments give.
        step_format_fixed_length: the least number of digits of the step's name.
        step_name_format: the format of the step's name, in place of prefix and length.
    """
    if directory is None:
        raise _StepNameError("cannot tell where to save: the directory is None")
    if override_directory is not None:
        path = as_path(override_directory)
    else:
        name_format = step_name_format or standard_name_format(step_prefix, step_format_fixed_length)
        path = build_step_path(directory, name_format, step)
    return path if name is None else path / name


# --- unfinished checkpoints ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TemporaryPath:
    """The directory of an unfinished checkpoint, and the path that is meant for the finished one."""

    path: UPath
    final_path: UPath

    def get(self) -> UPath:
        """Return where the unfinished checkpoint is."""
        return self.path

    def get_final(self) -> UPath:
        """Return where the checkpoint will be when it is finished."""
        return self.final_path


def get_tmp_directory(path: PathLike) -> UPath:
    """Return a directory in which to write the checkpoint that is to be at a path; creates nothing.

    Where checkpoints appear by a rename it is another one at each call, beside the path; elsewhere the path itself.
    """
    root, name = open_root_of(path)
    return _beside(path, name, root.unfinished_name(name, new_attempt()))


def create_tmp_directory(
    final_dir: PathLike,
    *,
    primary_host: int | None = 0,
    active_processes: set[int] | None = None,
) -> UPath:
    """Create a directory in which to write the checkpoint that is to be at a path, and return it.

    It is named as `get_tmp_directory` says, and holds a `_CHECKPOINT_METADATA` with the time at which it was made.
    Raises `FileExistsError` if something is there already: nothing is ever removed to make room.
    """
    del primary_host, active_processes
    root, name = open_root_of(final_dir)
    return _beside(final_dir, name, OneHost().decide("create a temporary directory", lambda: root.begin(name)))


def tmp_checkpoints(checkpoint_dir: PathLike) -> list[str]:
    """Return the names of all unfinished checkpoints directly below a root, in order; see `is_tmp_checkpoint`."""
    root = open_root(checkpoint_dir)
    return sorted(root.unfinished(root.folders()))


def all_temporary_paths(root_directory: PathLike) -> Iterator[TemporaryPath]:
    """Yield the directory of each unfinished checkpoint directly below a root, with the path it is meant for."""
    base = as_path(root_directory)
    for name in tmp_checkpoints(root_directory):
        made = parse_temporary(name)
        yield TemporaryPath(base / name, base / (made.final if made else name))


def cleanup_tmp_directories(
    directory: PathLike,
    primary_host: int | None = 0,
    active_processes: set[int] | None = None,
) -> None:
    """Remove the unfinished checkpoints directly below a root of which it is known that nobody will finish them.

    These are removed: what saves and deletions left whose process is gone, or that began more than a day ago; what
    `create_tmp_directory` made in this process, in one that is gone, or more than a day ago; and directories with a
    temporary name that the reference gives, whoever made them. These stay: saves that are running, here or elsewhere,
    and every directory that does not say that a checkpoint was begun in it. So do not clean up below a root into which
    the reference is saving. Raises `NotFoundError` if the directory does not exist.
    """
    del primary_host, active_processes
    root = open_root(directory)
    if root.is_missing():
        raise NotFoundError(f"cannot clean up {root.url!r}: no such directory")
    OneHost().decide("remove temporary directories", root.clean)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _missing_step(name_format: NameFormat[Any], base_path: PathLike, step: int) -> CheckpointNotFoundError:
    try:
        name = name_format.build_name(step)
    except Exception:  # noqa: BLE001 - a format that only reads need not build names
        name = f"*{step}"
    return CheckpointNotFoundError(
        f"cannot find step {step} below '{base_path}': no committed {name!r} is there, as {name_format} would name it"
    )


def _latest(name_format: NameFormat[MetadataT], root: Root, base_path: PathLike) -> MetadataT | None:
    found: Iterable[Any]
    if isinstance(name_format, _StandardNameFormat):
        return cast("MetadataT | None", next(name_format.among(root, base_path, newest=True), None))
    if isinstance(name_format, _CompositeNameFormat):
        newest = (_latest(one, root, base_path) for one in name_format.read_name_formats)
        found = [metadata for metadata in newest if metadata is not None]
    else:
        found = name_format.find_all(base_path)
    return max(found, key=lambda metadata: metadata.step, default=None)


def _named(name_format: NameFormat[Any], root: Root, base_path: PathLike, name: str) -> Iterator[Any]:
    """Yield the step of that name, without a look at the others where the format allows it."""
    if isinstance(name_format, _StandardNameFormat):
        yield from name_format.among(root, base_path, only=name)
    elif isinstance(name_format, _CompositeNameFormat):
        for one in name_format.read_name_formats:
            yield from _named(one, root, base_path, name)
    else:
        yield from (metadata for metadata in name_format.find_all(base_path) if metadata.path.name == name)


def _steps_by_number(root: Root) -> dict[str, int]:
    steps = {name: step for name in root.folders() if (step := any_step(name)) is not None}
    return dict(sorted(steps.items(), key=lambda item: (item[1], item[0])))


def _beside(path: PathLike, name: str, other: str) -> UPath:
    # A path such as "." has no name of its own, and still a place.
    given = as_path(path)
    if other == name:
        return given
    return given.with_name(other) if given.name == name else as_path(open_root_of(path)[0].url) / other


def _modified(path: UPath) -> float:
    """Return when a directory was last changed, in seconds since the epoch."""
    unknown = NotFoundError(f"cannot tell when '{path}' was committed: neither it nor its storage says so")
    try:
        seconds = float(as_path(path).stat().st_mtime)
    except (ImportError, ValueError, FileNotFoundError) as error:
        raise unknown from error
    if not seconds and "://" in str(path):
        raise unknown  # object stores keep no times of what is only a prefix
    return seconds
