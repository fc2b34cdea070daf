"""Names of the managers that the reference has in a module of this name; decides nothing."""

from __future__ import annotations

from milepost._manager_items import DEFAULT_ITEM, METRICS
from milepost.checkpoint_managers import (
    AbstractCheckpointManager,
    CheckpointManager,
    CheckpointManagerOptions,
)
from milepost.errors import StepAlreadyExistsError
from milepost.metadata.step import RootMetadata, StepMetadata

__all__ = [
    "DEFAULT_ITEM_NAME",
    "METRIC_ITEM_NAME",
    "RESERVED_ITEM_NAMES",
    "AbstractCheckpointManager",
    "CheckpointManager",
    "CheckpointManagerOptions",
    "RootMetadata",
    "StepAlreadyExistsError",
    "StepMetadata",
]

DEFAULT_ITEM_NAME = DEFAULT_ITEM
METRIC_ITEM_NAME = METRICS
RESERVED_ITEM_NAMES = (METRICS,)
