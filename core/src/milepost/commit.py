"""How a checkpoint becomes visible on a store that has no rename: the strategies `create` and `marker`.

This module decides who owns a name and what may be deleted. A checkpoint `7` of attempt `A` looks like this:

```
7/commit_success.txt   the manifest; it names the attempt whose data are the checkpoint
7/A/...                the data: keys that no other attempt ever writes, so that nothing can mix
7/A/begun              written first, when the attempt is staged
7/A.verdict            who decided over the attempt: sealed | aborted | retired
```

The rules it rests on:

1. *The commit object is made by one request that fails if it is there already.* One of two racing writers wins.
2. *The verdict is made by one such request, too, by the writer ("sealed") or by a sweep ("aborted").* Whoever comes
   first has decided: no sweep removes the data of a writer that may commit, no writer commits what a sweep may have
   removed.
3. *Data go before the verdict, always.* So a verdict that is missing means: nobody fenced the attempt off, or somebody
   did and has removed all of it. A writer that comes late seals successfully only in the second case, and then misses
   the object `begun`, which is made once and never again. Therefore no verdict has to be kept for ever.
4. *Before the commit object ceases to name an attempt, the attempt's verdict says "retired".* So a writer that lost the
   reply to its commit, and finds another commit object or none, knows that it had been committed if it is retired. Only
   if it is not may it ask again: committing a second time would name data that are gone. And whatever is retired and
   not named by the commit object is dead, however young.
5. *A commit object that cannot be read protects everything beside it.* It may be torn, foreign or from the future.
6. *A condition is believed when it has been seen to fail.* A store that ignores conditions accepts every one of them.
   So `begun` is created twice, and the second time must be refused; and before a commit object is replaced, `begun` is
   replaced on a condition that cannot hold, which must be refused as well. Otherwise nothing is saved.

What remains is an attempt that is sealed, and neither committed nor retired: its writer died between two requests, or
the second one is on its way. It is removed after a day (`grace`) only; a later request would do harm.

Without create-only requests (`marker`), rules 1 and 2 become "look, write, look again": two writers racing for a name,
or a writer racing with a sweep, may not notice each other.
"""

from __future__ import annotations

import abc
import contextlib
import json
import time
from typing import TYPE_CHECKING, Literal

from milepost import attempts
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
from milepost.protocols import COMMIT_OBJECT, CreatesOnly, Leftover, ListsInOrder, ReplacesObjects, Staging, Storage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from milepost.hookspecs import RegisterCommit

__all__ = ["CreateCommit", "MarkerCommit", "register_commit"]

_SEALED, _ABORTED, _RETIRED = "sealed", "aborted", "retired"
_VERDICT = ".verdict"
_AFTER_SLASH = "0"  # the character that follows "/": whatever begins with "7/" is before "70"
_MADE_AGAIN = 3  # times that one object was created: it is no accident
_ONE_WRITER = "if only one process at a time saves here, set commit = 'marker' for this URL in milepost.toml"
_TRIES = 8  # of one request: lost replies and lost races come in small numbers, and nothing may loop for ever


@hookimpl
def register_commit(register: RegisterCommit) -> None:
    """Offer the strategies that need no vendor."""
    register("create", CreateCommit)
    register("marker", MarkerCommit)


class _PrefixCommit(abc.ABC):
    """What both strategies share: everything but the two requests of which the rules speak."""

    def __init__(self, *, grace: float = attempts.DAY) -> None:
        self._grace = grace

    @abc.abstractmethod
    def _create(self, storage: Storage, key: str, body: bytes) -> None:
        """Make an object, or raise `AlreadyExistsError` if there is one."""

    @abc.abstractmethod
    def _version(self, storage: Storage, key: str) -> str | None:
        """Return what `_replace` needs to know; None if nothing is there, or if it can never be replaced."""

    @abc.abstractmethod
    def _replace(self, storage: Storage, key: str, body: bytes, version: str) -> None:
        """Put an object in the place of the one of that version."""

    @abc.abstractmethod
    def _replaces(self, storage: Storage) -> bool:
        """Say whether `_replace` works with this storage."""

    @abc.abstractmethod
    def _begin(self, storage: Storage, name: str, attempt: str) -> None:
        """Make the object `begun`, and find out whether the storage keeps what rules 1 and 2 need."""

    @abc.abstractmethod
    def _check_replacing(self, storage: Storage, staging: Staging, version: str) -> None:
        """Raise unless the storage refuses to replace an object that is not of that version."""

    def stage(self, storage: Storage, name: str, attempt: str) -> Staging:
        """Say where the attempt writes, and begin it; its id tells others whether its writer lives."""
        self._begin(storage, name, attempt)
        return Staging(name, attempt, prefix=f"{name}/{attempt}/", data=f"{attempt}/")

    def publish(self, storage: Storage, staging: Staging, manifest: bytes, *, overwrite: bool = False) -> None:
        """Seal the attempt, then make the commit object, or replace it: the commit point."""
        self._seal(storage, staging)
        replaces = overwrite and self._replaces(storage)
        for left in reversed(range(_TRIES)):
            try:
                self._put(storage, staging, manifest, replaces=replaces)
            except (AlreadyExistsError, NotFoundError, StorageError) as error:
                # A lost reply is not a lost race: clients report "already exists" for their own success.
                owner = _owner(storage, staging, manifest, error)
                if owner != "us":
                    self._give_up(staging, error, owner, replaces=replaces, left=left)
                    continue
            break
        if replaces:
            # The checkpoint is committed; what cannot be removed now is left to a sweep.
            with contextlib.suppress(StorageError):
                _remove_retired(storage, staging.name)

    def abandon(self, storage: Storage, staging: Staging) -> None:
        """Remove what the attempt wrote, unless it is committed, or may yet be by a request on its way."""
        verdict = _read_verdict(storage, staging.name, staging.attempt)
        with contextlib.suppress(ManifestError):  # nothing can be proven beside a commit object that cannot be read
            committed = _committed(storage, staging.name)
            pending = committed is None and verdict.startswith(_SEALED)
            if committed != staging.attempt and not pending:
                _remove(storage, staging.name, staging.attempt)

    def recover(self, storage: Storage, name: str) -> None:
        """Return None: the commit object is replaced at one instant, so nothing is ever between old and new."""
        del storage, name

    def leftovers(self, storage: Storage, *, older_than: float) -> Iterator[Leftover]:
        """Find the attempts that the commit object of their name does not name.

        Of a name with a commit object and a single attempt it is taken for granted that they belong together: most are
        like that, and it saves a request for each.
        """
        for name, children in _contents(storage):
            found = _attempts(children)
            if not found or (len(found) == 1 and COMMIT_OBJECT in children):
                continue
            try:
                committed, damage = _committed(storage, name), ""
            except ManifestError as error:
                committed, damage = None, str(error)
            for attempt in found:
                if attempt != committed:
                    fate = (False, damage) if damage else self._fate(storage, name, attempt, older_than)
                    yield Leftover(f"{name}/{attempt}/", name, attempt, *fate)

    def clear(self, storage: Storage, leftover: Leftover) -> bool:
        """Decide over the attempt, unless its writer already has, and remove it."""
        if not leftover.dead:
            return False
        name, attempt = leftover.name, leftover.attempt
        verdict = self._decide(storage, name, attempt, _ABORTED)
        if verdict not in {_ABORTED, _RETIRED} and not self._overdue(verdict, 0.0):
            return False
        try:
            # Looked up after the verdict: what was committed before that moment is named, or retired (rule 4).
            if _committed(storage, name) == attempt:
                return False
        except ManifestError:
            return False
        _remove(storage, name, attempt)
        return True

    def delete(self, storage: Storage, name: str) -> None:
        """Retire the attempt, remove the commit object, then the data; called again, go on where it stopped."""
        with contextlib.suppress(ManifestError):
            _retire(storage, name, _committed(storage, name))
        storage.delete(f"{name}/{COMMIT_OBJECT}")
        _remove_retired(storage, name)

    def _seal(self, storage: Storage, staging: Staging) -> None:
        what = f"cannot commit {staging.name!r}"
        verdict = self._decide(storage, staging.name, staging.attempt, f"{_SEALED} {time.time()}")
        if not verdict.startswith(_SEALED):
            raise noted(AbortedError(f"{what}: a sweep took this save for dead and removed it"), "save again")
        try:
            storage.size(_begun(staging.name, staging.attempt))
        except NotFoundError as error:
            _remove(storage, staging.name, staging.attempt)
            raise noted(AbortedError(f"{what}: its data were removed meanwhile"), "save again") from error

    def _decide(self, storage: Storage, name: str, attempt: str, verdict: str) -> str:
        """Return the verdict that stands: this one, if there was none."""
        for left in reversed(range(_TRIES)):
            try:
                self._create(storage, _verdict(name, attempt), verdict.encode())
            except (AlreadyExistsError, NotFoundError, StorageError):
                found = _read_verdict(storage, name, attempt)
                if not found and not left:
                    raise
                if not found:
                    continue
                return found
            return verdict
        raise AssertionError("unreachable")

    def _put(self, storage: Storage, staging: Staging, manifest: bytes, *, replaces: bool) -> None:
        key = f"{staging.name}/{COMMIT_OBJECT}"
        version = self._version(storage, key) if replaces else None
        if version is None:
            self._create(storage, key, manifest)
            return
        self._check_replacing(storage, staging, version)
        with contextlib.suppress(ManifestError):
            _retire(storage, staging.name, _committed(storage, staging.name))
        self._replace(storage, key, manifest, version)

    def _give_up(
        self, staging: Staging, error: Exception, owner: Literal["nobody", "another"], *, replaces: bool, left: int
    ) -> None:
        """Raise, unless asking again may help."""
        what = f"cannot commit {staging.name!r}"
        if owner == "another" and not (replaces and left):
            way_out = (
                "save under another name, delete that checkpoint first, or overwrite it where the storage allows it"
            )
            raise noted(AlreadyExistsError(f"{what}: another checkpoint is there"), way_out) from error
        if owner == "nobody" and isinstance(error, (StorageFullError, StorageDeniedError)):
            raise error
        if not left:
            raise OutcomeUnknownError(
                f"{what}: the storage failed {_TRIES} times, and a request may be late"
            ) from error

    def _fate(self, storage: Storage, name: str, attempt: str, older_than: float) -> tuple[bool, str]:
        verdict = _read_verdict(storage, name, attempt)
        if not verdict:
            return attempts.fate(attempt, older_than=older_than)
        if verdict == _RETIRED:
            return True, "it was replaced or deleted"
        if verdict == _ABORTED:
            return True, "another sweep began to remove it"
        dead = self._overdue(verdict, older_than)
        return dead, f"it was about to be committed ({verdict!r}), which {'never came' if dead else 'may yet come'}"

    def _overdue(self, verdict: str, older_than: float) -> bool:
        word, _, when = verdict.partition(" ")
        try:
            return word == _SEALED and time.time() - float(when) >= max(self._grace, older_than)
        except ValueError:
            return False


class CreateCommit(_PrefixCommit):
    """Commit by one create-only request; overwrite by one compare-and-swap, where the storage has it."""

    needs: tuple[type, ...] = (CreatesOnly,)
    promise = (
        "a checkpoint appears whole or not at all, and of two writers racing for a name exactly one wins; "
        "overwriting needs a storage that can compare and swap an object"
    )

    def _begin(self, storage: Storage, name: str, attempt: str) -> None:
        try:
            _check_made(storage, name, self._made(storage, _begun(name, attempt), attempt.encode()))
        except BaseException:
            # Nobody else knows of the attempt yet who could remove what is left of it.
            with contextlib.suppress(MilepostError):
                _remove(storage, name, attempt)
            raise

    def _made(self, storage: Storage, key: str, body: bytes) -> int:
        """Create an object that is no other's until that is refused; return how often it was not."""
        made = failed = 0
        while made < _MADE_AGAIN:
            try:
                self._create(storage, key, body)
                made += 1
            except AlreadyExistsError:
                break  # also at once: then a request of ours has made it whose reply was lost
            except (StorageFullError, StorageDeniedError):
                raise
            except StorageError:
                failed += 1  # which proves nothing
                if failed == _TRIES:
                    raise
        return made

    def _check_replacing(self, storage: Storage, staging: Staging, version: str) -> None:
        with contextlib.suppress(AlreadyExistsError):
            # The version is that of the commit object, so a storage that compares it cannot find it here.
            self._replace(storage, _begun(staging.name, staging.attempt), staging.attempt.encode(), version)
            raise noted(
                ConfigError(
                    f"cannot overwrite {staging.name!r}: {storage.url!r} replaces an object whatever its version is, "
                    "so of two saves at once both could succeed"
                ),
                "save under another name, or delete that checkpoint first",
                _ONE_WRITER,
            )

    def _create(self, storage: Storage, key: str, body: bytes) -> None:
        if not isinstance(storage, CreatesOnly):
            raise TypeError(f"cannot commit in {storage.url!r}: its storage has no create-only write")
        storage.create(key, [body])

    def _replaces(self, storage: Storage) -> bool:
        return isinstance(storage, ReplacesObjects)

    def _version(self, storage: Storage, key: str) -> str | None:
        with contextlib.suppress(NotFoundError):
            return storage.version(key) if isinstance(storage, ReplacesObjects) else None
        return None

    def _replace(self, storage: Storage, key: str, body: bytes, version: str) -> None:
        if isinstance(storage, ReplacesObjects):
            storage.replace(key, [body], version)


class MarkerCommit(_PrefixCommit):
    """Commit by a plain write of the commit object, after a look whether there is one: for one writer at a time."""

    needs: tuple[type, ...] = ()
    promise = (
        "a checkpoint appears whole or not at all if one writer at a time saves under its name; "
        "writers that race may both report success, and a sweep must not run beside a save older than its age limit"
    )

    def _begin(self, storage: Storage, name: str, attempt: str) -> None:
        storage.write(_begun(name, attempt), [attempt.encode()])

    def _check_replacing(self, storage: Storage, staging: Staging, version: str) -> None:
        """Nothing is promised that could be checked."""

    def _create(self, storage: Storage, key: str, body: bytes) -> None:
        if _exists(storage, key):
            raise AlreadyExistsError(f"cannot create '{storage.url}/{key}': an object is there")
        self._replace(storage, key, body, "")

    def _replaces(self, storage: Storage) -> bool:
        del storage
        return True

    def _version(self, storage: Storage, key: str) -> str | None:
        return "" if _exists(storage, key) else None

    def _replace(self, storage: Storage, key: str, body: bytes, version: str) -> None:
        del version
        storage.write(key, [body])
        if bytes(storage.read(key)) != body:
            raise AlreadyExistsError(f"cannot write '{storage.url}/{key}': another writer came at the same time")


def _check_made(storage: Storage, name: str, made: int) -> None:
    """Raise if one object was created more often than once, none of which was of another's making."""
    what = f"cannot save {name!r}"
    if made == _MADE_AGAIN:
        raise noted(
            ConfigError(
                f"{what}: {storage.url!r} creates an object though there is one, "
                "so of two saves at once both could succeed"
            ),
            _ONE_WRITER,
            f"milepost doctor {storage.url} says what else the storage does not keep",
        )
    if made > 1:  # it was there, then it was not, then it was there again
        raise noted(AbortedError(f"{what}: a sweep took this save for dead and removed it"), "save again")


def _begun(name: str, attempt: str) -> str:
    return f"{name}/{attempt}/begun"


def _verdict(name: str, attempt: str) -> str:
    return f"{name}/{attempt}{_VERDICT}"


def _read_verdict(storage: Storage, name: str, attempt: str) -> str:
    try:
        return bytes(storage.read(_verdict(name, attempt))).decode(errors="replace")
    except NotFoundError:
        return ""


def _exists(storage: Storage, key: str) -> bool:
    try:
        storage.size(key)
    except NotFoundError:
        return False
    return True


def _contents(storage: Storage) -> Iterator[tuple[str, set[str]]]:
    """Yield the names directly below the root that are prefixes, each with the names directly below it."""
    if isinstance(storage, ListsInOrder):
        yield from _listed_contents(storage, storage)
        return
    for child in sorted(storage.children("")):
        if child.endswith("/"):
            yield child.removesuffix("/"), _children(storage, child)


def _listed_contents(storage: Storage, listing: ListsInOrder) -> Iterator[tuple[str, set[str]]]:
    """Do so by pages of keys, of which one tells of many names; what is deep below a name is jumped over."""
    name, found, last, ended = "", set[str](), "", ""
    while page := listing.keys_after("", last):
        for key in page:
            first, slash, rest = key.partition("/")
            if slash and first != name:
                if name:
                    yield name, found
                name, found = first, set()
            if slash:
                found.add(rest.partition("/")[0])
        last = _past(page[-1])
        below = name if page[-1].startswith(f"{name}/") else ""
        if below and below == ended:  # two pages, and still the same: it is of many folders
            found |= _children(storage, f"{name}/")
            last = f"{name}{_AFTER_SLASH}"
        ended = below
    if name:
        yield name, found


def _past(key: str) -> str:
    """Return a key after which to list, so that no more comes of what is two levels below the root.

    >>> _past("7/a/b/c"), _past("7/a")
    ('7/a0', '7/a')
    """
    parts = key.split("/", 2)
    return key if len(parts) <= 2 else f"{parts[0]}/{parts[1]}{_AFTER_SLASH}"  # noqa: PLR2004 - name and child


def _children(storage: Storage, prefix: str) -> set[str]:
    return {child.removesuffix("/") for child in storage.children(prefix)}


def _attempts(children: Iterable[str]) -> list[str]:
    found = {child.removesuffix(_VERDICT) for child in children}
    return sorted(attempt for attempt in found if attempts.parse_attempt(attempt))


def _committed(storage: Storage, name: str) -> str | None:
    """Return the attempt that the commit object names; None without one, `ManifestError` if it cannot be told."""
    what = f"cannot read '{storage.url}/{name}/{COMMIT_OBJECT}'"
    try:
        manifest = json.loads(bytes(storage.read(f"{name}/{COMMIT_OBJECT}")))
    except NotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{what}: it is no JSON, so that nobody knows which data it stands for") from error
    attempt = manifest.get("attempt") if isinstance(manifest, dict) else None
    if not isinstance(attempt, str) or attempts.parse_attempt(attempt) is None:
        raise ManifestError(f"{what}: it names no attempt, so that nobody knows which data it stands for")
    return attempt


def _owner(storage: Storage, staging: Staging, manifest: bytes, error: Exception) -> Literal["us", "nobody", "another"]:
    """Say whose checkpoint the name holds after a request that failed, or seemed to."""
    what = f"cannot tell whether {staging.name!r} was committed"
    try:
        found = bytes(storage.read(f"{staging.name}/{COMMIT_OBJECT}"))
    except NotFoundError:
        found = b""
    except StorageError:
        raise OutcomeUnknownError(f"{what}: the storage failed, and then failed to say") from error
    if found == manifest:
        return "us"
    try:
        verdict = _read_verdict(storage, staging.name, staging.attempt)
    except StorageError:
        raise OutcomeUnknownError(f"{what}: the storage failed, and then failed to say") from error
    if verdict == _RETIRED:
        return "us"  # committed, and replaced or deleted since (rule 4)
    if not verdict:
        raise OutcomeUnknownError(f"{what}: the attempt was removed meanwhile") from error
    return "another" if found else "nobody"


def _retire(storage: Storage, name: str, attempt: str | None) -> None:
    if attempt is not None:
        storage.write(_verdict(name, attempt), [_RETIRED.encode()])


def _remove(storage: Storage, name: str, attempt: str) -> None:
    storage.delete(f"{name}/{attempt}/")
    storage.delete(_verdict(name, attempt))


def _remove_retired(storage: Storage, name: str) -> None:
    # The verdicts are read before the commit object, or an attempt could be committed and retired in between.
    retired = [
        attempt
        for attempt in _attempts(_children(storage, f"{name}/"))
        if _read_verdict(storage, name, attempt) == _RETIRED
    ]
    with contextlib.suppress(ManifestError):
        committed = _committed(storage, name)
        for attempt in retired:
            if attempt != committed:
                _remove(storage, name, attempt)
