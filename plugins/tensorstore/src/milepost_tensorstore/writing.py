"""How arrays are written: what goes to TensorStore, in what portions, and what is noted of it.

The rule: a chunk is handed over in its stored form, whole, as the value of its key; TensorStore's key-value stores take
thousands of those at a small part of what opening as many arrays costs. They go in portions, each a transaction of the
database, of which only as many are under way as the budget allows. Every chunk is hashed on its way. Large arrays of
raw chunks are the exception: TensorStore's array driver refers to their memory, where a value would be copied twice.
"""

from __future__ import annotations

import collections
import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import xxhash
from milepost.errors import StorageError

from milepost_tensorstore import chunking, documents, dtypes, names, places, records
from milepost_tensorstore.codecs import Codec
from milepost_tensorstore.failures import explained
from milepost_tensorstore.options import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from milepost.protocols import Array, ArraySpec, Box, Json, Location, Piece, WriteOptions

    from milepost_tensorstore.documents import Document

__all__ = ["add_arrays", "check", "chunk_of", "merge", "write"]

_PORTION = 16 << 20
_LARGE = 1 << 20
"""From this size on, opening an array costs less than copying it."""
_REFERRED = 256 << 20
"""The bytes of a portion that stand in memory anyway."""
_UNDER_WAY = 4
_MOST = 1024


def check(specs: Sequence[ArraySpec], settings: Settings) -> None:
    """Raise one `UnsupportedLeafError` for the arrays that cannot be written, by their dtypes or by their names."""
    dtypes.check(specs)
    names.check(specs, folders=not settings.ocdbt)


def chunk_of(spec: ArraySpec, settings: Settings) -> tuple[int, ...]:
    """Return the shape of an array's chunks."""
    stored = dtypes.kind(spec.dtype)
    itemsize = 1 if stored is None else stored.dtype.itemsize  # one that is refused by `check`
    limit = settings.chunk_bytes if spec.chunk_bytes is None else spec.chunk_bytes
    return chunking.chunk_shape(spec.shape, spec.box, max(1, limit // itemsize), spec.chunk_axes)


def write(location: Location, pieces: Sequence[Piece], options: WriteOptions, settings: Settings) -> dict[str, Any]:
    """Write this host's pieces durably; return the record of them."""
    dtypes.check(piece.spec for piece in pieces)
    _refuse_twins(pieces)
    with _sink(location, _folder(location, settings), options, settings) as sink:
        rows = _Pieces(sink, options, settings).write(pieces)
    record: dict[str, Any] = {"format": records.FORMAT, "zarr_format": settings.zarr_format, "ocdbt": settings.ocdbt}
    if settings.compression is not None:
        record["compression"] = list(settings.compression)
    return record | {"pieces": rows}


def _folder(location: Location, settings: Settings) -> str:
    """Return where this host's database is; the only host of a save writes the one that all share."""
    return f"ocdbt.process_{location.host}/" if settings.ocdbt and location.hosts > 1 else ""


def merge(location: Location, count: int) -> None:
    """Make one database of those that so many hosts wrote; their data stay where they are."""
    import tensorstore as ts

    folders = [f"ocdbt.process_{host}/" for host in range(count)]
    settings = Settings()
    with (
        places.scratch_or_native(location, "", folders) as base,
        explained(f"merge the databases at {location.url!r}", reading=False),
    ):
        shared = places.context(settings, base)
        transaction = ts.Transaction()
        target = places.database(base, "", settings, shared).with_transaction(transaction)
        copies = []
        for folder in folders:
            source = places.database(base, folder, settings, shared)
            copies.append(source.experimental_copy_range_to(target))
        for copy in copies:
            copy.result()
        transaction.commit_async().result()


def add_arrays(location: Location, record: Sequence[Json], arrays: Mapping[str, Array]) -> None:
    """Write further arrays, whole and each as one chunk, by their names in Orbax's layout, to an item that is written.

    `record` holds what every host's `write` of the item returned. The arrays are for others than milepost: no record is
    made of them.
    """
    form, _, _ = records.parse(record)
    settings = Settings(form.zarr_format, form.ocdbt)
    with _sink(location, "", None, settings, fetch=("",)) as sink:
        put = sink.put
        for name, array in arrays.items():
            kind = dtypes.kind(array.dtype.name)
            if kind is None:
                raise StorageError(f"cannot write array {name!r}: TensorStore holds no {array.dtype}")
            document = documents.document(kind, array.shape, tuple(n or 1 for n in array.shape), form.zarr_format, None)
            put(documents.key(name, documents.FILES[form.zarr_format]), document.text)
            if array.size:
                data = np.ascontiguousarray(array).tobytes()
                put(documents.key(name, document.key((0,) * array.ndim)), data + _tail(document, len(data)))


# --- pieces ----------------------------------------------------------------------------------------------------------


def _refuse_twins(pieces: Sequence[Piece]) -> None:
    counts = collections.Counter((piece.spec.name, piece.box) for piece in pieces)
    twins = [name for (name, _), count in counts.items() if count > 1]
    if twins:
        raise ValueError(f"a piece was given twice: of {', '.join(map(repr, sorted(twins)))}")


class _Put(Protocol):
    def __call__(self, key: str, value: bytes) -> None: ...


class _Refer(Protocol):
    def __call__(self, name: str, document: Document, box: Box, array: Array) -> None: ...


class _Sink(NamedTuple):
    """What takes values, and, where there is such a thing, whole pieces of raw chunks that stand in memory anyway."""

    put: _Put
    refer: _Refer | None = None


class _Pieces:
    """Turns pieces into keys and values; compressed chunks are made by threads."""

    def __init__(self, sink: _Sink, options: WriteOptions, settings: Settings) -> None:
        self._put, self._refer = sink
        self._options, self._settings = options, settings
        self._local = threading.local()
        self._waiting: collections.deque[tuple[str, int, Any]] = collections.deque()
        self._held = 0

    def write(self, pieces: Sequence[Piece]) -> list[list[Any]]:
        """Put all pieces; return what the record says of each."""
        if self._settings.compression is None:
            return [self._row(piece, self._raw) for piece in pieces]
        with ThreadPoolExecutor(self._options.threads, thread_name_prefix="milepost-encode") as pool:

            def encode(document: Document, key: str, part: Array) -> None:
                self._take(self._options.budget // 8 - part.nbytes)
                self._waiting.append((key, part.nbytes, pool.submit(self._encoded, document, part)))
                self._held += part.nbytes

            rows = [self._row(piece, encode) for piece in pieces]
            self._take(0)
        return rows

    def _row(self, piece: Piece, store: Callable[[Document, str, Array], None]) -> list[Any]:
        spec, form = piece.spec, self._settings.zarr_format
        kind = dtypes.kind(spec.dtype)
        assert kind is not None  # noqa: S101 checked for all pieces at once, for one error that names them all
        chunk, whole = chunk_of(spec, self._settings), chunking.whole(spec.shape)
        box = whole if piece.box is None else piece.box
        document = documents.document(kind, spec.shape, chunk, form, self._settings.compression)
        name = names.dotted(spec.name)
        if not any(box.start):
            # Of all pieces of an array, on all hosts, just one begins at the origin.
            self._put(documents.key(name, documents.FILES[form]), document.text)
        array = _fetched(piece, box, document)
        sums = []
        large = piece.view and array.nbytes >= _LARGE
        refer = self._refer if large and document.raw and not document.tail else None
        for cell, part in _parts(spec, box, chunk, array):
            sums.append(xxhash.xxh3_64_hexdigest(_bytes(part)))
            if refer is None:
                store(document, documents.key(name, document.key(cell)), part)
        if refer is not None:
            refer(name, document, box, array)
        cut = None if chunk == tuple(n or 1 for n in spec.shape) else list(chunk)
        row = [spec.name, spec.dtype, list(spec.shape), cut, "".join(sums)]
        return row if box == whole else [*row, list(box.start), list(box.shape)]

    def _raw(self, document: Document, key: str, part: Array) -> None:
        data = _bytes(_padded(part, document))
        self._put(key, b"".join((data, documents.trailer(len(data)))) if document.tail else bytes(data))

    def _encoded(self, document: Document, part: Array) -> bytes:
        codec: Codec | None = getattr(self._local, "codec", None)
        if codec is None:
            codec = self._local.codec = Codec()
        assert self._settings.compression is not None  # noqa: S101 - else nothing is encoded
        return codec.encode(_bytes(_padded(part, document)), document, self._settings.compression[1])

    def _take(self, most: int) -> None:
        """Put what is encoded until at most so many bytes are waited for."""
        while self._waiting and self._held > most:
            key, size, future = self._waiting.popleft()
            self._put(key, future.result())
            self._held -= size


def _padded(part: Array, document: Document) -> Array:
    """Return a chunk as it is stored: what lies beyond the end of the array is part of it."""
    if part.shape == document.chunk:
        return part
    padded: Array = np.zeros(document.chunk, part.dtype)
    padded[tuple(map(slice, part.shape))] = part
    return padded


def _tail(document: Document, size: int) -> bytes:
    return documents.trailer(size) if document.tail else b""


def _fetched(piece: Piece, box: Box, document: Document) -> Array:
    array = piece.fetch()
    if array.shape != box.shape or array.dtype != document.kind.dtype:
        raise ValueError(
            f"array {piece.spec.name!r} was announced as {document.kind.dtype}{list(box.shape)}: "
            f"what came is {array.dtype}{list(array.shape)}"
        )
    return array


def _parts(spec: ArraySpec, box: Box, chunk: tuple[int, ...], array: Array) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Yield the index of each chunk of a box, and what it holds."""
    if not array.size:
        return
    ends = zip(box.start, box.shape, chunk, spec.shape, strict=True)
    if any(at % n or ((at + length) % n and at + length != most) for at, length, n, most in ends):
        raise ValueError(f"a piece of array {spec.name!r} does not consist of whole chunks: {box} in chunks of {chunk}")
    for cell in chunking.cells(box, chunk):
        part = chunking.clipped(cell, chunk, spec.shape)
        sides = zip(part.start, part.shape, box.start, strict=True)
        yield cell, array[tuple(slice(at - low, at - low + n) for at, n, low in sides)]


def _bytes(part: Array) -> memoryview:
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


# --- where they go ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _sink(
    location: Location, folder: str, options: WriteOptions | None, settings: Settings, fetch: Sequence[str] = ()
) -> Iterator[_Sink]:
    """Give what stores a value under a key; on leaving without an error, all is stored durably."""
    budget = options.budget if options else _PORTION
    shared = _Shared(explained(f"write the arrays at {location.url!r}", reading=False), settings)
    if settings.ocdbt:
        with places.scratch_or_native(location, folder, fetch) as base:
            # What is compressed stands in memory several times on its way.
            portions = _Portions(base, folder, shared, budget // (4 if settings.compression else 2))
            yield _Sink(portions.put, portions.refer)
            portions.finish(0)
        return
    spec = places.native(location.storage, location.prefix)
    if spec is not None:
        files = _Files(spec, shared, budget // 2)
        yield _Sink(files.put)
        files.finish(0)
        places.note(location, files.keys)
        return
    with ThreadPoolExecutor(options.threads if options else 1, thread_name_prefix="milepost-write") as pool:

        def store(key: str, value: bytes) -> Any:
            return pool.submit(location.storage.write, location.prefix + key, [value])

        window = _Window(store, budget // 2)
        yield _Sink(window.put)
        window.finish(0)


class _Shared(NamedTuple):
    """How to call what fails, and the settings."""

    saying: explained
    settings: Settings


class _Portions:
    """Transactions of a database: one that is being filled, and a few that are being committed."""

    def __init__(self, base: Mapping[str, Json], folder: str, shared: _Shared, most: int) -> None:
        self._saying = shared.saying
        self._context = places.context(shared.settings, base)
        with self._saying:
            self._store = places.database(base, folder, shared.settings, self._context)
        self._most = most
        self._committing: collections.deque[tuple[int, Any]] = collections.deque()
        self._begin()

    def _begin(self) -> None:
        import tensorstore as ts

        self._transaction = ts.Transaction()
        self._open = self._store.with_transaction(self._transaction)
        self._held = self._referred = 0
        self._copies: list[Any] = []

    def put(self, key: str, value: bytes) -> None:
        """Store a value, sooner or later."""
        self._make_room(len(value))
        with self._saying:
            self._open.write(key, value)
        self._held += len(value)

    def refer(self, name: str, document: Document, box: Box, array: Array) -> None:
        """Store a piece of raw chunks, sooner or later; until then its memory must not change."""
        import tensorstore as ts

        self._make_room(0)
        spec = {
            "driver": "zarr",
            "kvstore": {**self._store.spec().to_json(), "path": f"{name}/"},
            "metadata": json.loads(document.text),
            "store_data_equal_to_fill_value": True,
        }
        place = tuple(slice(at, at + length) for at, length in zip(box.start, box.shape, strict=True))
        with self._saying:
            opened = ts.open(
                spec, open=True, assume_metadata=True, context=self._context, transaction=self._transaction
            ).result()
            self._copies.append(opened[place].write(array, can_reference_source_data_indefinitely=True).copy)
        self._referred += array.nbytes

    def _make_room(self, size: int) -> None:
        full = self._held and self._held + size > min(_PORTION, self._most // _UNDER_WAY)
        if full or self._referred >= _REFERRED:
            self.finish(self._most - size)
            self._begin()

    def finish(self, most: int) -> None:
        """Commit the transaction; wait until at most so many bytes are under way."""
        with self._saying:
            for copy in self._copies:
                copy.result()
            self._committing.append((self._held, self._transaction.commit_async()))
            while self._committing and (most <= 0 or sum(size for size, _ in self._committing) > most):
                self._committing.popleft()[1].result()


class _Window:
    """Writes of single values, of which only so many bytes are under way."""

    def __init__(self, store: Callable[[str, bytes], Any], most: int) -> None:
        self._store, self._most, self._held = store, most, 0
        self._writing: collections.deque[tuple[int, Any]] = collections.deque()

    def put(self, key: str, value: bytes) -> None:
        """Store a value, sooner or later."""
        self.finish(max(0, self._most - len(value)))
        self._writing.append((len(value), self._store(key, value)))
        self._held += len(value)

    def finish(self, most: int) -> None:
        """Wait until at most so many bytes are under way."""
        while self._writing and (self._held > most or len(self._writing) > _MOST or not most):
            size, future = self._writing.popleft()
            future.result()
            self._held -= size


class _Files(_Window):
    """Values as files of TensorStore's own driver."""

    def __init__(self, spec: Mapping[str, Json], shared: _Shared, most: int) -> None:
        import tensorstore as ts

        self._saying = shared.saying
        with self._saying:
            store = ts.KvStore.open(spec, context=places.context(shared.settings, spec)).result()
        super().__init__(store.write, most)
        self.keys: list[str] = []

    def put(self, key: str, value: bytes) -> None:
        """Store a value, sooner or later."""
        self.keys.append(key)
        with self._saying:
            super().put(key, value)

    def finish(self, most: int) -> None:
        """Wait until at most so many bytes are under way."""
        with self._saying:
            super().finish(most)
