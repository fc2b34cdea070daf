"""Which process of the job this is, and how processes wait for each other.

The rule: a wait has an end. It goes through the coordination service that `jax.distributed` runs, never through the
devices, and when time is up the error names who did not come. Where the service does not run there is nobody to wait
for. JAX is asked only where the program has imported it: before that, a process can only be alone.

These functions are for programs; the engine has its own two verbs (`milepost.protocols.Hosts`).
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from typing import TYPE_CHECKING, Any

from milepost.errors import DeadlineError, noted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

__all__ = [
    "broadcast_one_to_all",
    "coordination_timeout",
    "is_pathways_backend",
    "is_primary_host",
    "process_count",
    "process_index",
    "reached_preemption",
    "sync_global_processes",
]

_PREFIX = "milepost/barrier"


def process_index() -> int:
    """Return the number of this process, from 0."""
    return int(sys.modules["jax"].process_index()) if "jax" in sys.modules else 0


def process_count() -> int:
    """Return how many processes there are."""
    return int(sys.modules["jax"].process_count()) if "jax" in sys.modules else 1


def is_primary_host(primary_host: int | None) -> bool:
    """Say whether this process is the one that acts for all; with None, each acts for itself."""
    return primary_host is None or primary_host == process_index()


def is_pathways_backend() -> bool:
    """Say whether JAX was told to reach its devices through Pathways."""
    platforms = (sys.modules["jax"].config.jax_platforms or "") if "jax" in sys.modules else ""
    return not {"proxy", "pathways"}.isdisjoint(platforms.split(","))


def coordination_timeout() -> int:
    """Return how long a wait without a timeout of its own lasts, in seconds."""
    return 300


def reached_preemption(step: int) -> bool:
    """Say whether all processes should save at this step, because one of them is about to end.

    With JAX's preemption service all answer alike at the same step; without it each answers for itself.
    """
    from milepost.preemption import reached_sync_point

    return reached_sync_point(step)


def broadcast_one_to_all(in_tree: Any, is_source: bool | None = None) -> Any:  # noqa: FBT001 - the documented signature
    """Return the tree of one process (the first, or the one that says it is the source) on all, as NumPy arrays.

    Unlike the rest of this module, and as JAX's function of this name, it goes through the devices, without a deadline.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(in_tree, is_source)


def sync_global_processes(
    name: str,
    *,
    timeout: float | None = None,
    processes: Collection[int] | None = None,
    barrier_sync_fn: Callable[..., None] | None = None,
    record_event_name: str = "/jax/checkpoint/sync_global_devices_duration_sec",
) -> None:
    """Return when all processes, or all of those named, have called this with the same name, equally often.

    Waits at most `timeout` seconds, then raises `DeadlineError`, which names those who did not come. A process that is
    not among those named returns at once. `barrier_sync_fn(key=, timeout_ms=)` takes the place of JAX's service where
    it is given; `record_event_name` is the name by which `jax.monitoring` is told the duration.
    """
    seconds = coordination_timeout() if timeout is None else timeout
    who = None if processes is None else tuple(sorted(processes))
    if barrier_sync_fn is not None:
        barrier_sync_fn(key=name, timeout_ms=int(seconds * 1000))
    elif _service() is not None:
        # A barrier that was passed stays open: every meeting needs a name of its own.
        key = f"{name}/{'all' if who is None else '-'.join(map(str, who))}"
        meet(f"{key}/{next(_numbers(key))}", name, seconds, who, record_event_name)


@functools.cache
def _numbers(_key: str) -> Iterator[int]:
    return itertools.count()


def meet(key: str, name: str, seconds: float, processes: tuple[int, ...] | None, event: str) -> None:
    """Wait until all have come to `key`, which nobody has used before; see `sync_global_processes`."""
    service = _service()
    if service is None or (processes is not None and service.index not in processes):
        return
    began = time.perf_counter()
    service.meet(f"{_PREFIX}/{key}", name, seconds, processes)
    sys.modules["jax"].monitoring.record_event_duration_secs(event, time.perf_counter() - began)


class _Service:
    """JAX's coordination service, as this process sees it."""

    def __init__(self, client: Any, index: int, count: int) -> None:
        self._client = client
        self._count = count
        self.index = index

    def meet(self, key: str, name: str, seconds: float, processes: tuple[int, ...] | None) -> None:
        """Wait for the others; every process leaves a mark, by which those that did not come are told."""
        mark = f"{key}/{self.index}"
        self._client.key_value_set(mark, "here", allow_overwrite=True)
        try:
            self._client.wait_at_barrier(key, max(1, int(seconds * 1000)), process_ids=processes)
        except Exception as cause:  # JAX has no public class for it
            raise self._late(name, key, seconds, processes) from cause
        self._client.key_value_delete(mark)

    def _late(self, name: str, key: str, seconds: float, processes: tuple[int, ...] | None) -> DeadlineError:
        expected = set(range(self._count) if processes is None else processes)
        what = f"cannot go on after {seconds:g} s at {name!r}"
        try:
            came = {int(mark.rpartition("/")[2]) for mark, _ in self._client.key_value_dir_get(f"{key}/")}
        except Exception:  # noqa: BLE001 - the service itself may be gone
            return DeadlineError(f"{what}: the coordination service does not say who is missing")
        missing = ", ".join(map(str, sorted(expected - came))) or "no process"
        return noted(
            DeadlineError(f"{what}: missing are of {len(expected)} processes: {missing}"),
            "a process that failed or hangs keeps the others waiting; look at its log",
        )


def _service() -> _Service | None:
    if "jax" not in sys.modules:
        return None
    from jax._src.distributed import global_state

    client = global_state.client
    return None if client is None else _Service(client, global_state.process_id, global_state.num_processes)
