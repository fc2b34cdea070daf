"""The packed array writer: all arrays of a host in a few large safetensors files, aligned, checked, mappable.

The rule: a file is valid safetensors that any reader of the format opens; what milepost needs beyond that stands in the
record that `write` returns. docs/reference/packed-format.md describes both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost.hookspecs import hookimpl

from milepost_safetensors import dtypes, reading, writing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from milepost.hookspecs import RegisterArrays
    from milepost.protocols import Array, ArraySpec, Json, Location, Piece, ReadOptions, ReadRequest, WriteOptions

__all__ = ["PackedArrays", "register_arrays"]


class PackedArrays:
    """Write and read arrays in packed safetensors files; keeps no state between calls."""

    def create(self, location: Location, specs: Sequence[ArraySpec]) -> None:
        """Refuse dtypes that cannot be written; files need no preparation."""
        del location
        dtypes.check(specs)

    def write(self, location: Location, pieces: Sequence[Piece], options: WriteOptions) -> Json:
        """Write this host's pieces durably; return where each lies, and its checksums."""
        return writing.write(location, pieces, options)

    def read(
        self, location: Location, records: Sequence[Json], requests: Sequence[ReadRequest], options: ReadOptions
    ) -> Iterator[tuple[int, Array]]:
        """Yield `(index of the request, array)`, each as soon as it is there; refuse at once what cannot be read."""
        return reading.read(location, records, requests, options)


@hookimpl
def register_arrays(register: RegisterArrays) -> None:
    """Offer the writer under the name of its format."""
    register("safetensors", PackedArrays)
