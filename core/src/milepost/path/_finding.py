"""Which folders below one root are checkpoints, on any storage.

This module decides what counts as committed. The rules, by how checkpoints appear there:

1. *By rename*: whatever has a name of its own is finished, because only what was finished could get it. No look into a
   folder is needed, and one listing tells all.
2. *By a commit object*: a name is a checkpoint if its commit object is visible, which takes one small request per name.
   These requests go out several at a time, few at first, so that whoever wants only the newest pays for little more.
   Where keys are listed in order, a page of them takes the place of many such requests.

What is unfinished is told from what is foreign: by the name, by the ids of attempts, or by a record that a checkpoint
was begun here. A folder without any of these is somebody else's, and nothing is said or done about it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from milepost import urls
from milepost.attempts import DAY, fate, new_attempt, parse_attempt, place
from milepost.errors import (
    AlreadyExistsError,
    ConfigError,
    DamagedError,
    NotFoundError,
    StorageError,
    noted,
)
from milepost.fixed import CLAIM
from milepost.manifest import decode, is_manifest
from milepost.names import is_temporary, parse_temporary, temporary_name
from milepost.path._foreign import TOMBSTONE, erase, recognised
from milepost.path._listing import listed
from milepost.path._uploads import abort, unfinished_uploads
from milepost.plugins import installed
from milepost.protocols import COMMIT_OBJECT, CreatesOnly, ListsInOrder, RenamesPrefixes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from upath import UPath

    from milepost.protocols import CommitStrategy, Storage

__all__ = ["PathLike", "Root", "as_path", "open_root", "open_root_of", "timestamps"]

PathLike: TypeAlias = "str | os.PathLike[str] | UPath"
"""A path or URL as it is taken; a `UPath` of a remote storage is no `os.PathLike`."""

_STEP_METADATA = "_CHECKPOINT_METADATA"
_BEGUN_BY = "milepost_attempt"
_AT_ONCE = 32
_BATCH = 512
_LARGEST = 64 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Root:
    """A place below which checkpoints are, opened; every answer is a new look at the storage."""

    url: str
    storage: Storage
    strategy: CommitStrategy

    @property
    def renames(self) -> bool:
        """Say whether checkpoints appear here by a rename, so that a name is enough."""
        return RenamesPrefixes in self.strategy.needs

    def folders(self) -> list[str]:
        """Return the names of all folders, in no order, also of checkpoints that an overwrite was about to replace."""
        found = self._children()
        unfinished = filter(None, map(parse_temporary, found))
        # Between the two renames of an overwrite the checkpoint has no name, and yet it can be read under it.
        for name in {one.final for one in unfinished} - found:
            if self._is_recoverable(name):
                found.add(name)
        return list(found)

    def committed(self, names: Iterable[str]) -> Iterator[str]:
        """Yield those of some folders that are committed, in their order, each when it is asked for."""
        finished = (name for name in names if not is_temporary(name))
        if self.renames:
            yield from finished
            return
        size: int | None = 1
        while batch := list(itertools.islice(finished, size)):
            yield from self._marked(batch)
            # A listing is the shorter the more is asked of it at once.
            listing = isinstance(self.storage, ListsInOrder) and len(batch) >= _AT_ONCE
            size = None if listing else min(2 * len(batch), _BATCH)

    def checkpoints(self, names: Iterable[str]) -> Iterator[str]:
        """Yield those of some folders that hold a commit object, or can be read without, several looks at once.

        Without it can be read what an overwrite was about to replace, and what an installed layout knows.
        """
        wanted = list(names)
        found = set(self._marked(wanted)) if wanted else set()
        rest = set(wanted) - found
        if rest:
            if self.renames:  # elsewhere nothing is put aside under another name, and all would be listed for nothing
                unfinished = {one.final for one in map(parse_temporary, self._children()) if one is not None}
                found |= {name for name in rest & unfinished if self._is_recoverable(name)}
            else:
                found |= {name for name in rest if self._is_recoverable(name)}
            found |= set(self._filtered(self._is_foreign, [name for name in rest - found if not is_temporary(name)]))
        yield from (name for name in wanted if name in found)

    def move(self, name: str, folder: str) -> None:
        """Move a checkpoint into a folder below the root, durably, under a name that is free there."""
        if not isinstance(self.storage, RenamesPrefixes):
            raise ConfigError(f"cannot move checkpoints into {folder!r}: the storage of {self.url!r} cannot rename")
        for number in itertools.count():
            target = f"{folder}/{name}" if number == 0 else f"{folder}/{name}.{number}"
            try:
                self.storage.rename(f"{name}/", f"{target}/")
            except AlreadyExistsError:
                continue
            return

    def is_committed(self, name: str) -> bool:
        """Say whether a name, which may also be that of nothing, is a committed checkpoint."""
        if is_temporary(name):
            return False
        if not self.renames:
            return self._holds_commit_object(name)
        return self.kind(name) == "folder"

    def kind(self, name: str) -> Literal["folder", "file"] | None:
        """Say what has a name; None for nothing, and for a link that leads nowhere."""
        if _holds_anything(self.storage, f"{name}/"):
            return "folder"
        if _exists(self.storage, name):
            return "file"
        empty = f"{name}/" in self.storage.children("")
        return "folder" if empty or self._is_recoverable(name) else None

    def is_missing(self) -> bool:
        """Say whether there is no such directory; where a storage knows none, one in which nothing is exists too."""
        if not self.renames or any(True for _ in self.storage.children("")):
            return False
        if len(urls.parts(self.url)) <= 2:  # noqa: PLR2004 - scheme and authority: the root of everything
            return False
        above, name = open_root_of(self.url)
        return f"{name}/" not in above.storage.children("")

    def unfinished(self, names: Iterable[str]) -> Iterator[str]:
        """Yield those of some folders in which a checkpoint was begun that is not committed."""
        rest: list[str] = []
        for name in names:
            if is_temporary(name):
                yield name
            else:
                rest.append(name)
        if not self.renames:
            committed = set(self.committed(rest))
            yield from (name for name in rest if name not in committed and self._was_begun(name))

    def begin(self, name: str) -> str:
        """Make a folder for a checkpoint that the caller writes himself, with a record of it; return its name.

        Raises `AlreadyExistsError` where checkpoints are written in place and something is there.
        """
        attempt = new_attempt()
        made = self.unfinished_name(name, attempt)
        record: dict[str, Any] = {"init_timestamp_nsecs": time.time_ns(), "commit_timestamp_nsecs": None}
        if self.renames:
            self.storage.write(f"{made}/{_STEP_METADATA}", [json.dumps(record).encode()])
            return made
        taken = noted(
            AlreadyExistsError(f"cannot begin a checkpoint in {urls.join(self.url, made)!r}: something is there"),
            "checkpoints are written in place here: remove what is there first, or use another name",
        )
        if any(True for _ in self.storage.children(f"{made}/")):
            raise taken
        body = json.dumps(record | {"custom_metadata": {_BEGUN_BY: attempt}}).encode()
        try:
            create = self.storage.create if isinstance(self.storage, CreatesOnly) else self.storage.write
            create(f"{made}/{_STEP_METADATA}", [body])
        except AlreadyExistsError as error:
            raise taken from error
        return made

    def unfinished_name(self, name: str, attempt: str) -> str:
        """Return the name under which a caller writes a checkpoint until it is finished."""
        return temporary_name(name, attempt) if self.renames else name

    def clean(self, *, older_than: float = DAY) -> None:
        """Remove what is unfinished and dead, as `cleanup_tmp_directories` promises it."""
        for leftover in list(self.strategy.leftovers(self.storage, older_than=older_than)):
            if leftover.dead:
                self.strategy.clear(self.storage, leftover)
        for leftover, unfinished in unfinished_uploads(self.storage, older_than):
            if leftover.dead:
                abort(self.storage, unfinished)
        for name in list(self.unfinished(self.folders())):
            if self._is_abandoned(name, older_than):
                self._remove(f"{name}/")

    def _remove(self, prefix: str) -> None:
        if TOMBSTONE in self.storage.children(prefix):
            erase(self.storage, prefix)  # in its order, should it be cut off again
        else:
            self.storage.delete(prefix)

    # --- one name ---

    def _marked(self, names: list[str]) -> list[str]:
        storage, found, rest = self.storage, set[str](), names
        if isinstance(storage, ListsInOrder) and len(names) > _AT_ONCE:
            found, rest = listed(lambda last: storage.keys_after("", last), names, worth=_AT_ONCE)
        found |= set(self._filtered(self._holds_commit_object, rest))
        return [name for name in names if name in found]

    def _filtered(self, look: Callable[[str], bool], names: list[str]) -> list[str]:
        """Return those of some names of which a look says True, several looks at once."""
        if len(names) <= 1:
            return [name for name in names if look(name)]
        # Closed before anything is yielded: an iterator that nobody exhausts leaves no thread behind.
        with ThreadPoolExecutor(min(len(names), _AT_ONCE), thread_name_prefix="milepost-find") as pool:
            return list(itertools.compress(names, pool.map(look, names)))

    def _children(self) -> set[str]:
        return {child[:-1] for child in self.storage.children("") if child.endswith("/")}

    def _is_recoverable(self, name: str) -> bool:
        with _nowhere():
            return self.strategy.recover(self.storage, name) is not None
        return False

    def _is_foreign(self, name: str) -> bool:
        """Say whether a folder without a commit object is a checkpoint that others laid out in their own way."""
        prefix, names = f"{name}/", sorted(self.storage.children(f"{name}/"))
        if not self.renames and _STEP_METADATA in names and self._record(name) is not None:
            return False  # it was begun, and is written in place
        return recognised(self.storage, prefix, names, installed()) is not None

    def _holds_commit_object(self, name: str) -> bool:
        return _exists(self.storage, f"{name}/{COMMIT_OBJECT}")

    def _was_begun(self, name: str) -> bool:
        children = {child.removesuffix("/") for child in self.storage.children(f"{name}/")}
        if COMMIT_OBJECT in children:
            return False
        if TOMBSTONE in children or CLAIM in children:
            return True
        return any(map(parse_attempt, children)) or (_STEP_METADATA in children and self._record(name) is not None)

    def _record(self, name: str) -> dict[str, Any] | None:
        """Return what was noted when the checkpoint was begun; None if it says that it was finished, or nothing."""
        record = _step_metadata(self.storage, f"{name}/")
        begun = _count(record.get("init_timestamp_nsecs")) is not None
        return record if begun and record.get("commit_timestamp_nsecs") is None else None

    def _is_abandoned(self, name: str, older_than: float) -> bool:
        """Say whether a folder that no attempt of the strategy made may be removed."""
        if is_temporary(name):
            made = parse_temporary(name)
            if made is None or made.maker != "caller":
                # What the reference began tells nothing but its name; what a strategy began, it removes itself.
                return made is not None and made.maker == "reference"
            return _is_over(made.attempt, older_than)
        children = list(self.storage.children(f"{name}/"))
        begun = CLAIM in children or any(parse_attempt(child.removesuffix("/")) for child in children)
        if begun or TOMBSTONE in children:
            return not begun  # the strategy's, or else a deletion that was cut off
        record = self._record(name)
        if record is None:
            return False
        custom = record.get("custom_metadata")
        attempt = custom.get(_BEGUN_BY) if isinstance(custom, dict) else None
        if isinstance(attempt, str):
            return _is_over(attempt, older_than)
        return bool(time.time() - record["init_timestamp_nsecs"] / 1e9 > older_than)


def open_root(path: PathLike) -> Root:
    """Open the place below which checkpoints are, which need not exist; changes nothing."""
    return open_root_of(urls.join(urls.locate(cast("str", path)), "_"))[0]


def open_root_of(path: PathLike) -> tuple[Root, str]:
    """Open the place in which a checkpoint is; return it with the checkpoint's name there."""
    from milepost.routes import open_route, resolve

    opened = open_route(resolve(cast("str", path)))
    return Root(opened.route.root, opened.storage, opened.commit), opened.route.name


def as_path(path: PathLike) -> UPath:
    """Return a path as it is handed out: what is local without a scheme, what is relative as it was given."""
    from upath import UPath

    if not isinstance(path, (str, os.PathLike)):
        return path
    text = os.fspath(path)
    return UPath(urls.locate(text).removeprefix(f"{urls.LOCAL}://") if "://" in text else text)


def timestamps(path: PathLike) -> tuple[int | None, int | None]:
    """Return when a checkpoint was begun and committed, in nanoseconds since the epoch, as far as it says so."""
    root, name = open_root_of(path)
    prefix = f"{name}/"
    body = _read(root.storage, prefix + COMMIT_OBJECT)
    if body is None and (recovered := root.strategy.recover(root.storage, name)) is not None:
        prefix, body = recovered, _read(root.storage, recovered + COMMIT_OBJECT)
    if body is not None and is_manifest(body):
        try:
            manifest = decode(body, where=urls.join(root.url, name))
        except DamagedError:
            return None, None  # whoever loads it will be told what is wrong with it
        return manifest.init_timestamp_nsecs, manifest.commit_timestamp_nsecs
    record = _step_metadata(root.storage, prefix)
    return _count(record.get("init_timestamp_nsecs")), _count(record.get("commit_timestamp_nsecs"))


def _is_over(attempt: str, older_than: float) -> bool:
    made = parse_attempt(attempt)
    # What this process made on request, it may also ask to have removed.
    ours = made is not None and (made.place, made.pid) == (place(), os.getpid())
    return ours or fate(attempt, older_than=older_than)[0]


def _step_metadata(storage: Storage, prefix: str) -> dict[str, Any]:
    try:
        found = json.loads(_read(storage, prefix + _STEP_METADATA, _LARGEST) or b"")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _read(storage: Storage, key: str, stop: int | None = None) -> bytes | None:
    try:
        return bytes(storage.read(key, 0, stop))
    except NotFoundError:
        return None


def _exists(storage: Storage, key: str) -> bool:
    with _nowhere():
        return storage.size(key) >= 0
    return False


def _holds_anything(storage: Storage, prefix: str) -> bool:
    with _nowhere():
        return any(True for _ in storage.children(prefix))
    return False


@contextlib.contextmanager
def _nowhere() -> Iterator[None]:
    """Leave the block where a key leads nowhere; a link to itself does so as much as one to nothing."""
    try:
        yield
    except NotFoundError:
        pass
    except StorageError as error:
        if error.errno != errno.ELOOP:
            raise
