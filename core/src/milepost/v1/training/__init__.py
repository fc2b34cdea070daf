"""Checkpoints of a training: a sequence of steps under one root."""

from __future__ import annotations

from milepost.v1._training_metadata import CheckpointMetadata, RootMetadata
from milepost.v1.training import errors, preservation_policies, save_decision_policies
from milepost.v1.training._checkpointer import Checkpointer

__all__ = [
    "CheckpointMetadata",
    "Checkpointer",
    "RootMetadata",
    "errors",
    "preservation_policies",
    "save_decision_policies",
]


def __dir__() -> list[str]:
    return list(__all__)
