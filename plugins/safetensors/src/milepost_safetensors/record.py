"""What the record of the packed files says, and when it is believed.

The rule: a record may come from anybody, so nothing in it is used before it is checked. Sizes are computed from shapes,
never read; every piece lies in its file, apart from all others; files have the names that this writer gives. Files that
others wrote go by other names, and lack what only this writer gives: checksums, and data aligned to their items.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeGuard

from milepost.errors import FutureFormatError, ManifestError, noted
from milepost.protocols import Box

from milepost_safetensors.dtypes import Kind, kind
from milepost_safetensors.layout import Blocks, blocks, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milepost.protocols import Json

__all__ = ["FORMAT", "REFUSAL", "Entry", "File", "Parsed", "Stored", "parse"]

FORMAT = 1

REFUSAL = "the record of the packed files cannot be believed: "
"""How the message begins of every error about a record that cannot be true."""

_LIMIT = 1 << 60
_AXES = 64
_NAME = re.compile(r"arrays-\d{5,10}-\d{5,10}\.safetensors")
_OTHERS = re.compile(r"[^/\\\0]+\.safetensors")
_SUMS = re.compile(r"[0-9a-f]*")


class File(NamedTuple):
    """A packed file: its name below the prefix, and its size."""

    name: str
    size: int


class Stored(NamedTuple):
    """A box of an array that lies in a file: where, how it is cut into blocks, and 16 hex digits for each or none."""

    array: str
    file: File
    offset: int
    nbytes: int
    box: Box
    cut: Blocks
    sums: str


class Entry(NamedTuple):
    """An array: its dtype, the box of the whole of it, and every box of it that is stored."""

    kind: Kind
    box: Box
    pieces: list[Stored]


class Parsed:
    """Records as they were parsed last: a reader may ask for the boxes of one item in many calls.

    With `foreign`, as in `parse`.
    """

    def __init__(self, *, foreign: bool = False) -> None:
        self._foreign = foreign
        self._last: tuple[Sequence[Json], dict[str, Entry]] | None = None

    def entries(self, records: Sequence[Json]) -> dict[str, Entry]:
        """Return what `parse` does, without parsing the same list again; nobody changes it meanwhile."""
        last = self._last
        if last is None or last[0] is not records:
            last = self._last = (records, parse(records, foreign=self._foreign))
        return last[1]


def parse(records: Sequence[Json], *, foreign: bool = False) -> dict[str, Entry]:
    """Read the records of all hosts; raise `ManifestError` for one that cannot be true.

    With `foreign`, files may be called as they like, and pieces be without checksums and alignment.
    """
    entries: dict[str, Entry] = {}
    names: set[str] = set()
    for record in records:
        for raw in _files(record):
            file, start, rows = _file(raw, _OTHERS if foreign else _NAME)
            if file.name in names:
                _refuse(f"it describes file {file.name!r} twice")
            names.add(file.name)
            ranges = sorted([_row(row, file, start, entries, foreign=foreign) for row in rows])
            for (_, end), (begin, _) in itertools.pairwise(ranges):
                if begin < end:
                    _refuse(f"two arrays overlap in file {file.name!r} at offset {begin}")
    return entries


def _files(record: Json) -> list[Any]:
    if not isinstance(record, dict) or type(record.get("format")) is not int:
        _refuse("it is not one")
    if record["format"] != FORMAT:
        error = FutureFormatError(f"the packed files are of format {record['format']}: this version reads {FORMAT}")
        raise noted(error, "pip install --upgrade milepost-safetensors")
    files = record.get("files")
    return files if isinstance(files, list) else _refuse("it has no list of files")


def _file(raw: Any, form: re.Pattern[str]) -> tuple[File, int, list[Any]]:
    if not isinstance(raw, dict):
        _refuse("a file is not described by an object")
    name, size, start, rows = (raw.get(key) for key in ("name", "size", "data", "pieces"))
    if not isinstance(name, str) or not form.fullmatch(name):
        _refuse(f"it names a file {name!r}")
    if not _count(size) or not _count(start) or start > size or not isinstance(rows, list):
        _refuse(f"size, start of data or pieces of file {name!r} make no sense")
    return File(name, size), start, rows


def _row(row: Any, file: File, start: int, entries: dict[str, Entry], *, foreign: bool) -> tuple[int, int]:
    """Enter a piece; return the range it takes."""
    if type(row) is not list or len(row) not in (5, 7):
        _refuse(f"a piece in file {file.name!r} is not a list of 5 or 7")
    name, dtype, dims, offset, sums = row[:5]
    stored = kind(dtype) if type(dtype) is str else None
    if type(name) is not str or stored is None:
        _refuse(f"array {name!r} in file {file.name!r} has dtype {dtype!r}")
    shape = _dims(dims, name)
    box = whole(shape) if len(row) == 5 else _box(row[5], row[6], shape, name)  # noqa: PLR2004 the two forms of a row
    cut = blocks(box.shape, stored.itemsize)
    nbytes = cut.outer * cut.rows * cut.inner
    step = 1 if foreign else stored.itemsize
    if not _count(offset) or offset < start or offset + nbytes > file.size or offset % step:
        _refuse(f"array {name!r} cannot lie at offset {offset!r} of file {file.name!r} of {file.size} bytes")
    if foreign and sums == "":
        pass  # nobody made any
    elif type(sums) is not str or len(sums) != 16 * cut.total or not _SUMS.fullmatch(sums):
        _refuse(f"the checksums of array {name!r} are not 16 hex digits for each of {cut.total} blocks")
    entry = entries.get(name)
    if entry is None:
        entry = entries[name] = Entry(stored, whole(shape), [])
    elif entry.kind is not stored or entry.box.shape != shape:
        _refuse(f"array {name!r} has two shapes or dtypes")
    entry.pieces.append(Stored(name, file, offset, nbytes, box, cut, sums))
    return offset, offset + nbytes


def _dims(raw: Any, name: str) -> tuple[int, ...]:
    if type(raw) is not list:
        _refuse(f"array {name!r} has shape {raw!r:.80}")
    for n in raw:
        if type(n) is not int:  # looked at here, since to a cache 1 and True are the same
            _refuse(f"array {name!r} has shape {raw!r:.80}")
    shape = tuple(raw)
    if not _possible(shape):
        _refuse(f"array {name!r} has shape {raw!r:.80}")
    return shape


@functools.lru_cache(1024)
def _possible(shape: tuple[int, ...]) -> bool:
    if len(shape) > _AXES or not all(0 <= n <= _LIMIT for n in shape):
        return False
    return math.prod(n or 1 for n in shape) <= _LIMIT


def _box(start: Any, shape: Any, full: tuple[int, ...], name: str) -> Box:
    box = Box(_dims(start, name), _dims(shape, name))
    if len(box.start) != len(full) or len(box.shape) != len(full):
        _refuse(f"array {name!r} of shape {full} has a box of {len(box.shape)} axes")
    if any(a + n > most for a, n, most in zip(box.start, box.shape, full, strict=True)):
        _refuse(f"array {name!r} of shape {full} has a box that begins at {box.start} with shape {box.shape}")
    return box


def _count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _LIMIT


def _refuse(why: str) -> NoReturn:
    raise ManifestError(REFUSAL + why)
