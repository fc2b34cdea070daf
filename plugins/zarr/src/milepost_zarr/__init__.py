"""The Zarr writer: every item of a checkpoint is one plain Zarr v3 group, open to every reader of Zarr.

The rule: the files are those of the published format and nothing else; what milepost needs beyond them stands in the
record that `write` returns. zarr-python writes them, on whatever storage the checkpoint is on. They are read here,
because zarr-python puts the fill value where a file is gone, and bounds no memory.
docs/how-to/read-with-zarr-and-xarray.md describes the result.
"""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from milepost.errors import ConfigError
from milepost.hookspecs import hookimpl

from milepost_zarr import dtypes, grid, metadata, reading, record, writing
from milepost_zarr.codecs import CODECS, Codec

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence

    from milepost.hookspecs import RegisterArrays
    from milepost.protocols import Array, ArraySpec, Json, Location, Piece, ReadOptions, ReadRequest, WriteOptions

    from milepost_zarr.store import GroupStore

__all__ = ["ZarrArrays", "register_arrays"]

_WRITERS = 16
"""How many documents are written at once: they are small, so what is waited for is the storage's answer."""

_CHUNK_LIMIT = 1 << 30


class ZarrArrays:
    """Write and read arrays as Zarr groups; keeps no state between calls.

    `compression` is "none", "zstd", or "blosc" (bytes shuffled, then Zstandard), with a `level` of its own. Chunks, the
    least that is read, have at most about `chunk_bytes`, files at most about `shard_bytes`, where the shape allows it.
    """

    def __init__(
        self,
        *,
        compression: Literal["none", "zstd", "blosc"] = "none",
        level: int | None = None,
        chunk_bytes: int = 1 << 20,
        shard_bytes: int = 1 << 24,
    ) -> None:
        if compression not in CODECS:
            raise ConfigError(f"zarr has no compression {compression!r}: it has {', '.join(map(repr, CODECS))}")
        default, lowest, highest = CODECS[compression]
        self._codec = Codec(compression, default if level is None else level)
        if not _is_count(self._codec.level, lowest, highest):
            raise ConfigError(f"zarr cannot compress with level {level!r}: {compression!r} has {lowest} to {highest}")
        if not _is_count(chunk_bytes, 1, _CHUNK_LIMIT):
            raise ConfigError(f"zarr cannot have chunks of chunk_bytes = {chunk_bytes!r}: 1 to {_CHUNK_LIMIT} can be")
        if not _is_count(shard_bytes, chunk_bytes, None):
            raise ConfigError(f"zarr cannot have files of shard_bytes = {shard_bytes!r}: a chunk has {chunk_bytes}")
        self._chunk_bytes, self._shard_bytes = chunk_bytes, shard_bytes

    def chunk(self, spec: ArraySpec) -> tuple[int, ...]:
        """Return the shape of an array's files; raise `UnsupportedLeafError` for a dtype that cannot be written."""
        return self._cut(spec).file

    def create(self, location: Location, specs: Sequence[ArraySpec]) -> None:
        """Write the metadata of all arrays and groups; refuse dtypes that cannot be written."""
        dtypes.check(specs)
        arrays = [(spec, self._cut(spec)) for spec in specs]
        _describe(location, lambda store: metadata.make_group(store, arrays, self._codec))

    def write(self, location: Location, pieces: Sequence[Piece], options: WriteOptions) -> Json:
        """Write this host's pieces durably; return how their arrays are cut."""
        dtypes.check(piece.spec for piece in pieces)
        specs = {piece.spec.name: (piece.spec, self._cut(piece.spec)) for piece in pieces}
        writing.write(location, pieces, lambda piece: specs[piece.spec.name][1], options)
        return record.make(specs.values(), self._codec)

    def complete(self, location: Location, checkpoint: Mapping[str, Any]) -> None:
        """Add the small values of each item, and what the caller noted, to the attributes of its group."""
        for item in checkpoint["items"].values():
            if item["writer"]:
                place = dataclasses.replace(location, prefix=location.prefix + item["prefix"])
                _describe(place, functools.partial(metadata.set_attributes, item=item, checkpoint=checkpoint))

    def read(
        self, location: Location, records: Sequence[Json], requests: Sequence[ReadRequest], options: ReadOptions
    ) -> Iterator[tuple[int, Array]]:
        """Yield `(index of the request, array)`, each as soon as it is there; refuse at once what cannot be read."""
        return reading.read(location, records, requests, options)

    def stored_chunks(
        self, location: Location, records: Sequence[Json], names: Sequence[str]
    ) -> Sequence[tuple[int, ...] | None]:
        """Return the shape of the chunks of each array; None for one that is not there, which reading it will say."""
        del location
        entries = record.parse(records)
        return [entries[name].grid.chunk if name in entries else None for name in names]

    def _cut(self, spec: ArraySpec) -> grid.Grid:
        dtypes.check([spec])
        found = dtypes.kind(spec.dtype)
        assert found is not None  # noqa: S101 checked just before
        return grid.cut(spec, found.itemsize, self._chunk_bytes, self._shard_bytes)


def _describe(location: Location, act: Callable[[GroupStore], Coroutine[Any, Any, None]]) -> None:
    """Let zarr-python make documents, then write them."""
    import asyncio

    from milepost_zarr.store import GroupStore

    store = GroupStore(location)
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="milepost-zarr-create") as pool:
        # Not in the caller's thread, which may run an event loop.
        pool.submit(lambda: asyncio.run(act(store))).result()
        for _ in pool.map(store.flush, store.documents):
            pass


def _is_count(value: object, lowest: int, highest: int | None) -> bool:
    return type(value) is int and value >= lowest and (highest is None or value <= highest)


@hookimpl
def register_arrays(register: RegisterArrays) -> None:
    """Offer the writer under the name of its format."""
    register("zarr", ZarrArrays)
