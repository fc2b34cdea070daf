"""A second name for the one array of a tree that has no containers.

The rule: milepost and Orbax have different names for it, and both find it. In a database the second name refers to the
same data and costs nothing; a folder is copied file by file, of which each is a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost_tensorstore import places
from milepost_tensorstore.failures import explained
from milepost_tensorstore.options import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from milepost.protocols import Buffer, Location, Storage

__all__ = ["add_name"]

_BLOCK = 4 << 20


def add_name(location: Location, name: str, other: str, *, ocdbt: bool) -> None:
    """Let an array of an item be found under another name, too; "" is the place of the item itself."""
    source, target = f"{name}/", f"{other}/" if other else ""
    if ocdbt:
        _refer(location, source, target)
        return
    storage = location.storage
    for file in _below(storage, location.prefix + source):
        storage.write(f"{location.prefix}{target}{file}", _blocks(storage, f"{location.prefix}{source}{file}"))


def _refer(location: Location, source: str, target: str) -> None:
    settings = Settings()
    with (
        places.scratch_or_native(location, "", ("",)) as base,
        explained(f"name an array at {location.url!r}", reading=False),
    ):
        database = places.database(base, "", settings, places.context(settings, base))
        (database / source).experimental_copy_range_to(database / target if target else database).result()


def _below(storage: Storage, prefix: str) -> Iterator[str]:
    for name in sorted(storage.children(prefix)):
        if name.endswith("/"):
            yield from (name + inner for inner in _below(storage, prefix + name))
        else:
            yield name


def _blocks(storage: Storage, key: str) -> Iterator[Buffer]:
    size = storage.size(key)
    for start in range(0, size, _BLOCK):
        yield storage.read(key, start, min(start + _BLOCK, size))
