"""How a tree leaves milepost: as a folder of safetensors files for programs that know no checkpoints.

Decides which name each array gets in the folder, what is left out of it, and when the folder exists. The rule: whatever
can be wrong with names and dtypes is told before a byte is written; then arrays are read as they are written, within
the byte budget; and the folder gets its name once every byte of it was read back. No JAX here,
and no device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from milepost import urls
from milepost.attempts import new_attempt
from milepost.dtypes import dtype_name, known_dtypes
from milepost.engine.choosing import Selection
from milepost.engine.pieces import cut
from milepost.engine.reading import Checkpoint, choose_item, open_checkpoint
from milepost.engine.recording import RecordingStorage
from milepost.engine.renaming import Rule, renamed
from milepost.engine.stored import Shares, StoredArrays
from milepost.engine.verifying import verify
from milepost.errors import (
    AlreadyExistsError,
    ConfigError,
    DamagedError,
    InvalidLayoutError,
    ManifestError,
    MilepostError,
    MismatchError,
    NotFoundError,
    StorageError,
    noted,
)
from milepost.manifest import Manifest
from milepost.plugins import Plugins, installed
from milepost.protocols import (
    Array,
    ArrayIO,
    ArraySpec,
    Box,
    ExchangesPrefixes,
    Location,
    Piece,
    RenamesPrefixes,
    Storage,
    WriteOptions,
)
from milepost.routes import OpenRoute, open_route, resolve
from milepost.structure import leaf_names, leaf_paths, show_path

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Self

    from milepost.engine.copying import Started
    from milepost.manifest import ArrayLeaf, FileEntry, Item

__all__ = ["ExportRequest", "Exported", "export"]

_WRITER = "huggingface"
_BUDGET = 256 << 20
_SHOWN = 20
_STAGING = ".orbax-checkpoint-tmp-"  # what a dead export leaves is cleared up as what a dead save leaves
_REPLACEABLE = (".safetensors", ".safetensors.index.json")
_TEXTS = ("str", "bytes")
_SCALARS = ("bool", "int", "float", "complex", "np.generic")
_EVERYTHING = Selection()
_MANY = 4096
"""The number of pieces from which on an array is looked at before they are listed: sizes may lie."""


def _silent(_phase: str, _total: int) -> Callable[[int], object]:
    return lambda _size: None


@dataclasses.dataclass(frozen=True, slots=True)
class ExportRequest:
    """What to export, and where to. Keys of a path are joined by "."; then each rule is applied to the result.

    `options` are keyword arguments of the writer; `progress` is called from any thread.
    """

    source: str | os.PathLike[str]
    target: str | os.PathLike[str]
    item: str = "AUTO"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rules: Sequence[Rule] = ()
    selection: Selection = _EVERYTHING
    overwrite: bool = False
    progress: Started = _silent


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote: files, the number of tensors and their bytes; and which leaves it left out, by path."""

    source: str
    url: str
    item: str
    files: tuple[FileEntry, ...]
    tensors: int
    data_bytes: int
    left_out: tuple[str, ...]


def export(request: ExportRequest, plugins: Plugins | None = None) -> Exported:
    """Export one tree of a checkpoint, of any format, into a new folder.

    Raises `ConfigError` for rules that match nothing and names that would be given twice, `UnsupportedLeafError` for
    dtypes that the files cannot hold, `AlreadyExistsError`, and `StorageError` if what was written is not there.
    """
    plugins = plugins or installed()
    checkpoint = open_checkpoint(request.source, plugins)
    opened = open_route(resolve(request.target, plugins), plugins)
    if urls.parts(opened.route.url)[: len(parts := urls.parts(checkpoint.url))] == parts:
        raise ConfigError(f"cannot export to {opened.route.url!r}: it is the checkpoint itself, or within it")
    name, item = _tree(checkpoint, request.item)
    arrays, left_out = _arrays(item, request, checkpoint.url, plugins)
    writer: ArrayIO = plugins.arrays(_WRITER)(**request.options)
    with _Folder(opened, request) as folder:
        writer.create(folder.location, [array.spec for array in arrays])
        shares = Shares.of(checkpoint.route.load_budget or _BUDGET, checkpoint.route.threads)
        pieces = _pieces(arrays, StoredArrays(checkpoint, item, plugins, shares), shares.piece)
        total = sum(_nbytes(array.spec) for array in arrays)
        folder.begin(total)
        writer.write(folder.location, pieces, WriteOptions(shares.writing, shares.threads))
        folder.read_back(shares.threads)
        if open_checkpoint(checkpoint.url, plugins).manifest.attempt != checkpoint.manifest.attempt:
            raise DamagedError(f"cannot export {checkpoint.url!r}: it was overwritten while it was read")
        folder.publish()
    return Exported(checkpoint.url, opened.route.url, name, folder.files, len(arrays), total, left_out)


def _tree(checkpoint: Checkpoint, name: str) -> tuple[str, Item]:
    items = checkpoint.manifest.items
    if name == "AUTO" and "state" not in items:
        name = min((each for each, item in items.items() if item.writer), default=name)
    name, item = choose_item(checkpoint.manifest, name, checkpoint.url)
    if not item.writer:
        raise InvalidLayoutError(f"cannot export item {name!r} of {checkpoint.url!r}: it wrote its own files")
    return name, item


# --- names -----------------------------------------------------------------------------------------------------------


class _Array(NamedTuple):
    """An array to export: as it will be called, and as it is called in the source, or its value."""

    spec: ArraySpec
    stored: str
    value: Array | None = None


def _arrays(item: Item, request: ExportRequest, where: str, plugins: Plugins) -> tuple[list[_Array], tuple[str, ...]]:
    """Return the arrays to export in the order in which they are written, and the leaves that are left out."""
    paths = list(leaf_paths(item.structure))
    if idle := request.selection.idle(paths):
        raise noted(
            MismatchError(f"cannot export from {where!r}: no leaf matches the pattern {idle[0]!r}"),
            f"there are {', '.join(map(repr, leaf_names(paths)[:_SHOWN]))}",
        )
    handlers = {handler.name: handler for handler in plugins.leaf_handlers()}
    found: dict[tuple[Any, ...], _Array] = {}
    left_out = []
    for path, stored, leaf in zip(paths, leaf_names(paths), item.leaves, strict=True):
        if not request.selection.chooses(path):
            continue
        parts = {} if leaf["type"] in _TEXTS else dict(_parts(stored, leaf, handlers))
        found |= {(*path, part) if part else path: array for part, array in parts.items()}
        if not parts:
            left_out.append(show_path(path))
    names = renamed(found, request.rules, where)
    arrays = [one._replace(spec=dataclasses.replace(one.spec, name=names[path])) for path, one in found.items()]
    # Files have no room for padding, so that large items come first: each is aligned then.
    return sorted(arrays, key=lambda one: -_itemsize(one.spec)), tuple(left_out)


def _parts(stored: str, leaf: Mapping[str, Any], handlers: Mapping[str, Any]) -> Iterator[tuple[str, _Array]]:
    described: Mapping[str, ArrayLeaf] = leaf["arrays"]
    for part, array in described.items():
        yield part, _Array(ArraySpec("", array.shape, array.dtype), f"{stored}~.{part}" if part else stored)
    if described or leaf["type"] not in _SCALARS:
        return
    try:
        value = np.asarray(handlers[leaf["type"]].put_together(leaf, {}))
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError(f"cannot read the value of leaf {stored!r}: {error}") from error
    try:
        dtype = dtype_name(value.dtype)
    except ValueError:
        dtype = f"{leaf['type']} of more than 64 bits"  # refused by the writer, together with all that it cannot hold
    yield "", _Array(ArraySpec("", (), dtype), stored, value)


def _itemsize(spec: ArraySpec) -> int:
    known = known_dtypes().get(spec.dtype)
    return 1 if known is None else known.itemsize


def _nbytes(spec: ArraySpec) -> int:
    return math.prod(spec.shape) * _itemsize(spec)


# --- reading ---------------------------------------------------------------------------------------------------------


def _pieces(arrays: Sequence[_Array], stored: StoredArrays, most: int) -> list[Piece]:
    """Return the pieces of arrays: runs of rows, so that each is a run of bytes of its file."""
    large = [array for array in arrays if array.value is None and _nbytes(array.spec) > most]
    for array in large:
        if _nbytes(array.spec) > _MANY * most:
            stored.check_last(array.stored, array.spec.shape)
    chunks = dict(zip((one.stored for one in large), stored.chunks([one.stored for one in large]), strict=True))
    return [
        Piece(array.spec, _giving(array.value), view=True)
        if array.value is not None
        else Piece(array.spec, functools.partial(stored.fetch, stored.announce(array.stored, array.spec, box)), box)
        for array in arrays
        for box in _boxes(array.spec, chunks.get(array.stored), most)
    ]


def _giving(value: Array) -> Callable[[], Array]:
    return lambda: value


def _boxes(spec: ArraySpec, chunk: tuple[int, ...] | None, most: int) -> Iterator[Box | None]:
    """Cut an array into runs of rows of at most about so many bytes, and of whole chunks where that is not too much."""
    if not chunk or len(chunk) != len(spec.shape) or not all(chunk):
        return cut(spec, most)
    rows = (min(chunk[0], spec.shape[0]), *spec.shape[1:])
    one, all_of_them = (_nbytes(dataclasses.replace(spec, shape=shape)) for shape in (chunk, rows))
    # A chunk is unpacked whole for any part of it: better a few side by side at once than each again and again.
    if all_of_them > max(most, 8 * one):
        return cut(spec, most)
    return cut(spec, max(most, all_of_them), lambda _: rows)


# --- writing ---------------------------------------------------------------------------------------------------------


class _Folder:
    """A folder that appears under its name when it is whole, or in stores without folders when its last file does.

    A failure within the `with` block removes what was written.
    """

    def __init__(self, opened: OpenRoute, request: ExportRequest) -> None:
        self._route, self._store = opened.route, opened.storage
        self._name, self._url = opened.route.name, opened.route.url
        self._progress = request.progress
        self._former = self._look(overwrite=request.overwrite)
        self._renames = isinstance(opened.storage, RenamesPrefixes)
        self._prefix = f"{self._name}{_STAGING}{new_attempt()}/" if self._renames else f"{self._name}/"
        self._telling: Callable[[int], object] = _silent("", 0)
        self._recording = RecordingStorage(opened.storage, self._prefix, "", self._tell)

    def _tell(self, size: int) -> None:
        self._telling(size)

    @property
    def location(self) -> Location:
        """Where to write."""
        return Location(self._recording, self._prefix, f"{self._store.url}/{self._prefix}")

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """What was written."""
        return tuple(self._recording.files())

    def _look(self, *, overwrite: bool) -> list[str]:
        """Return the names that are in the folder already; refuse those that must not be replaced."""
        there = sorted(self._store.children(f"{self._name}/"))
        if not there and not _is_file(self._store, self._name):
            return []
        if not overwrite:
            raise noted(
                AlreadyExistsError(f"cannot export to {self._url!r}: something is there already"),
                "choose another folder, or replace the safetensors files in it with --overwrite",
            )
        strange = [name for name in there if not name.endswith(_REPLACEABLE)] if there else [self._name]
        if strange:
            shown = ", ".join(map(repr, strange[:_SHOWN]))
            raise noted(
                AlreadyExistsError(f"cannot export to {self._url!r}: it holds more than safetensors files: {shown}"),
                "only safetensors files are overwritten; choose another folder, or take the others away first",
            )
        return there

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        with contextlib.suppress(MilepostError):  # the error on its way matters more
            for file in self.files:
                self._store.delete(self._prefix + file.path)
            if self._renames:
                self._store.delete(self._prefix)

    def begin(self, total: int) -> None:
        """Make way, where the files are written under their names at once."""
        self._telling = self._progress("writing", total)
        if not self._renames:
            # The index first: without it nobody takes what is left for a model.
            for name in sorted(self._former, key=lambda name: not name.endswith(".json")):
                self._store.delete(self._prefix + name)

    def read_back(self, threads: int) -> None:
        """Compare what is stored with what was written."""
        written = Checkpoint(self._route, self._store, self._prefix, Manifest("", 0, 0, {}, {}, self.files))
        telling = self._progress("verifying", written.manifest.data_bytes)
        for report in verify(written, threads=threads, progress=telling):
            if report.problem is not None:
                error = f"cannot export to {self._url!r}: the storage gives back other bytes: of file {report.path!r}, "
                raise StorageError(error + report.problem)

    def publish(self) -> None:
        """Give the folder its name, if it does not have it yet."""
        target, store = f"{self._name}/", self._store
        if not isinstance(store, RenamesPrefixes):
            return
        if not self._former:
            store.rename(self._prefix, target)
            return
        former = self._prefix
        if not (isinstance(store, ExchangesPrefixes) and store.exchange(self._prefix, target)):
            former = f"{self._prefix.removesuffix('/')}.deleted/"
            store.rename(target, former)
            store.rename(self._prefix, target)
        with contextlib.suppress(StorageError):  # the export is there; a sweep removes what it replaced
            store.delete(former)


def _is_file(storage: Storage, key: str) -> bool:
    try:
        storage.size(key)
    except (NotFoundError, StorageError):
        return False
    return True
