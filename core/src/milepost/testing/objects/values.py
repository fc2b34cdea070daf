"""What is told to a store of objects and what it tells: values, and the one error.

The rule: nothing here can do anything, so that protocols and store agree on words and on nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from milepost.testing.objects import digests

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ALWAYS", "PLAIN", "Condition", "Page", "Part", "RefusedError", "Stored", "Traits", "Upload", "Window"]


class RefusedError(KeyError):
    """What the store does not do: an HTTP status, the word that S3 has for it, and which condition was false."""

    def __init__(self, status: int, code: str, message: str, condition: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.condition = condition

    def __str__(self) -> str:
        return self.message


@dataclasses.dataclass(frozen=True, slots=True)
class Traits:
    """What a writer says of an object beside its bytes; `checksums` are headers that are compared with them."""

    content_type: str = "application/octet-stream"
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    checksums: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Condition:
    """What must hold for a change: no object of that key, or one with this ETag ("*": any) or this generation."""

    absent: bool = False
    etag: str | None = None
    generation: int | None = None


ALWAYS = Condition()
PLAIN = Traits()


@dataclasses.dataclass(frozen=True)
class Stored:
    """One object as it was at one time; its ETag is without quotes."""

    data: bytes
    generation: int
    etag: str
    written: float
    traits: Traits

    @functools.cached_property
    def crc32c(self) -> str:
        """The checksum that Google Cloud Storage tells, in base 64."""
        return digests.crc32c(self.data)


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A piece of an upload."""

    data: bytes
    etag: str
    written: float


@dataclasses.dataclass(slots=True)
class Upload:
    """An upload in pieces that was begun; nothing of it is an object yet."""

    id: str
    bucket: str
    key: str
    started: float
    condition: Condition
    traits: Traits
    resumable: bool
    parts: dict[int, Part] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many bytes have come."""
        return sum(len(part.data) for part in self.parts.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """Which keys to list: from `start` on and before `end`; those that share a prefix up to a delimiter as one."""

    prefix: str = ""
    delimiter: str = ""
    start: str = ""
    end: str = ""
    limit: int = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """What a window shows; `more` is the `start` from which to go on, None at the end."""

    objects: Sequence[tuple[str, Stored]]
    prefixes: Sequence[str]
    more: str | None
