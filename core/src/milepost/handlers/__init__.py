"""What saves and restores one kind of object each, by the names of the reference's `handlers`.

Decides nothing: what a handler has to do stands in `CheckpointHandler`, which arguments it takes in `milepost.args`.
"""

from __future__ import annotations

from typing import TypeAlias

from milepost.args import (
    ArrayRestore,
    ArraySave,
    Composite,
    JaxRandomKeyRestore,
    JaxRandomKeySave,
    JsonRestore,
    JsonSave,
    NumpyRandomKeyRestore,
    NumpyRandomKeySave,
    ProtoRestore,
    ProtoSave,
    PyTreeRestore,
    PyTreeSave,
    StandardRestore,
    StandardSave,
)
from milepost.handlers._composite import CompositeCheckpointHandler, CompositeOptions
from milepost.handlers._composition import Composition
from milepost.handlers._files import JsonCheckpointHandler, ProtoCheckpointHandler
from milepost.handlers._interface import AsyncCheckpointHandler, CheckpointHandler
from milepost.handlers._registry import (
    AlreadyExistsError,
    CheckpointHandlerRegistry,
    DefaultCheckpointHandlerRegistry,
    NoEntryError,
    create_default_handler_registry,
)
from milepost.handlers._trees import (
    ArrayCheckpointHandler,
    BasePyTreeCheckpointHandler,
    JaxRandomKeyCheckpointHandler,
    NumpyRandomKeyCheckpointHandler,
    PyTreeCheckpointHandler,
    StandardCheckpointHandler,
)

__all__ = [
    "AlreadyExistsError",
    "ArrayCheckpointHandler",
    "ArrayRestoreArgs",
    "ArraySaveArgs",
    "AsyncCheckpointHandler",
    "BasePyTreeCheckpointHandler",
    "CheckpointHandler",
    "CheckpointHandlerRegistry",
    "CompositeArgs",
    "CompositeCheckpointHandler",
    "CompositeOptions",
    "CompositeResults",
    "Composition",
    "DefaultCheckpointHandlerRegistry",
    "JaxRandomKeyCheckpointHandler",
    "JaxRandomKeyRestoreArgs",
    "JaxRandomKeySaveArgs",
    "JsonCheckpointHandler",
    "JsonRestoreArgs",
    "JsonSaveArgs",
    "NoEntryError",
    "NumpyRandomKeyCheckpointHandler",
    "NumpyRandomKeyRestoreArgs",
    "NumpyRandomKeySaveArgs",
    "ProtoCheckpointHandler",
    "ProtoRestoreArgs",
    "ProtoSaveArgs",
    "PyTreeCheckpointHandler",
    "PyTreeRestoreArgs",
    "PyTreeSaveArgs",
    "StandardCheckpointHandler",
    "StandardRestoreArgs",
    "StandardSaveArgs",
    "create_default_handler_registry",
]

# The reference has these under a second name, too.
ArrayRestoreArgs: TypeAlias = ArrayRestore
ArraySaveArgs: TypeAlias = ArraySave
CompositeArgs: TypeAlias = Composite
CompositeResults: TypeAlias = Composite
JaxRandomKeyRestoreArgs: TypeAlias = JaxRandomKeyRestore
JaxRandomKeySaveArgs: TypeAlias = JaxRandomKeySave
JsonRestoreArgs: TypeAlias = JsonRestore
JsonSaveArgs: TypeAlias = JsonSave
NumpyRandomKeyRestoreArgs: TypeAlias = NumpyRandomKeyRestore
NumpyRandomKeySaveArgs: TypeAlias = NumpyRandomKeySave
ProtoRestoreArgs: TypeAlias = ProtoRestore
ProtoSaveArgs: TypeAlias = ProtoSave
PyTreeRestoreArgs: TypeAlias = PyTreeRestore
PyTreeSaveArgs: TypeAlias = PyTreeSave
StandardRestoreArgs: TypeAlias = StandardRestore
StandardSaveArgs: TypeAlias = StandardSave
