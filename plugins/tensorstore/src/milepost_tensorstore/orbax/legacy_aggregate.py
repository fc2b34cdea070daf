"""Trees in one file, as Orbax wrote them up to 0.5: a file `checkpoint` in msgpack, with arrays in it or beside it.

The rule: the file is walked, not loaded. It is looked at through a window; what is an array is noted with its place in
the file, so that it is read when it is wanted and as far as it is wanted. Every count is checked against the bytes that
are left, and nothing is set aside for a promise.

A leaf is a number, text or bytes as they stand; an array is one extension type, a scalar of NumPy another, both of
`(shape, name of the dtype, bytes)`; an array of more than a GiB is a map of such pieces. Text that begins with
`PLACEHOLDER://` names an array that is stored as arrays are.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from milepost.errors import DamagedError, ManifestError, MissingDataError, NotFoundError
from milepost.protocols import Box

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

    from milepost.protocols import Array, Buffer, Json, Location, ReadRequest, Storage

__all__ = ["FILE", "Elsewhere", "Stored", "names", "read", "record", "scan"]

FILE = "checkpoint"
"""The name of the file, which is a folder where an item is a single array called so."""

_PLACEHOLDER = "PLACEHOLDER://"
_CHUNKED = "__msgpack_chunked_array__"
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_DEEPEST = 200
_WINDOW = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """An array in the file: its shape, its dtype by name, and where its bytes are, as `(offset, length)` in order."""

    shape: tuple[int, ...]
    dtype: str
    spans: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return sum(length for _, length in self.spans)


class Elsewhere(str):
    """The name of an array that is stored beside the file."""

    __slots__ = ()


# --- finding out what there is ---------------------------------------------------------------------------------------


def scan(storage: Storage, key: str) -> Any:
    """Return the tree in a file: dicts and lists of `None`, numbers, text, bytes, scalars, `Stored` and `Elsewhere`.

    Raises `NotFoundError` if there is no such file, and `DamagedError` for what is not one of these.
    """
    size = storage.size(key)
    walker = _Walker(lambda start, stop: storage.read(key, start, stop), size)
    try:
        return walker.all()
    except (ValueError, TypeError, OverflowError) as error:
        where = f"{storage.url}/{key}"
        raise DamagedError(f"cannot read the tree in {where!r}: byte {walker.at} of {size}: {error}") from error


class _Walker:
    """Walks over the values in a file; `at` is where it stands."""

    def __init__(self, read: Callable[[int, int], Buffer], size: int) -> None:
        self._read, self._size = read, size
        self._window, self._begin = b"", 0
        self.at = 0

    def all(self) -> Any:
        """Return the one value that the file has."""
        found = self._value(0)
        if self.at != self._size:
            raise ValueError(f"{self._size - self.at} bytes follow its end")
        return found

    def _value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError(f"containers stand more than {_DEEPEST} deep")
        kind, detail = _sort(self._take(1)[0])
        if kind == "is":
            return detail
        if kind == "number":
            return struct.unpack(f">{detail}", self._take(struct.calcsize(detail)))[0]
        count = self._count(detail) if kind.endswith("?") else detail
        match kind.removesuffix("?"):
            case "map":
                return self._map(count, depth)
            case "list":
                return [self._value(depth + 1) for _ in range(self._possible(count))]
            case "ext":
                return self._extension(count)
        body = self._take(count)
        return body if kind == "bin?" else _text(body.decode("utf-8"))

    def _map(self, count: int, depth: int) -> Any:
        found: dict[Any, Any] = {}
        for _ in range(self._possible(count)):
            name = self._value(depth + 1)
            if type(name) not in (str, int):
                raise ValueError(f"a key is {name!r:.60}, neither text nor an integer")
            found[name] = self._value(depth + 1)
        if len(found) != count:
            raise ValueError("a key stands twice in a map")
        return _joined(found) if found.get(_CHUNKED) is True else found

    def _extension(self, length: int) -> Any:
        code = struct.unpack(">b", self._take(1))[0]
        end = self.at + length
        if code not in (_ARRAY, _COMPLEX, _SCALAR):
            raise ValueError(f"there is a value of extension type {code}, which is not known")
        if self._take(1)[0] & 0xF0 != 0x90:  # noqa: PLR2004 - a short list, and its length
            raise ValueError(f"a value of extension type {code} is no list")
        if code == _COMPLEX:
            found: Any = complex(*(float(self._value(_DEEPEST)) for _ in range(2)))
        else:
            shape, dtype = self._value(_DEEPEST - 1), self._value(_DEEPEST)
            kind, detail = _sort(self._take(1)[0])
            if kind != "bin?" or type(dtype) is not str:
                raise ValueError("an array is not shape, dtype and bytes")
            count = self._count(detail)
            found = _stored(shape, dtype, [(self.at, count)])
            if code == _SCALAR and not found.shape:
                found = np.frombuffer(self._take(count), _dtype(found.dtype))[0]
            else:
                self.at += self._possible(count)
        if self.at != end:
            raise ValueError(f"a value of extension type {code} is not as long as it says")
        return found

    def _count(self, form: str) -> int:
        return int(struct.unpack(f">{form}", self._take(struct.calcsize(form)))[0])

    def _possible(self, count: int) -> int:
        if count > self._size - self.at:
            raise ValueError(f"{count} values are said to be in {self._size - self.at} bytes")
        return count

    def _take(self, count: int) -> bytes:
        self._possible(count)
        here = self.at - self._begin
        if not 0 <= here <= len(self._window) - count:
            self._begin, here = self.at, 0
            self._window = bytes(self._read(self.at, min(self.at + max(count, _WINDOW), self._size)))
            if len(self._window) < count:
                raise ValueError("the file is shorter than its size")
        self.at += count
        return self._window[here : here + count]


_FIXED: Mapping[int, tuple[str, Any]] = {
    0xC0: ("is", None),
    0xC2: ("is", False),
    0xC3: ("is", True),
    **{0xC4 + i: ("bin?", form) for i, form in enumerate("BHI")},
    **{0xC7 + i: ("ext?", form) for i, form in enumerate("BHI")},
    **{0xCA + i: ("number", form) for i, form in enumerate("fdBHIQbhiq")},
    **{0xD4 + i: ("ext", 1 << i) for i in range(5)},
    **{0xD9 + i: ("str?", form) for i, form in enumerate("BHI")},
    **{0xDC + i: ("list?", form) for i, form in enumerate("HI")},
    **{0xDE + i: ("map?", form) for i, form in enumerate("HI")},
}


def _sort(byte: int) -> tuple[str, Any]:
    """Return what a value is by its first byte: its kind, and the value, its form, its length, or the form of that.

    >>> _sort(0x07), _sort(0xFF), _sort(0x82), _sort(0xA3), _sort(0xCB), _sort(0xD9)
    (('is', 7), ('is', -1), ('map', 2), ('str', 3), ('number', 'd'), ('str?', 'B'))
    """
    if byte < 0x80 or byte >= 0xE0:  # noqa: PLR2004 - small integers
        return "is", byte if byte < 0x80 else byte - 0x100  # noqa: PLR2004 - of either sign
    if byte < 0xC0:  # noqa: PLR2004 - short containers and text
        kind, bits = ("str", 5) if byte >= 0xA0 else ("list", 4) if byte >= 0x90 else ("map", 4)  # noqa: PLR2004
        return kind, byte & ((1 << bits) - 1)
    if byte not in _FIXED:
        raise ValueError(f"no value begins with byte {byte:#x}")
    return _FIXED[byte]


def _text(text: str) -> str:
    return Elsewhere(text.removeprefix(_PLACEHOLDER)) if text.startswith(_PLACEHOLDER) else text


def _joined(found: Mapping[Any, Any]) -> Stored:
    """Return the array of which a map has the pieces."""
    shape, pieces = (_in_order(found.get(part)) for part in ("shape", "chunks"))
    if not pieces or not all(type(piece) is Stored for piece in pieces):
        raise ValueError("an array in pieces has none")
    return _stored(shape, pieces[0].dtype, [span for piece in pieces for span in piece.spans])


def _in_order(found: Any) -> list[Any]:
    if type(found) is not dict or sorted(found) != sorted(map(str, range(len(found)))):
        raise ValueError("an array in pieces is not numbered from 0 on")
    return [found[str(number)] for number in range(len(found))]


def _stored(shape: Any, dtype: str, spans: Sequence[tuple[int, int]]) -> Stored:
    if type(shape) is not list or not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"the shape of an array is {shape!r:.60}")
    # The name that NumPy once had for every dtype that is not its own, when there was one such dtype.
    stored = Stored(tuple(shape), "bfloat16" if dtype == "V2" else dtype, tuple(spans))
    if stored.nbytes != math.prod(shape) * _dtype(stored.dtype).itemsize:
        raise ValueError(f"an array of {dtype} and shape {shape!r:.60} has {stored.nbytes} bytes")
    return stored


def _dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes

    own = name.isidentifier() and name in ml_dtypes.__all__ and not name.endswith("info")
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name) if own else name)
    if dtype.name != name or (dtype.kind not in "biufc" and not own):
        raise ValueError(f"the dtype of an array is {name!r:.60}")
    return dtype


# --- reading arrays --------------------------------------------------------------------------------------------------


def record(arrays: Mapping[str, Stored], file: str = FILE) -> Json:
    """Return the part of a record by which `read` finds arrays in a file, by their names in Orbax's layout."""
    return {
        "file": file,
        "arrays": {
            name: {"shape": list(one.shape), "dtype": one.dtype, "spans": [list(span) for span in one.spans]}
            for name, one in arrays.items()
        },
    }


def names(part: Json) -> Container[str]:
    """Return the names, in Orbax's layout, of the arrays that this part of a record has; raise `ManifestError`."""
    arrays = part.get("arrays") if isinstance(part, dict) else None
    if not isinstance(arrays, dict):
        raise ManifestError(f"the record of the arrays cannot be believed: it has {part!r:.80} for a file of arrays")
    return arrays


def read(
    location: Location, part: Any, requests: Iterable[tuple[int, str, ReadRequest]]
) -> Iterator[tuple[int, Array]]:
    """Yield `(index, array)` for requests `(index, name in Orbax's layout, request)`; one array is held at a time.

    Raises `MissingDataError`, naming file and array, and `ManifestError` for a record that is none.
    """
    for index, name, request in requests:
        try:
            file, one = part["file"], part["arrays"][name]
            spans = [(int(offset), int(length)) for offset, length in one["spans"]]
            stored = _stored(one["shape"], one["dtype"], spans)
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"the record of array {name!r} cannot be believed: {error!r:.200}") from error
        if type(file) is not str or "/" in file or min((number for span in spans for number in span), default=0) < 0:
            raise ManifestError(f"the record of array {name!r} cannot be believed: it names {file!r:.80} and {spans}")
        yield index, _box(location, file, request, stored)


def _box(location: Location, file: str, request: ReadRequest, stored: Stored) -> Array:
    """Read the rows that a box is of, and cut the box out of them."""
    dtype = _dtype(stored.dtype)
    box = request.box or Box((0,) * len(stored.shape), stored.shape)
    if len(box.shape) != len(stored.shape) or any(
        start < 0 or start + length > end for start, length, end in zip(box.start, box.shape, stored.shape, strict=True)
    ):
        raise ManifestError(f"cannot read array {request.name!r} at {box}: its shape is {stored.shape}")
    row = math.prod(stored.shape[1:]) * dtype.itemsize
    first, count = (box.start[0], box.shape[0]) if box.shape else (0, 1)
    body = _bytes(location, file, request.name, stored.spans, (first * row, (first + count) * row))
    rows = np.frombuffer(body, dtype).reshape((count, *stored.shape[1:]) if box.shape else ())
    inner = tuple(slice(start, start + length) for start, length in zip(box.start[1:], box.shape[1:], strict=True))
    found = _aligned(box.shape, dtype)
    # A number of half a byte was stored without what is above it; every reader puts its sign there.
    narrow = dtype.kind == "V" and dtype.name in ("int2", "int4")
    found[...] = (rows.astype(np.int8) if narrow else rows)[(slice(None), *inner) if box.shape else ...]
    return found


def _bytes(
    location: Location, file: str, name: str, spans: Sequence[tuple[int, int]], part: tuple[int, int]
) -> bytearray:
    """Return a part of the bytes of an array, which stand in spans of a file."""
    body, before = bytearray(), 0
    for offset, length in spans:
        start, stop = max(part[0] - before, 0), min(part[1] - before, length)
        before += length
        if start >= stop:
            continue
        where = f"{location.url.removesuffix('/')}/{file}"
        try:
            found = location.storage.read(f"{location.prefix}{file}", offset + start, offset + stop)
        except NotFoundError as error:
            raise MissingDataError(f"cannot read array {name!r}: file {where!r} is missing") from error
        if len(found) != stop - start:
            raise MissingDataError(
                f"cannot read array {name!r}: file {where!r} ends within it, at byte {offset + start + len(found)}"
            )
        body += found
    return body


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    nbytes = math.prod(shape) * dtype.itemsize
    room = np.empty(nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + nbytes].view(dtype).reshape(shape)
