"""What an item of a checkpoint can be: a tree, or something that reads and writes files of its own.

The rule: both share one commit. A tree goes through the array writer; the other kind is given an empty folder of this
machine, and what it leaves there is stored with the checkpoint, on any storage, with size and checksum like every file.
On loading it gets a folder with those files, each checked, at the place where they are if that is on this machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from milepost.checksums import Running
from milepost.errors import ChecksumError, MissingDataError, NotFoundError
from milepost.protocols import KeepsFolders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from milepost.engine.reading import Checkpoint
    from milepost.manifest import FileEntry, Item
    from milepost.protocols import Storage

__all__ = ["OwnFiles", "OwnItem", "TreeItem", "Wish", "folder_of"]

T = TypeVar("T")

_CHUNK = 8 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Wish:
    """How an array is divided where the array writer stores chunks: their most bytes, and the axes divided first."""

    chunk_bytes: int | None = None
    chunk_axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class TreeItem(Generic[T]):
    """A tree to save; `handler` names what it was saved with, `custom_metadata` is kept with it.

    The files of one that is `flat` are directly in the checkpoint's folder, where the only item of a checkpoint may be.
    `options` are for the array writer, where it takes them, and stronger than those of the route; `wishes` say for each
    leaf, in JAX's order, how its array is divided, None for nothing.
    """

    tree: T
    handler: str = ""
    custom_metadata: Mapping[str, Any] | None = None
    flat: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wishes: Sequence[Wish | None] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class OwnItem:
    """Something that writes its own files.

    `begin` is given an empty folder; when it returns, the caller may change what is saved, and what it returns is
    called once, on any thread, to complete the files. `flat` is as in `TreeItem`.
    """

    begin: Callable[[Path], Callable[[], object]]
    handler: str = ""
    flat: bool = False


class OwnFiles:
    """The files of one own item while it is saved."""

    def __init__(self, item: OwnItem) -> None:
        self.handler: str = item.handler
        self.flat: bool = item.flat
        self._folder = tempfile.TemporaryDirectory(prefix="milepost-")
        try:
            self._complete = item.begin(Path(self._folder.name))
        except BaseException:
            self.close()
            raise

    def store(self, storage: Storage, prefix: str) -> None:
        """Complete the files, and write them below a prefix."""
        self._complete()
        root = Path(self._folder.name)
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            storage.write(prefix + path.relative_to(root).as_posix(), _chunks(path))

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


@contextlib.contextmanager
def folder_of(checkpoint: Checkpoint, item: Item) -> Iterator[Path]:
    """Give a folder with the files of an item that wrote its own, all of them checked unless the route says otherwise.

    Nothing may be changed in it. Raises `MissingDataError` and `ChecksumError`, which name the file.
    """
    files = [file for file in checkpoint.manifest.files if file.path.startswith(item.prefix)]
    with tempfile.TemporaryDirectory(prefix="milepost-") as scratch:
        place = _in_place(checkpoint, item)
        for file in files:
            _fetch(checkpoint, file, None if place else Path(scratch) / file.path.removeprefix(item.prefix))
        yield place or Path(scratch)


def _in_place(checkpoint: Checkpoint, item: Item) -> Path | None:
    storage = checkpoint.storage
    return storage.folder(checkpoint.prefix + item.prefix) if isinstance(storage, KeepsFolders) else None


def _fetch(checkpoint: Checkpoint, file: FileEntry, target: Path | None) -> None:
    running = Running()
    with contextlib.ExitStack() as stack:
        out = None
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(target.open("wb"))
        for start in range(0, file.size, _CHUNK):
            chunk = _read(checkpoint, file, start)
            running.update(chunk)
            if out is not None:
                out.write(chunk)
    if checkpoint.route.verify and file.checksum and running.fingerprint() != file.checksum:
        raise ChecksumError(
            f"cannot load {checkpoint.url!r}: the bytes of file {file.path!r} are not those that were saved"
        )


def _read(checkpoint: Checkpoint, file: FileEntry, start: int) -> bytes:
    wanted = min(_CHUNK, file.size - start)
    try:
        chunk = bytes(checkpoint.storage.read(checkpoint.prefix + file.path, start, start + wanted))
    except NotFoundError as error:
        raise MissingDataError(f"cannot load {checkpoint.url!r}: file {file.path!r} is missing") from error
    if len(chunk) != wanted:
        raise MissingDataError(
            f"cannot load {checkpoint.url!r}: file {file.path!r} ends at {start + len(chunk)} of {file.size} bytes"
        )
    return chunk
