"""Which arrays a record speaks of, and where each chunk of them is.

The rule: what milepost wrote is known from its record alone. Of what others wrote, the documents of Zarr say what
there is, and nothing vouches for the bytes; there is never more of it than there are chunks. Where a database has the
chunks is known before the first is read; where each is a file, it is known by its name.
"""

from __future__ import annotations

import json
import math
import threading
from typing import TYPE_CHECKING, NamedTuple

from milepost.errors import DamagedError, ManifestError, MissingDataError, NotFoundError

from milepost_tensorstore import chunking, database, documents, names, records
from milepost_tensorstore.database import Range

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milepost.protocols import Box, Json, Location, Storage

    from milepost_tensorstore.documents import Document

__all__ = ["Catalog", "Catalogs", "Chunk", "Entry"]

_DIGITS = 16
_MOST_CELLS = 1 << 24


class Entry(NamedTuple):
    """An array: its name, its name in the files, its metadata, and the checksums of its chunks, if it has any.

    `sums` is one text where the whole array was written as one box.
    """

    name: str
    stored: str
    document: Document
    sums: str | dict[tuple[int, ...], str] | None

    def sum_of(self, cell: tuple[int, ...]) -> str | None:
        """Return the checksum of what a chunk holds; None where there is none."""
        if self.sums is None:
            return None
        if isinstance(self.sums, str):
            return self.sums if len(self.sums) == _DIGITS else _nth(self.sums, cell, self.document)
        found = self.sums.get(cell)
        if found is None:
            part = chunking.clipped(cell, self.document.chunk, self.document.shape)
            raise MissingDataError(f"array {self.name!r} is stored in part only: {part} is in none of the chunks")
        return found


def _nth(sums: str, cell: tuple[int, ...], document: Document) -> str:
    at = 0
    for index, length, n in zip(cell, document.shape, document.chunk, strict=True):
        at = at * -(-length // n) + index
    return sums[_DIGITS * at : _DIGITS * (at + 1)]


class Chunk(NamedTuple):
    """A chunk: of which array, which one, the part of the array it holds, its bytes or where, its checksum.

    A value of None is one of zeros, which is not stored.
    """

    entry: Entry
    cell: tuple[int, ...]
    part: Box
    value: bytes | Range | None
    sum: str | None


class Catalogs:
    """The catalog that was made last: a reader may ask for the boxes of one item in many calls, from any thread."""

    def __init__(self) -> None:
        self._last: tuple[Storage, str, Sequence[Json], Catalog] | None = None

    def get(self, location: Location, raw: Sequence[Json]) -> Catalog:
        """Return the catalog of an item, the same for the same list of records; nobody changes it meanwhile."""
        last = self._last
        if last is None or last[0] is not location.storage or last[1] != location.prefix or last[2] is not raw:
            last = self._last = (location.storage, location.prefix, raw, Catalog(location, raw))
        return last[3]


class Catalog:
    """The arrays of one item, by milepost's names; may be used by many threads."""

    def __init__(self, location: Location, raw: Sequence[Json]) -> None:
        self._form, self._others, self._pieces = records.parse(raw)
        self._storage, self._prefix = location.storage, location.prefix + self._form.base
        self._known: dict[str, Entry] = {}
        found = [record["aggregate"] for record in raw if isinstance(record, dict) and "aggregate" in record]
        self.aggregate: Json = found[0] if found else None
        self._values: dict[str, bytes | Range] | None = None
        self._lock = threading.Lock()

    def entry(self, name: str) -> Entry:
        """Return the array of that name; raises `MissingDataError` where there is none."""
        found = self._known.get(name)
        if found is None:
            stored = self.stored(name)
            found = self._known[name] = (
                self._ours(name, stored) if self._pieces is not None else self._theirs(name, stored)
            )
        return found

    def stored(self, name: str) -> str:
        """Return what an array is called in the files."""
        other = self._others.get(name)
        return names.dotted(name) if other is None else other

    def _ours(self, name: str, stored: str) -> Entry:
        pieces = self._pieces.get(name) if self._pieces is not None else None
        if pieces is None:
            raise MissingDataError(f"array {name!r} is in none of the records of the arrays")
        if not self._form.ocdbt and names.unsafe(stored) is not None:
            raise ManifestError(f"array {name!r} cannot be believed: it {names.unsafe(stored)}")
        form = self._form
        document = documents.document(pieces.kind, pieces.shape, pieces.chunk, form.zarr_format, form.compression)
        if len(pieces.boxes) == 1 and pieces.boxes[0][0] == chunking.whole(pieces.shape):
            return Entry(name, stored, document, pieces.boxes[0][1])
        sums: dict[tuple[int, ...], str] = {}
        for box, digits in pieces.boxes:
            if 0 not in box.shape:
                cells = enumerate(chunking.cells(box, pieces.chunk))
                sums |= {cell: digits[_DIGITS * at : _DIGITS * (at + 1)] for at, cell in cells}
        return Entry(name, stored, document, sums)

    def _theirs(self, name: str, stored: str) -> Entry:
        file = documents.FILES[self._form.zarr_format]
        key = documents.key(stored, file)
        text = self._value(key)
        if text is None:
            raise MissingDataError(f"array {name!r} is missing: there is no {self._named(key)}")
        if isinstance(text, Range):
            try:
                text = bytes(self._storage.read(self._prefix + text.file, *_ends(text)))
            except NotFoundError as error:
                raise MissingDataError(f"array {name!r} is missing: there is no {self._named(key)}") from error
        return Entry(name, stored, documents.understood(text, self._form.zarr_format, name), None)

    def chunks(self, entry: Entry, box: Box) -> list[Chunk]:
        """Return the stored chunks of which a box of an array consists, in C order.

        Raises `MissingDataError` for the first that is missing, as far as that is known without reading.
        """
        document = entry.document
        cells = math.prod(
            -(-(a + n) // m) - a // m for a, n, m in zip(box.start, box.shape, document.chunk, strict=True)
        )
        if cells > (_MOST_CELLS if self._form.fill or not self._form.ocdbt else len(self._all())):
            raise MissingDataError(f"array {entry.name!r} is stored in part only: not all of its chunks are there")
        found = []
        for cell in chunking.cells(box, document.chunk):
            part = chunking.clipped(cell, document.chunk, document.shape)
            key = documents.key(entry.stored, document.key(cell))
            value = self._value(key)
            if value is None and not (self._form.fill and _is_zero(document)):
                raise MissingDataError(f"array {entry.name!r} is stored in part only: there is no {self._named(key)}")
            found.append(Chunk(entry, cell, part, value, entry.sum_of(cell)))
        return found

    def _value(self, key: str) -> bytes | Range | None:
        if self._form.ocdbt:
            return self._all().get(key)
        try:
            value = Range(names.safe(key), 0, None)
        except ManifestError as error:
            raise DamagedError(f"cannot read the arrays: an array cannot be in {key!r}") from error
        return value if not self._form.fill or self._is_there(value.file) else None

    def _is_there(self, file: str) -> bool:
        try:
            self._storage.size(self._prefix + file)
        except NotFoundError:
            return False
        return True

    def _all(self) -> dict[str, bytes | Range]:
        with self._lock:
            if self._values is None:
                values: dict[str, bytes | Range] = {}
                for folder in self._form.databases or ("",):
                    for key, value in database.entries(self._storage, self._prefix + folder).items():
                        values[key] = value._replace(file=folder + value.file) if isinstance(value, Range) else value
                self._values = values
            return self._values

    @property
    def prefix(self) -> str:
        """The prefix that files of values are relative to."""
        return self._prefix

    def _named(self, key: str) -> str:
        where = f"{self._storage.url}/{self._prefix}"
        return f"key {key!r} in the database at {where!r}" if self._form.ocdbt else f"file {where + key!r}"


def _is_zero(document: Document) -> bool:
    """Say whether what an array has where nothing is stored is zero."""
    fill = json.loads(document.text).get("fill_value")
    return not (any(fill) if isinstance(fill, list) else fill)


def _ends(value: Range) -> tuple[int, int | None]:
    return value.start, None if value.length is None else value.start + value.length
