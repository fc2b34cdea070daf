"""Zarr's own metadata of an array: made for what is written, understood for what others wrote; and names of chunks.

The rule: documents are those that TensorStore makes for Orbax, byte by byte where that is settled. What is stored in
raw chunks is said here, too: a chunk of Zarr v2 without a codec is the bytes of the array, and one of v3, which Orbax
wraps in a shard of one chunk, is the same bytes with an index of 20 bytes behind them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import struct
from typing import TYPE_CHECKING, Any

from milepost.errors import DamagedError

from milepost_tensorstore.dtypes import Kind, coded

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FILES", "Document", "document", "key", "trailer", "understood"]

FILES = {2: ".zarray", 3: "zarr.json"}
"""The name of an array's document, by the version of Zarr."""

_AXES = 32
_LIMIT = 1 << 60
_V2, _V3 = 2, 3


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """What the metadata of an array says, and what is known of its chunks without a codec.

    `raw` is whether a chunk is the bytes of the array, `zstd` whether it is one frame of Zstandard that has them;
    behind either are `tail` more.
    """

    text: bytes
    kind: Kind
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    zarr_format: int
    raw: bool
    zstd: bool
    tail: int
    separator: str
    default_keys: bool

    @property
    def chunk_bytes(self) -> int:
        """The bytes of a chunk as an array."""
        return math.prod(self.chunk) * self.kind.dtype.itemsize

    def key(self, cell: tuple[int, ...]) -> str:
        """Return the name of a chunk within its array."""
        if self.default_keys:
            return self.separator.join(["c", *map(str, cell)])
        return self.separator.join(map(str, cell)) or "0"


def key(name: str, file: str) -> str:
    """Return the key of a file of an array; that of an array without a name is at the top."""
    return f"{name}/{file}" if name else file


@functools.lru_cache(4096)
def document(
    kind: Kind, shape: tuple[int, ...], chunk: tuple[int, ...], zarr_format: int, compression: tuple[str, int] | None
) -> Document:
    """Return the metadata of an array that is written here."""
    if zarr_format == _V2:
        codec = None if compression is None else {"id": compression[0], "level": compression[1]}
        content: dict[str, Any] = {
            "chunks": chunk,
            "compressor": codec,
            "dimension_separator": ".",
            "dtype": kind.code,
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": shape,
            "zarr_format": 2,
        }
    else:
        content = _version_3(kind, shape, chunk, compression)
    text = json.dumps(content, separators=(",", ":")).encode()
    raw = compression is None
    tail, separator = (0, ".") if zarr_format == _V2 else (len(trailer(0)), "/")
    return Document(text, kind, shape, chunk, zarr_format, raw, not raw, tail, separator, zarr_format == _V3)


def _version_3(
    kind: Kind, shape: tuple[int, ...], chunk: tuple[int, ...], compression: tuple[str, int] | None
) -> dict[str, Any]:
    endian = {"configuration": {"endian": "little"}, "name": "bytes"}
    codecs: list[dict[str, Any]] = [endian if kind.dtype.itemsize > 1 else {"name": "bytes"}]
    if compression is not None:
        codecs.append({"configuration": {"checksum": False, "level": compression[1]}, "name": compression[0]})
    shard = {
        "configuration": {"chunk_shape": chunk, "codecs": codecs, "index_codecs": [endian, {"name": "crc32c"}]},
        "name": "sharding_indexed",
    }
    return {
        "chunk_grid": {"configuration": {"chunk_shape": chunk}, "name": "regular"},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [shard],
        "data_type": kind.name,
        "fill_value": kind.zero,
        "node_type": "array",
        "shape": shape,
        "zarr_format": 3,
    }


# --- shards of one chunk ---------------------------------------------------------------------------------------------


@functools.lru_cache(4096)
def trailer(size: int) -> bytes:
    """Return the index of a shard that has one chunk of so many bytes: where it begins, its size, and their CRC-32C.

    >>> trailer(6).hex()
    '00000000000000000600000000000000c9e215f1'
    """
    index = struct.pack("<QQ", 0, size)
    return index + struct.pack("<I", _crc32c(index))


@functools.cache
def _table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901 - eight steps of the same value
        table.append(value)
    return tuple(table)


def _crc32c(data: bytes) -> int:
    table, value = _table(), 0xFFFFFFFF
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF


# --- documents of others ---------------------------------------------------------------------------------------------


def understood(text: bytes, zarr_format: int, name: str) -> Document:
    """Return what the document of an array says, or raise `DamagedError`, which names the array."""
    try:
        return _understood(text, zarr_format)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error) or "it is nested too deeply"
        raise DamagedError(
            f"cannot read array {name!r}: its {FILES[zarr_format]} cannot be believed: {what}"
        ) from error


@functools.lru_cache(4096)
def _understood(text: bytes, zarr_format: int) -> Document:
    content = json.loads(text)
    if type(content) is not dict or content.get("zarr_format") != zarr_format:
        raise ValueError(f"it is no metadata of Zarr v{zarr_format}")
    shape = _dims(content["shape"])
    if zarr_format == _V2:
        kind, native = _kind(content["dtype"])
        chunk = _dims(content["chunks"])
        plain = native and not content.get("filters") and content.get("order", "C") == "C"
        codec = content.get("compressor")
        raw, zstd, tail = plain and codec is None, plain and type(codec) is dict and codec.get("id") == "zstd", 0
        keys = _separator(content.get("dimension_separator", ".")), False
    else:
        kind, native = _kind(content["data_type"])
        chunk = _dims(content["chunk_grid"]["configuration"]["chunk_shape"])
        zstd = _is_zstd(content.get("codecs"), content["chunk_grid"]["configuration"]["chunk_shape"], kind)
        raw, tail = False, len(trailer(0))
        keys = _encoding(content["chunk_key_encoding"])
    if len(chunk) != len(shape) or 0 in chunk:
        raise ValueError(f"its chunks are {chunk} of shape {shape}")
    return Document(text, kind, shape, chunk, zarr_format, raw, zstd, tail if zstd else 0, *keys)


def _is_zstd(codecs: Any, chunk: Any, kind: Kind) -> bool:
    """Say whether codecs of Zarr v3 make a shard of a single chunk, which is compressed with Zstandard alone."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    try:
        (sharding,) = codecs
        shard = sharding["configuration"]
        order, compression = shard["codecs"]
        return (
            sharding["name"] == "sharding_indexed"
            and shard["chunk_shape"] == chunk
            and shard.get("index_location", "end") == "end"
            and shard["index_codecs"] == [little, {"name": "crc32c"}]
            and (order == little or (kind.dtype.itemsize == 1 and order == {"name": "bytes"}))
            and compression["name"] == "zstd"
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        return False  # TensorStore knows what it is, if anybody does


def _kind(name: Any) -> tuple[Kind, bool]:
    found = coded(name) if type(name) is str else None
    if found is None:
        raise ValueError(f"its dtype is {name!r:.80}")
    return found


def _dims(value: Any) -> tuple[int, ...]:
    if type(value) is not list or len(value) > _AXES or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"it has a shape {value!r:.80}")
    if math.prod(n or 1 for n in value) > _LIMIT:
        raise ValueError(f"it has a shape {value!r:.80}")
    return tuple(value)


def _separator(value: Any) -> str:
    if value not in (".", "/"):
        raise ValueError(f"its separator is {value!r:.80}")
    return str(value)


def _encoding(value: Mapping[str, Any]) -> tuple[str, bool]:
    default = value["name"] == "default"
    if not default and value["name"] != "v2":
        raise ValueError(f"its keys are encoded by {value['name']!r:.80}")
    return _separator(value.get("configuration", {}).get("separator", "/" if default else ".")), default
