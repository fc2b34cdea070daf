"""Checkpoints' bytes as files below one directory.

Decides when a file exists and when it is durable. The rule: bytes go to a temporary name in the same directory, are
synced, and get their key by one rename; a directory is synced after every name it gains or loses. A key is a relative
path of plain segments, so that no manifest reaches outside the root by its keys.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from milepost.errors import AlreadyExistsError, ConfigError, StorageError, noted

from milepost_posix import _system
from milepost_posix._system import explained

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from milepost.protocols import Buffer

__all__ = ["PosixStorage"]

_TEMPORARY: Final = ".milepost-tmp-"
"""How the names begin under which files are written; they are no keys."""

_SMALL: Final = 64 << 10
_PORTION: Final = 32 << 20
_ATTEMPTS: Final = 16
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
        self._root = Path(path)
        self._url = url if path == "/" else url.rstrip("/")
        self._mode = _parse_mode(mode)

    @property
    def url(self) -> str:
        """The root."""
        return self._url

    @property
    def commit(self) -> str:
        """`rename`, or `create` on FUSE, where renaming a directory is often a loop over its files."""
        return self._commit

    @functools.cached_property
    def _commit(self) -> str:
        kind = _system.file_system(self._root.resolve())
        return "create" if kind.startswith("fuse") and kind != "fuseblk" else "rename"

    # --- reading ---

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """Return the bytes `[start, stop)` of a file; fewer where it ends before `stop`."""
        path = self._path(key)
        with explained("read", path, reading=True), _opened(path) as (file, size):
            end = size if stop is None else min(stop, size)
            data = memoryview(bytearray(max(0, end - start)))
            return data[: _fill(file, start, data)]

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        """Fill the buffer with the bytes from `start` on; return how many there were before the file ended."""
        path = self._path(key)
        with explained("read", path, reading=True), _opened(path) as (file, _):
            return _fill(file, start, buffer.cast("B") if buffer.nbytes else buffer)

    def map(self, key: str) -> memoryview:
        """Return the file as private, writable memory; it outlives the file's name."""
        path = self._path(key)
        with explained("map", path, reading=True), _opened(path) as (file, size):
            if not size:
                return memoryview(bytearray())
            # Without a reservation, a file larger than memory can be mapped too: only pages written to are copied.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            return memoryview(mmap.mmap(file, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE))

    def size(self, key: str) -> int:
        """Return the size of a file in bytes."""
        path = self._path(key)
        with explained("read the size of", path, reading=True):
            return _size(path.stat())

    def children(self, prefix: str) -> Iterable[str]:
        """Return the names directly below a prefix; those of directories end in "/"."""
        path = self._folder(prefix) if prefix else self._root
        with explained("list", path):
            try:
                with os.scandir(path) as entries:
                    return [_shown(entry) for entry in entries if not entry.name.startswith(_TEMPORARY)]
            except (FileNotFoundError, NotADirectoryError):
                return []

    # --- writing ---

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Store the buffers as one file: wholly and durably, or not at all.

        Large buffers go to the system as they are, one by one, before the next is taken; small ones are gathered in a
        buffer of their own.
        """
        path = self._path(key)
        temporary = _temporary(path)
        with self._written(temporary, path, buffers), explained("write", path):
            temporary.replace(path)
            _system.sync_directory(path.parent)

    def create(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Store a new file as `write` does, or raise `AlreadyExistsError` and change nothing."""
        path = self._path(key)
        if os.path.lexists(path):
            raise AlreadyExistsError(f"cannot create {str(path)!r}: it exists")
        temporary = _temporary(path)
        with self._written(temporary, path, buffers), explained("create", path):
            if not _linked(temporary, path):
                # Without hard links a crash can leave a part of the file, but still only one writer gets the name.
                with self._written(path, path, _portions(temporary)):
                    pass
            temporary.unlink()
            _system.sync_directory(path.parent)

    def delete(self, key: str) -> None:
        """Remove a file, or with a key that ends in "/" everything below it; what is gone already is no error."""
        if not key:
            for child in self.children(""):
                self.delete(child)
            return
        path = self._folder(key) if key.endswith("/") else self._path(key)
        with explained("delete", path):
            try:
                _remove_tree(path) if key.endswith("/") else path.unlink()
                _system.sync_directory(path.parent)
            except (FileNotFoundError, NotADirectoryError):
                return

    # --- whole directories ---

    def rename(self, source: str, target: str) -> None:
        """Rename a directory, durably; `AlreadyExistsError` if anything is at the target, an empty directory too."""
        old, new = self._folder(source), self._folder(target)
        with explained("rename", old, new):
            if old.parent != new.parent:
                _make_directory(new.parent, self._mode)
            _system.rename_exclusive(old, new)
            for parent in {old.parent, new.parent}:
                _system.sync_directory(parent)

    def exchange(self, one: str, other: str) -> bool:
        """Swap two directories at one instant, durably; False, with nothing changed, where this system cannot."""
        first, second = self._folder(one), self._folder(other)
        with explained("exchange", first, second):
            for path in (first, second):
                path.lstat()  # the answer for what is not there is the same on every system
            done = _system.exchange(first, second)
            for parent in {first.parent, second.parent} if done else ():
                _system.sync_directory(parent)
        return done

    def sync(self, prefix: str) -> None:
        """Make everything below the prefix durable, whoever wrote it, and every directory on the way to it."""
        path = self._folder(prefix)
        with explained("sync", path):
            for folder, _, names in os.walk(path, topdown=False, onerror=_raise):
                for name in names:
                    _sync_regular(Path(folder, name))
                _system.sync_directory(Path(folder))
            for parent in path.parents:
                # Above the root somebody else may rule; what cannot be opened was not made by us.
                with contextlib.suppress(PermissionError):
                    _system.sync_directory(parent)

    # --- helpers ---

    def _folder(self, prefix: str) -> Path:
        return self._path(prefix.removesuffix("/"))

    def _path(self, key: str) -> Path:
        segments = key.split("/")
        if {"", ".", ".."} & {*segments} or "\0" in key or segments[-1].startswith(_TEMPORARY):
            raise _refused(key)
        try:
            os.fsencode(key)
        except UnicodeEncodeError as error:
            raise _refused(key) from error
        return self._root.joinpath(*segments)

    @contextlib.contextmanager
    def _written(self, target: Path, path: Path, buffers: Iterable[Buffer]) -> Iterator[None]:
        """Write a new file, durable but for its name; remove it, and the directories made for it, if anything fails."""
        made: list[Path] = []
        with explained("write", path):
            file = self._open_new(target, made)
        try:
            try:
                _pour(file, path, buffers)
                with explained("write", path):
                    if self._mode is not None:
                        os.fchmod(file, self._mode & 0o666)
                    _system.sync_file(file)
            finally:
                # Network file systems report a full disk here.
                with explained("write", path):
                    os.close(file)
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                target.unlink()
                for folder in reversed(made):
                    folder.rmdir()
            raise

    def _open_new(self, target: Path, made: list[Path]) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                return os.open(target, flags, 0o666)
            # A failing writer may remove the directory again before the file is there.
            made += _make_directory(target.parent, self._mode)
        return os.open(target, flags, 0o666)


# --- options and keys ------------------------------------------------------------------------------------------------


def _parse_mode(mode: str | int | None) -> int | None:
    if mode is None:
        return None
    try:
        bits = int(mode, 8) if isinstance(mode, str) else mode
    except ValueError:
        bits = -1
    # This also catches 750 for 0o750: no three digits read as a decimal number leave all bits to the owner.
    if not 0 <= bits <= 0o7777 or bits & 0o700 != 0o700:  # noqa: PLR2004 (permission bits)
        raise noted(
            ConfigError(f"mode {mode!r} is no permission of a directory that its owner can use"), "write mode = '0750'"
        )
    return bits


def _refused(key: str) -> StorageError:
    error = StorageError(f"cannot use the key {key!r}: it is no relative path of plain names")
    error.errno = errno.EINVAL
    return error


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")


def _shown(entry: os.DirEntry[str]) -> str:
    try:
        return f"{entry.name}/" if entry.is_dir() else entry.name
    except OSError:
        return entry.name  # a link that leads to itself


# --- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    file = os.open(path, os.O_RDONLY)
    try:
        yield file, _size(os.fstat(file))
    finally:
        os.close(file)


def _size(found: os.stat_result) -> int:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return found.st_size


def _fill(file: int, start: int, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], start + done)
        if not count:
            break
        done += count
    return done


def _pour(file: int, path: Path, buffers: Iterable[Buffer]) -> None:
    """Write the buffers one after the other; each is done with before the next is taken."""
    written, gathered = 0, bytearray()
    for buffer in buffers:
        if len(buffer) <= _SMALL:
            gathered += buffer
            if len(gathered) <= _SMALL:
                continue
            buffer = b""  # noqa: PLW2901 (it is part of what is gathered now)
        with explained("write", path):
            written = _put(file, written, [memoryview(gathered), memoryview(buffer)])
        gathered = bytearray()
    with explained("write", path):
        _put(file, written, [memoryview(gathered)])


def _put(file: int, start: int, views: list[memoryview]) -> int:
    """Write the views; return where they end. In portions, so that the disk works while the next one is copied."""
    portions = [view[at : at + _PORTION] for view in views for at in range(0, len(view), _PORTION)]
    while portions:
        count = os.writev(file, portions[:2])
        _system.start_write_back(file, start, count)
        start += count
        while portions and count >= len(portions[0]):
            count -= len(portions.pop(0))
        if count:
            portions[0] = portions[0][count:]
    return start


def _portions(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(_PORTION):
            yield data


def _linked(source: Path, target: Path) -> bool:
    try:
        target.hardlink_to(source)
    except FileExistsError:
        # A network file system may repeat a request whose reply was lost, and meet its own link.
        if not _same(source, target):
            raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False


# --- directories -----------------------------------------------------------------------------------------------------


def _make_directory(path: Path, mode: int | None) -> list[Path]:
    """Make a directory and its missing ancestors, durably; return those made, outermost first."""
    made = [] if os.path.lexists(path.parent) else _make_directory(path.parent, mode)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
        made.append(path)
        if mode is not None:
            path.chmod(mode)
    # Also where another process made it, which may not have come as far as this.
    _system.sync_directory(path.parent)
    return made


def _remove_tree(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
        return
    for _ in range(_ATTEMPTS):
        # Two sweeps may remove one tree together.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
            return
        if not path.exists():
            return
    shutil.rmtree(path)


def _sync_regular(path: Path) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        return
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        _system.sync_file(file)
    finally:
        os.close(file)


def _raise(error: OSError) -> None:
    raise error
