"""What the record of a group says, and when it is believed.

The rule: the record says how arrays are cut and packed; where they are follows from their names, so a record cannot
lead anywhere else. It may come from anybody: nothing in it is used before it is checked.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from milepost.errors import FutureFormatError, ManifestError, noted
from milepost.protocols import Box

from milepost_zarr.codecs import CODECS, Codec
from milepost_zarr.dtypes import Kind, kind
from milepost_zarr.grid import Grid
from milepost_zarr.naming import path_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from milepost.protocols import ArraySpec, Json

__all__ = ["FORMAT", "Entry", "make", "parse"]

FORMAT = 1

_LIMIT = 1 << 60
_AXES = 64


class Entry(NamedTuple):
    """An array of a group: its name and path, its dtype, how it is cut, and how its chunks are packed."""

    name: str
    path: str
    kind: Kind
    grid: Grid
    codec: Codec

    @property
    def chunk_bytes(self) -> int:
        """The bytes of one chunk before it is packed."""
        return math.prod(self.grid.chunk) * self.kind.itemsize

    @property
    def box(self) -> Box:
        """The box that is the whole array."""
        return Box((0,) * len(self.grid.shape), self.grid.shape)


def make(arrays: Iterable[tuple[ArraySpec, Grid]], codec: Codec) -> Json:
    """Return the record of the arrays of which a host wrote something: rows of name, dtype, shape, files and chunks."""
    rows: list[Json] = []
    for spec, grid in arrays:
        row: list[Json] = [spec.name, spec.dtype, list(grid.shape)]
        if grid.sharded or grid.file != grid.shape:
            row.append(list(grid.file))
        if grid.sharded:
            row.append(list(grid.chunk))
        rows.append(row)
    return {"format": FORMAT, "compression": codec.name, "arrays": rows}


def parse(records: Sequence[Json]) -> dict[str, Entry]:
    """Read the records of all hosts; raise `ManifestError` for one that cannot be true."""
    entries: dict[str, Entry] = {}
    for record in records:
        codec, rows = _head(record)
        for row in rows:
            entry = _entry(row, codec)
            if entries.setdefault(entry.name, entry) != entry:
                _refuse(f"array {entry.name!r} is described in two ways")
    return entries


def _head(record: Json) -> tuple[Codec, list[Any]]:
    if not isinstance(record, dict) or type(record.get("format")) is not int:
        _refuse("it is not one")
    if record["format"] != FORMAT:
        error = FutureFormatError(f"the Zarr group is of format {record['format']}: this version reads {FORMAT}")
        raise noted(error, "pip install --upgrade milepost-zarr")
    name, rows = record.get("compression"), record.get("arrays")
    if not isinstance(name, str) or name not in CODECS or not isinstance(rows, list):
        _refuse(f"its compression is {name!r:.80}, or it has no list of arrays")
    return Codec(name), rows


def _entry(row: Any, codec: Codec) -> Entry:
    if type(row) is not list or not 3 <= len(row) <= 5:  # noqa: PLR2004 the three forms of a row
        _refuse("an array is not described by a list of 3 to 5")
    name, dtype = row[:2]
    found = kind(dtype) if type(dtype) is str else None
    if type(name) is not str or found is None:
        _refuse(f"array {name!r:.80} has dtype {dtype!r:.80}")
    shape = _dims(row[2], name)
    file = _dims(row[3], name) if len(row) > 3 else tuple(max(1, n) for n in shape)  # noqa: PLR2004 as above
    chunk = _dims(row[4], name) if len(row) > 4 else file  # noqa: PLR2004 as above
    grid = Grid(shape, file, chunk)
    if not _fits(grid) or math.prod(n or 1 for n in shape) * found.itemsize > _LIMIT:
        _refuse(f"array {name!r} of shape {shape} cannot have files of {file} and chunks of {chunk}")
    return Entry(name, path_of(name), found, grid, codec)


def _fits(grid: Grid) -> bool:
    """Say whether chunks are no larger than the array, files hold whole chunks, and no file is all padding."""
    if not len(grid.shape) == len(grid.file) == len(grid.chunk) <= _AXES:
        return False
    return all(
        1 <= chunk <= max(1, n) and file % chunk == 0 and 1 <= file <= -(-max(1, n) // chunk) * chunk
        for n, file, chunk in zip(*grid, strict=True)
    )


def _dims(raw: Any, name: str) -> tuple[int, ...]:
    if type(raw) is not list or not all(type(n) is int and 0 <= n <= _LIMIT for n in raw):
        _refuse(f"array {name!r} has lengths {raw!r:.80}")
    return tuple(raw)


def _refuse(why: str) -> NoReturn:
    raise ManifestError(f"the record of the Zarr group cannot be believed: {why}")
