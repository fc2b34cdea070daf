"""What a log of changes says about order: was everything synced before a name made it visible, or the save returned?

The rule: a file system owes nothing for what was not synced, whatever today's ext4 gives away. A file owes a sync for
its content, a folder for the names in it; a name that moves must have nothing owing below it.
"""

from __future__ import annotations

import dataclasses
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Change", "changes", "owing"]

_SYNCS = ("fsync", "fdatasync")
_HINTS = ("sync_file_range",)
_REMOVES = ("unlink", "unlinkat", "rmdir")
_NAMES = ("open", "open64", "openat", "openat64", "creat", "creat64", "mkdir", "mkdirat", "symlink", "symlinkat")


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One line of the log: the call, and the path or paths it changed."""

    call: str
    path: PurePath
    to: PurePath | None


def changes(log: str) -> Iterator[Change]:
    """Read a log of the preloaded library.

    >>> [*changes("1 rename /a -> /b")]
    [Change(call='rename', path=PurePosixPath('/a'), to=PurePosixPath('/b'))]
    """
    for line in log.splitlines():
        _, call, paths = line.split(" ", 2)
        path, _, to = paths.partition(" -> ")
        yield Change(call, PurePath(path), PurePath(to) if to else None)


def owing(done: Iterable[Change]) -> list[str]:
    """Return what was made visible, or was left at the end, without a sync; in words.

    >>> owing(changes("1 mkdir /r/a\\n2 fsync /r/a\\n3 rename /r/a -> /r/b\\n4 fsync /r"))
    []
    >>> owing(changes("1 mkdir /r/a\\n2 rename /r/a -> /r/b\\n3 fsync /r"))
    ['/r/a was not synced before it was renamed']
    """
    owed: set[PurePath] = set()
    found: list[str] = []
    for change in done:
        if change.call in _SYNCS:
            owed.discard(change.path)
        elif change.call in _HINTS:
            continue
        elif change.call in _REMOVES:
            owed.discard(change.path)  # that it comes back after a power cut does no harm
        elif change.to:
            early = {path for path in owed if path.is_relative_to(change.path) or path.is_relative_to(change.to)}
            found += [f"{path} was not synced before it was renamed" for path in sorted(early)]
            owed = owed - early | {change.path.parent, change.to.parent}
        else:
            owed |= {change.path.parent} if change.call in _NAMES else set()
            owed |= {change.path}
    return found + [f"{path} was not synced when the save returned" for path in sorted(owed)]
