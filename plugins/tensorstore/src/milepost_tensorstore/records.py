"""What the record of arrays in TensorStore's formats says, and when it is believed.

The rule: a record may come from anybody, so nothing in it is used before it is checked. It is a JSON object:

| field | value |
|---|---|
| `format` | 1 |
| `zarr_format` | 2 or 3 |
| `ocdbt` | whether the arrays are in an OCDBT database; else each is a folder |
| `base` | optional: the folder below the item's prefix that has the database or the arrays; ends in "/" |
| `databases` | optional, with `ocdbt`: folders below `base` with databases that were never merged; each ends in "/" |
| `names` | optional: what arrays are called in the files, by milepost's name, where that is not `names.dotted(name)` |
| `fill` | optional: whether chunks that are not there are zeros, which some writers leave out |
| `aggregate` | optional: a file that has some of the arrays, and where; see `orbax.legacy_aggregate` |
| `pieces` | what milepost wrote; without it, shapes, dtypes and chunks are read from Zarr's own metadata |
| `compression` | with `pieces`, optional: the name of the codec and its level |

A piece is `[name, dtype, shape, chunk, sums]`, or for a box of an array `[..., start, shape of the box]`; `chunk` is
null where a chunk is the whole array, `sums` holds 16 hex digits for each chunk, of what it holds of the array.
"""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from milepost.errors import FutureFormatError, ManifestError, noted
from milepost.protocols import Box

from milepost_tensorstore import chunking, names
from milepost_tensorstore.dtypes import Kind, kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milepost.protocols import Json

__all__ = ["FORMAT", "Form", "Pieces", "parse"]

FORMAT = 1

_LIMIT = 1 << 60
_AXES = 32
_WHOLE, _BOXED = 5, 7
_SUMS = re.compile(r"[0-9a-f]*")


class Form(NamedTuple):
    """How the arrays of an item are stored."""

    zarr_format: int
    ocdbt: bool
    base: str = ""
    databases: tuple[str, ...] = ()
    compression: tuple[str, int] | None = None
    fill: bool = False


class Pieces(NamedTuple):
    """An array that milepost wrote: dtype, shape, chunk, and of each box that is stored its checksums."""

    kind: Kind
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    boxes: list[tuple[Box, str]]


def parse(records: Sequence[Json]) -> tuple[Form, dict[str, str], dict[str, Pieces] | None]:
    """Read the records of all hosts: the form, names other than the usual, and the pieces if milepost wrote them.

    Raises `ManifestError` for a record that cannot be true.
    """
    if not records:
        _refuse("there is none")
    forms: list[Form] = []
    others: dict[str, str] = {}
    pieces: dict[str, Pieces] = {}
    ours = [isinstance(record, dict) and "pieces" in record for record in records]
    for record in records:
        form, known = _form(record)
        forms.append(form)
        others.update(known)
        if isinstance(record, dict) and "pieces" in record:
            _enter(record["pieces"], pieces)
    if any(form != forms[0] for form in forms) or len(set(ours)) != 1:
        _refuse("the hosts do not agree")
    return forms[0], others, pieces if ours[0] else None


def _form(record: Json) -> tuple[Form, dict[str, str]]:
    if not isinstance(record, dict) or type(record.get("format")) is not int:
        _refuse("it is not one")
    if record["format"] != FORMAT:
        error = FutureFormatError(f"the arrays are of format {record['format']}: this version reads {FORMAT}")
        raise noted(error, "pip install --upgrade milepost-tensorstore")
    zarr_format, ocdbt = record.get("zarr_format"), record.get("ocdbt")
    if type(zarr_format) is not int or zarr_format not in (2, 3) or type(ocdbt) is not bool:
        _refuse(f"its formats are {zarr_format!r:.80} and {ocdbt!r:.80}")
    databases = record.get("databases", [])
    if not isinstance(databases, list):
        _refuse(f"its databases are {databases!r:.80}")
    others = record.get("names", {})
    if not isinstance(others, dict) or not all(isinstance(name, str) for name in others.values()):
        _refuse("its names are no names")
    known = {name: str(other) for name, other in others.items()}
    if not ocdbt:
        for name in known.values():
            if name:
                names.safe(name)
    folders = tuple(_folder(folder) for folder in databases)
    codec, fill = _codec(record.get("compression")), record.get("fill") is True
    return Form(zarr_format, ocdbt, _folder(record.get("base", "")), folders, codec, fill), known


def _folder(value: Json) -> str:
    if not isinstance(value, str) or (value and not value.endswith("/")):
        _refuse(f"it names a folder {value!r:.80}")
    return f"{names.safe(value[:-1])}/" if value else ""


def _codec(value: Json) -> tuple[str, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or value[0] != "zstd" or type(value[1]) is not int:  # noqa: PLR2004 a pair
        _refuse(f"its compression is {value!r:.80}")
    return "zstd", value[1]


def _enter(rows: Json, pieces: dict[str, Pieces]) -> None:
    if not isinstance(rows, list):
        _refuse("it has no list of pieces")
    for row in rows:
        _row(row, pieces)


def _row(row: Any, pieces: dict[str, Pieces]) -> None:
    if type(row) is not list or len(row) not in (_WHOLE, _BOXED):
        _refuse("a piece is not a list of 5 or 7")
    name, dtype, dims, cut, sums = row[:_WHOLE]
    stored = kind(dtype) if type(dtype) is str else None
    if type(name) is not str or stored is None:
        _refuse(f"array {name!r:.80} has dtype {dtype!r:.80}")
    shape = _dims(dims, name)
    chunk = tuple(n or 1 for n in shape) if cut is None else _dims(cut, name)
    if len(chunk) != len(shape) or 0 in chunk:
        _refuse(f"array {name!r} of shape {shape} has chunks of {chunk}")
    box = chunking.whole(shape) if len(row) == _WHOLE else _box(row[5], row[6], shape, name)
    if any(at % n for at, n in zip(box.start, chunk, strict=True)):
        _refuse(f"a box of array {name!r} begins at {box.start}, within a chunk")
    count = math.prod(-(-length // n) for length, n in zip(box.shape, chunk, strict=True))
    if type(sums) is not str or len(sums) != 16 * count or not _SUMS.fullmatch(sums):
        _refuse(f"the checksums of array {name!r} are not 16 hex digits for each of {count} chunks")
    entry = pieces.get(name)
    if entry is None:
        entry = pieces[name] = Pieces(stored, shape, chunk, [])
    elif entry.kind is not stored or entry.shape != shape or entry.chunk != chunk:
        _refuse(f"array {name!r} has two shapes, dtypes or chunks")
    entry.boxes.append((box, sums))


def _dims(raw: Any, name: str) -> tuple[int, ...]:
    if type(raw) is not list or not all(type(n) is int for n in raw) or not _possible(shape := tuple(raw)):
        _refuse(f"array {name!r} has shape {raw!r:.80}")
    return shape


@functools.lru_cache(4096)
def _possible(shape: tuple[int, ...]) -> bool:
    return len(shape) <= _AXES and min(shape, default=0) >= 0 and math.prod(n or 1 for n in shape) <= _LIMIT


def _box(start: Any, shape: Any, full: tuple[int, ...], name: str) -> Box:
    box = Box(_dims(start, name), _dims(shape, name))
    if len(box.start) != len(full) or len(box.shape) != len(full):
        _refuse(f"array {name!r} of shape {full} has a box of {len(box.shape)} axes")
    if any(a + n > most for a, n, most in zip(box.start, box.shape, full, strict=True)):
        _refuse(f"array {name!r} of shape {full} has a box that begins at {box.start} with shape {box.shape}")
    return box


def _refuse(why: str) -> NoReturn:
    raise ManifestError(f"the record of the arrays cannot be believed: {why}")
