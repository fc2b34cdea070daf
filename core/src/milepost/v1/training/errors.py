"""The errors of a sequence of steps, by the names of the reference; their home is `milepost.errors`."""

from __future__ import annotations

from milepost.errors import StepAlreadyExistsError, StepNotFoundError

__all__ = ["StepAlreadyExistsError", "StepNotFoundError"]
