"""Measure what is there before any byte moves: the price of importing, and of the engine per leaf.

The rule: an import is measured in fresh processes, over what everybody has imported anyway; the engine is measured on
empty arrays and memory storage, beside the calls into JAX that no library can avoid.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import workloads

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["engine", "imports", "main"]

IMPORTS = {
    "milepost over numpy": ("numpy", "milepost"),
    "safetensors.numpy over numpy": ("numpy", "safetensors.numpy"),
    "milepost over jax": ("jax", "milepost"),
    "orbax.checkpoint over jax": ("jax", "orbax.checkpoint"),
}
SIZES = (1_000, 10_000, 100_000)


def imports(repeat: int) -> dict[str, list[float]]:
    """Return seconds per import by name, each in a fresh process; the first of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(repeat + 1):
        for name, (before, measured) in IMPORTS.items():
            code = f"import time, {before}; t = time.perf_counter(); import {measured}; print(time.perf_counter() - t)"
            output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
            if turn:
                seconds[name].append(float(output))
    return seconds


def engine(repeat: int) -> dict[str, dict[str, list[float]]]:
    """Return seconds by number of leaves and by what was done."""
    import milepost

    _engine_round(milepost, 100, "warm")
    result: dict[str, dict[str, list[float]]] = {}
    for size in SIZES:
        rounds = [_engine_round(milepost, size, f"{size}-{turn}") for turn in range(repeat)]
        result[str(size)] = {key: [one[key] for one in rounds] for key in rounds[0]}
    return result


def main() -> None:
    """Measure the engine as the JSON on the command line says, and write JSON to the file named there."""
    job = json.loads(sys.argv[1])
    Path(job["out"]).write_text(json.dumps(engine(job["repeat"])), encoding="utf-8")


def _engine_round(milepost: Any, size: int, name: str) -> dict[str, float]:
    import jax
    import numpy as np

    url = f"memory://milepost-benchmark/{name}"
    empties = [np.empty(0, np.float32) for _ in range(size)]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def states() -> Any:
        return {f"leaf_{i}": leaf for i, leaf in enumerate(jax.device_put(empties, sharding))}

    def jax_save(state: Any) -> None:
        for _, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
            np.asarray(leaf)

    mine, theirs = states(), states()  # each new: JAX keeps what it has handed to the host once
    target = workloads.abstract(mine)

    def jax_load() -> Any:
        leaves, structure = jax.tree_util.tree_flatten_with_path(target)
        return workloads.ready(jax.tree.unflatten(structure, jax.device_put(empties, [sharding] * len(leaves))))

    return {
        "jax save": _timed(lambda: jax_save(theirs)),
        "milepost save": _timed(lambda: milepost.save(url, mine)),
        "jax load": _timed(jax_load),
        "milepost load": _timed(lambda: workloads.ready(milepost.load(url, target))),
    }


def _timed(act: Callable[[], object]) -> float:
    gc.collect()
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def per_leaf(seconds: dict[str, list[float]], size: int, verb: str) -> tuple[float, float]:
    """Return microseconds per leaf: what milepost took, and what of it is beyond JAX's own price."""
    whole, own = (statistics.median(seconds[f"{who} {verb}"]) / size * 1e6 for who in ("milepost", "jax"))
    return whole, whole - own


if __name__ == "__main__":
    main()
