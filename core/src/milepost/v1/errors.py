"""The errors of v1, by the names of the reference.

Decides nothing but two classes: the rule is that of `milepost.errors`, that each is also the builtin a reader expects.
"""

from __future__ import annotations

from milepost.errors import InvalidLayoutError, RequestError

__all__ = ["DeletionInProgressError", "DeletionRecoveryError", "InvalidLayoutError"]


class DeletionInProgressError(RequestError, RuntimeError):
    """Say that a part of the checkpoint is being deleted; name another, or let the deletion end."""


class DeletionRecoveryError(RequestError, RuntimeError):
    """Say that a deletion was interrupted and cannot be completed; its cause says why."""
