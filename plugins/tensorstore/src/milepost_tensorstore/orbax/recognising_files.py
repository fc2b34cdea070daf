"""How the files of a foreign checkpoint are looked at: nothing is believed, and what is wrong is named by its URL.

The rule: a file that is not there is None, and whether that is damage is for the caller to say; a file that is there
and is not what it has to be is damage. Everything that was read is remembered by a fingerprint, which is the identity
of a checkpoint whose writer gave it none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import TYPE_CHECKING, Any, TypeVar

from milepost.errors import DamagedError, NotFoundError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from milepost.protocols import Storage

__all__ = ["Folder", "checked"]

_LIMIT = 1 << 30
"""No document is larger than this many bytes."""

T = TypeVar("T")


class Folder:
    """What is below one prefix of a storage; `names` are its children, prefixes with a slash at the end."""

    def __init__(self, storage: Storage, prefix: str, names: Sequence[str] | None = None, digest: Any = None) -> None:
        self.storage = storage
        self.prefix = prefix
        self._names = None if names is None else frozenset(names)
        self._digest = digest or hashlib.blake2b(digest_size=16)

    @property
    def names(self) -> frozenset[str]:
        """The names of its files, and those of its folders with a slash at the end."""
        if self._names is None:
            self._names = frozenset(self.storage.children(self.prefix))
        return self._names

    @property
    def url(self) -> str:
        """Its URL."""
        return f"{self.storage.url}/{self.prefix}".removesuffix("/")

    @property
    def name(self) -> str:
        """Its name within the folder above."""
        return self.prefix.removesuffix("/").rpartition("/")[2]

    @property
    def identity(self) -> str:
        """A text that differs for any two folders from which different things were read."""
        return str(self._digest.hexdigest())

    def folders(self) -> Iterator[Folder]:
        """Yield the folders in it, by name, without those of saves that were not finished."""
        for name in sorted(self.names):
            if name.endswith("/") and ".orbax-checkpoint-tmp" not in name:
                yield self.folder(name)

    def folder(self, name: str) -> Folder:
        """Return the folder of a name in it, whether or not there is one."""
        return Folder(self.storage, f"{self.prefix}{name.removesuffix('/')}/", digest=self._digest)

    def above(self) -> Folder | None:
        """Return the folder around it; None for the root of the storage."""
        above = self.prefix.removesuffix("/").rpartition("/")[0]
        return Folder(self.storage, f"{above}/" if above else "", digest=self._digest) if self.prefix else None

    def read(self, name: str) -> bytes | None:
        """Return what is in a file, None if there is none."""
        body = self.read_quietly(name)
        if body is None:
            return None
        self.note(name, body)
        return body

    def note(self, name: str, body: bytes) -> None:
        """Make something that was read of a file by other ways part of the identity."""
        self._digest.update(f"{self.prefix}{name}\n{len(body)}\n".encode())
        self._digest.update(body)

    def read_quietly(self, name: str, start: int = 0, stop: int | None = _LIMIT) -> bytes | None:
        """Do what `read` does, for what is no part of the identity; from any thread."""
        try:
            return bytes(self.storage.read(f"{self.prefix}{name}", start, stop))
        except NotFoundError:
            return None
        except StorageError as error:
            if isinstance(error.__cause__, (NotADirectoryError, IsADirectoryError)):
                return None
            raise

    def read_object(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in a file, None if there is no such file; `DamagedError` for anything else."""
        body = self.read(name)
        if body is None:
            return None
        found = self.parsed(name, body)
        if type(found) is not dict:
            raise DamagedError(f"cannot read {self.file(name)!r}: it holds {body[:60]!r}, which is no JSON object")
        return found

    def parsed(self, name: str, text: str | bytes) -> Any:
        """Return what a JSON text of a file says; `DamagedError` for what is none."""
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"cannot read {self.file(name)!r}: it holds {text[:60]!r}, which is no JSON") from error

    def file(self, name: str) -> str:
        """Return the URL of a file in it."""
        return f"{self.url}/{name}"

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Yield key and size of every file below it, without markers of a commit."""
        for name in sorted(self.names):
            if name.endswith("/"):
                yield from self.folder(name).sizes()
            elif name != "commit_success.txt":
                with contextlib.suppress(NotFoundError):
                    yield f"{self.prefix}{name}", self.storage.size(f"{self.prefix}{name}")


def checked(value: Any, kind: type[T], what: str, where: str) -> T:
    """Return a value that is of a type, exactly; else raise `DamagedError`, which says what it is and where.

    >>> checked({}, dict, "'metrics'", "_CHECKPOINT_METADATA")
    {}
    """
    if type(value) is not kind:
        raise DamagedError(f"cannot believe {where!r}: its {what} is {value!r:.60}, not of type {kind.__name__}")
    return value
