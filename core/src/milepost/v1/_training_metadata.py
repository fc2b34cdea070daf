"""What is known of a sequence of checkpoints and of each of its steps, as `milepost.v1.training` shows it.

The rule: read-only values; making one checks nothing and reads nothing.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import pprint
from typing import TYPE_CHECKING, Any, TypeVar, final

from milepost.errors import RequestError
from milepost.v1 import _metadata

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upath import UPath

    from milepost.sequence import Step

__all__ = ["CheckpointMetadata", "RootMetadata", "metadata_of_step"]

T = TypeVar("T")

_EPOCH = dt.datetime.fromtimestamp(0, dt.UTC)


class _NoTimeError(RequestError, TypeError):
    """Say that the checkpoint has no timestamp."""


@final
class CheckpointMetadata(_metadata.CheckpointMetadata[T]):
    """What is known of one step of a sequence without loading it: also its number and its metrics."""

    def __init__(  # noqa: PLR0913 - the documented signature
        self,
        step: int,
        path: UPath,
        *,
        metadata: T,
        init_timestamp_nsecs: int | None = None,
        commit_timestamp_nsecs: int | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            path,
            metadata=metadata,
            init_timestamp_nsecs=init_timestamp_nsecs,
            commit_timestamp_nsecs=commit_timestamp_nsecs,
            custom_metadata=custom_metadata,
        )
        self._step = step
        self._metrics = metrics
        self._found: Step | None = None

    @property
    def commit_timestamp_nsecs(self) -> int | None:
        """When the checkpoint came to exist; to the microsecond where this is one of a list of steps."""
        if self._found is None:
            return super().commit_timestamp_nsecs
        return (self._found.time - _EPOCH) // dt.timedelta(microseconds=1) * 1000

    @property
    def commit_timestamp(self) -> dt.datetime | None:
        """When the checkpoint came to exist, in UTC."""
        return super().commit_timestamp if self._found is None else self._found.time

    @property
    def step(self) -> int:
        """The number of the step."""
        return self._step

    @property
    def metrics(self) -> Mapping[str, Any] | None:
        """The metrics saved with the step."""
        return self._metrics if self._found is None else self._found.metrics

    @property
    def time(self) -> dt.datetime:
        """When the checkpoint came to exist, in UTC; `TypeError` if that is not known."""
        time = self.commit_timestamp
        if time is None:
            raise _NoTimeError(f"cannot tell the time of step {self._step!r}: it has no commit timestamp")
        return time

    def _shown(self) -> dict[str, str]:
        return {"step": str(self._step), **super()._shown(), "metrics": str(self.metrics)}


def metadata_of_step(found: Step) -> CheckpointMetadata[None]:
    """Return the metadata of a step of a sequence; what has to be read is read when it is first asked for."""
    made: CheckpointMetadata[None] = CheckpointMetadata(found.step, found.path, metadata=None)
    made._found = found  # noqa: SLF001 - the constructor has the documented parameters
    return made


@final
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class RootMetadata:
    """What is known of a sequence of checkpoints as a whole: where it is, and what its user noted for all steps."""

    directory: UPath
    custom_metadata: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        shown = {"directory": str(self.directory), "custom_metadata": str(self.custom_metadata)}
        return f"RootMetadata({pprint.pformat(shown)})"
