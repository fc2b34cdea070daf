"""Where TensorStore writes, and how the storage learns of it.

The rule: TensorStore writes by a driver of its own wherever the storage names a place that it can reach, a folder of
this machine or one behind a driver; the storage is told of every file afterwards. For any other storage, and where the
driver cannot be told of an endpoint or of credentials, it writes into a scratch folder, whose files go through the
storage when they are complete.
"""

from __future__ import annotations

import collections
import contextlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milepost.protocols import KeepsFolders, NamesDriver, NotesFiles

from milepost_tensorstore import names
from milepost_tensorstore.database import MANIFEST
from milepost_tensorstore.failures import explained

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from milepost.protocols import Buffer, Json, Location, Storage

    from milepost_tensorstore.options import Settings

__all__ = ["NODES", "context", "database", "native", "note", "scratch_or_native"]

NODES = "d/n"
"""What the names of files with nodes of a tree begin with: they are told from those with data, which may be large."""

_AT_ONCE = 16
_BLOCK = 4 << 20
_NODE_BYTES = 8 << 20
_INLINE_BYTES = 1024


def context(settings: Settings, base: Mapping[str, Json]) -> Any:
    """Return the one context that all stores below a key-value store share during a call."""
    import tensorstore as ts

    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": settings.cache_bytes},
            "file_io_concurrency": {"limit": settings.file_io_concurrency},
            **_resources(base),
        }
    )


def native(storage: Storage, prefix: str) -> Mapping[str, Json] | None:
    """Return TensorStore's specification of a prefix; None where TensorStore cannot reach it."""
    if isinstance(storage, KeepsFolders):
        return {"driver": "file", "path": f"{storage.folder(prefix)}/"}
    if isinstance(storage, NamesDriver):
        return storage.kvstore(prefix)
    return None


def database(base: Mapping[str, Json], folder: str, settings: Settings, shared: Any) -> Any:
    """Open the OCDBT database in a folder ("" or ends in "/") below a key-value store."""
    import tensorstore as ts

    # Databases refer to each other's data only if they are of one store, and two with resources of their own are not.
    plain = {name: value for name, value in base.items() if name not in _resources(base)}
    spec = {
        "driver": "ocdbt",
        "base": below(plain, folder),
        "config": {"max_inline_value_bytes": _INLINE_BYTES, "max_decoded_node_bytes": _NODE_BYTES},
        "btree_node_data_prefix": NODES,
        "version_tree_node_data_prefix": NODES,
        "target_data_file_size": settings.target_file_bytes,
        "cache_pool": "cache_pool",
    }
    return ts.KvStore.open(spec, context=shared).result()


def _resources(base: Mapping[str, Json]) -> dict[str, Any]:
    """Return what a driver shares with others: limits, retries, credentials."""
    return {name: value for name, value in base.items() if isinstance(value, dict)}


def below(base: Mapping[str, Json], folder: str) -> dict[str, Json]:
    """Return the specification of a folder below a key-value store."""
    return {**base, "path": f"{base.get('path', '')}{folder}"}


@contextlib.contextmanager
def scratch_or_native(location: Location, folder: str, fetch: Sequence[str] = ()) -> Iterator[Mapping[str, Json]]:
    """Give TensorStore a place for the database in a folder below a location; on leaving, the storage has its files.

    `fetch` names the folders of databases that are to be there already, though only of their trees, not of their data.
    """
    storage, prefix = location.storage, location.prefix
    spec = native(storage, prefix)
    if spec is not None:
        yield spec
        note(location, [f"{folder}{file}" for file in _written(below(spec, folder))])
        return
    with tempfile.TemporaryDirectory(prefix="milepost-") as scratch:
        for one in fetch:
            _fetch(location, one, Path(scratch))
        before = set(_files(Path(scratch) / folder))
        yield {"driver": "file", "path": f"{scratch}/"}
        for file in _files(Path(scratch) / folder):
            if file == MANIFEST or file not in before:
                storage.write(f"{prefix}{folder}{file}", _blocks(Path(scratch) / folder / file))


def note(location: Location, files: Sequence[str]) -> None:
    """Tell the storage of files below a location that TensorStore wrote."""
    storage, keys = location.storage, [location.prefix + file for file in files]
    if not isinstance(storage, NotesFiles):
        return
    if isinstance(storage, KeepsFolders):
        for key in keys:
            storage.note(key)
        return
    # Each is a request, and may be so many as there are arrays.
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="milepost-note") as pool:
        collections.deque(pool.map(storage.note, keys), maxlen=0)


def _written(spec: Mapping[str, Json]) -> list[str]:
    """Return the files of a database, whoever wrote them."""
    if spec.get("driver") == "file":
        return list(_files(Path(str(spec["path"]))))
    import tensorstore as ts

    with explained(f"list {spec}", reading=False):
        store = ts.KvStore.open(spec, context=ts.Context()).result()
        # A host that writes nothing leaves no database, and so no manifest either.
        ranges = (ts.KvStore.KeyRange(MANIFEST, f"{MANIFEST}\0"), ts.KvStore.KeyRange("d/", "d0"))
        found = [store.list(keys) for keys in ranges]
        return [key.decode() for keys in found for key in keys.result()]


def _files(folder: Path) -> Iterator[str]:
    if (folder / MANIFEST).exists():
        yield MANIFEST
    if (folder / "d").is_dir():
        with os.scandir(folder / "d") as entries:
            yield from [f"d/{entry.name}" for entry in entries if entry.is_file()]


def _fetch(location: Location, folder: str, scratch: Path) -> None:
    storage, prefix = location.storage, f"{location.prefix}{folder}"
    if MANIFEST not in set(storage.children(prefix)):
        return
    nodes = [f"d/{name}" for name in storage.children(f"{prefix}d/") if f"d/{name}".startswith(NODES)]
    for file in (MANIFEST, *nodes):
        target = scratch / folder / names.safe(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(storage.read(f"{prefix}{file}"))


def _blocks(path: Path) -> Iterator[Buffer]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block
