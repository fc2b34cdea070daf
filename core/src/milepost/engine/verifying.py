"""Whether the bytes of a checkpoint are those that were saved, and which leaves are concerned where they are not.

The rule: the manifest says of every file how large it is and what its checksum is, and nothing else is trusted; every
byte is read. A damaged file is told apart from one that could not be read: only the former is known to be bad. Which
leaves lie in damaged bytes is for the array writer to say: each array is read alone, and the files it asked for are
noted. Of what others laid out nobody listed the files: its arrays are read, and what their format checks is checked. No
JAX here.
"""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from milepost.attempts import parse_attempt
from milepost.checksums import Running
from milepost.dtypes import known_dtypes
from milepost.errors import NotFoundError, PluginError, StorageError
from milepost.fixed import CLAIM
from milepost.plugins import Plugins, installed
from milepost.protocols import (
    COMMIT_OBJECT,
    ArrayIO,
    Box,
    Buffer,
    KeepsFolders,
    Location,
    NamesDriver,
    ReadOptions,
    ReadRequest,
    Storage,
)
from milepost.structure import leaf_names, leaf_paths, show_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from milepost.engine.reading import Checkpoint
    from milepost.manifest import ArrayLeaf, FileEntry, Item
    from milepost.protocols import Json

__all__ = ["FileReport", "LeafName", "strangers", "verify"]

_CHUNK = 8 << 20
_HELD = 256 << 20
"""The bytes of one array that are held at a time while its leaf is looked for."""

_MOST_BYTES = 16  # of an element of any dtype


class LeafName(NamedTuple):
    """A leaf: the item it belongs to, and its path in it as Python would write it."""

    item: str
    path: str


@dataclasses.dataclass(frozen=True, slots=True)
class FileReport:
    """What was found out about one file of a checkpoint; `problem` None: its bytes are those that were saved.

    `leaves` lie in the damaged bytes. `readable` False: the storage refused, so that nothing is known of the bytes.
    """

    path: str
    size: int
    problem: str | None = None
    leaves: tuple[LeafName, ...] = ()
    readable: bool = True


def verify(
    checkpoint: Checkpoint,
    *,
    threads: int,
    plugins: Plugins | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Iterator[FileReport]:
    """Read every file of a checkpoint, and report on each, in the manifest's order.

    `progress` is called with numbers of bytes as they were read, from any thread. Raises nothing for what is wrong with
    the files.
    """
    leaves = _Leaves(checkpoint, threads, plugins or installed())
    with ThreadPoolExecutor(threads, "milepost-verify") as pool:
        checks = pool.map(lambda file: _check(checkpoint, file, progress), checkpoint.manifest.files)
        for report, file in zip(checks, checkpoint.manifest.files, strict=True):
            if report.problem is not None and report.readable:
                yield leaves.named(report)
            elif report.problem is None and not file.checksum:
                yield leaves.read_in(report)
            else:
                yield report
    if checkpoint.foreign:
        yield from leaves.of_unlisted_files()


def strangers(checkpoint: Checkpoint) -> list[str]:
    """Return what is within a checkpoint and not in its manifest: files, and folders with a slash at the end.

    What commit strategies keep beside the data, and the data of other attempts, is not counted; nor is anything in a
    checkpoint that others laid out.
    """
    if checkpoint.foreign:
        return []
    manifest = checkpoint.manifest
    files = {file.path for file in manifest.files} | {COMMIT_OBJECT}
    inside = {item.prefix for item in manifest.items.values()}
    folders = {
        f"{'/'.join(parts[:n])}/"
        for path in (*files, *inside)
        for parts in [path.split("/")]
        for n in range(1, len(parts))
    }
    top = {name for name in checkpoint.storage.children(checkpoint.prefix) if not _is_of_an_attempt(name)}
    found = top - files - folders
    # The files of a flat item are at the top, and its folders are those that are listed.
    for prefix in (top & folders) if "" in inside else inside:
        found |= set(_unlisted(checkpoint, prefix, files, folders))
    return sorted(found)


def _is_of_an_attempt(name: str) -> bool:
    return name == CLAIM or parse_attempt(name.removesuffix("/").partition(".")[0]) is not None


def _unlisted(checkpoint: Checkpoint, prefix: str, files: set[str], folders: set[str]) -> Iterator[str]:
    for name in checkpoint.storage.children(checkpoint.prefix + prefix):
        path = prefix + name
        if path in folders:
            yield from _unlisted(checkpoint, path, files, folders)
        elif path not in files:
            yield path


# --- files -----------------------------------------------------------------------------------------------------------


def _check(checkpoint: Checkpoint, file: FileEntry, progress: Callable[[int], object]) -> FileReport:
    key = checkpoint.prefix + file.path
    try:
        problem = _compared(checkpoint.storage, key, file, progress)
    except NotFoundError:
        problem = "it is missing"
    except StorageError as error:
        return FileReport(file.path, file.size, f"it could not be read: {error}", readable=False)
    return FileReport(file.path, file.size, problem)


def _compared(storage: Storage, key: str, file: FileEntry, progress: Callable[[int], object]) -> str | None:
    size = storage.size(key)
    if size != file.size:
        return f"it has {size} bytes where {file.size} were saved"
    if not file.checksum:
        return None
    running = Running()
    while running.size < size:
        chunk = storage.read(key, running.size, min(size, running.size + _CHUNK))
        if not chunk:
            return f"it ends after {running.size} bytes where {size} were saved"
        running.update(chunk)
        progress(len(chunk))
    if running.fingerprint() != file.checksum:
        return f"its bytes are not those that were saved: checksum {running.fingerprint()}, not {file.checksum}"
    return None


# --- leaves ----------------------------------------------------------------------------------------------------------


class _Damaged(NamedTuple):
    leaf: LeafName
    error: Exception
    touched: frozenset[str]


class _Leaves:
    """The leaves that cannot be read, found item by item when somebody asks."""

    def __init__(self, checkpoint: Checkpoint, threads: int, plugins: Plugins) -> None:
        self._checkpoint, self._plugins = checkpoint, plugins
        self._options = ReadOptions(_HELD, threads, verify=True)
        self._found: dict[str, list[_Damaged]] = {}

    def named(self, report: FileReport) -> FileReport:
        """Name the leaves in a damaged file."""
        try:
            return dataclasses.replace(report, leaves=_names(self._concerned(report.path)))
        except PluginError as error:
            problem = f"{report.problem}; which leaves lie in it cannot be told: {error}"
            return dataclasses.replace(report, problem=problem)

    def read_in(self, report: FileReport) -> FileReport:
        """Check a file that has no checksum of its own by the arrays in it."""
        try:
            found = self._concerned(report.path)
        except PluginError as error:
            problem = f"it has no checksum of its own, and its arrays cannot be read: {error}"
            return dataclasses.replace(report, problem=problem, readable=False)
        if not found:
            return report
        return dataclasses.replace(report, problem=f"arrays in it are damaged: {found[0].error}", leaves=_names(found))

    def of_unlisted_files(self) -> Iterator[FileReport]:
        """Read the arrays of items of which no file is listed, and report on each item as if it were a file."""
        manifest = self._checkpoint.manifest
        for name, item in manifest.items.items():
            arrays = [array for leaf in item.leaves for array in leaf["arrays"].values()]
            if not arrays or any(file.path.startswith(item.prefix) for file in manifest.files):
                continue
            size = sum(math.prod(array.shape) * _itemsize(array) for array in arrays)
            found = self._of(name, item)
            problem = f"arrays are damaged: {found[0].error}" if found else None
            yield FileReport(item.prefix or "./", size, problem, _names(found))

    def _concerned(self, path: str) -> list[_Damaged]:
        items = self._checkpoint.manifest.items
        found = (one for name, item in items.items() if path.startswith(item.prefix) for one in self._of(name, item))
        # A writer that reads past the storage, by a driver of its own, touches nothing that could be seen.
        return [one for one in found if not one.touched or self._checkpoint.prefix + path in one.touched]

    def _of(self, name: str, item: Item) -> list[_Damaged]:
        if name not in self._found:
            io = self._plugins.arrays(item.writer)()
            # Together first: to open the arrays one by one takes long, and is needed only to say which are damaged.
            fine = self._failure(item, io, list(_requests(item)), self._checkpoint.storage) is None
            self._found[name] = [] if fine else list(self._damaged(name, item, io))
        return self._found[name]

    def _damaged(self, item_name: str, item: Item, io: ArrayIO) -> Iterator[_Damaged]:
        paths = list(leaf_paths(item.structure))
        for path, name, leaf in zip(paths, leaf_names(paths), item.leaves, strict=True):
            for part, array in leaf["arrays"].items():
                watched = _watching(self._checkpoint.storage)
                requests = [ReadRequest(f"{name}~.{part}" if part else name, box) for box in _boxes(array)]
                error = self._failure(item, io, requests, watched)
                if error is not None:
                    yield _Damaged(LeafName(item_name, show_path(path)), error, frozenset(watched.touched))

    def _failure(self, item: Item, io: ArrayIO, requests: Sequence[ReadRequest], storage: Storage) -> Exception | None:
        prefix = f"{self._checkpoint.prefix}{item.prefix}"
        location = Location(storage, prefix, f"{storage.url}/{prefix}")
        try:
            for _ in io.read(location, item.records, requests, self._options):
                pass  # dropped as it comes
        except Exception as error:  # noqa: BLE001 - a writer may fail in any way on bytes and records that are damaged
            return error
        return None


def _requests(item: Item) -> Iterator[ReadRequest]:
    for name, leaf in zip(leaf_names(list(leaf_paths(item.structure))), item.leaves, strict=True):
        for part, array in leaf["arrays"].items():
            yield from (ReadRequest(f"{name}~.{part}" if part else name, box) for box in _boxes(array))


def _names(found: Iterable[_Damaged]) -> tuple[LeafName, ...]:
    return tuple(dict.fromkeys(one.leaf for one in found))


def _boxes(array: ArrayLeaf) -> Iterator[Box | None]:
    itemsize = _itemsize(array)
    if math.prod(array.shape) * itemsize <= _HELD:
        yield None
    else:
        yield from _halved(Box((0,) * len(array.shape), array.shape), _HELD // itemsize)


def _itemsize(array: ArrayLeaf) -> int:
    known = known_dtypes().get(array.dtype)
    return _MOST_BYTES if known is None else known.itemsize


def _halved(box: Box, most: int) -> Iterator[Box]:
    if math.prod(box.shape) <= most:
        yield box
        return
    axis = box.shape.index(max(box.shape))
    half = box.shape[axis] // 2
    for start, length in ((0, half), (half, box.shape[axis] - half)):
        begin, shape = list(box.start), list(box.shape)
        begin[axis], shape[axis] = begin[axis] + start, length
        yield from _halved(Box(tuple(begin), tuple(shape)), most)


def _watching(storage: Storage) -> _Watched:
    # A native driver would otherwise be handed copies of all files, once for each array.
    if isinstance(storage, KeepsFolders):
        return _WatchedFolders(storage)
    return _WatchedDriver(storage) if isinstance(storage, NamesDriver) else _Watched(storage)


class _Watched:
    """A storage that notes what is read from it, and passes on nothing but reading."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.touched: set[str] = set()

    @property
    def url(self) -> str:
        """The root of the storage underneath."""
        return self._storage.url

    @property
    def commit(self) -> str:
        """The commit strategy that fits the storage underneath."""
        return self._storage.commit

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """Read from the storage underneath, and take note."""
        self.touched.add(key)
        return self._storage.read(key, start, stop)

    def size(self, key: str) -> int:
        """Return the size of an object underneath, and take note."""
        self.touched.add(key)
        return self._storage.size(key)

    def children(self, prefix: str) -> Iterable[str]:
        """List the storage underneath."""
        return self._storage.children(prefix)

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:  # noqa: ARG002 - the protocol's
        """Refuse."""
        raise StorageError(f"cannot write {key!r}: the checkpoint is being verified")

    def delete(self, key: str) -> None:
        """Refuse."""
        raise StorageError(f"cannot delete {key!r}: the checkpoint is being verified")


class _WatchedFolders(_Watched):
    def folder(self, prefix: str) -> Path:
        """Return the folder of a prefix; what is read there is not noted."""
        storage = self._storage
        assert isinstance(storage, KeepsFolders)  # noqa: S101 - `_watching` chose this class by it
        return storage.folder(prefix)


class _WatchedDriver(_Watched):
    def kvstore(self, prefix: str) -> Mapping[str, Json] | None:
        """Return the specification of a prefix; what is read there is not noted."""
        storage = self._storage
        assert isinstance(storage, NamesDriver)  # noqa: S101 - `_watching` chose this class by it
        return storage.kvstore(prefix)
