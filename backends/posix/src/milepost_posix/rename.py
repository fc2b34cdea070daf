"""Commit by renaming a directory.

Decides when a checkpoint of a file system exists: from the instant at which the directory it was written into gets its
name. Every directory this strategy makes up is called `<name>.orbax-checkpoint-tmp-<attempt>`, with one of these ends:

```
(none)     an attempt that is being written, or after an exchange the checkpoint it replaced
.old       the former checkpoint, between the two renames of an overwrite where the system has no exchange
.deleted   on its way out, whatever it was
```

The rules, in the order in which they save checkpoints:

1. While `<name>` is missing, its `.old` *is* the checkpoint: it is read there, put back by the next writer or sweep,
   and never removed by anything but a deletion.
2. Nothing is removed under a name at which somebody could still publish or read it: it is renamed to `.deleted` first.
3. A ticket is left in a new staging directory and must be there when its attempt is published. A sweep takes it away
   with the directory, so that a writer that was taken for dead and writes on cannot publish the rest of its files.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Final

from milepost import attempts
from milepost.errors import (
    AbortedError,
    AlreadyExistsError,
    InvalidLayoutError,
    MilepostError,
    NotFoundError,
    OutcomeUnknownError,
    StorageError,
    noted,
)
from milepost.protocols import (
    COMMIT_OBJECT,
    ExchangesPrefixes,
    Leftover,
    RenamesPrefixes,
    Staging,
    Storage,
    SyncsPrefixes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RenameCommit"]

_INFIX: Final = ".orbax-checkpoint-tmp-"
_OLD: Final = ".old"
_DELETED: Final = ".deleted"
_FORM: Final = re.compile(rf"(?P<name>.+){re.escape(_INFIX)}(?P<attempt>[^/]+?)(?P<end>\.old|\.deleted)?/", re.DOTALL)
_TICKET: Final = "in_progress"
_ADDED: Final = len(_INFIX) + 46 + len(_DELETED)
_LONGEST: Final = 255 - _ADDED
_TRIES: Final = 16


class RenameCommit:
    """Publish a staging directory by one rename to a name that must not exist, or be an empty directory."""

    needs: tuple[type, ...] = (RenamesPrefixes,)
    promise = (
        "a checkpoint appears whole, at one instant, and survives power cuts from then on; of writers racing for one"
        " name exactly one wins; an overwrite leaves the former or the new one loadable at every instant"
    )

    def stage(self, storage: Storage, name: str, attempt: str) -> Staging:
        """Say where an attempt writes, and leave its ticket there; refuse a name that could never be published."""
        size = len(os.fsencode(name.rpartition("/")[2]))
        if size > _LONGEST:
            raise noted(
                StorageError(f"cannot save as {name!r}: the name has {size} bytes, and {_LONGEST} are allowed"),
                f"while a checkpoint is written, up to {_ADDED} bytes are added to its name",
            )
        _refuse(storage, name, overwrite=True)
        staging = Staging(name, attempt, f"{name}{_INFIX}{attempt}/")
        try:
            storage.write(staging.prefix + _TICKET, [attempt.encode()])
        except BaseException:
            # Nobody else knows of the attempt yet who could remove what is left of it.
            with contextlib.suppress(MilepostError):
                storage.delete(staging.prefix)
            raise
        return staging

    def publish(self, storage: Storage, staging: Staging, manifest: bytes, *, overwrite: bool = False) -> None:
        """Make the attempt the checkpoint of its name, by one rename or one exchange."""
        _settle(storage, staging.name)
        try:
            _seal(storage, staging, manifest)
            _enter(storage, staging, overwrite=overwrite)
        except (AlreadyExistsError, AbortedError):
            # A network file system may repeat a rename whose reply was lost: then it was done before it failed.
            if not _is_ours(storage, staging, manifest):
                raise
            _sync(storage, f"{staging.name}/")
        except StorageError as error:
            if _is_ours(storage, staging, manifest):
                raise OutcomeUnknownError(
                    f"cannot say whether {_called(storage, staging.name)} would survive a power cut:"
                    " it is there, but not synced"
                ) from error
            raise

    def abandon(self, storage: Storage, staging: Staging) -> None:
        """Remove what a failed attempt wrote; a former checkpoint that it had put aside gets its name back."""
        _settle(storage, staging.name)
        _discard(storage, staging.prefix, staging.name)

    def recover(self, storage: Storage, name: str) -> str | None:
        """Return the prefix of the former checkpoint if an overwrite was cut off between its two renames."""
        if _holds(storage, f"{name}/"):
            return None
        return next((old for old in _olds(storage, name) if _holds(storage, old)), None)

    def leftovers(self, storage: Storage, *, older_than: float) -> Iterator[Leftover]:
        """Find the directories of attempts, overwrites and deletions directly below the root."""
        for child in storage.children(""):
            if made := _parse(child):
                dead, reason = attempts.fate(made["attempt"], older_than=older_than)
                yield Leftover(child, made["name"], made["attempt"], dead, reason)

    def clear(self, storage: Storage, leftover: Leftover) -> bool:
        """Rename it away, then remove it; a former checkpoint whose name is missing gets it back instead."""
        made = _parse(leftover.prefix)
        if made is None:
            return False
        if made["end"] == _OLD:
            return _settle(storage, made["name"])
        return _discard(storage, leftover.prefix, made["name"])

    def delete(self, storage: Storage, name: str) -> None:
        """Remove a checkpoint: its name goes by one rename, then its files."""
        if any(storage.children(f"{name}/")) and not _holds(storage, f"{name}/"):
            raise InvalidLayoutError(f"cannot delete {_called(storage, name)}: it holds no {COMMIT_OBJECT}")
        # What could be read in its place goes first.
        for prefix in (*_olds(storage, name), f"{name}/"):
            _discard(storage, prefix, name)


# --- what is there ---------------------------------------------------------------------------------------------------


def _called(storage: Storage, name: str) -> str:
    return repr(f"{storage.url.removesuffix('/')}/{name}")


def _parse(prefix: str) -> re.Match[str] | None:
    """Read a prefix that this strategy made up."""
    found = _FORM.fullmatch(prefix)
    return found if found and attempts.parse_attempt(found["attempt"]) else None


def _holds(storage: Storage, prefix: str) -> bool:
    return COMMIT_OBJECT in storage.children(prefix)


def _olds(storage: Storage, name: str) -> list[str]:
    """Return the prefixes at which overwrites put the checkpoint of a name aside, the newest first."""
    folder = name[: name.rfind("/") + 1]
    made = filter(None, (_parse(f"{folder}{child}") for child in storage.children(folder)))
    return sorted((old[0] for old in made if (old["name"], old["end"]) == (name, _OLD)), reverse=True)


def _is_ours(storage: Storage, staging: Staging, manifest: bytes) -> bool:
    with contextlib.suppress(NotFoundError, StorageError):
        return storage.read(f"{staging.name}/{COMMIT_OBJECT}") == manifest
    return False


def _refuse(storage: Storage, name: str, *, overwrite: bool) -> None:
    """Raise unless the name is free, or holds a checkpoint that may be replaced."""
    children = set(storage.children(f"{name}/"))
    if COMMIT_OBJECT in children:
        if not overwrite:
            raise _taken(storage, name, "a checkpoint is there")
    elif children or _is_object(storage, name):
        found = f"it holds {min(children)!r} and no {COMMIT_OBJECT}" if children else "it is a file"
        raise noted(_taken(storage, name, found), "only a checkpoint can be overwritten: move what is there away")


def _is_object(storage: Storage, name: str) -> bool:
    with contextlib.suppress(NotFoundError):
        return storage.size(name) >= 0
    return False


def _taken(storage: Storage, name: str, found: str) -> AlreadyExistsError:
    return AlreadyExistsError(f"cannot save as {_called(storage, name)}: {found}")


# --- moving ----------------------------------------------------------------------------------------------------------


def _rename(storage: Storage, source: str, target: str) -> None:
    if not isinstance(storage, RenamesPrefixes):
        raise TypeError(f"cannot commit by rename below {storage.url!r}: this storage renames no prefixes")
    storage.rename(source, target)


def _discard(storage: Storage, prefix: str, name: str) -> bool:
    """Take a prefix away from everybody, then remove it; False where somebody was quicker."""
    fenced = f"{name}{_INFIX}{attempts.new_attempt()}{_DELETED}/"
    try:
        _rename(storage, prefix, fenced)
    except NotFoundError:
        return False
    storage.delete(fenced)
    return True


def _settle(storage: Storage, name: str) -> bool:
    """End the overwrites of a name that were cut off; say whether anything was put back or removed."""
    done = False
    for old in _olds(storage, name):
        if _holds(storage, f"{name}/") or not _holds(storage, old):
            done |= _discard(storage, old, name)
        else:
            # Where something else has the name by now, the former checkpoint stays where it is.
            with contextlib.suppress(AlreadyExistsError, NotFoundError):
                _rename(storage, old, f"{name}/")
                done = True
    return done


def _seal(storage: Storage, staging: Staging, manifest: bytes) -> None:
    """Complete the staging directory; raise `AbortedError` if it is not the one that was staged."""
    storage.write(staging.prefix + COMMIT_OBJECT, [manifest])
    # Only now: had it been taken away before, the line above would have begun a new one, without a ticket.
    if _TICKET not in storage.children(staging.prefix):
        raise _aborted(storage, staging)
    storage.delete(staging.prefix + _TICKET)
    try:
        _sync(storage, staging.prefix)
    except NotFoundError as error:
        raise _aborted(storage, staging) from error


def _aborted(storage: Storage, staging: Staging) -> AbortedError:
    return noted(
        AbortedError(f"cannot commit {_called(storage, staging.name)}: {staging.prefix!r} was swept away"),
        "a sweep took this save for dead; save again, and sweep only what is older than a save can last",
    )


def _sync(storage: Storage, prefix: str) -> None:
    if isinstance(storage, SyncsPrefixes):
        storage.sync(prefix)


def _enter(storage: Storage, staging: Staging, *, overwrite: bool) -> None:
    """Give the attempt its name, also where others save, delete and sweep meanwhile: then look again."""
    for _ in range(_TRIES):
        if not _holds(storage, staging.prefix):
            raise _aborted(storage, staging)
        with contextlib.suppress(AlreadyExistsError, NotFoundError):
            if overwrite and _holds(storage, f"{staging.name}/"):
                _replace(storage, staging)
            else:
                _rename(storage, staging.prefix, f"{staging.name}/")
            return
        _refuse(storage, staging.name, overwrite=overwrite)
    raise _taken(storage, staging.name, "something is there, or others keep saving there")


def _replace(storage: Storage, staging: Staging) -> None:
    """Put the attempt in the place of what has the name."""
    name = f"{staging.name}/"
    former = staging.prefix
    if not (isinstance(storage, ExchangesPrefixes) and storage.exchange(staging.prefix, name)):
        former = f"{staging.prefix[:-1]}{_OLD}/"
        _rename(storage, name, former)
        try:
            _rename(storage, staging.prefix, name)
        except MilepostError:
            with contextlib.suppress(MilepostError):
                _rename(storage, former, name)
            raise
    # The new checkpoint is there; what cannot be removed of the former one is left to a sweep.
    with contextlib.suppress(MilepostError):
        _discard(storage, former, staging.name)
