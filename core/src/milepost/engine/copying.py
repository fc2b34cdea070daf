"""How a checkpoint is copied: to another place, into another format, or both.

The rule: a copy is a save whose data come from a checkpoint, so that it is all or nothing like every save, and nothing
is held beyond the budget. Where the format stays the same its files are copied as they are, each checked against the
manifest while its bytes pass; else the arrays are read box by box and written by the other array writer, and leaves,
shardings and metadata are carried over as they stand. What was written is read back before it becomes visible: a copy
that is not what it should be never is. A checkpoint that is overwritten while it is copied is copied once more. No JAX
here, and no device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from typing import TYPE_CHECKING, Any, TypeAlias

from milepost import manifest as manifests
from milepost import urls
from milepost.attempts import parse_attempt
from milepost.config import configured
from milepost.engine.budgets import automatic_budget
from milepost.engine.pieces import chunks_of
from milepost.engine.reading import Checkpoint, choose_item, open_checkpoint
from milepost.engine.saving import Save, SaveRequest
from milepost.engine.stored import Shares, StoredArrays, StoredTree, copy_files
from milepost.engine.verifying import verify
from milepost.errors import (
    AbortedError,
    AlreadyExistsError,
    DamagedError,
    ManifestError,
    NotFoundError,
    RequestError,
    StorageError,
    noted,
)
from milepost.fixed import CLAIM
from milepost.manifest import Item, Manifest, check_path, is_manifest
from milepost.plugins import Plugins, installed
from milepost.protocols import COMMIT_OBJECT, CompletesCheckpoints, WriteOptions
from milepost.routes import resolve

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from milepost.engine.recording import RecordingStorage
    from milepost.manifest import FileEntry
    from milepost.protocols import Buffer, Piece, Staging

__all__ = ["Copied", "Copy", "CopyRequest", "Rename", "Started"]

Rename: TypeAlias = "Callable[[str, Item], tuple[Any, Sequence[int]]]"
"""Given the name of an item and the item, returns the structure of its copy, and for each leaf of that structure the
number of the leaf which it was."""

Started: TypeAlias = "Callable[[str, int], Callable[[int], object]]"
"""Called with the name of a phase and the bytes to come; returns what is called with the bytes that came."""

_ATTEMPTS = 3


def _silent(_phase: str, _total: int) -> Callable[[int], object]:
    return lambda _size: None


@dataclasses.dataclass(frozen=True, slots=True)
class CopyRequest:
    """What to copy, where to, and how.

    Without `arrays` the format stays, or is the one configured for the target if the source is in a format of others;
    with `arrays_options` (keyword arguments of the array writer) arrays are written anew in any case. `items` empty
    means all of them. `progress` is called from any thread.
    """

    source: str | os.PathLike[str]
    target: str | os.PathLike[str]
    arrays: str | None = None
    arrays_options: Mapping[str, object] | None = None
    items: Sequence[str] = ()
    overwrite: bool = False
    rename: Rename | None = None
    progress: Started = _silent


@dataclasses.dataclass(frozen=True, slots=True)
class Copied:
    """What was done: from where, to where, the manifest of the copy, and whether its files are those of the source."""

    source: str
    target: str
    manifest: Manifest
    verbatim: bool


class Copy:
    """One copy: `run` once, on any thread; `cancel` from another."""

    def __init__(self, request: CopyRequest, plugins: Plugins | None = None) -> None:
        self._request = request
        self._plugins = plugins or installed()
        self._source = urls.locate(request.source)
        self._target = urls.locate(request.target)
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Have `run` end with `AbortedError`, with nothing left at the target, unless it is done already."""
        self._cancelled.set()

    def run(self) -> Copied:
        """Copy, read back what was written, and make it visible.

        Raises `RequestError` for what cannot be asked for, `AlreadyExistsError` among them; `DamagedError` for a source
        that cannot be read whole; `StorageError` where the target does not give back what was written.
        """
        self._refuse_overlap()
        source = open_checkpoint(self._source, self._plugins)
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._once(source)
            except (DamagedError, NotFoundError, StorageError):
                again = open_checkpoint(self._source, self._plugins)
                if again.manifest.attempt == source.manifest.attempt:
                    raise
                source = again
        return self._once(source)

    def _refuse_overlap(self) -> None:
        source, target = urls.parts(self._source), urls.parts(self._target)
        shared = min(len(source), len(target))
        if source[:shared] == target[:shared]:
            how = "it is the same place" if len(source) == len(target) else "one is within the other"
            raise RequestError(f"cannot copy {self._source!r} to {self._target!r}: {how}")

    def _once(self, source: Checkpoint) -> Copied:
        items = self._chosen(source)
        verbatim = self._is_verbatim(source, items)
        kind = _VerbatimSave if verbatim else _AnewSave
        with configured({} if verbatim else self._settings(source, items)):
            save = kind(source, items, self._request, self._cancelled, self._plugins)
            save.prepare(lasting=False)()
        return Copied(self._source, self._target, save.finish(), verbatim)

    def _chosen(self, source: Checkpoint) -> dict[str, Item]:
        manifest = source.manifest
        for name in self._request.items:
            choose_item(manifest, name, source.url)
        chosen = {
            name: item for name, item in manifest.items.items() if name in (self._request.items or manifest.items)
        }
        for name in chosen:
            try:
                check_path(name)
            except ValueError as error:
                raise ManifestError(f"cannot copy {source.url!r}: it has an item {name!r}: {error}") from error
        return chosen

    def _is_verbatim(self, source: Checkpoint, items: Mapping[str, Item]) -> bool:
        request = self._request
        if request.rename is not None or request.arrays_options or not _is_ours(source):
            return False
        writers = {item.writer for item in items.values()} - {""}
        if request.arrays is not None and writers - {request.arrays}:
            return False
        # What such a writer has put beside the items speaks of all of them.
        return len(items) == len(source.manifest.items) or not any(map(self._completes, writers))

    def _completes(self, writer: str) -> bool:
        return isinstance(self._plugins.arrays(writer)(), CompletesCheckpoints)

    def _settings(self, source: Checkpoint, items: Mapping[str, Item]) -> Mapping[str, object]:
        """Return the settings by which the target's array writer is the one that was asked for."""
        configured_one = resolve(self._target, self._plugins).arrays
        own = next((item.writer for item in items.values() if item.writer), None) if _is_ours(source) else None
        name = self._request.arrays or own or configured_one
        said: dict[str, object] = {"arrays": name}
        if self._request.arrays_options is not None or name != configured_one:
            said["arrays_options"] = dict(self._request.arrays_options or {})
        return {"url": {self._target: said}}


def _is_ours(source: Checkpoint) -> bool:
    with contextlib.suppress(NotFoundError):
        return is_manifest(bytes(source.storage.read(source.prefix + COMMIT_OBJECT, 0, 512)))
    return False


def _data_prefix(manifest: Manifest) -> str:
    """Return what stands before all paths of a manifest because of the way in which it was committed."""
    data = f"{manifest.attempt}/"
    paths = [*(file.path for file in manifest.files), *(item.prefix for item in manifest.items.values())]
    return data if all(path.startswith(data) for path in paths) else ""


# --- saving what is stored -------------------------------------------------------------------------------------------


class _CopySave(Save):
    """A save of what a checkpoint holds."""

    def __init__(
        self,
        source: Checkpoint,
        items: Mapping[str, Item],
        request: CopyRequest,
        cancelled: threading.Event,
        plugins: Plugins,
    ) -> None:
        manifest = source.manifest
        metadata: Any = manifest.custom_metadata
        metrics: Any = manifest.metrics
        super().__init__(SaveRequest(request.target, {}, request.overwrite, metadata, metrics), plugins=plugins)
        self._cancelled = cancelled
        self._source, self._items = source, items
        self._progressing, self._rename = request.progress, request.rename
        self._data = _data_prefix(manifest)

    def _begin(self) -> str:
        try:
            attempt = super()._begin()
        except AlreadyExistsError as error:
            raise self._refused("a checkpoint is there already", "choose another name, or overwrite it") from error
        name = f"{self._open.route.name}/"
        inside = {child for child in self._open.storage.children(name) if not _is_of_an_attempt(child)}
        if inside and COMMIT_OBJECT not in inside and CLAIM not in inside:
            found = f"it is no checkpoint, and holds {min(inside)!r}"
            raise self._refused(found, f"name the copy itself, such as {urls.join(self._open.route.url, 'copy')!r}")
        return attempt

    def _refused(self, found: str, way_out: str) -> AlreadyExistsError:
        return noted(AlreadyExistsError(f"cannot copy to {self._open.route.url!r}: {found}"), way_out)

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise AbortedError(f"cannot copy {self._source.url!r}: it was cancelled")

    def _take_apart(self) -> None:
        self._trees: Any = {}

    def _plan(self) -> None:
        route = self._open.route
        self._shares = Shares.of(route.save_budget or automatic_budget(lasting=False), route.threads)
        self._options = WriteOptions(self._shares.writing, self._shares.threads)
        self._plans = {}

    def _files_of(self, item: Item) -> list[FileEntry]:
        others = [one.prefix for one in self._source.manifest.items.values() if len(one.prefix) > len(item.prefix)]
        mine = (file for file in self._source.manifest.files if file.path.startswith(item.prefix))
        return [file for file in mine if not file.path.startswith(tuple(others))]

    def _copy(self, files: Sequence[FileEntry], storage: RecordingStorage, prefix: str, to: str) -> None:
        """Copy files, with `to` in the place of the prefix of their paths."""

        def write(file: FileEntry, data: Iterator[Buffer]) -> None:
            storage.write(to + file.path.removeprefix(prefix), data)

        copy_files(self._source, files, write, self._shares)

    def _telling(self, phase: str, total: int) -> Callable[[int], object]:
        advance = self._progressing(phase, total)

        def tell(size: int) -> None:
            self._check_cancelled()
            advance(size)

        return tell

    def _manifest(self, items: Mapping[str, Item]) -> Manifest:
        made, manifest = super()._manifest(items), self._source.manifest
        return dataclasses.replace(
            made,
            items={name: items[name] for name in self._items},
            # When a state was saved does not change because it is copied; 0: that is not known.
            init_timestamp_nsecs=manifest.init_timestamp_nsecs or made.init_timestamp_nsecs,
            commit_timestamp_nsecs=manifest.commit_timestamp_nsecs or made.commit_timestamp_nsecs,
        )

    def _commit(self, staging: Staging, manifest: Manifest) -> None:
        route = self._open.route
        # Where the files are now, by the paths that the manifest gives them.
        prefix = staging.prefix.removesuffix(staging.data)
        written = manifests.decode(manifests.encode(manifest), where=route.url)
        self._read_back(Checkpoint(route, self._open.storage, prefix, written))
        super()._commit(staging, manifest)

    def _read_back(self, written: Checkpoint) -> None:
        """Compare what is stored with what was written; files that were written by native drivers have no checksum."""
        files = tuple(file for file in written.manifest.files if file.checksum)
        checked = dataclasses.replace(written, manifest=dataclasses.replace(written.manifest, files=files))
        advance = self._telling("verifying", checked.manifest.data_bytes)
        threads = self._shares.threads
        for report in verify(checked, threads=threads, plugins=self._plugins, progress=advance):
            if report.problem is not None:
                raise self._differs(f"of file {report.path!r}, {report.problem}")

    def _differs(self, what: str) -> StorageError:
        error = StorageError(f"cannot copy to {self._open.route.url!r}: the storage gives back other bytes: {what}")
        return noted(error, "nothing was committed")


def _is_of_an_attempt(name: str) -> bool:
    return parse_attempt(name.removesuffix("/").partition(".")[0]) is not None


class _VerbatimSave(_CopySave):
    """A save of the files of a checkpoint, as they are."""

    def _chosen_files(self) -> list[FileEntry]:
        manifest = self._source.manifest
        if len(self._items) == len(manifest.items):
            return list(manifest.files)
        return [file for item in self._items.values() for file in self._files_of(item)]

    def _progress(self) -> Callable[[int], object]:
        return self._telling("copying", sum(file.size for file in self._chosen_files()))

    def _write_items(self, staging: Staging, storage: RecordingStorage) -> dict[str, Item]:
        files = self._chosen_files()
        if any(file.path.removeprefix(self._data) == COMMIT_OBJECT for file in files):
            raise ManifestError(f"cannot copy {self._source.url!r}: it lists {COMMIT_OBJECT!r} as one of its own files")
        self._copy(files, storage, self._data, staging.prefix)
        return {
            name: dataclasses.replace(
                item,
                leaves=[_as_written(leaf) for leaf in item.leaves],
                prefix=staging.data + item.prefix.removeprefix(self._data),
            )
            for name, item in self._items.items()
        }

    def _complete(self, manifest: Manifest, staging: Staging, storage: RecordingStorage) -> None:
        """Do nothing: those files were copied, too."""

    def _manifest(self, items: Mapping[str, Item]) -> Manifest:
        return dataclasses.replace(super()._manifest(items), written_by=self._source.manifest.written_by)


def _as_written(leaf: dict[str, Any]) -> dict[str, Any]:
    return leaf if leaf["arrays"] else {key: value for key, value in leaf.items() if key != "arrays"}


class _AnewSave(_CopySave):
    """A save of the arrays of a checkpoint, read and written box by box."""

    @functools.cached_property
    def _stored(self) -> dict[str, StoredTree]:
        return {name: self._tree(name, item, self._rename) for name, item in self._items.items() if item.writer}

    def _tree(self, name: str, item: Item, rename: Rename | None) -> StoredTree:
        structure, index = rename(name, item) if rename else (item.structure, range(len(item.leaves)))
        return StoredTree(item, structure, index, flat=self._is_flat(item))

    def _is_flat(self, item: Item) -> bool:
        return len(self._items) == 1 and item.prefix == self._data

    def _take_apart(self) -> None:
        self._trees = self._stored

    def _plan(self) -> None:
        super()._plan()
        self._pieces: dict[str, Sequence[Piece]] = {}
        for name, tree in self._stored.items():
            arrays = StoredArrays(self._source, tree.item, self._plugins, self._shares)
            self._plans[name] = tree.plan(arrays, chunks_of(self._arrays), self._shares)
            self._pieces[name] = self._plans[name].pieces

    def _progress(self) -> Callable[[int], object]:
        own = (file.size for item in self._items.values() if not item.writer for file in self._files_of(item))
        return self._telling("copying", sum(plan.data_bytes for plan in self._plans.values()) + sum(own))

    def _write_items(self, staging: Staging, storage: RecordingStorage) -> dict[str, Item]:
        items = super()._write_items(staging, storage)
        for name, item in self._items.items():
            if not item.writer:
                folder = "" if self._is_flat(item) else f"{name}/"
                self._copy(self._files_of(item), storage, item.prefix, staging.prefix + folder)
                items[name] = dataclasses.replace(item, prefix=staging.data + folder)
        return items

    def _read_back(self, written: Checkpoint) -> None:
        super()._read_back(written)
        for name, tree in self._stored.items():
            item, pieces = written.manifest.items[name], self._pieces[name]
            if all(file.checksum for file in written.manifest.files if file.path.startswith(item.prefix)):
                continue
            stored = StoredArrays(written, item, self._plugins, self._shares)
            different = functools.partial(tree.compare, stored, pieces, self._shares.threads)
            for array in different():
                raise self._differs(f"array {array!r} of item {name!r} has other elements than were written")
