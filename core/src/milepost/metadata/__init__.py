"""What is known of a checkpoint without loading it, under the names of the reference's `metadata`.

The rule: plain values. Making, reading, comparing and printing them needs no JAX and touches no device; what speaks of
JAX's own objects (`to_jax_sharding`, `from_jax_sharding`, `axis_types`) imports it when called.
"""

from __future__ import annotations

from milepost.metadata import tree, value
from milepost.metadata.sharding import (
    DeviceMetadata,
    DeviceMetadataMesh,
    NamedShardingMetadata,
    ShardingMetadata,
    SingleDeviceShardingMetadata,
    from_jax_sharding,
    from_serialized_string,
    get_sharding_or_none,
)
from milepost.metadata.step import RootMetadata, StepMetadata, get_step_metadata
from milepost.metadata.store import MetadataStore, metadata_store
from milepost.metadata.tree import TreeMetadata, tree_metadata
from milepost.metadata.value import ArrayMetadata, Metadata, ScalarMetadata, StorageMetadata, StringMetadata

__all__ = [
    "ArrayMetadata",
    "DeviceMetadata",
    "DeviceMetadataMesh",
    "Metadata",
    "MetadataStore",
    "NamedShardingMetadata",
    "RootMetadata",
    "ScalarMetadata",
    "ShardingMetadata",
    "SingleDeviceShardingMetadata",
    "StepMetadata",
    "StorageMetadata",
    "StringMetadata",
    "TreeMetadata",
    "from_jax_sharding",
    "from_serialized_string",
    "get_sharding_or_none",
    "get_step_metadata",
    "metadata_store",
    "tree",
    "tree_metadata",
    "value",
]
