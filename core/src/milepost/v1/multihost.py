"""Which process of the job this is, and how processes wait for each other, by the names of the reference.

Decides nothing but that waiting is awaitable here: the rules are those of `milepost.multihost`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost.multihost import (
    coordination_timeout,
    is_pathways_backend,
    is_primary_host,
    meet,
    process_count,
    process_index,
)

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["is_pathways_backend", "is_primary_host", "process_count", "process_index", "sync_global_processes"]


async def sync_global_processes(
    key: str,
    *,
    operation_id: str,
    timeout: float | None = None,  # noqa: ASYNC109 - the documented signature
    processes: Collection[int] | None = None,
    record_event_name: str = "/jax/checkpoint/sync_global_devices_duration_sec",
) -> None:
    """Return when all processes, or all of those named, have called this with the same key and operation.

    `operation_id` must be another one every time. Waits at most `timeout` seconds, then raises `DeadlineError`, which
    names those who did not come. A process that is not among those named returns at once. Meanwhile the event loop
    runs. `record_event_name` is the name by which `jax.monitoring` is told the duration.
    """
    import asyncio

    seconds = coordination_timeout() if timeout is None else timeout
    who = None if processes is None else tuple(sorted(processes))
    await asyncio.to_thread(meet, f"{key}.{operation_id}", key, seconds, who, record_event_name)
