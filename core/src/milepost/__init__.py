"""Checkpoints for JAX that work the same, and as safely, on a laptop disk and on object storage.

import milepost

milepost.save("checkpoints/1", state)
state = milepost.load("checkpoints/1")

The rule: every name is found when it is first asked for, so that importing milepost costs next to nothing.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from milepost import (
        args,
        checkpoint_manager,
        checkpoint_managers,
        checkpoint_utils,
        checkpointers,
        errors,
        handlers,
        metadata,
        multihost,
        options,
        path,
        preemption,
        progress,
        transform_utils,
        tree,
        type_handlers,
        v1,
    )
    from milepost.checkpoint_managers import AbstractCheckpointManager, CheckpointManager, CheckpointManagerOptions
    from milepost.checkpointers import (
        AbstractCheckpointer,
        AsyncCheckpointer,
        Checkpointer,
        PyTreeCheckpointer,
        StandardCheckpointer,
    )
    from milepost.config import configured
    from milepost.handlers import (
        ArrayCheckpointHandler,
        AsyncCheckpointHandler,
        BasePyTreeCheckpointHandler,
        CheckpointHandler,
        CheckpointHandlerRegistry,
        CompositeCheckpointHandler,
        CompositeOptions,
        DefaultCheckpointHandlerRegistry,
        JaxRandomKeyCheckpointHandler,
        JsonCheckpointHandler,
        NumpyRandomKeyCheckpointHandler,
        ProtoCheckpointHandler,
        PyTreeCheckpointHandler,
        StandardCheckpointHandler,
    )
    from milepost.options import AsyncOptions
    from milepost.transform_utils import RestoreTransform, Transform, apply_transformations, merge_trees
    from milepost.type_handlers import ArrayRestoreArgs, RestoreArgs, SaveArgs
    from milepost.v1 import PLACEHOLDER, load, load_async, save, save_async

__all__ = [
    "PLACEHOLDER",
    "AbstractCheckpointManager",
    "AbstractCheckpointer",
    "ArrayCheckpointHandler",
    "ArrayRestoreArgs",
    "AsyncCheckpointHandler",
    "AsyncCheckpointer",
    "AsyncOptions",
    "BasePyTreeCheckpointHandler",
    "CheckpointHandler",
    "CheckpointHandlerRegistry",
    "CheckpointManager",
    "CheckpointManagerOptions",
    "Checkpointer",
    "CompositeCheckpointHandler",
    "CompositeOptions",
    "DefaultCheckpointHandlerRegistry",
    "JaxRandomKeyCheckpointHandler",
    "JsonCheckpointHandler",
    "NumpyRandomKeyCheckpointHandler",
    "ProtoCheckpointHandler",
    "PyTreeCheckpointHandler",
    "PyTreeCheckpointer",
    "RestoreArgs",
    "RestoreTransform",
    "SaveArgs",
    "StandardCheckpointHandler",
    "StandardCheckpointer",
    "Transform",
    "__version__",
    "apply_transformations",
    "args",
    "checkpoint_manager",
    "checkpoint_managers",
    "checkpoint_utils",
    "checkpointers",
    "configured",
    "errors",
    "handlers",
    "load",
    "load_async",
    "merge_trees",
    "metadata",
    "multihost",
    "options",
    "path",
    "preemption",
    "progress",
    "save",
    "save_async",
    "transform_utils",
    "tree",
    "type_handlers",
    "v1",
]

__version__ = "0.1.0"

_HOMES: Mapping[str, str] = MappingProxyType(
    {
        "AbstractCheckpointManager": "checkpoint_managers",
        "CheckpointManager": "checkpoint_managers",
        "CheckpointManagerOptions": "checkpoint_managers",
        "AbstractCheckpointer": "checkpointers",
        "AsyncCheckpointer": "checkpointers",
        "Checkpointer": "checkpointers",
        "PyTreeCheckpointer": "checkpointers",
        "StandardCheckpointer": "checkpointers",
        "configured": "config",
        "ArrayCheckpointHandler": "handlers",
        "AsyncCheckpointHandler": "handlers",
        "BasePyTreeCheckpointHandler": "handlers",
        "CheckpointHandler": "handlers",
        "CheckpointHandlerRegistry": "handlers",
        "CompositeCheckpointHandler": "handlers",
        "CompositeOptions": "handlers",
        "DefaultCheckpointHandlerRegistry": "handlers",
        "JaxRandomKeyCheckpointHandler": "handlers",
        "JsonCheckpointHandler": "handlers",
        "NumpyRandomKeyCheckpointHandler": "handlers",
        "ProtoCheckpointHandler": "handlers",
        "PyTreeCheckpointHandler": "handlers",
        "StandardCheckpointHandler": "handlers",
        "AsyncOptions": "options",
        "RestoreTransform": "transform_utils",
        "Transform": "transform_utils",
        "apply_transformations": "transform_utils",
        "merge_trees": "transform_utils",
        "ArrayRestoreArgs": "type_handlers",
        "RestoreArgs": "type_handlers",
        "SaveArgs": "type_handlers",
        "PLACEHOLDER": "v1",
        "load": "v1",
        "load_async": "v1",
        "save": "v1",
        "save_async": "v1",
    }
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"milepost.{_HOMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"milepost.{name}")
    raise AttributeError(f"module 'milepost' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
