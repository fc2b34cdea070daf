"""How the bytes of one chunk stand in a file.

The rule: behind the bytes of every chunk, compressed or not, stands their CRC-32C, as Zarr's codec of that name has it,
so that every reader of the format notices damage, not only this one. Compressed bytes are unpacked into memory of the
size that the chunk must have, never of the size that they claim.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import TYPE_CHECKING, Any, Final

import google_crc32c

if TYPE_CHECKING:
    from milepost.protocols import Array
    from zarr.abc.codec import BytesBytesCodec

__all__ = ["CODECS", "SUM", "Codec", "checksum"]

SUM: Final = 4
"""Bytes of a checksum."""

CODECS: dict[str, tuple[int, int, int]] = {"none": (0, 0, 0), "zstd": (1, -131072, 22), "blosc": (5, 0, 9)}
"""The compressions by name: the level where none is given, the lowest and the highest."""

_BLOSC_SIZES = struct.Struct("<4xI")
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def checksum(data: Array) -> bytes:
    """Return the checksum that follows so many bytes in a file."""
    # Its annotation asks for bytes; it takes any array that is contiguous, and copies nothing.
    found: Any = google_crc32c.value(data)  # type: ignore[arg-type, unused-ignore]  # pyright: ignore[reportArgumentType]
    return int(found).to_bytes(SUM, "little")


@dataclasses.dataclass(frozen=True, slots=True)
class Codec:
    """A compression and its level."""

    name: str = "none"
    level: int = 0

    def compressors(self) -> list[BytesBytesCodec]:
        """Return what zarr-python is to make of the bytes of a chunk."""
        from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

        packed: dict[str, list[BytesBytesCodec]] = {
            "none": [],
            "zstd": [ZstdCodec(level=self.level)],
            "blosc": [BloscCodec(cname="zstd", clevel=self.level, shuffle="shuffle")],
        }
        return [*packed[self.name], Crc32cCodec()]

    def decode(self, data: Array, into: Array) -> None:
        """Unpack bytes into as many as are wanted; raise `ValueError` where they cannot be what this codec made."""
        if self.name == "zstd":
            from numcodecs.zstd import Zstd as Packed
        else:
            from numcodecs.blosc import Blosc as Packed
        size = _zstd_size(data) if self.name == "zstd" else _blosc_size(data)
        if size != len(into):
            raise ValueError(f"they claim to hold {size} bytes where there must be {len(into)}")
        try:
            Packed().decode(data, into)
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    def most(self, size: int) -> int:
        """Return how many bytes so many can become at most, when they cannot be compressed."""
        return size if self.name == "none" else size + size // 128 + 1024


def _blosc_size(data: Array) -> int | None:
    raw = data[: _BLOSC_SIZES.size].tobytes()
    return _BLOSC_SIZES.unpack(raw)[0] if len(raw) == _BLOSC_SIZES.size else None


def _zstd_size(data: Array) -> int | None:
    """Return the size that a frame of Zstandard claims (RFC 8878, 3.1.1.1); None where it claims none."""
    raw = data[:18].tobytes()
    if len(raw) < len(_ZSTD_MAGIC) + 1 or raw[:4] != _ZSTD_MAGIC:
        return None
    flag, single, dictionary = raw[4] >> 6, raw[4] >> 5 & 1, raw[4] & 3
    start = 5 + (not single) + (0, 1, 2, 4)[dictionary]
    length = (single, 2, 4, 8)[flag]
    if not length or len(raw) < start + length:
        return None
    return int.from_bytes(raw[start : start + length], "little") + (256 if flag == 1 else 0)
