"""Which arrays a foreign item has, and their documents of Zarr, read many at once.

The rule: no array is opened. A database is listed once, with what stands in it; files are read by several threads, a
few each time. A database that was not merged is several, one for each process that wrote; an array is in any of them.
"""

from __future__ import annotations

import functools
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from milepost.errors import DamagedError, MissingDataError
from milepost.protocols import KeepsFolders

from milepost_tensorstore.database import MANIFEST, Range, entries
from milepost_tensorstore.documents import FILES, key, understood

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from milepost_tensorstore.documents import Document
    from milepost_tensorstore.orbax.recognising_files import Folder

__all__ = ["Arrays", "databases"]

_OF_PROCESS = re.compile(r"ocdbt\.process_(\d{1,9})[\w.-]*/", re.ASCII)
_NEAR, _FAR = 4, 32
_RUN = 256
_DEEPEST = 200


def databases(folder: Folder) -> list[str]:
    """Return the folders of the OCDBT databases of an item, relative to it: "" for a merged one; none without OCDBT."""
    if MANIFEST in folder.names:
        return [""]
    found = sorted((int(one[1]), name) for name in folder.names if (one := _OF_PROCESS.fullmatch(name)) is not None)
    return [name for _, name in found if MANIFEST in folder.folder(name).names]


class Arrays:
    """The arrays of one item by their names there, in the databases of `bases`, or without any in folders."""

    def __init__(self, folder: Folder, bases: Sequence[str]) -> None:
        self._folder, self._bases = folder, bases

    def described(self, names: Sequence[str], version: int) -> dict[str, Document]:
        """Return what the documents of arrays say, as far as there are such; `DamagedError` for one that is wrong."""
        keys = {key(name, FILES[version]): name for name in names}
        found = dict(self._in_databases(keys) if self._bases else self._in_files(list(keys)))
        try:
            return {keys[one]: understood(body, version, keys[one]) for one, body in found.items()}
        except DamagedError as error:
            raise DamagedError(f"cannot read {self._folder.url!r}: {error}") from error

    def names(self) -> dict[int, list[str]]:
        """Return the names of all arrays that there are, by the version of Zarr; slow where each is a folder."""
        keys = list(self._entries if self._bases else _walk(self._folder, ""))
        found = {version: [_name(one, file) for one in keys if _is(one, file)] for version, file in FILES.items()}
        return {version: sorted(names) for version, names in found.items() if names}

    # --- databases ---

    @functools.cached_property
    def _entries(self) -> Mapping[str, tuple[str, bytes | Range]]:
        found: dict[str, tuple[str, bytes | Range]] = {}
        for base in reversed(self._bases):
            listed = entries(self._folder.storage, f"{self._folder.prefix}{base}")
            found |= {one: (base, value) for one, value in listed.items()}
        return found

    def _in_databases(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for one in keys:
            base, value = self._entries.get(one, ("", None))
            if value is not None:
                yield one, self._fetched(one, base, value) if isinstance(value, Range) else value

    def _fetched(self, one: str, base: str, place: Range) -> bytes:
        stop = None if place.length is None else place.start + place.length
        body = self._folder.read_quietly(f"{base}{place.file}", place.start, stop)
        if body is None:
            raise MissingDataError(
                f"cannot read {self._folder.url!r}: file {base + place.file!r} is missing, which has {one!r}"
            )
        return body

    # --- files ---

    def _in_files(self, keys: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        # Handing a task over costs as much as to read a small file; where files are near, so do threads.
        threads = _NEAR if isinstance(self._folder.storage, KeepsFolders) else _FAR
        size = max(1, min(_RUN, len(keys) // (4 * threads)))
        runs = [keys[start : start + size] for start in range(0, len(keys), size)]
        if len(runs) <= 1:
            bodies = [self._run(run) for run in runs]
        else:
            with ThreadPoolExecutor(min(len(runs), threads), thread_name_prefix="milepost-recognise") as pool:
                bodies = list(pool.map(self._run, runs))
        for run, found in zip(runs, bodies, strict=True):
            yield from ((one, body) for one, body in zip(run, found, strict=True) if body is not None)

    def _run(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self._folder.read_quietly(one) for one in keys]


def _is(one: str, file: str) -> bool:
    return one == file or one.endswith(f"/{file}")


def _name(one: str, file: str) -> str:
    return one.removesuffix(file).removesuffix("/")


def _walk(folder: Folder, path: str, depth: int = 0) -> Iterator[str]:
    """Yield the documents of arrays in a folder and those below it; there is nothing of interest in an array."""
    if depth > _DEEPEST:
        raise DamagedError(f"cannot read {folder.url!r}: folders stand more than {_DEEPEST} deep in it")
    here = [file for file in FILES.values() if file in folder.names]
    yield from (f"{path}{file}" for file in here)
    if not here:
        for child in folder.folders():
            yield from _walk(child, f"{path}{child.name}/", depth + 1)
