"""Paths as v1 takes and hands them out.

The rule: a path that is handed out is a `UPath`; whoever is given one that is still being made can wait for it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeAlias

from milepost.v1.path import step

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from upath import UPath

    Path: TypeAlias = UPath
    PathLike: TypeAlias = str | os.PathLike[str] | UPath

__all__ = ["Path", "PathAwaitingCreation", "PathLike", "step"]


class PathAwaitingCreation:
    """A directory that may still have to be made; awaiting it, or `await_creation()`, gives its path once it is there.

    `created` blocks until the directory is there, or raises; None where it is there already.
    """

    def __init__(self, path: UPath, created: Callable[[], object] | None = None) -> None:
        self._path = path
        self._created = created

    @property
    def path(self) -> UPath:
        """The path, at which nothing need be yet."""
        return self._path

    async def await_creation(self) -> UPath:
        """Wait until the directory is there, without blocking the event loop; return its path."""
        if self._created is not None:
            import asyncio

            await asyncio.to_thread(self._created)
        return self._path

    def __await__(self) -> Generator[Any, None, UPath]:
        return self.await_creation().__await__()

    def __truediv__(self, name: str) -> PathAwaitingCreation:
        return PathAwaitingCreation(self._path / name, self._created)


def __getattr__(name: str) -> Any:
    # Both names need a package that importing milepost must not load.
    if name == "Path":
        from upath import UPath

        return UPath
    if name == "PathLike":
        from upath import UPath

        return str | os.PathLike[str] | UPath
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
