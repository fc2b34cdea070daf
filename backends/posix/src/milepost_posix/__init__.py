"""Local and network file systems for milepost.

Decides which names this package claims: the URL scheme `file` and the commit strategy `rename`. The rule: a checkpoint
is written into a directory of its own, synced whole, and appears by one rename to a name that must not exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost.hookspecs import hookimpl

from milepost_posix.rename import RenameCommit
from milepost_posix.storage import PosixStorage

if TYPE_CHECKING:
    from milepost.hookspecs import RegisterCommit, RegisterStorage

__all__ = ["PosixStorage", "RenameCommit", "register_commit", "register_storage"]


@hookimpl
def register_storage(register: RegisterStorage) -> None:
    """Offer `file://`."""
    register("file", PosixStorage)


@hookimpl
def register_commit(register: RegisterCommit) -> None:
    """Offer commit by rename."""
    register("rename", RenameCommit)
