"""What the header of a safetensors file says, and when it is believed.

The rule: a header may come from anybody. Its size is compared with the file's before it is read; every tensor lies in
the data, apart from all others, has just the bytes that its shape and dtype need, and together they leave no gap, as
the format demands.
"""

from __future__ import annotations

import collections
import json
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from milepost.errors import DamagedError, ManifestError, MissingDataError, NotFoundError

from milepost_safetensors.dtypes import CODES
from milepost_safetensors.record import FORMAT, REFUSAL, parse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from milepost.protocols import Json, Storage

__all__ = ["LIMIT", "Header", "Tensor", "header_of", "parsed_json"]

LIMIT = 100_000_000
"""The largest header that readers of the format take."""

_FIRST = 64 << 10
_SIZE = 8
_METADATA = "__metadata__"


class Tensor(NamedTuple):
    """One tensor of a file: the name of its dtype, its shape, and the offset at which it begins in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class Header(NamedTuple):
    """A file: its name, its size, where its data begin, its tensors, and what else it says.

    `strange` has the dtype codes of those tensors that no array of NumPy can hold.
    """

    name: str
    size: int
    data: int
    tensors: Mapping[str, Tensor]
    strange: Mapping[str, str]
    metadata: Mapping[str, str]


def header_of(storage: Storage, prefix: str, name: str) -> Header:
    """Read the header of a file; `DamagedError` for one that no reader of the format should believe."""
    where = f"{storage.url}/{prefix}{name}"
    try:
        size = storage.size(prefix + name)
        first = bytes(storage.read(prefix + name, 0, min(size, _FIRST)))
        length = int.from_bytes(first[:_SIZE], "little")
        if size < _SIZE or length > min(LIMIT, size - _SIZE):
            _refuse(where, f"its header would have {length} bytes, the file has {size}")
        text = first[_SIZE : _SIZE + length]
        if len(text) < length:
            text += bytes(storage.read(prefix + name, len(first), _SIZE + length))
    except NotFoundError as error:
        raise MissingDataError(f"cannot read {where!r}: the file is gone") from error
    if len(text) != length:
        _refuse(where, f"it ends within its header, after {_SIZE + len(text)} bytes")
    document = parsed_json(text, f"the header of {where!r}")
    metadata = _metadata(document.pop(_METADATA, None), where)
    return _believed(Header(name, size, _SIZE + length, {}, {}, metadata), document, where)


def parsed_json(text: bytes, what: str) -> dict[str, Any]:
    """Return an object of JSON in UTF-8 that has no key twice, or raise `DamagedError`."""
    try:
        document = json.loads(text.decode(), object_pairs_hook=_once)
    except RecursionError:
        raise DamagedError(f"cannot read {what}: it is nested too deeply") from None
    except ValueError as error:
        raise DamagedError(f"cannot read {what}: {error}") from error
    if not isinstance(document, dict):
        raise DamagedError(f"cannot read {what}: it is no JSON object")
    return document


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r:.200} stands in it twice")
    return found


def _metadata(raw: Any, where: str) -> dict[str, str]:
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        _refuse(where, f"its {_METADATA} is not an object of texts")
    return raw


def _believed(head: Header, document: Mapping[str, Any], where: str) -> Header:
    """Return the header with its tensors, those of strange dtypes aside."""
    ranges = {name: _range(name, entry, where) for name, entry in document.items()}
    strange = {name: entry["dtype"] for name, entry in document.items() if entry["dtype"] not in CODES}
    known = {name: CODES[entry["dtype"]] for name, entry in document.items() if name not in strange}
    rows: list[Json] = [
        [name, dtype, document[name]["shape"], head.data + ranges[name][0], ""] for name, dtype in known.items()
    ]
    file: Json = {"name": head.name, "size": head.size, "data": head.data, "pieces": rows}
    try:
        entries = parse([{"format": FORMAT, "files": [file]}], foreign=True)
    except ManifestError as error:
        _refuse(where, str(error).removeprefix(REFUSAL), error)
    for name, entry in entries.items():
        start, stop = ranges[name]
        if entry.pieces[0].nbytes != stop - start:
            _refuse(where, f"tensor {name!r} needs {entry.pieces[0].nbytes} bytes and has {stop - start}")
    at = 0
    for start, stop in sorted(ranges.values()):
        if start != at:
            _refuse(where, f"its tensors {'leave a gap' if at < start else 'overlap'} at offset {min(at, start)}")
        at = stop
    if head.data + at != head.size:
        _refuse(where, f"its tensors end at byte {head.data + at}, the file at {head.size}")
    tensors = {
        name: Tensor(known[name], entry.box.shape, head.data + ranges[name][0]) for name, entry in entries.items()
    }
    return head._replace(tensors=tensors, strange=strange)


def _range(name: str, entry: Any, where: str) -> tuple[int, int]:
    try:
        name.encode()
    except UnicodeEncodeError:
        _refuse(where, f"the name {name!r} is no text")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(where, f"tensor {name!r} is described by {entry!r:.80}")
    offsets = entry["data_offsets"]
    if type(entry["dtype"]) is not str or type(offsets) is not list or [type(one) for one in offsets] != [int, int]:
        _refuse(where, f"tensor {name!r} is described by {entry!r:.80}")
    start, stop = offsets
    if not 0 <= start <= stop:
        _refuse(where, f"tensor {name!r} begins at {start} and ends at {stop}")
    return start, stop


def _refuse(where: str, why: str, cause: Exception | None = None) -> NoReturn:
    raise DamagedError(f"cannot believe the header of {where!r}: {why}") from cause
