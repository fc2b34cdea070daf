"""What the engine is told of the options: one frozen value.

Decides which options mean something here, in words that do not depend on the face that was asked. The rule: an option
that was not set stays None, so that `milepost.toml` and `milepost.configured` say it; one that was set is stronger than
both, for the path of this call only.
"""

from __future__ import annotations

import contextlib
import dataclasses
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from milepost import urls
from milepost.config import configured, current_layers, lookup

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np

__all__ = ["Broadcast", "Settings", "StorageRule", "applied", "as_config"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StorageRule:
    """How one array is stored: None leaves it to the writer.

    `dtype` is what it is cast to, `chunk_bytes` the size in bytes that no chunk exceeds, `shard_axes` the axes that are
    divided first.
    """

    dtype: np.dtype[Any] | None = None
    chunk_bytes: int | None = None
    shard_axes: tuple[int, ...] | None = None

    def over(self, weaker: StorageRule) -> StorageRule:
        """Return this rule, with what it leaves open taken from a weaker one.

        >>> StorageRule(chunk_bytes=4).over(StorageRule(chunk_bytes=8, shard_axes=(0,)))
        StorageRule(dtype=None, chunk_bytes=4, shard_axes=(0,))
        """
        return StorageRule(
            dtype=weaker.dtype if self.dtype is None else self.dtype,
            chunk_bytes=weaker.chunk_bytes if self.chunk_bytes is None else self.chunk_bytes,
            shard_axes=weaker.shard_axes if self.shard_axes is None else self.shard_axes,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Broadcast:
    """How one replica reads for all: along which axis of the mesh, which, and how many bytes it may give at once.

    A limit of None is what is free; it is multiplied by `scale`.
    """

    axis: int | None = 0
    replica: int | None = 0
    limit: int | None = None
    scale: float | None = 0.75


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What holds for one call.

    The route: budgets in bytes, `directory_mode` as in `os.mkdir`, the name of a commit strategy; `trash` is where
    deleted checkpoints are moved on gs://. Saving: see `storage_of`; `array_format` are options of array writers;
    with `copy_host_arrays` False the caller promises not to change NumPy arrays until an asynchronous save has
    ended; `on_committed` is called after each of those. Loading: `layout` is "auto", "orbax" or "safetensors"; with
    `partial`, saved leaves that the target lacks are left out; with `resize`, arrays are cut or filled with zeros
    to the target's shape; `broadcast` None means that everybody reads; `read_chunk_bytes` and `over_read` are for
    foreign safetensors files. `registry` holds the handlers, None means those of the process. Processes: `timeout`
    bounds each wait in seconds; `primary_host` None means that each process is its own; `active_processes` None
    means all.
    """

    save_budget: int | None = None
    load_budget: int | None = None
    directory_mode: int | None = None
    commit: str | None = None
    trash: str | None = None

    array_format: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    storage: StorageRule = StorageRule()
    scoped_storage: Callable[[tuple[Any, ...], Any], StorageRule | None] | None = None
    copy_host_arrays: bool = True
    on_committed: Callable[[], object] | None = None

    layout: str = "orbax"
    partial: bool = False
    resize: bool = False
    broadcast: Broadcast | None = None
    read_chunk_bytes: int | None = None
    over_read: float | None = None
    registry: Any = None

    timeout: float = 1200.0
    primary_host: int | None = 0
    active_processes: frozenset[int] | None = None
    barrier_prefix: str | None = None

    def storage_of(self, path: tuple[Any, ...], value: Any) -> StorageRule:
        """Return how the leaf at a JAX key path is stored; a dtype is for arrays, not for numbers and random keys.

        Raises what the caller's function raises.
        """
        scoped = self.scoped_storage(path, value) if self.scoped_storage is not None else None
        return self.storage if scoped is None else scoped.over(self.storage)


def as_config(
    settings: Settings, url: str, storage_options: Mapping[str, object] = MappingProxyType({})
) -> Mapping[str, Any]:
    """Return what `milepost.toml` would have to say for the settings to hold for one located URL; empty if nothing.

    `storage_options` are those that hold without the settings: tables replace each other, so they are said again.

    >>> as_config(Settings(save_budget=4096, directory_mode=0o750), "file:///runs/7")
    {'url': {'file:///runs/7': {'save_budget': 4096, 'storage_options': {'mode': '750'}}}}
    >>> as_config(Settings(directory_mode=0o750), "gs://bucket/7")
    {}
    """
    said: dict[str, Any] = {
        "save_budget": settings.save_budget,
        "load_budget": settings.load_budget,
        "commit": settings.commit,
    }
    if settings.directory_mode is not None and urls.scheme(url) == urls.LOCAL:
        said["storage_options"] = {**storage_options, "mode": f"{settings.directory_mode:o}"}
    said = {name: value for name, value in said.items() if value is not None}
    return {"url": {url: said}} if said else {}


@contextlib.contextmanager
def applied(settings: Settings, path: str | os.PathLike[str]) -> Iterator[None]:
    """Let the settings hold for one path inside the `with` block; errors are those of `milepost.configured`."""
    url = urls.locate(path)
    options: Any = lookup(current_layers(), url)["storage_options"].value
    with configured(as_config(settings, url, options)):
        yield
