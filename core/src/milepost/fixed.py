"""How a checkpoint becomes visible where its files have fixed keys: the strategy `fixed`.

This module decides who may write below a name. Others look for the files of a checkpoint directly below it, so that two
attempts cannot have keys of their own. A checkpoint `7` looks like this:

```
7/milepost_claim.txt   whose the keys are, and what for: writing | sealed | removing
7/commit_success.txt   the manifest
7/...                  the data
```

The rules it rests on:

1. *A name is claimed by one request that fails if it is claimed already*, before the first byte, and only where nothing
   is. So whatever is below a claim may be removed by whoever holds it.
2. *A claim gets another holder or another word only by compare-and-swap.* A writer seals it before it commits; a sweep,
   a deletion or the next writer puts itself into the place of the former holder before it removes anything. Whoever
   comes first has decided, and only one at a time removes.
3. *The commit object goes before the data, and the claim after them.* Without a claim nothing is left to be removed.
4. *What has a commit object is no leftover*, whatever its claim says.
5. *A condition is believed when it has been seen to fail.* So the claim is created twice, and replaced on a condition
   that no longer holds: both must be refused, or nothing is saved.

What no claim can prevent is a request that arrives late: the keys may be another's by then. The manifest has the size
and the checksum of every file, so that reading finds out. A claim is therefore taken over only if its process is gone
from this machine, or after a day (`grace`); and one that is sealed and not committed after a day only, because the
commit object may be on its way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from typing import TYPE_CHECKING, Protocol, cast

from milepost import attempts
from milepost.commit import _MADE_AGAIN, _TRIES, CreateCommit, _committed, _exists
from milepost.errors import (
    AbortedError,
    AlreadyExistsError,
    ConfigError,
    ManifestError,
    MilepostError,
    NotFoundError,
    OutcomeUnknownError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    noted,
)
from milepost.hookspecs import hookimpl
from milepost.protocols import COMMIT_OBJECT, CreatesOnly, FindsUploads, Leftover, ReplacesObjects, Staging, Storage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

    from milepost.hookspecs import RegisterCommit

__all__ = ["CLAIM", "FixedCommit", "register_commit"]

CLAIM = "milepost_claim.txt"
"""The object that stands beside the data from before the first byte until after the last."""

_WRITING, _SEALED, _REMOVING = "writing", "sealed", "removing"
_ANOTHER_STRATEGY = "set commit = 'create' for this URL in milepost.toml where only milepost reads"


@hookimpl
def register_commit(register: RegisterCommit) -> None:
    """Offer the strategy for layouts of others."""
    register("fixed", FixedCommit)


class _Store(Storage, CreatesOnly, ReplacesObjects, Protocol):
    """A storage with all that claims need."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Claim:
    """A claim as it was read: its version, its body, who holds it, and what for ("sealed" is followed by a time)."""

    version: str
    body: bytes
    holder: str
    word: str


class FixedCommit(CreateCommit):
    """Write at fixed keys under a claim; commit by one create-only request, and never overwrite."""

    needs: tuple[type, ...] = (CreatesOnly, ReplacesObjects)
    promise = (
        "a checkpoint appears whole or not at all, with its files where other programs look for them, and of two "
        "writers racing for a name exactly one wins; overwriting is refused; what a writer that was taken for dead "
        "does later may damage files of its successor, which reading notices"
    )

    def stage(self, storage: Storage, name: str, attempt: str) -> Staging:
        """Claim the name, where nothing is or where whoever holds it is dead; then the attempt writes there."""
        store = _able(storage)
        for _ in range(_TRIES):
            free, former = self._looked(store, name)
            claim = None
            if free:
                claim = self._claimed(store, name, attempt)
            elif former is not None and _swapped(store, name, former, _body(attempt, _REMOVING)):
                _erase(store, name)
                claim = _read(store, name)
            if claim is not None:
                _begin(store, name, attempt, claim)
                return Staging(name, attempt, prefix=f"{name}/")
        raise noted(AlreadyExistsError(f"cannot save {name!r}: others claim it each time"), "save again, or elsewhere")

    def publish(self, storage: Storage, staging: Staging, manifest: bytes, *, overwrite: bool = False) -> None:
        """Seal the claim, then make the commit object: the commit point. There is none that could be overwritten."""
        del overwrite
        store = _able(storage)
        self._seal(store, staging)
        for left in reversed(range(_TRIES)):
            try:
                store.create(f"{staging.name}/{COMMIT_OBJECT}", [manifest])
            except (AlreadyExistsError, NotFoundError, StorageError) as error:
                owner = _owner(store, staging, manifest, error)
                if owner != "us":
                    self._give_up(staging, error, owner, replaces=False, left=left)
                    continue
            break

    def abandon(self, storage: Storage, staging: Staging) -> None:
        """Remove what the attempt wrote, unless it is committed, may yet be, or the keys are another's by now."""
        store, name, attempt = _able(storage), staging.name, staging.attempt
        claim = _read(store, name)
        if claim is None:
            # A sweep has been here, and what is here now was written after it: the keys were ours.
            inside = _children(store, name)
            ours = bool(inside) and COMMIT_OBJECT not in inside and self._claimed(store, name, attempt) is not None
        elif claim.word == _WRITING:
            ours = claim.holder == attempt and _swapped(store, name, claim, _body(attempt, _REMOVING))
        else:
            ours = claim.holder == attempt and claim.word == _REMOVING
        if ours:
            _remove_all(store, name, attempt)

    def leftovers(self, storage: Storage, *, older_than: float) -> Iterator[Leftover]:
        """Find the claims beside which there is no commit object."""
        store = _able(storage)
        for child in sorted(store.children("")):
            name = child.removesuffix("/")
            inside = _children(store, name) if child.endswith("/") else set()
            claim = _read(store, name) if CLAIM in inside and COMMIT_OBJECT not in inside else None
            if claim is not None:
                yield Leftover(child, name, claim.holder, *self._fate_of(claim, older_than))

    def clear(self, storage: Storage, leftover: Leftover) -> bool:
        """Take the claim over, unless it has changed or its checkpoint is committed, and remove everything."""
        store, name = _able(storage), leftover.name
        claim = _read(store, name) if leftover.dead else None
        if claim is None or claim.holder != leftover.attempt or _is_committed(store, name):
            return False
        if claim.word.startswith(_SEALED) and not self._overdue(claim.word, 0.0):
            return False
        sweeper = attempts.new_attempt()
        if not _swapped(store, name, claim, _body(sweeper, _REMOVING)):
            return False
        if _is_committed(store, name):
            # Its last request arrived in between, a day late; nothing has been removed yet.
            _hand_back(store, name, sweeper, claim)
            return False
        _remove_all(store, name, sweeper)
        return True

    def delete(self, storage: Storage, name: str) -> None:
        """Take the claim over, remove the commit object, then all else; called again, go on where it stopped."""
        store, deleter = _able(storage), attempts.new_attempt()
        for _ in range(_TRIES):
            claim = _read(store, name)
            if claim is None:
                taken = self._is_ours_unclaimed(store, name) and self._claimed(store, name, deleter) is not None
            elif claim.word == _REMOVING and not self._may_go_on(claim):
                store.delete(f"{name}/{COMMIT_OBJECT}")
                return  # all else is removed by whoever is at it
            elif claim.word != _REMOVING and not _is_committed(store, name):
                return  # somebody saves, or will be swept
            else:
                taken = _swapped(store, name, claim, _body(deleter, _REMOVING))
            if taken:
                _remove_all(store, name, deleter)
                return
            if claim is None and _read(store, name) is None:
                return  # nothing of ours was there

    def _looked(self, store: _Store, name: str) -> tuple[bool, _Claim | None]:
        """Say whether a name is free, else return the claim of a dead holder, if it is still there; or raise."""
        what, inside = f"cannot save {name!r}", _children(store, name)
        if COMMIT_OBJECT in inside:
            raise noted(
                AlreadyExistsError(f"{what}: a checkpoint is there, and its keys are those of any other"),
                "delete that checkpoint first, or save under another name",
                f"to overwrite without a gap, {_ANOTHER_STRATEGY}",
            )
        if CLAIM not in inside:
            if inside:
                raise noted(
                    AlreadyExistsError(f"{what}: {min(inside)!r} is there, and nobody has a claim to it"),
                    "remove it, or save under another name",
                )
            return True, None
        claim = _read(store, name)
        if claim is None:
            return False, None
        dead, reason = self._fate_of(claim, self._grace)
        if not dead:
            raise noted(
                AlreadyExistsError(f"{what}: attempt {claim.holder!r} has a claim to it: {reason}"),
                "save under another name, or wait; a writer elsewhere counts as dead once it is as old as `grace` in "
                "commit_options says, in seconds",
            )
        return False, claim

    def _claimed(self, store: _Store, name: str, holder: str) -> _Claim | None:
        """Claim a name that has no claim; None where another was faster."""
        try:
            made = self._made(store, _key(name), _body(holder, _REMOVING))
        except BaseException:
            with contextlib.suppress(MilepostError):
                _release(store, name, holder)
            raise
        if made == _MADE_AGAIN:
            _release(store, name, holder)
            raise noted(
                ConfigError(
                    f"cannot claim {name!r}: {store.url!r} creates an object though there is one, "
                    "so of two saves at once both could succeed"
                ),
                "files at fixed keys need a storage that keeps such conditions",
                f"milepost doctor {store.url} says what else the storage does not keep",
            )
        claim = _read(store, name)
        return claim if claim is not None and claim.holder == holder else None

    def _seal(self, storage: Storage, staging: Staging) -> None:
        store, name = _able(storage), staging.name
        claim = _read(store, name)
        if claim is not None and claim.holder == staging.attempt:
            sealed = _body(staging.attempt, f"{_SEALED} {time.time()}")
            if claim.word.startswith(_SEALED):
                return  # `publish` is called again
            if claim.word == _WRITING and _swapped(store, name, claim, sealed):
                return
        what = f"cannot commit {name!r}"
        if _is_committed(store, name):
            raise AlreadyExistsError(f"{what}: this save was taken for dead, and another checkpoint is there")
        raise noted(AbortedError(f"{what}: this save was taken for dead, and its data removed"), "save again")

    def _fate_of(self, claim: _Claim, older_than: float) -> tuple[bool, str]:
        if attempts.parse_attempt(claim.holder) is None:
            return False, f"the claim cannot be read: {claim.body[:60]!r}"
        if claim.word.startswith(_SEALED):
            dead = self._overdue(claim.word, older_than)
            return (
                dead,
                f"it was about to be committed ({claim.word!r}), which {'never came' if dead else 'may yet come'}",
            )
        dead, reason = attempts.fate(claim.holder, older_than=older_than)
        return dead, f"it was being removed, and {reason}" if claim.word == _REMOVING else reason

    def _may_go_on(self, claim: _Claim) -> bool:
        """Say whether a removal that somebody began may be completed by this process."""
        known = attempts.parse_attempt(claim.holder)
        if known is not None and (known.place, known.pid) == (attempts.place(), os.getpid()):
            return True
        return attempts.fate(claim.holder, older_than=self._grace)[0]

    def _is_ours_unclaimed(self, store: _Store, name: str) -> bool:
        """Say whether there is a checkpoint of ours without a claim: copied here, or saved by another strategy."""
        try:
            return _committed(store, name) is not None
        except ManifestError:
            # It may be of others, whose files the caller removes, if anybody.
            store.delete(f"{name}/{COMMIT_OBJECT}")
            return False


def _able(storage: Storage) -> _Store:
    if not (isinstance(storage, CreatesOnly) and isinstance(storage, ReplacesObjects)):
        raise TypeError(f"cannot claim anything in {storage.url!r}: its storage cannot create only, or not replace")
    return cast("_Store", storage)


def _key(name: str) -> str:
    return f"{name}/{CLAIM}"


def _body(holder: str, word: str) -> bytes:
    return f"{holder} {word}\n".encode()


def _children(store: _Store, name: str) -> set[str]:
    return set(store.children(f"{name}/")) - {""}


def _is_committed(store: _Store, name: str) -> bool:
    return _exists(store, f"{name}/{COMMIT_OBJECT}")


def _read(store: _Store, name: str) -> _Claim | None:
    try:
        # The version first: if the claim changes in between, a swap will fail.
        version = store.version(_key(name))
        body = bytes(store.read(_key(name)))
    except NotFoundError:
        return None
    holder, _, word = body.decode(errors="replace").strip().partition(" ")
    return _Claim(version, body, holder, word)


def _swapped(store: _Store, name: str, claim: _Claim, body: bytes) -> bool:
    """Put another claim in the place of one; False where that one has changed."""
    for left in reversed(range(_TRIES)):
        try:
            store.replace(_key(name), [body], claim.version)
        except (AlreadyExistsError, NotFoundError, StorageError) as error:
            found = _read(store, name)
            if found is not None and found.body == body:
                return True  # ours: the reply was lost
            if found is None or found.version != claim.version:
                return False
            if not left or isinstance(error, (StorageFullError, StorageDeniedError)):
                raise
            continue
        return True
    raise AssertionError("unreachable")


def _begin(store: _Store, name: str, attempt: str, claim: _Claim) -> None:
    """Have the claim say that the attempt writes, now that nothing is there any more."""
    if claim.holder != attempt or not _swapped(store, name, claim, _body(attempt, _WRITING)):
        raise noted(AbortedError(f"cannot save {name!r}: a sweep took this save for dead"), "save again")
    try:
        _check_replacing(store, name, claim, attempt)
    except BaseException:
        with contextlib.suppress(MilepostError):
            _release(store, name, attempt)
        raise


def _check_replacing(store: _Store, name: str, former: _Claim, attempt: str) -> None:
    for left in reversed(range(_TRIES)):
        try:
            store.replace(_key(name), [_body(attempt, _WRITING)], former.version)
        except (AlreadyExistsError, NotFoundError):
            return
        except StorageError:
            if not left:
                raise
            continue
        raise noted(
            ConfigError(
                f"cannot save {name!r}: {store.url!r} replaces an object whatever its version is, so of two saves at "
                "once both could succeed"
            ),
            _ANOTHER_STRATEGY,
            f"milepost doctor {store.url} says what else the storage does not keep",
        )


def _owner(store: _Store, staging: Staging, manifest: bytes, error: Exception) -> Literal["us", "nobody", "another"]:
    """Say whose checkpoint the name holds after a request that failed, or seemed to."""
    what = f"cannot tell whether {staging.name!r} was committed"
    try:
        with contextlib.suppress(NotFoundError):
            return "us" if bytes(store.read(f"{staging.name}/{COMMIT_OBJECT}")) == manifest else "another"
        claim = _read(store, staging.name)
    except StorageError:
        raise OutcomeUnknownError(f"{what}: the storage failed, and then failed to say") from error
    if claim is None or claim.holder != staging.attempt:
        # It was committed, and deleted since; or it is late by days, and was swept.
        raise OutcomeUnknownError(f"{what}: the attempt was removed meanwhile") from error
    return "nobody"


def _remove_all(store: _Store, name: str, holder: str) -> None:
    _erase(store, name)
    _release(store, name, holder)


def _erase(store: _Store, name: str) -> None:
    """Remove all but the claim, which says that this is being done."""
    prefix = f"{name}/"
    if isinstance(store, FindsUploads):
        # To list them is a permission of its own, and without it the objects go all the same.
        with contextlib.suppress(StorageError):
            for upload in store.uploads(prefix):
                store.abort_upload(upload)
    for _ in range(_TRIES):
        inside = _children(store, name) - {CLAIM}
        if not inside:
            break  # else somebody who was taken for dead goes on writing
        if COMMIT_OBJECT in inside:
            store.delete(prefix + COMMIT_OBJECT)
        # Orbax opens an item by itself if only the item's own commit object is there.
        for folder in sorted(child for child in inside if child.endswith("/")):
            store.delete(f"{prefix}{folder}{COMMIT_OBJECT}")
        for child in sorted(inside - {COMMIT_OBJECT}):
            store.delete(prefix + child)


def _release(store: _Store, name: str, holder: str) -> None:
    # Whoever was taken for dead meanwhile must not remove the claim of his successor.
    claim = _read(store, name)
    if claim is not None and claim.holder == holder:
        store.delete(_key(name))


def _hand_back(store: _Store, name: str, sweeper: str, former: _Claim) -> None:
    claim = _read(store, name)
    if claim is not None and claim.holder == sweeper:
        _swapped(store, name, claim, former.body)
