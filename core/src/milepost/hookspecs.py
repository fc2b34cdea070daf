"""The hooks through which packages join milepost; the signatures here are the contract.

The rule: entry points say *what* is offered, by name; hooks say *how* it is made. The value of an entry point is a
module whose functions are marked with `milepost.hookspecs.hookimpl`. pluggy matches arguments by name, so that an
implementation may leave out those it does not need.

Groups of entry points: `milepost.storage` (the name is a URL scheme), `milepost.commit`, `milepost.arrays` (the name is
the user's word for it), and `milepost.plugins` (observers, leaf handlers, name formats, wrappers; loaded by the first
save or load).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import pluggy

if TYPE_CHECKING:
    from milepost.protocols import ArrayIO, CommitStrategy, Layout, LeafHandler, Storage

__all__ = [
    "PROJECT",
    "CheckpointEvent",
    "Hooks",
    "RegisterArrays",
    "RegisterCommit",
    "RegisterLayout",
    "RegisterLeafHandler",
    "RegisterNameFormat",
    "RegisterStorage",
    "StorageFactory",
    "hookimpl",
    "hookspec",
]

PROJECT = "milepost"

hookspec: pluggy.HookspecMarker = pluggy.HookspecMarker(PROJECT)
hookimpl: pluggy.HookimplMarker = pluggy.HookimplMarker(PROJECT)


class StorageFactory(Protocol):
    """A callable that opens the storage below a root URL; options are keywords, checked against its signature."""

    def __call__(self, url: str, /, *args: Any, **options: Any) -> Storage:
        """Return the storage; does no I/O that could fail for a root that does not exist yet."""
        ...


RegisterStorage: TypeAlias = "Callable[[str, Callable[..., Storage]], None]"
RegisterCommit: TypeAlias = "Callable[[str, Callable[..., CommitStrategy]], None]"
RegisterArrays: TypeAlias = "Callable[[str, Callable[..., ArrayIO]], None]"
RegisterLayout: TypeAlias = "Callable[[str, Callable[..., Layout]], None]"
RegisterLeafHandler: TypeAlias = "Callable[[LeafHandler], None]"
RegisterNameFormat: TypeAlias = Callable[[str, Callable[..., object]], None]


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointEvent:
    """What happened to one checkpoint: URL, the attempt's id, bytes of data, seconds by phase, the error if any."""

    url: str
    attempt: str = ""
    bytes: int = 0
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error: BaseException | None = None


class Hooks:
    """All hooks of milepost."""

    @hookspec
    def register_storage(self, register: RegisterStorage) -> None:
        """Call `register(scheme, factory)` for every URL scheme this package claims."""

    @hookspec
    def register_commit(self, register: RegisterCommit) -> None:
        """Call `register(name, factory)` for every commit strategy this package claims."""

    @hookspec
    def register_arrays(self, register: RegisterArrays) -> None:
        """Call `register(name, factory)` for every array writer this package claims."""

    @hookspec
    def register_layouts(self, register: RegisterLayout) -> None:
        """Call `register(name, factory)` for every layout of others that this package reads."""

    @hookspec
    def register_leaf_handlers(self, register: RegisterLeafHandler) -> None:
        """Call `register(handler)` for every kind of leaf this package handles."""

    @hookspec
    def register_name_formats(self, register: RegisterNameFormat) -> None:
        """Call `register(name, factory)` for every step name format this package offers."""

    @hookspec(firstresult=True)
    def open_storage(self, factory: StorageFactory, url: str, options: Mapping[str, Any]) -> Storage | None:
        """Open the storage of a URL; a wrapper may decorate what the others return."""

    @hookspec
    def save_started(self, event: CheckpointEvent) -> None:
        """Learn that a save began."""

    @hookspec
    def save_committed(self, event: CheckpointEvent) -> None:
        """Learn that a checkpoint is durable; an error raised here is logged and changes nothing."""

    @hookspec
    def save_failed(self, event: CheckpointEvent) -> None:
        """Learn that a save failed, and why."""

    @hookspec
    def restored(self, event: CheckpointEvent) -> None:
        """Learn that a checkpoint was loaded."""

    @hookspec
    def deleted(self, event: CheckpointEvent) -> None:
        """Learn that a checkpoint was deleted."""
