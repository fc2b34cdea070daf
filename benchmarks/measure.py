"""Measure one thing in a process of its own: the times of one workload, the steps after a save, or a peak of memory.

The rule: what is compared is measured side by side. Libraries take turns, round by round, each starting from a freshly
copied state, an empty directory, memory at hand and a disk with nothing left to write; loads follow from a warm page
cache; what is old is deleted outside the timing. Each library is warmed up on a small state first, and the machine by a
raw round that is not counted; what each library loads is compared, once, with what it was given, to the bit.

Called by `run.py` with one JSON argument; writes JSON to the file named there.
"""

from __future__ import annotations

import collections
import gc
import json
import mmap
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import libraries
import workloads

if TYPE_CHECKING:
    from collections.abc import Callable

    from libraries import Library

__all__ = ["child_memory", "child_steps", "child_times", "main"]

CANNOT = {("W6", "zarr")}
"""zarr-python has no bfloat16."""
ONE_ROUND = {("W3", "orbax"), ("W3", "orbax uncompressed"), ("W3", "zarr"), ("W3", "milepost zarr")}
"""What takes most of a minute each time, and is far beyond the noise: measured once."""

Samples = dict[str, list[float]]


def child_times(job: dict[str, Any]) -> dict[str, Any]:
    """Measure all libraries on one workload; return the seconds by "library operation"."""
    workload, root = workloads.WORKLOADS[job["workload"]], Path(job["root"])
    members = [libraries.LIBRARIES[name]() for name in job["libraries"] if (workload.name, name) not in CANNOT]
    state = workloads.ready(workload.make())
    for library in members:
        _warm_up(library, root / "warm")
    samples: Samples = collections.defaultdict(list)
    _one_round(libraries.Raw(), root / "checkpoint", state, collections.defaultdict(list), check=False)
    for turn in range(job["repeat"]):
        # Another one begins each time, and every other time backwards, so that nobody always follows the same one.
        order = members[turn % len(members) :] + members[: turn % len(members)]
        for library in order[:: -1 if turn % 2 else 1]:
            if turn and (workload.name, library.name) in ONE_ROUND:
                continue
            _one_round(library, root / "checkpoint", state, samples, check=turn == 0)
    return {"bytes": workloads.byte_count(state), "leaves": _leaf_count(state), "seconds": dict(samples)}


def child_steps(job: dict[str, Any]) -> dict[str, Any]:
    """Measure the training step that follows a save, and donates what is being saved, beside one that follows none."""
    import jax

    workload, path = workloads.WORKLOADS[job["workload"]], Path(job["root"]) / "checkpoint"
    members: list[Library | None] = [None, *(libraries.LIBRARIES[name]() for name in job["libraries"])]
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + leaf, state), donate_argnums=0)
    state = workloads.ready(step(workload.make()))
    samples: Samples = collections.defaultdict(list)
    for _ in range(job["repeat"]):
        for library in members:
            state = workloads.fresh(state)
            _quiet(state)
            wait = library.save(path, library.prepare(state)) if library else None
            begin = time.perf_counter()
            state = workloads.ready(step(state))
            samples[library.name if library else "no save"].append(time.perf_counter() - begin)
            if wait:
                wait()
                shutil.rmtree(path)
    return dict(samples)


def child_memory(job: dict[str, Any]) -> dict[str, Any]:
    """Measure the peak memory of one save, or of one load of what an earlier process saved there."""
    workload, path = workloads.WORKLOADS[job["workload"]], Path(job["root"]) / "checkpoint"
    library = libraries.LIBRARIES[job["library"]]()
    _warm_up(library, Path(job["root"]) / "warm")
    state = workloads.ready(workload.make())  # what is still being copied would count as taken by the library
    if job["operation"] == "save":
        extra = _save_peak(library, path, library.prepare(state))
        return {"bytes": workloads.byte_count(state), "extra": extra, "loads": list(library.loads())}
    target, size = workloads.abstract(state), workloads.byte_count(state)
    load = library.loads()[job["operation"]]
    del state
    kept: list[Any] = []
    return {"bytes": size, "extra": _peak(lambda: kept.append(workloads.ready(load(path, target)))) - size}


def main() -> None:
    """Do the job given as JSON on the command line."""
    job = json.loads(sys.argv[1])
    measured = {"times": child_times, "steps": child_steps, "memory": child_memory}[job["kind"]](job)
    Path(job["out"]).write_text(json.dumps(measured), encoding="utf-8")


def _one_round(library: Library, path: Path, state: Any, samples: Samples, *, check: bool) -> None:
    target, copy = workloads.abstract(state), workloads.fresh(state)
    prepared = library.prepare(copy)
    shutil.rmtree(path, ignore_errors=True)
    _quiet(state)
    begin = time.perf_counter()
    wait = library.save(path, prepared)
    blocked = time.perf_counter()
    wait()
    durable = time.perf_counter()
    samples[f"{library.name} blocking"].append(blocked - begin)
    samples[f"{library.name} durable"].append(durable - begin)
    del prepared, wait, copy  # with what JAX has cached of it on the host, before loading takes as much again
    for name, load in library.loads().items():
        _quiet(state)
        _read_all(path)
        begin = time.perf_counter()
        result = workloads.ready(load(path, target))
        samples[f"{library.name} {name}"].append(time.perf_counter() - begin)
        if check and not _holds(library, state, result):
            raise AssertionError(f"what {library.name} loaded is not what it saved")
        del result
    shutil.rmtree(path)


def _holds(library: Library, state: Any, result: Any) -> bool:
    if library.name == "raw":
        return all(a == memoryview(b) for a, b in zip(library.prepare(state), result, strict=True))
    return workloads.same_bits(state, result)


def _warm_up(library: Library, path: Path) -> None:
    import jax
    import numpy as np

    state = {"a": jax.device_put(np.ones((256, 256), np.float32)), "b": jax.device_put(np.ones(7, np.float32))}
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    library.save(path, library.prepare(state))()
    for load in library.loads().values():
        workloads.ready(load(path, workloads.abstract(state)))
    shutil.rmtree(path)


def _leaf_count(state: Any) -> int:
    import jax

    return len(jax.tree.leaves(state))


def _quiet(state: Any) -> None:
    """Leave nothing to collect, nothing to write, and free memory that the machine has at hand.

    A virtual machine gets memory from its host when a page is first touched, and gives back what has been free for some
    seconds: the same read was measured to take 0.2 s or 1.5 s, and the slow one is whoever comes first. Only huge pages
    help those who ask for huge pages, as NumPy does.
    """
    import numpy as np

    gc.collect()
    os.sync()
    size = min(2 * workloads.byte_count(state), _available() // 2)
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1


def _available() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _read_all(path: Path) -> None:
    """Bring every file into the page cache."""
    buffer = bytearray(1 << 22)
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as handle:
                while handle.readinto(buffer):
                    pass


def _peak(act: Callable[[], object]) -> int:
    """Return by how many bytes the resident memory rose above where it stood, at its highest."""
    import ctypes

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory still held would hide what is taken anew
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    act()
    return _status("VmHWM") - before


def _save_peak(library: Library, path: Path, prepared: Any) -> int:
    def act() -> None:
        wait = library.save(path, prepared)
        wait()

    return _peak(act)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
