"""What becomes of the errors that TensorStore raises.

The rule: TensorStore says nearly everything with `ValueError`, and the first word of its message is the kind of
failure; by that word, and by whether something was being written or read, the error becomes one of milepost's.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from milepost.errors import (
    DamagedError,
    MilepostError,
    MissingDataError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
)

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["explained"]

_STATUS = re.compile(r"[A-Z_]{4,}(?=:)")
_FULL = re.compile(r"No space left|quota exceeded|File too large", re.IGNORECASE)
_FOREIGN = (ValueError, OSError, RuntimeError, KeyError, IndexError, TypeError, NotImplementedError)


class explained:  # noqa: N801 - it is used as a verb, with `with`
    """Raise milepost's error for what TensorStore raises while something is done: "write 'url'", "read array 'w'"."""

    def __init__(self, action: str, *, reading: bool) -> None:
        self._action, self._reading = action, reading

    def __enter__(self) -> None:
        """Begin what may fail."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise the error that says what failed, from the one that came."""
        del kind, trace
        if isinstance(error, _FOREIGN) and not isinstance(error, (MilepostError, NotImplementedError)):
            raise _made(self._action, str(error), reading=self._reading) from error


def _made(action: str, text: str, *, reading: bool) -> MilepostError:
    found = _STATUS.match(text)
    status = found[0] if found else ""
    message = f"cannot {action}: {text.partition(' [')[0]}"
    if status in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
        return StorageDeniedError(message)
    if _FULL.search(text):
        return StorageFullError(message)
    if status in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "RESOURCE_EXHAUSTED") or not reading:
        return StorageError(message)
    return MissingDataError(message) if status == "NOT_FOUND" else DamagedError(message)
