"""Paths of steps, as the reference spells them: `milepost.path.step`."""

from __future__ import annotations

from milepost.path import step

__all__ = ["step"]


def __dir__() -> list[str]:
    return list(__all__)
