"""What is known of a checkpoint at a path, as v1 shows it.

The rule: read-only values; making one checks nothing and reads nothing.
"""

from __future__ import annotations

import datetime as dt
import pprint
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upath import UPath

__all__ = ["CheckpointMetadata"]

T = TypeVar("T")


class CheckpointMetadata(Generic[T]):
    """What is known of a checkpoint without loading it.

    `metadata` is the tree of the leaves' metadata, or such a tree for each name. Timestamps are in nanoseconds since
    the epoch, by the clock of the process that saved.
    """

    def __init__(
        self,
        path: UPath,
        *,
        metadata: T,
        init_timestamp_nsecs: int | None = None,
        commit_timestamp_nsecs: int | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = path
        self._metadata = metadata
        self._init_timestamp_nsecs = init_timestamp_nsecs
        self._commit_timestamp_nsecs = commit_timestamp_nsecs
        self._custom_metadata = custom_metadata

    @property
    def path(self) -> UPath:
        """Where the checkpoint is."""
        return self._path

    @property
    def metadata(self) -> T:
        """The metadata of what was saved."""
        return self._metadata

    @property
    def init_timestamp_nsecs(self) -> int | None:
        """When the save began."""
        return self._init_timestamp_nsecs

    @property
    def commit_timestamp_nsecs(self) -> int | None:
        """When the checkpoint came to exist."""
        return self._commit_timestamp_nsecs

    @property
    def init_timestamp(self) -> dt.datetime | None:
        """When the save began, in UTC."""
        return _utc(self._init_timestamp_nsecs)

    @property
    def commit_timestamp(self) -> dt.datetime | None:
        """When the checkpoint came to exist, in UTC."""
        return _utc(self._commit_timestamp_nsecs)

    @property
    def custom_metadata(self) -> Mapping[str, Any] | None:
        """What the caller of the save noted."""
        return self._custom_metadata

    def _shown(self) -> dict[str, str]:
        return {
            "metadata": str(self._metadata),
            "init_timestamp_nsecs": str(self._init_timestamp_nsecs),
            "commit_timestamp_nsecs": str(self.commit_timestamp_nsecs),
            "custom_metadata": str(self._custom_metadata),
        }

    def __repr__(self) -> str:
        return f"CheckpointMetadata({pprint.pformat(self._shown())})"


def _utc(nsecs: int | None) -> dt.datetime | None:
    return None if nsecs is None else dt.datetime.fromtimestamp(nsecs / 1e9, dt.UTC)
