"""The array writer of Orbax's format: Zarr v2 or v3 through TensorStore, in an OCDBT database or in plain folders.

The rule: what is written is what Orbax would read, whole: besides the arrays, everything that Orbax keeps beside them.
What milepost needs beyond that, checksums above all, stands in the record that `write` returns.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from milepost.hookspecs import hookimpl

from milepost_tensorstore import options as choices

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from milepost.hookspecs import RegisterArrays
    from milepost.protocols import Array, ArraySpec, Json, Location, Piece, ReadOptions, ReadRequest, WriteOptions

    from milepost_tensorstore.catalog import Catalog, Catalogs

__all__ = ["TensorStoreArrays", "register_arrays"]

_NAME = "tensorstore"


class TensorStoreArrays:
    """Write and read arrays in Orbax's format; keeps no state between calls but where the arrays of one item are.

    `zarr_format` is 2 or 3, and `ocdbt` whether all arrays go into one database; otherwise each is a folder. Chunks
    are compressed with `compression` "zstd" at `compression_level`, or not at all. A chunk is what one device holds,
    cut into smaller ones above `chunk_bytes` (8 MiB when not given). `target_file_bytes` is the size at which a new
    file of data is begun, `cache_bytes` what TensorStore may keep of a database's tree, and `file_io_concurrency` how
    many files it writes at once. Raises `ConfigError` for a value that cannot be.
    """

    def __init__(  # noqa: PLR0913 - each is an option of the user, given by name
        self,
        *,
        zarr_format: int = 2,
        ocdbt: bool = True,
        compression: str | None = None,
        compression_level: int | None = None,
        chunk_bytes: int | None = None,
        target_file_bytes: int | None = None,
        cache_bytes: int | None = None,
        file_io_concurrency: int | None = None,
    ) -> None:
        self._settings = choices.checked(
            {
                "zarr_format": zarr_format,
                "ocdbt": ocdbt,
                "compression": compression,
                "compression_level": compression_level,
                "chunk_bytes": chunk_bytes,
                "target_file_bytes": target_file_bytes,
                "cache_bytes": cache_bytes,
                "file_io_concurrency": file_io_concurrency,
            }
        )
        self._catalogs: Catalogs | None = None

    def create(self, location: Location, specs: Sequence[ArraySpec]) -> None:
        """Refuse dtypes and names that cannot be written; nothing needs preparation."""
        from milepost_tensorstore import writing

        del location
        writing.check(specs, self._settings)

    def chunk(self, spec: ArraySpec) -> tuple[int, ...]:
        """Return the shape of an array's chunks, counted from the origin; it divides `spec.box` where there is one."""
        from milepost_tensorstore import writing

        return writing.chunk_of(spec, self._settings)

    def write(self, location: Location, pieces: Sequence[Piece], options: WriteOptions) -> Json:
        """Write this host's pieces durably; return how they are stored, and their checksums."""
        from milepost_tensorstore import writing

        return writing.write(location, pieces, options, self._settings)

    def complete(self, location: Location, checkpoint: Mapping[str, Any]) -> None:
        """Make one database of what several hosts wrote, then write what else Orbax reads."""
        from milepost_tensorstore import writing
        from milepost_tensorstore.orbax import describing

        for item in checkpoint["items"].values():
            if item["writer"] and len(item["records"]) > 1 and item["records"][0]["ocdbt"]:
                below = location.prefix + item["prefix"]
                inner = dataclasses.replace(location, prefix=below, url=f"{location.storage.url}/{below}")
                writing.merge(inner, len(item["records"]))
        describing.complete(location, checkpoint)

    def read(
        self, location: Location, records: Sequence[Json], requests: Sequence[ReadRequest], options: ReadOptions
    ) -> Iterator[tuple[int, Array]]:
        """Yield `(index of the request, array)`, each as soon as it is there; refuse at once what cannot be read."""
        from milepost_tensorstore import reading

        return reading.read(location, self._catalog(location, records), requests, options) if requests else iter(())

    def stored_chunks(
        self, location: Location, records: Sequence[Json], names: Sequence[str]
    ) -> Sequence[tuple[int, ...] | None]:
        """Return the shapes of the chunks of arrays; None for one that can be read by rows as well."""
        from milepost_tensorstore import reading

        return reading.stored_chunks(self._catalog(location, records), names)

    def _catalog(self, location: Location, records: Sequence[Json]) -> Catalog:
        if self._catalogs is None:
            from milepost_tensorstore.catalog import Catalogs

            self._catalogs = Catalogs()
        return self._catalogs.get(location, records)


@hookimpl
def register_arrays(register: RegisterArrays) -> None:
    """Offer the writer under the name of the library."""
    register(_NAME, TensorStoreArrays)
