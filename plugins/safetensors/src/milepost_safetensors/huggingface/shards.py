"""How a folder of shards is written: which tensor goes into which file, and where in it.

The rule: tensors fill one file after the other in the order in which they come, and lie in each by falling size of
their items, so that all are aligned though the format allows no padding. All sizes are known before a byte is written;
the index, which says that everything is there, comes last.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash
from milepost.errors import ConfigError, UnsupportedLeafError, noted

from milepost_safetensors import dtypes
from milepost_safetensors.huggingface.folder import INDEX, SINGLE, SUFFIX
from milepost_safetensors.layout import ALIGN, TENSORS, blocks, spans, uncovered, whole
from milepost_safetensors.record import FORMAT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from milepost.protocols import Array, ArraySpec, Json, Location, Piece, WriteOptions

    from milepost_safetensors.dtypes import Kind

__all__ = ["bytes_of", "check", "write"]

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgt]?)(?P<binary>i?)b?", re.IGNORECASE)
_POWERS = "kmgt"
_METADATA = {"format": "pt"}  # without it, readers of Hugging Face's own refuse the file
_SLICE = 1 << 20


class _StoppedError(Exception):
    """Another file failed, so this one is given up."""


class _Tensor(NamedTuple):
    spec: ArraySpec
    kind: Kind
    nbytes: int
    pieces: list[Piece]


def bytes_of(size: int | str) -> int:
    """Return a size that may be a text: "5GB" is 5 * 1000**3, "5GiB" is 5 * 1024**3.

    >>> bytes_of("5GB"), bytes_of("1.5 KiB"), bytes_of(7)
    (5000000000, 1536, 7)
    """
    found = _SIZE.fullmatch(str(size).strip()) if type(size) in (int, str) else None
    if found is not None:
        power = _POWERS.index(found["unit"].lower()) + 1 if found["unit"] else 0
        count = int(float(found["number"]) * (1024 if found["binary"] else 1000) ** power)
        if count > 0:
            return count
    raise noted(ConfigError(f"cannot cut shards of size {size!r}: it is no number of bytes"), "write 5GB or 512MiB")


def check(location: Location, specs: Sequence[ArraySpec]) -> None:
    """Raise one `UnsupportedLeafError` that lists every array the format has no name or dtype for."""
    if location.hosts > 1:
        raise noted(
            ConfigError(
                f"cannot write safetensors shards with an index from {location.hosts} processes: one writes them"
            ),
            "save with the array writer 'safetensors', and export the checkpoint",
        )
    bad = [f"{spec.name!r} {why}" for spec in specs if (why := _hindrance(spec)) is not None]
    if bad:
        raise UnsupportedLeafError(f"safetensors has no way to hold these arrays: {', '.join(bad)}")


def _hindrance(spec: ArraySpec) -> str | None:
    kind = dtypes.kind(spec.dtype)
    if kind is None or not kind.native:
        return f"of dtype {spec.dtype!r}"
    if spec.name == "__metadata__":
        return "by that name"
    try:
        spec.name.encode()
    except UnicodeEncodeError:
        return "by a name that is no text"
    return None


def write(location: Location, pieces: Sequence[Piece], shard_size: int, options: WriteOptions) -> Json:
    """Write the pieces to shards, as many at once as the budget allows, the index last; return the record of them."""
    shards = list(_shards(_tensors(pieces), shard_size)) or [[]]
    names = [f"model-{at:05d}-of-{len(shards):05d}{SUFFIX}" for at in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    files = [_File(name, shard) for name, shard in zip(names, shards, strict=True)]
    largest = max((math.prod(_shape(piece)) * _itemsize(piece) for piece in pieces if not piece.view), default=0)
    threads = min(options.threads, options.budget // largest) if largest else options.threads
    _write_all(location, files, max(1, threads))
    if len(files) > 1:
        homes = {tensor.spec.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
        location.storage.write(location.prefix + INDEX, [json.dumps(index, indent=2).encode() + b"\n"])
    records: list[Json] = [file.record() for file in files]
    return {"format": FORMAT, "files": records}


def _write_all(location: Location, files: Sequence[_File], threads: int) -> None:
    """Write the files; once one fails, the others stop before their next piece."""
    stop = threading.Event()
    with ThreadPoolExecutor(min(threads, len(files)), thread_name_prefix="milepost-write") as pool:
        futures = [pool.submit(location.storage.write, location.prefix + one.name, one.buffers(stop)) for one in files]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
        raise error


def _tensors(pieces: Iterable[Piece]) -> list[_Tensor]:
    grouped: dict[str, list[Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.spec.name, []).append(piece)
    return [_tensor(some) for some in grouped.values()]


def _tensor(pieces: list[Piece]) -> _Tensor:
    spec = pieces[0].spec
    kind = dtypes.kind(spec.dtype)
    if kind is None or not kind.native:
        raise UnsupportedLeafError(f"safetensors has no way to hold array {spec.name!r} of dtype {spec.dtype!r}")
    count = sum(math.prod(_shape(piece)) for piece in pieces)
    if count != math.prod(spec.shape):
        raise ValueError(f"the pieces of array {spec.name!r} have {count} of its {math.prod(spec.shape)} elements")
    return _Tensor(spec, kind, math.prod(spec.shape) * kind.itemsize, pieces)


def _itemsize(piece: Piece) -> int:
    kind = dtypes.kind(piece.spec.dtype)
    return 0 if kind is None else kind.itemsize


def _shape(piece: Piece) -> tuple[int, ...]:
    return piece.spec.shape if piece.box is None else piece.box.shape


def _shards(tensors: Iterable[_Tensor], most: int) -> Iterator[list[_Tensor]]:
    shard: list[_Tensor] = []
    held = 0
    for tensor in tensors:
        if shard and (held + tensor.nbytes > most or len(shard) == TENSORS):
            yield _ordered(shard)
            shard, held = [], 0
        shard.append(tensor)
        held += tensor.nbytes
    if shard:
        yield _ordered(shard)


def _ordered(shard: Sequence[_Tensor]) -> list[_Tensor]:
    return sorted(shard, key=lambda tensor: -tensor.kind.itemsize)


class _File:
    """One shard under way."""

    def __init__(self, name: str, shard: Sequence[_Tensor]) -> None:
        self.name, self._shard = name, shard
        entries: dict[str, Any] = {"__metadata__": _METADATA}
        self._offsets, at = [], 0
        for spec, kind, nbytes, _ in shard:
            self._offsets.append(at)
            entries[spec.name] = {"dtype": kind.code, "shape": list(spec.shape), "data_offsets": [at, at + nbytes]}
            at += nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGN)
        self._header, self._data = len(text).to_bytes(8, "little") + text, at
        self._sums: list[str] = []

    def record(self) -> dict[str, Json]:
        """Return what a reader has to know of it."""
        start = len(self._header)
        rows: list[Json] = [
            [tensor.spec.name, tensor.spec.dtype, list(tensor.spec.shape), start + offset, sums]
            for tensor, offset, sums in zip(self._shard, self._offsets, self._sums, strict=True)
        ]
        return {"name": self.name, "size": start + self._data, "data": start, "pieces": rows}

    def buffers(self, stop: threading.Event) -> Iterator[bytes | memoryview]:
        """Yield the file from front to back; each piece is fetched when its turn comes, and dropped after it."""
        self._sums.clear()
        yield self._header
        for tensor in self._shard:
            sums = _Sums(tensor)
            for part in _in_order(tensor):
                if stop.is_set():
                    raise _StoppedError
                sums.update(part)
                yield part
                # The storage may still hold this slice while the next piece is fetched; it must not keep its array.
                with contextlib.suppress(BufferError):
                    part.release()
            self._sums.append(sums.digits())


class _Sums:
    """The checksums of a tensor's blocks, of bytes that come in their order."""

    def __init__(self, tensor: _Tensor) -> None:
        self._cut = blocks(tensor.spec.shape, tensor.kind.itemsize)
        self._done: list[str] = []
        self._running, self._at = xxhash.xxh3_64(), 0

    def update(self, data: memoryview) -> None:
        while data:
            stop = self._cut.span(len(self._done))[1]
            part = data[: stop - self._at]
            self._running.update(part)
            self._at, data = self._at + len(part), data[len(part) :]
            if self._at == stop:
                self._done.append(self._running.hexdigest())
                self._running = xxhash.xxh3_64()

    def digits(self) -> str:
        return "".join(self._done)


# --- the data of a tensor --------------------------------------------------------------------------------------------


def _in_order(tensor: _Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in C order: piece by piece where they are runs of it, else put together first."""
    if not tensor.nbytes:
        return
    runs = sorted(((_run(tensor, piece), piece) for piece in tensor.pieces), key=lambda run: run[0])
    at = 0
    for (start, stop), piece in runs:
        if start != at or stop - start != math.prod(_shape(piece)) * tensor.kind.itemsize:
            yield from _slices(_put_together(tensor))
            return
        at = stop
    for _, piece in runs:
        yield from _slices(_fetched(tensor, piece))


def _slices(array: Array) -> Iterator[memoryview]:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for at in range(0, len(data), _SLICE):
        yield data[at : at + _SLICE]


def _run(tensor: _Tensor, piece: Piece) -> tuple[int, int]:
    """Return the bytes of the tensor between the first and the last one of a piece."""
    if piece.box is None:
        return 0, tensor.nbytes
    runs = spans(piece.box, whole(tensor.spec.shape), tensor.kind.itemsize)
    return runs[0][0], runs[-1][1]


def _put_together(tensor: _Tensor) -> Array:
    full = whole(tensor.spec.shape)
    if (gap := uncovered(full, (piece.box or full for piece in tensor.pieces))) is not None:
        raise ValueError(f"the pieces of array {tensor.spec.name!r} leave out {gap}")
    data: Array = np.empty(tensor.spec.shape, tensor.kind.dtype)
    for piece in tensor.pieces:
        box = piece.box or full
        region = tuple(slice(start, start + n) for start, n in zip(box.start, box.shape, strict=True))
        data[region] = _fetched(tensor, piece)
    return data


def _fetched(tensor: _Tensor, piece: Piece) -> Array:
    array = piece.fetch()
    if array.shape != _shape(piece) or array.dtype != tensor.kind.dtype:
        raise ValueError(
            f"array {tensor.spec.name!r} was announced as {tensor.kind.dtype}{list(_shape(piece))}: "
            f"what came is {array.dtype}{list(array.shape)}"
        )
    return array
