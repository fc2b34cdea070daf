"""Checkpoints of a training: a sequence of steps under one root."""

from __future__ import annotations

__all__: list[str] = []
