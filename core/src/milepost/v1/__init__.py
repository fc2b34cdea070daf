"""The functions most people ever need, with the names and meanings of the reference's v1.

The rule: thin. Everything here checks its arguments and calls the engine, which is imported by the first call, since it
brings JAX with it.
"""

from __future__ import annotations

from milepost.v1._checkpoints import AsyncResponse, CheckpointMetadata, load, load_async, metadata, save, save_async

__all__ = ["PLACEHOLDER", "AsyncResponse", "CheckpointMetadata", "load", "load_async", "metadata", "save", "save_async"]

PLACEHOLDER = ...
"""A leaf of a target that is not loaded: it comes back as it is."""
