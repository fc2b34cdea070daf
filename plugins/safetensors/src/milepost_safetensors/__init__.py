"""The packed array writer: all arrays of a host in a few large safetensors files, aligned, checked, mappable.

Beside it stands the writer and reader of folders as Hugging Face lays them out.

The rule: a file is valid safetensors that any reader of the format opens; what milepost needs beyond that stands in the
record that `write` returns. docs/reference/packed-format.md describes both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost.hookspecs import hookimpl

from milepost_safetensors import dtypes, reading, record, writing
from milepost_safetensors.huggingface import HuggingFaceArrays, HuggingFaceLayout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from milepost.hookspecs import RegisterArrays, RegisterLayout
    from milepost.protocols import Array, ArraySpec, Json, Location, Piece, ReadOptions, ReadRequest, WriteOptions

__all__ = ["HuggingFaceArrays", "HuggingFaceLayout", "PackedArrays", "register_arrays", "register_layouts"]


class PackedArrays:
    """Write and read arrays in packed safetensors files; keeps no state between calls but the records it parsed."""

    def __init__(self) -> None:
        self._parsed = record.Parsed()

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
        return reading.read(location, self._parsed.entries(records), requests, options)


@hookimpl
def register_arrays(register: RegisterArrays) -> None:
    """Offer the writer under the name of its format, and that of folders for others."""
    register("safetensors", PackedArrays)
    register("huggingface", HuggingFaceArrays)


@hookimpl
def register_layouts(register: RegisterLayout) -> None:
    """Offer to read folders of safetensors files."""
    register("huggingface", HuggingFaceLayout)
