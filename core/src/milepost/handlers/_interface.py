"""What a handler of the documented interface has to do: anybody may write one.

The rule: a handler is given a folder of this machine and knows nothing of checkpoints: that what it writes becomes
visible at one instant, on any storage, is the business of whoever calls it.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import os
    from concurrent.futures import Future

    from upath import UPath

__all__ = ["AsyncCheckpointHandler", "CheckpointHandler", "Directory"]

Directory: TypeAlias = "UPath | os.PathLike[str] | str"
"""A folder, as handlers of ours take it: those who call them may have a UPath, a path, or a text."""


class CheckpointHandler(abc.ABC):
    """One kind of object: how it is saved into a folder, and restored from it."""

    @abc.abstractmethod
    def save(self, directory: UPath, *args: Any, **kwargs: Any) -> None:
        """Save an object into a folder that exists and is empty; return when the files are complete."""

    @abc.abstractmethod
    def restore(self, directory: UPath, *args: Any, **kwargs: Any) -> Any:
        """Return the object that was saved into a folder; nothing may be changed there."""

    def structure(self, directory: UPath) -> Any:
        """Return what is known of the structure of what was saved; deprecated, use `metadata`."""
        raise NotImplementedError

    def metadata(self, directory: UPath) -> Any | None:
        """Return what is known of what was saved, without restoring it; None if nothing is."""
        raise NotImplementedError

    def finalize(self, directory: UPath) -> None:  # noqa: B027 - most handlers have nothing to do
        """Do what is left to do when all of an object has been saved, before the checkpoint is committed."""

    def close(self) -> None:  # noqa: B027 - most handlers hold nothing
        """Give back what the handler holds."""

    @classmethod
    def typestr(cls) -> str:
        """Return the name that the checkpoint keeps of what saved an item."""
        return f"{cls.__module__}.{cls.__qualname__}"


class AsyncCheckpointHandler(CheckpointHandler):
    """A handler that can go on writing after the caller has gone on."""

    @abc.abstractmethod
    async def async_save(self, directory: UPath, *args: Any, **kwargs: Any) -> list[Future[Any]] | None:
        """Return as soon as the object may be changed; the futures are done when the files are complete."""
