"""The functions most people ever need, with the names and meanings of the reference's v1.

The rule: thin. Everything here checks its arguments and calls the engine, which is imported by the first call, since it
brings JAX with it.
"""

from __future__ import annotations

from typing import Any

from milepost.v1 import arrays, errors, handlers, multihost, options, partial, path, training, tree
from milepost.v1._checkpoints import (
    checkpointables_metadata,
    delete,
    delete_async,
    is_orbax_checkpoint,
    load,
    load_async,
    load_checkpointables,
    load_checkpointables_async,
    load_pytree,
    load_pytree_async,
    metadata,
    pytree_metadata,
    save,
    save_async,
    save_checkpointables,
    save_checkpointables_async,
    save_pytree,
    save_pytree_async,
)
from milepost.v1._context import Context
from milepost.v1._metadata import CheckpointMetadata
from milepost.v1._responses import AsyncResponse
from milepost.v1.handlers import (
    AbstractCheckpointable,
    Checkpointable,
    CheckpointableHandler,
    StatefulCheckpointable,
)

__all__ = [
    "PLACEHOLDER",
    "AbstractCheckpointable",
    "AsyncResponse",
    "CheckpointMetadata",
    "Checkpointable",
    "CheckpointableHandler",
    "Context",
    "PyTreeMetadata",
    "StatefulCheckpointable",
    "arrays",
    "checkpointables_metadata",
    "delete",
    "delete_async",
    "errors",
    "handlers",
    "is_orbax_checkpoint",
    "load",
    "load_async",
    "load_checkpointables",
    "load_checkpointables_async",
    "load_pytree",
    "load_pytree_async",
    "metadata",
    "multihost",
    "options",
    "partial",
    "path",
    "pytree_metadata",
    "save",
    "save_async",
    "save_checkpointables",
    "save_checkpointables_async",
    "save_pytree",
    "save_pytree_async",
    "training",
    "tree",
]

PLACEHOLDER = ...
"""A leaf of a target that is not loaded: it comes back as it is."""

PyTreeMetadata = Any
"""A tree with what is known of each leaf in its place; a name for annotations."""


def __dir__() -> list[str]:
    return list(__all__)
