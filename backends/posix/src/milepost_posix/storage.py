"""Checkpoints' bytes as files below one directory.

Decides when a file exists and when it is durable. The rule: bytes go to a temporary name in the same directory, are
synced, and get their key by one rename; a directory is synced after every name it gains or loses. A key is a relative
path of plain segments, so that no manifest reaches outside the root by its keys.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from milepost.errors import ConfigError, noted

from milepost_posix import _system
from milepost_posix._system import explained, sync

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from milepost.protocols import Buffer

__all__ = ["PosixStorage"]

_TEMPORARY: Final = ".milepost-tmp-"
"""How the names begin under which files are written; they are no keys."""

_SMALL: Final = 64 << 10
_PORTION: Final = 32 << 20
_TRIES: Final = 16
_SCHEME: Final = "file://"
_NO_LINKS: Final = _system.UNSUPPORTED | {errno.EPERM, errno.EMLINK}


class PosixStorage:
    """Files below the directory of a `file://` URL, which need not exist before the first write.

    `mode` is an octal text such as "0750": directories made here get it, files its bits for reading and writing,
    whatever the umask; without it the umask decides.
    """

    def __init__(self, url: str, /, *, mode: str | int | None = None) -> None:
        path = url.removeprefix(_SCHEME)
        if not url.startswith(f"{_SCHEME}/") or "\0" in path:
            raise noted(ConfigError(f"cannot open {url!r}: it is no absolute file URL"), "write 'file:///directory'")
        self.url: str = url if path == "/" else url.rstrip("/")
        self._root = Path(path)
        self._mode = None if mode is None else _parse_mode(mode)

    @property
    def commit(self) -> str:
        """`rename`, or `create` on FUSE, where renaming a directory is often a loop over its files."""
        kind = _system.file_system(self._root.resolve())
        return "create" if kind.startswith("fuse") and kind != "fuseblk" else "rename"

    # --- reading ---

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """Return the bytes `[start, stop)` of a file; fewer where it ends before `stop`."""
        with self._opened("read", key) as (file, size):
            data = memoryview(bytearray(max(0, (size if stop is None else min(stop, size)) - start)))
            return data[: _fill(file, start, data)]

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        """Fill the buffer with the bytes from `start` on; return how many there were before the file ended."""
        with self._opened("read", key) as (file, _):
            return _fill(file, start, buffer.cast("B") if buffer.nbytes else buffer)

    def map(self, key: str) -> memoryview:
        """Return the file as private, writable memory; it outlives the file's name."""
        with self._opened("map", key) as (file, size):
            if not size:
                return memoryview(bytearray())
            # Without a reservation, a file larger than memory can be mapped too: only pages written to are copied.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            return memoryview(mmap.mmap(file, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE))

    def folder(self, prefix: str) -> Path:
        """Return the directory of a prefix, whether or not it exists."""
        return self._path(prefix.removesuffix("/")) if prefix else self._root

    def _folder(self, prefix: str) -> Path:
        """Return the directory of a prefix that is not all of the storage, which nobody may move."""
        return self._path(prefix.removesuffix("/"))

    def size(self, key: str) -> int:
        """Return the size of a file in bytes."""
        path = self._path(key)
        with explained("read the size of", path, reading=True):
            return _size(path.stat())

    def children(self, prefix: str) -> Iterable[str]:
        """Return the names directly below a prefix; those of directories end in "/"."""
        path = self.folder(prefix)
        gone = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with explained("list", path), gone, os.scandir(path) as entries:
            return [_shown(entry) for entry in entries if not entry.name.startswith(_TEMPORARY)]
        return []

    # --- writing ---

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Store the buffers as one file: wholly and durably, or not at all.

        Large buffers go to the system as they are, one by one, before the next is taken; small ones are gathered.
        """
        path = self._path(key)
        with self._written(path, buffers) as temporary, explained("write", path):
            temporary.replace(path)
            sync(path.parent)

    def create(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Store a new file as `write` does, or raise `AlreadyExistsError` and change nothing."""
        path = self._path(key)
        with self._written(path, buffers) as temporary, explained("create", path):
            if not _linked(temporary, path):
                # Without hard links a crash can leave a part of the file, but still only one writer gets the name.
                with self._written(path, [temporary.read_bytes()], path):
                    pass
            temporary.unlink()
            sync(path.parent)

    def delete(self, key: str) -> None:
        """Remove a file, or with a key that ends in "/" everything below it; what is gone already is no error."""
        for each in [key] if key else self.children(""):
            path = self._folder(each)
            with explained("delete", path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                _remove_tree(path) if each.endswith("/") else path.unlink()
                sync(path.parent)

    # --- whole directories ---

    def rename(self, source: str, target: str) -> None:
        """Rename a directory, durably; `AlreadyExistsError` if anything but an empty directory is at the target."""
        old, new = self._folder(source), self._folder(target)
        with explained("rename", old, new):
            if old.parent != new.parent:
                _make_directory(new.parent, self._mode, [])
            _system.rename_new(old, new)
            for parent in {old.parent, new.parent}:
                sync(parent)

    def exchange(self, one: str, other: str) -> bool:
        """Swap two directories at one instant, durably; False, with nothing changed, where this system cannot."""
        first, second = self._folder(one), self._folder(other)
        with explained("exchange", first, second):
            for path in (first, second):
                path.lstat()  # the answer for what is not there is the same on every system
            done = _system.exchange(first, second)
            for parent in {first.parent, second.parent} if done else ():
                sync(parent)
        return done

    def sync(self, prefix: str) -> None:
        """Make everything below the prefix durable, whoever wrote it, and every directory on the way to it."""
        path = self._folder(prefix)
        with explained("sync", path):
            for folder, _, names in os.walk(path, topdown=False, onerror=_raise):
                for file in (Path(folder, name) for name in names):
                    if stat.S_ISREG(file.lstat().st_mode):
                        sync(file, os.O_NOFOLLOW)
                sync(Path(folder))
            for parent in path.parents:
                # Above the root somebody else may rule; what cannot be opened was not made by us.
                with contextlib.suppress(PermissionError):
                    sync(parent)

    # --- helpers ---

    def _path(self, key: str) -> Path:
        segments = key.split("/")
        try:
            plain = b"\0" not in os.fsencode(key) and not {"", ".", ".."} & {*segments}
        except UnicodeEncodeError:
            plain = False
        with explained("use the key", key):
            if not plain or segments[-1].startswith(_TEMPORARY):
                raise _system.failure(errno.EINVAL, "it is no relative path of plain names")
        return self._root.joinpath(*segments)

    @contextlib.contextmanager
    def _opened(self, action: str, key: str) -> Iterator[tuple[int, int]]:
        """Open a file for reading; yield it and its size."""
        path = self._path(key)
        with explained(action, path, reading=True):
            file = os.open(path, os.O_RDONLY)
            try:
                yield file, _size(os.fstat(file))
            finally:
                os.close(file)

    @contextlib.contextmanager
    def _written(self, path: Path, buffers: Iterable[Buffer], target: Path | None = None) -> Iterator[Path]:
        """Write a new file, durable but for its name; remove it, and the directories made for it, if anything fails."""
        target = target or path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
        undo: list[Callable[[], None]] = []
        try:
            with explained("write", path):
                file = self._open_new(target, undo)
            undo.append(target.unlink)
            try:
                self._pour(file, path, buffers)
            finally:
                # Network file systems report a full disk here.
                with explained("write", path):
                    file.close()
            yield target
        except BaseException:
            for step in reversed(undo):
                with contextlib.suppress(OSError):
                    step()
            raise

    def _open_new(self, target: Path, undo: list[Callable[[], None]]) -> BinaryIO:
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):
                return target.open("xb", buffering=_SMALL)
            # A writer that fails takes away the directories it made, perhaps just before another one uses them.
            with contextlib.suppress(FileNotFoundError):
                _make_directory(Path(os.path.realpath(target.parent)), self._mode, undo)
        return target.open("xb", buffering=_SMALL)

    def _pour(self, file: BinaryIO, path: Path, buffers: Iterable[Buffer]) -> None:
        """Write the buffers, each before the next is taken, so that the disk works while that one is made."""
        written = begun = 0
        for buffer in buffers:
            with explained("write", path):
                for at in range(0, len(buffer), _PORTION):
                    written += file.write(memoryview(buffer)[at : at + _PORTION])
                    if written - begun >= _PORTION:
                        _system.start_write_back(file.fileno(), begun, written - begun)
                        begun = written
        with explained("write", path):
            file.flush()
            if self._mode is not None:
                os.fchmod(file.fileno(), self._mode & 0o666)
            os.fsync(file.fileno())


# --- options and files -----------------------------------------------------------------------------------------------


def _parse_mode(mode: str | int) -> int:
    text = mode if isinstance(mode, str) else f"{mode:o}"
    # This also catches 750 for 0o750: no three digits read as a decimal number leave all bits to the owner.
    if not re.fullmatch("(0|0o)?[0-7]?7[0-7]{2}", text):
        raise noted(
            ConfigError(f"mode {mode!r} is no permission of a directory that its owner can use"), "write mode = '0750'"
        )
    return int(text, 8)


def _shown(entry: os.DirEntry[str]) -> str:
    try:
        return f"{entry.name}/" if entry.is_dir() else entry.name
    except OSError:
        return entry.name  # a link that leads to itself


def _size(found: os.stat_result) -> int:
    if stat.S_ISDIR(found.st_mode):
        raise _system.failure(errno.EISDIR)
    return found.st_size


def _fill(file: int, start: int, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], start + done)
        if not count:
            break
        done += count
    return done


def _linked(source: Path, target: Path) -> bool:
    try:
        target.hardlink_to(source)
    except OSError as error:
        # A network file system may repeat a request whose reply was lost, and meet its own link.
        if source.stat().st_nlink > 1:
            return True
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


# --- directories -----------------------------------------------------------------------------------------------------


def _make_directory(path: Path, mode: int | None, undo: list[Callable[[], None]]) -> None:
    """Make a directory and its missing ancestors, durably."""
    if not os.path.lexists(path.parent):
        _make_directory(path.parent, mode, undo)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
        undo.append(path.rmdir)
        if mode is not None:
            path.chmod(mode)
    # Also where another process made it, which may not have come as far as this.
    sync(path.parent)


def _remove_tree(path: Path) -> None:
    while not path.is_symlink():
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            # Two sweeps may remove one tree together: go on with what the other one left.
            if not os.path.lexists(path):
                raise
        else:
            return
    path.unlink()


def _raise(error: OSError) -> None:
    raise error
