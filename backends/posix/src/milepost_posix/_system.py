"""What the operating system is asked for beyond `os`, and what its refusals mean.

Decides which error a system call's number becomes, and what counts as "this file system cannot": the rule is that only
EINVAL, ENOSYS and EOPNOTSUPP do; everything else is a failure and is raised.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from milepost.errors import (
    AlreadyExistsError,
    MilepostError,
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    noted,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

__all__ = ["UNSUPPORTED", "exchange", "explained", "failure", "file_system", "rename_new", "start_write_back", "sync"]

UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})

_AT_FDCWD: Final = -100
_NOREPLACE: Final = 1
_EXCHANGE: Final = 2
_SYNC_FILE_RANGE_WRITE: Final = 2

_KINDS: Final[dict[int | None, type[NotFoundError | AlreadyExistsError | StorageError]]] = {
    errno.ENOENT: NotFoundError,
    errno.EEXIST: AlreadyExistsError,
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), StorageFullError),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), StorageDeniedError),
}


# --- errors ----------------------------------------------------------------------------------------------------------


def failure(code: int, reason: str = "") -> OSError:
    """Return the error that the system raises with this number."""
    return OSError(code, reason or os.strerror(code))


class explained:  # noqa: N801 - it is used as a verb, with `with`
    """Turn an `OSError` of the block into milepost's; when `reading`, what is no file is not found.

    A class, and the error is made elsewhere: a generator, or a local name for the error, would tie the error to its own
    frames, and these hold the arrays that are being saved until the next garbage collection.
    """

    def __init__(self, action: str, *names: Path | str, reading: bool = False) -> None:
        self._action, self._names, self._reading = action, names, reading

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and not isinstance(error, MilepostError):
            raise _made(error, self._action, self._names, reading=self._reading) from error


def _made(error: OSError, action: str, names: tuple[Path | str, ...], *, reading: bool) -> MilepostError:
    missing = reading and error.errno in {errno.ENOTDIR, errno.EISDIR}
    kind = NotFoundError if missing else _KINDS.get(error.errno, StorageError)
    quoted = " and ".join(repr(str(name)) for name in names)
    made = kind(f"cannot {action} {quoted}: {_reason(error, [Path(name) for name in names])}")
    made.errno = error.errno
    if error.errno == errno.EFBIG:
        noted(made, "see `ulimit -f`, and the largest file that this file system can hold")
    return made


def _reason(error: OSError, paths: list[Path]) -> str:
    if error.errno == errno.ENOTDIR:
        way = (part for path in paths for part in (*reversed(path.parents), path))
        files = (f"{str(part)!r} is not a directory" for part in way if os.path.lexists(part) and not _is_folder(part))
        links = (f"{str(path)!r} is a link" for path in paths if path.is_symlink())
        return next(itertools.chain(files, links), "not a directory")
    if error.errno == errno.ENAMETOOLONG:
        return _too_long(paths[-1])
    return (error.strerror or str(error)).lower()


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises for what it cannot look at)


def _too_long(path: Path) -> str:
    parent = next(filter(_is_folder, path.parents))
    limit = os.pathconf(parent, "PC_NAME_MAX")
    for name in path.parts:
        if len(os.fsencode(name)) > limit:
            return f"the name {name!r} has {len(os.fsencode(name))} bytes, and {limit} are allowed here"
    return f"the path has {len(os.fsencode(path))} bytes, and {os.pathconf(parent, 'PC_PATH_MAX') - 1} are allowed"


# --- durability ------------------------------------------------------------------------------------------------------


def sync(path: Path, kind: int = os.O_DIRECTORY) -> None:
    """Make the names in a directory durable, or with another flag for opening it what a file holds."""
    file = os.open(path, os.O_RDONLY | kind)
    try:
        os.fsync(file)
    except OSError as error:
        # Some network and FUSE file systems have nothing to sync in a directory, and say so.
        if kind != os.O_DIRECTORY or error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(file)


def start_write_back(file: int, start: int, size: int) -> None:
    """Let the disk begin with a range of a file while the next one is made; a hint, which may do nothing."""
    ask = getattr(_library(), "sync_file_range", None)
    if ask is not None:
        ask(file, ctypes.c_int64(start), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


# --- renames ---------------------------------------------------------------------------------------------------------


def rename_new(old: Path, new: Path) -> None:
    """Rename a directory to a name that has nothing, or an empty directory; `FileExistsError` where more is there."""
    with contextlib.suppress(FileExistsError):
        _rename_exclusive(old, new)
        return
    # rmdir takes away an empty directory and nothing else, at one instant: a racing writer's files are safe from it.
    with contextlib.suppress(OSError):
        new.rmdir()
    _rename_exclusive(old, new)


def exchange(one: Path, other: Path) -> bool:
    """Swap two directories at one instant; False where this system cannot."""
    return _renamed(one, other, _EXCHANGE)


def _rename_exclusive(old: Path, new: Path) -> None:
    if _renamed(old, new, _NOREPLACE):
        return
    if os.path.lexists(new):
        raise failure(errno.EEXIST)
    # Between the look and the rename, only an empty directory can be lost: rename refuses to replace anything else.
    try:
        os.rename(_directory(old), _directory(new))  # noqa: PTH104 (a Path cannot end in a slash)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise failure(errno.EEXIST) from error
        raise


def _renamed(old: Path, new: Path, flags: int) -> bool:
    ask = _renameat2()
    if ask is None:
        return False
    if ask(_AT_FDCWD, _directory(old), _AT_FDCWD, _directory(new), flags) == 0:
        return True
    if ctypes.get_errno() in UNSUPPORTED:
        return False
    raise failure(ctypes.get_errno())


def _directory(path: Path) -> bytes:
    # With the slash the system itself refuses what is not a directory, a link to one included.
    return os.fsencode(path) + b"/"


def _renameat2() -> Callable[..., int] | None:
    found: Callable[..., int] | None = getattr(_library(), "renameat2", None)
    return found


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


# --- mounts ----------------------------------------------------------------------------------------------------------


def file_system(path: Path, mounts: Iterable[str] | None = None) -> str:
    """Return the type of the file system a path lies on, from the lines of `mountinfo`; "" if that cannot be told.

    >>> file_system(Path("/mnt/bucket/7"), ["1 0 0:1 / / rw - ext4 /dev/a rw", "2 1 0:2 / /mnt rw - fuse.gcs x rw"])
    'fuse.gcs'
    """
    longest, found, below = -1, "", f"{path}/"
    for line in _mounts() if mounts is None else mounts:
        where, _, kind = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), where.split(" ")[4]).rstrip("/") + "/"
        # The last of several mounts on one point is the one that is seen.
        if len(point) >= longest and below.startswith(point):
            longest, found = len(point), kind.split(" ")[0]
    return found


def _mounts() -> list[str]:
    try:
        return os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines()
    except OSError:
        return []
