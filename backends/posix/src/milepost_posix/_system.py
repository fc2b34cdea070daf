"""What the operating system is asked for beyond `os`, and what its refusals mean.

Decides which error a system call's number becomes, and what counts as "this file system cannot": the rule is that only
EINVAL, ENOSYS and EOPNOTSUPP do; everything else is a failure and is raised.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
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
    from collections.abc import Callable, Iterable, Iterator

__all__ = [
    "UNSUPPORTED",
    "exchange",
    "explained",
    "file_system",
    "rename_exclusive",
    "start_write_back",
    "sync_directory",
    "sync_file",
]

UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})

_AT_FDCWD: Final = -100
_NOREPLACE: Final = 1
_EXCHANGE: Final = 2
_SYNC_FILE_RANGE_WRITE: Final = 2

_KINDS: Final[dict[int, type[MilepostError]]] = {
    errno.ENOENT: NotFoundError,
    errno.EEXIST: AlreadyExistsError,
    errno.ENOSPC: StorageFullError,
    errno.EDQUOT: StorageFullError,
    errno.EFBIG: StorageFullError,
    errno.EACCES: StorageDeniedError,
    errno.EPERM: StorageDeniedError,
    errno.EROFS: StorageDeniedError,
}


# --- errors ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(action: str, path: Path, other: Path | None = None, *, reading: bool = False) -> Iterator[None]:
    """Turn an `OSError` of the block into milepost's; when `reading`, what is no file is not found."""
    try:
        yield
    except MilepostError:
        raise
    except OSError as error:
        # Made elsewhere: a local name for it would tie the error to this frame, and that to the arrays being saved.
        raise _made(error, action, [path, other] if other else [path], reading=reading) from error


def _made(error: OSError, action: str, paths: list[Path], *, reading: bool) -> MilepostError:
    missing = reading and error.errno in {errno.ENOTDIR, errno.EISDIR}
    kind = NotFoundError if missing else _KINDS.get(error.errno or 0, StorageError)
    made = kind(f"cannot {action} {' and '.join(repr(str(path)) for path in paths)}: {_reason(error, paths)}")
    if isinstance(made, OSError):
        made.errno = error.errno
    if error.errno == errno.EFBIG:
        noted(made, "see `ulimit -f`, and the largest file that this file system can hold")
    return made


def _reason(error: OSError, paths: list[Path]) -> str:
    if error.errno == errno.ENOTDIR:
        return _not_a_directory(paths)
    if error.errno == errno.ENAMETOOLONG:
        return _too_long(paths[-1])
    return (error.strerror or str(error)).lower()


def _not_a_directory(paths: list[Path]) -> str:
    for part in [part for path in paths for part in (*reversed(path.parents), path)]:
        # Path.is_dir raises for what it cannot look at.
        if os.path.lexists(part) and not os.path.isdir(part):  # noqa: PTH112
            return f"{str(part)!r} is not a directory"
    return next((f"{str(path)!r} is a link" for path in paths if path.is_symlink()), "not a directory")


def _too_long(path: Path) -> str:
    parent = next(part for part in path.parents if os.path.isdir(part))  # noqa: PTH112 (as above)
    limit = os.pathconf(parent, "PC_NAME_MAX")
    for name in path.parts:
        if len(os.fsencode(name)) > limit:
            return f"the name {name!r} has {len(os.fsencode(name))} bytes, and {limit} are allowed here"
    return f"the path has {len(os.fsencode(path))} bytes, and {os.pathconf(parent, 'PC_PATH_MAX') - 1} are allowed"


# --- durability ------------------------------------------------------------------------------------------------------


def sync_file(file: int) -> None:
    """Make what was written to an open file durable."""
    os.fsync(file)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    except OSError as error:
        # Some network and FUSE file systems have nothing to sync in a directory, and say so.
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(file)


def start_write_back(file: int, start: int, size: int) -> None:
    """Let the disk begin with a range of a file while the next one is made; a hint, which may do nothing."""
    ask = _library("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    if ask is not None:
        ask(file, start, size, _SYNC_FILE_RANGE_WRITE)


# --- renames ---------------------------------------------------------------------------------------------------------


def rename_exclusive(old: Path, new: Path) -> None:
    """Rename a directory to a name that nothing has; `FileExistsError` where something does."""
    if _renamed(old, new, _NOREPLACE):
        return
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    # Between the look and the rename, only an empty directory can be lost: rename refuses to replace anything else.
    try:
        os.rename(_directory(old), _directory(new))  # noqa: PTH104 (a Path cannot end in a slash)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        raise


def exchange(one: Path, other: Path) -> bool:
    """Swap two directories at one instant; False where this system cannot."""
    return _renamed(one, other, _EXCHANGE)


def _renamed(old: Path, new: Path, flags: int) -> bool:
    ask = _renameat2()
    if ask is None:
        return False
    if ask(_AT_FDCWD, _directory(old), _AT_FDCWD, _directory(new), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code))


def _directory(path: Path) -> bytes:
    # With the slash the system itself refuses what is not a directory, a link to one included.
    return os.fsencode(path) + b"/"


def _renameat2() -> Callable[..., int] | None:
    text = ctypes.c_char_p
    return _library("renameat2", ctypes.c_int, text, ctypes.c_int, text, ctypes.c_uint)


@functools.cache
def _library(name: str, *types: type[ctypes._SimpleCData[object]]) -> Callable[..., int] | None:
    found = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if found is None:
        return None
    found.argtypes = types
    found.restype = ctypes.c_int
    return found  # type: ignore[no-any-return]  # ctypes knows functions at run time only


# --- mounts ----------------------------------------------------------------------------------------------------------


def file_system(path: Path, mounts: Iterable[str] | None = None) -> str:
    """Return the type of the file system a path lies on, from the lines of `mountinfo`; "" if that cannot be told.

    >>> file_system(Path("/mnt/bucket/7"), ["1 0 0:1 / / rw - ext4 /dev/a rw", "2 1 0:2 / /mnt rw - fuse.gcs x rw"])
    'fuse.gcs'
    """
    longest, found = -1, ""
    for line in _mounts() if mounts is None else mounts:
        where, _, kind = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), where.split(" ")[4]))
        # The last of several mounts on one point is the one that is seen.
        if len(point.parts) >= longest and path.is_relative_to(point):
            longest, found = len(point.parts), kind.split(" ")[0]
    return found


def _mounts() -> list[str]:
    try:
        return os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines()
    except OSError:
        return []
