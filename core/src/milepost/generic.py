"""How any file system that fsspec can open becomes a storage.

This module claims nothing that it cannot know: no create-only write, no compare and swap, no rename, because fsspec's
own are a look followed by a write. The rules it rests on: nothing is cached, and what could not be written wholly does
not appear. An object appears at one instant if it is small (the commit object always is), or if the file system names
objects only once they are complete, as object stores do, or renames within a directory, as disks do. How durable it
then is, is up to the file system; a storage of its own always promises more.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
import secrets
from typing import TYPE_CHECKING, Any

from milepost.errors import MilepostError, NotFoundError, StorageDeniedError, StorageError, StorageFullError
from milepost.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from milepost.hookspecs import RegisterStorage
    from milepost.protocols import Buffer

__all__ = ["FsspecStorage", "register_storage"]

_UNCACHED = {"use_listings_cache": False, "skip_instance_cache": True}
_SMALL = 8 << 20  # up to this size an object is sent in one request
_RENAMING = frozenset({"file", "local", "sftp", "ssh"})  # their `mv` replaces a file at one instant
_PART = re.compile(r"\.part-[0-9a-f]{12}$")  # the name of an object that is being written ends so
_TRIES = 3
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@hookimpl
def register_storage(register: RegisterStorage) -> None:
    """Offer the storage for URLs that no package claims."""
    register("fsspec", FsspecStorage)


class FsspecStorage:
    """Objects in any file system that fsspec can open; options are those of the file system.

    Objects above 8 MiB can be seen while they grow on file systems that neither rename nor hide what is incomplete.
    """

    def __init__(self, url: str, /, **options: Any) -> None:
        self.url: str = url.rstrip("/")
        self.commit = "marker"
        self._fs, self._root = _opened(url, options)
        self._renames = _renames(self._fs)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """Return the bytes `[start, stop)` of an object; fewer where it ends before `stop`."""
        if stop is not None and stop <= start:
            return b""
        try:
            with self._asked("read", key):
                return bytes(self._fs.cat_file(self._path(key), start=start, end=stop))
        except StorageError:
            # Web servers refuse a range that begins behind the end; here it is an empty one.
            if start and self.size(key) <= start:
                return b""
            raise

    def size(self, key: str) -> int:
        """Return the size of an object in bytes."""
        with self._asked("read", key):
            found = self._fs.info(self._path(key))
        if found["type"] == "directory" or found["size"] is None:
            raise NotFoundError(f"cannot read {self._name(key)!r}: no such object")
        return int(found["size"])

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Store the buffers as one object: joined if they are few bytes, else one after the other."""
        path, rest = self._path(key), iter(buffers)
        if self._renames:
            part = f"{path}.part-{secrets.token_hex(6)}"
            self._stream(key, part, rest)
            with self._asked("write", key):
                self._fs.mv(part, path)
            return
        head = bytearray()
        while len(head) <= _SMALL:
            buffer = next(rest, None)
            if buffer is None:
                with self._asked("write", key):
                    self._fs.pipe_file(path, bytes(head))
                return
            head += buffer
        self._stream(key, path, itertools.chain([head], rest))

    def children(self, prefix: str) -> Iterable[str]:
        """Return the names directly below a prefix; those that are prefixes themselves end in "/"."""
        # A set: some file systems list an object and the prefix of the same name, or name one twice.
        names = {(path.rpartition("/")[2], folder) for path, folder in self._list(prefix)}
        return {f"{name}/" if folder else name for name, folder in names if not _PART.search(name)}

    def delete(self, key: str) -> None:
        """Remove an object, or with a key that ends in "/" everything below it; what is gone already is no error."""
        with contextlib.suppress(NotFoundError):
            if key and not key.endswith("/"):
                with self._asked("delete", key):
                    self._fs.rm_file(self._path(key))
            else:
                self._empty(key)
        self._prune(key)

    def _empty(self, prefix: str) -> None:
        # fsspec's own recursive removal takes `*?[` in names for patterns.
        found = list(self._list(prefix))
        for path, folder in found:
            child = prefix + path.rpartition("/")[2]
            if folder:
                self._empty(f"{child}/")
                with contextlib.suppress(Exception):
                    self._fs.rmdir(self._path(child))
            else:
                with contextlib.suppress(NotFoundError), self._asked("delete", child):
                    self._fs.rm_file(self._path(child))

    def _prune(self, key: str) -> None:
        # On a disk a prefix would outlive its last object; rmdir of anything else fails, which ends the loop.
        parent = key.rstrip("/") if key.endswith("/") else key.rpartition("/")[0]
        with contextlib.suppress(Exception):
            while parent and not any(True for _ in self._list(f"{parent}/")):
                self._fs.rmdir(self._path(parent))
                parent = parent.rpartition("/")[0]

    def _list(self, prefix: str) -> Iterator[tuple[str, bool]]:
        path = self._path(prefix.rstrip("/"))
        try:
            with self._asked("list", prefix):
                found = self._fs.ls(path, detail=True)
        except NotFoundError:
            return
        for entry in found:
            # Asked for a file, or for a prefix that has an object of its own, file systems list that too.
            if (name := entry["name"].rstrip("/")).lstrip("/") != path.strip("/"):
                yield name, entry["type"] == "directory"

    def _stream(self, key: str, path: str, buffers: Iterator[Buffer]) -> None:
        with self._asked("write", key):
            file = self._created(path)
        try:
            for buffer in buffers:
                with self._asked("write", key):
                    file.write(buffer)
            with self._asked("write", key):
                file.close()
        except BaseException:
            with contextlib.suppress(Exception):
                self._forget(file, path)
            raise

    def _created(self, path: str) -> Any:
        # Object stores have no directories, so one is made only when it is missed; a racing `delete` may remove it.
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):
                return self._fs.open(path, "wb")
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        return self._fs.open(path, "wb")

    def _forget(self, file: Any, path: str) -> None:
        from fsspec.spec import AbstractBufferedFile

        if isinstance(file, AbstractBufferedFile):
            # Closing would make an object of what was written so far, and so would the garbage collector.
            file.closed = True
            file.discard()
        else:
            file.close()
            self._fs.rm_file(path)

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{key}".rstrip("/") if self._root else key

    def _name(self, key: str) -> str:
        return f"{self.url}/{key}"

    @contextlib.contextmanager
    def _asked(self, verb: str, key: str) -> Iterator[None]:
        # File systems raise whatever their client libraries do.
        try:
            yield
        except MilepostError:
            raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise NotFoundError(f"cannot {verb} {self._name(key)!r}: no such object") from error
        except PermissionError as error:
            raise StorageDeniedError(error.errno, f"cannot {verb} {self._name(key)!r}: {error}") from error
        except Exception as error:
            number = getattr(error, "errno", None)
            kind = (
                StorageFullError if number in _FULL else StorageDeniedError if number == errno.EROFS else StorageError
            )
            raise kind(number, f"cannot {verb} {self._name(key)!r}: {error}") from error


def _opened(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(url, **{**_UNCACHED, **options})
    except TypeError:
        # A file system that takes no such options has no such caches; a wrong option fails again, with its own words.
        fs, root = url_to_fs(url, **options)
    return fs, root


def _renames(fs: Any) -> bool:
    while hasattr(fs, "fs"):  # a file system that shows a part of another one
        fs = fs.fs
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return not _RENAMING.isdisjoint(protocols)
