"""The errors of a sequence of steps, by the names of the reference; decides nothing: they are `milepost.errors`'s."""

from __future__ import annotations

from milepost.errors import StepAlreadyExistsError, StepNotFoundError

__all__ = ["StepAlreadyExistsError", "StepNotFoundError"]
