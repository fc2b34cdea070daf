"""Folders of safetensors files as Hugging Face lays them out: an index and its shards, or a single file.

Decides that such a folder is a checkpoint of one flat tree, of which each tensor is a leaf under its own name. The
rule: the files are the format's, to the byte, so that everybody reads what is written here; and what others wrote is
read without a manifest, and believed only as far as it was checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from milepost_safetensors import reading, record
from milepost_safetensors.huggingface import folder, shards

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from milepost.protocols import (
        Array,
        ArraySpec,
        Json,
        Location,
        Piece,
        ReadOptions,
        ReadRequest,
        Storage,
        WriteOptions,
    )

__all__ = ["HuggingFaceArrays", "HuggingFaceLayout"]


class HuggingFaceArrays:
    """Write and read arrays in `model-00001-of-00002.safetensors` and so on; keeps no state between calls.

    `shard_size` is the bytes of tensors that a file holds at most, a number or a text such as "5GB" or "512MiB"; a
    tensor that is larger has a file of its own.
    """

    def __init__(self, *, shard_size: int | str = "5GB") -> None:
        self._shard_size = shards.bytes_of(shard_size)
        self._parsed = record.Parsed(foreign=True)

    def create(self, location: Location, specs: Sequence[ArraySpec]) -> None:
        """Refuse names and dtypes that the format does not have, and more than one process."""
        shards.check(location, specs)

    def write(self, location: Location, pieces: Sequence[Piece], options: WriteOptions) -> Json:
        """Write the shards, and the index last; return where each array lies, and its checksums."""
        return shards.write(location, pieces, self._shard_size, options)

    def read(
        self, location: Location, records: Sequence[Json], requests: Sequence[ReadRequest], options: ReadOptions
    ) -> Iterator[tuple[int, Array]]:
        """Yield `(index of the request, array)`, each as soon as it is there; refuse at once what cannot be read."""
        return reading.read(location, self._parsed.entries(records), requests, options)


class HuggingFaceLayout:
    """Read a folder of safetensors files, or a single one, as if it were a checkpoint with one item "state".

    Such a folder is its user's, who may keep other things in it: nothing here says that it may be deleted.
    """

    def read(self, storage: Storage, prefix: str, names: Sequence[str]) -> Mapping[str, Any] | None:
        """Return the manifest of the folder; None where there are no safetensors files, or packed ones of milepost."""
        return folder.manifest(storage, prefix, names)

    def recognises(self, storage: Storage, prefix: str, names: Sequence[str]) -> bool:
        """Say whether there are such files, by their names and the header of one of them."""
        return folder.recognises(storage, prefix, names)
