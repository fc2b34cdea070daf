"""What is known of a step and of a root as a whole, in the words of the checkpointers and managers.

The rule: the commit object of a checkpoint says it. Only where that is not ours, the small file that the reference
writes into each step is read instead.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from milepost.errors import CheckpointNotFoundError, DamagedError
from milepost.manifest import decode, is_manifest
from milepost.metadata.metrics import from_stored
from milepost.metadata.store import opened, read_body, read_document
from milepost.protocols import COMMIT_OBJECT
from milepost.urls import join

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from milepost.manifest import Manifest
    from milepost.routes import OpenRoute

__all__ = [
    "STEP_METADATA_FILE",
    "RootMetadata",
    "StepMetadata",
    "get_step_metadata",
    "step_metadata",
    "step_metadata_from_document",
]

STEP_METADATA_FILE = "_CHECKPOINT_METADATA"
"""The small file that the reference writes into each step."""


@dataclasses.dataclass
class StepMetadata:
    """What is known of one step.

    `item_handlers` names what each item was saved with (a text alone for a step that is one item), `item_metadata` is
    what is known of each. Timestamps are in nanoseconds since the epoch, by the clock of the process that saved.
    """

    item_handlers: dict[str, str] | str | None = None
    item_metadata: Any = None
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    performance_metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    init_timestamp_nsecs: int | None = None
    commit_timestamp_nsecs: int | None = None
    custom_metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class RootMetadata:
    """What is known of a sequence of steps: what the writers of libraries noted, and what its user did."""

    internal_metadata: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    custom_metadata: dict[str, Any] | None = dataclasses.field(default_factory=dict)


def step_metadata(manifest: Manifest) -> StepMetadata:
    """Return what a manifest says about its step; the items' own metadata is not filled in."""
    metrics: Any = from_stored(manifest.metrics)
    custom: Any = manifest.custom_metadata
    return StepMetadata(
        item_handlers={name: item.handler for name, item in manifest.items.items()},
        metrics={} if metrics is None else metrics,
        performance_metrics=dict(manifest.written_by.get("performance_metrics") or {}),
        init_timestamp_nsecs=manifest.init_timestamp_nsecs or None,  # a foreign layout may not know
        commit_timestamp_nsecs=manifest.commit_timestamp_nsecs or None,
        custom_metadata=dict(custom or {}),
    )


_TYPES: Mapping[str, tuple[type, ...]] = {
    "item_handlers": (dict, str),
    "metrics": (dict,),
    "performance_metrics": (dict,),
    "init_timestamp_nsecs": (int,),
    "commit_timestamp_nsecs": (int,),
    "custom_metadata": (dict,),
}


def step_metadata_from_document(document: Mapping[str, Any], *, where: str = STEP_METADATA_FILE) -> StepMetadata:
    """Return what the small file of the reference says about its step.

    Keys that are not known are custom metadata. Raises `DamagedError`, a `ValueError`, for values that do not fit, and
    where there are unknown keys beside custom metadata.

    >>> step_metadata_from_document({"init_timestamp_nsecs": 5, "lr": 0.1}).custom_metadata
    {'lr': 0.1}
    """
    known = {key: value for key, value in document.items() if key in _TYPES and value is not None}
    for key, value in known.items():
        if type(value) not in _TYPES[key]:
            raise DamagedError(f"cannot believe {where!r}: its {key!r} is {value!r:.60}")
    unknown = {key: value for key, value in document.items() if key not in _TYPES and key != "item_metadata"}
    if unknown and known.get("custom_metadata"):
        raise DamagedError(
            f"cannot believe {where!r}: it has custom metadata, and the unknown keys {sorted(unknown)!r}"
        )
    return StepMetadata(**{**known, "custom_metadata": known.get("custom_metadata") or unknown})


def get_step_metadata(path: str | os.PathLike[str]) -> StepMetadata:
    """Return what is known of the step at a path or URL, without its items' own metadata.

    Raises `CheckpointNotFoundError` (a `ValueError`) if neither a commit object of ours nor the small file of the
    reference is there, and `DamagedError` for what cannot be believed.
    """
    route = opened(path)
    body = _commit_object(route)
    if body is not None and is_manifest(body):
        return step_metadata(decode(body, where=route.route.url))
    file = join(route.route.url, STEP_METADATA_FILE)
    document = read_document(file)
    if document is None:
        there = f"it has neither a {COMMIT_OBJECT} of milepost nor a {STEP_METADATA_FILE}"
        raise CheckpointNotFoundError(f"cannot read the metadata of step {route.route.url!r}: {there}")
    return step_metadata_from_document(document, where=file)


def _commit_object(route: OpenRoute) -> bytes | None:
    body = read_body(route.storage, f"{route.route.name}/{COMMIT_OBJECT}")
    if body is None and (prefix := route.commit.recover(route.storage, route.route.name)) is not None:
        return read_body(route.storage, f"{prefix}{COMMIT_OBJECT}")
    return body
