"""Turn the samples of one run into tables, and say plainly which targets are met.

The rule: a ratio compares samples of the same round, and its median is reported; a target is met or missed by that
median, and what was not measured is said to be so.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

import overheads
import stores
import workloads

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["render"]

MIB = 1 << 20
BUDGET_MIB = 64
ORDER = (
    "raw",
    "orbax",
    "orbax uncompressed",
    "safetensors",
    "zarr",
    "milepost",
    "milepost sync",
    "milepost tensorstore",
    "milepost zarr",
)

Results = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What is aimed at: `value` is None where it was not measured; `least` says that more is better."""

    text: str
    limit: float
    value: float | None
    unit: str = "x"
    least: bool = False

    def row(self) -> str:
        """Return a line of the table of targets."""
        bound = f"{'at least' if self.least else 'at most'} {self.limit:g} {self.unit}"
        if self.value is None:
            return f"| {self.text} | {bound} | | not measured |"
        met = self.value >= self.limit if self.least else self.value <= self.limit
        return f"| {self.text} | {bound} | {_short(self.value)} {self.unit} | {'met' if met else '**missed**'} |"


def render(results: Results) -> str:
    """Return the report as Markdown."""
    parts = [_head(results["environment"]), _targets(results)]
    parts += [_times(name, times) for name, times in results["times"].items()]
    parts += [_steps(results["steps"])] if results["steps"] else []
    parts += [_memory(results["memory"])] if results["memory"] else []
    parts += [_stores(results["stores"])] if results.get("stores") else []
    parts += [_imports(results["imports"])] if "imports" in results else []
    parts += [_engine(results["engine"])] if "engine" in results else []
    return "\n".join(parts)


def _head(environment: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    earlier = environment.get("earlier")
    taken = f"\n- from earlier runs on the same machine, within a day: {', '.join(earlier)}" if earlier else ""
    return f"""# Results

Rendered by `benchmarks/run.py` from one run; what is measured, and how, is in `README.md` beside this page.

- {environment["date"]}, Python {environment["python"]}, {versions}
- {environment["kernel"]}, {environment["file system"]}, {environment["processor"]}, {environment["cores"]} cores,
  {environment["memory"] / 2**30:.0f} GiB of memory; load average {environment["load at the start"]:.1f} at the start,
  {environment["load at the end"]:.1f} at the end
- medians of {environment["repeat"]} rounds (one where the table says so), reads from a warm page cache{taken}
"""


def _targets(results: Results) -> str:
    rows = [target.row() for target in _all_targets(results)]
    return "\n".join(["## Targets", "", "| | target | measured | |", "|---|---|---|---|", *rows, ""])


def _all_targets(results: Results) -> Iterator[Target]:
    yield from _save_targets(results)
    yield from _load_targets(results)
    yield from _tensorstore_targets(results)
    yield from _other_targets(results)


def _save_targets(results: Results) -> Iterator[Target]:
    def ratio(name: str, one: str, other: str) -> float | None:
        return _ratio(results["times"].get(name), one, other)

    for name, limit in (("W1", 1.15), ("W2", 1.15), ("W5", 1.15), ("W6", 1.15), ("W4", 1.5)):
        value = ratio(name, "milepost durable", "raw durable")
        yield Target(f"save {name}, beside raw write and fsync", limit, value)
    faster = ratio("W3", "orbax durable", "milepost durable")
    yield Target("save W3, faster than Orbax", 100, faster, least=True)
    for name in workloads.WORKLOADS:
        value = ratio(name, "milepost blocking", "orbax blocking")
        yield Target(f"blocking time of `save_async` {name}, beside Orbax", 0.1, value)


def _load_targets(results: Results) -> Iterator[Target]:
    def ratio(name: str, one: str, other: str) -> float | None:
        return _ratio(results["times"].get(name), one, other)

    for name in ("W1", "W2", "W5", "W6"):
        yield Target(f"load {name} verified, beside raw read", 1.3, ratio(name, "milepost load", "raw load"))
    for name, limit in (("W4", 8), ("W3", 25)):
        value = ratio(name, "orbax load", "milepost load")
        yield Target(f"load {name} verified, faster than Orbax", limit, value, least=True)
    mapped = ratio("W1", "milepost load mapped", "raw load")
    yield Target("load W1 mapped and not verified, beside raw read", 0.1, mapped)


def _tensorstore_targets(results: Results) -> Iterator[Target]:
    ours = "milepost tensorstore"
    for verb, end in (("save", "durable"), ("load", "load")):
        for name in ("W1", "W2"):
            times = results["times"].get(name)
            ratios = [_ratio(times, f"{ours} {end}", f"{other} {end}") for other in ("orbax", "orbax uncompressed")]
            measured = [ratio for ratio in ratios if ratio is not None]
            text = f"{verb} {name} in Orbax's format, beside the best of Orbax"
            yield Target(text, 1, max(measured) if len(measured) == len(ratios) else None)
        for name, limit in (("W4", 5), ("W3", 10)):
            faster = _ratio(results["times"].get(name), f"orbax {end}", f"{ours} {end}")
            yield Target(f"{verb} {name} in Orbax's format, faster than Orbax", limit, faster, least=True)


def _other_targets(results: Results) -> Iterator[Target]:
    for name in ("W1", "W2", "W5"):
        for verb, beyond in (("save", "state"), ("load", "result")):
            measured = results["memory"].get(name, {}).get(f"milepost {verb}")
            value = None if measured is None else max(0, measured["extra"]) / MIB
            yield Target(f"memory of {verb} {name} beyond the {beyond}", BUDGET_MIB, value, "MiB")
    for size in overheads.SIZES:
        for verb in ("save", "load"):
            seconds = results.get("engine", {}).get(str(size))
            own = None if seconds is None else overheads.per_leaf(seconds, size, verb)[1]
            yield Target(f"engine's {verb} of {size:,} leaves, beyond JAX's price per leaf", 20, own, "µs")
    for name in ("W4", "W3"):
        for store in stores.STORES:
            measured = results.get("stores", {}).get(name)
            count = None if measured is None else measured[store]["requests"]["milepost save"]
            most = stores.most_requests(0 if measured is None else measured["bytes"])
            yield Target(f"requests of a save of {name} to `{store}://`", most, count, "requests")
    seconds = results.get("imports", {}).get("milepost over numpy")
    milliseconds = None if seconds is None else statistics.median(seconds) * 1000
    yield Target("`import milepost` over numpy", 100, milliseconds, "ms")


def _times(name: str, times: Results) -> str:
    seconds = times["seconds"]
    title = f"## {name}: {workloads.WORKLOADS[name].title}"
    lines = [title, "", f"{times['leaves']:,} leaves, {times['bytes'] / 1e6:,.1f} MB", ""]
    lines += ["| | seconds | least to most | beside raw | rounds |", "|---|---|---|---|---|"]
    for key in sorted(seconds, key=_place):
        samples, base = seconds[key], "raw load" if " load" in key else "raw durable"
        ratio = _ratio(times, key, base)
        beside = "" if ratio is None else f"{_short(ratio)} x"
        spread = f"{_short(min(samples))} to {_short(max(samples))}"
        lines.append(f"| {_words(key)} | {_short(statistics.median(samples))} | {spread} | {beside} | {len(samples)} |")
    return "\n".join([*lines, ""])


def _place(key: str) -> tuple[bool, bool, int]:
    library = max((one for one in ORDER if key.startswith(f"{one} ")), key=len)
    return " load" in key, " durable" in key, ORDER.index(library)


def _words(key: str) -> str:
    for end, words in ((" blocking", ": save, caller goes on"), (" durable", ": save, durable")):
        if key.endswith(end):
            return key.removesuffix(end) + words
    return key.replace(" load", ": load", 1)


def _steps(steps: Results) -> str:
    lines = ["## The training step after a save", ""]
    lines += ["Seconds of a step that donates the arrays being saved, begun when `save_async` has returned.", ""]
    lines += ["| | after | seconds | least to most |", "|---|---|---|---|"]
    for name, seconds in steps.items():
        for after, samples in seconds.items():
            spread = f"{_short(min(samples))} to {_short(max(samples))}"
            lines.append(f"| {name} | {after} | {_short(statistics.median(samples))} | {spread} |")
    return "\n".join([*lines, ""])


def _memory(memory: Results) -> str:
    rows = sorted({key for one in memory.values() for key in one}, key=_place)
    lines = ["## Peak memory", "", "MiB beyond the state when saving, beyond the result when loading.", ""]
    lines += ["| | " + " | ".join(memory) + " |", "|---" * (len(memory) + 1) + "|"]
    for key in rows:
        cells = (f"{max(0, one[key]['extra']) / MIB:,.0f}" if key in one else "" for one in memory.values())
        lines.append(f"| {_words(key)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _stores(measured: Results) -> str:
    lines = ["## Object stores", ""]
    lines += ["The server for tests, in a process of its own; `plain` is the same bytes as one object by the same"]
    lines += ["client, s3fs or gcsfs, in parts of 16 MiB. Requests are those of the first save, or of a load.", ""]
    lines += ["| | | seconds | least to most | beside plain | requests |", "|---" * 6 + "|"]
    for name, one in measured.items():
        for store in stores.STORES:
            for key, samples in one[store]["seconds"].items():
                spread = f"{_short(min(samples))} to {_short(max(samples))}"
                ratio = _ratio(one[store], key, f"plain {key.rpartition(' ')[2]}")
                cells = [f"{name}, `{store}://`", key, _short(statistics.median(samples)), spread]
                lines.append(f"| {' | '.join(cells)} | {_short(ratio or 0)} x | {one[store]['requests'][key]} |")
    return "\n".join([*lines, ""])


def _imports(imports: Results) -> str:
    lines = ["## Imports", "", "| | milliseconds | least to most |", "|---|---|---|"]
    for name, seconds in imports.items():
        low, middle, high = (1000 * pick(seconds) for pick in (min, statistics.median, max))
        lines.append(f"| {name} | {middle:.0f} | {low:.0f} to {high:.0f} |")
    return "\n".join([*lines, ""])


def _engine(engine: Results) -> str:
    lines = ["## The engine alone", "", "Empty arrays, memory storage; microseconds per leaf.", ""]
    lines += [
        "| leaves | save | of it beyond JAX's own price | load | of it beyond JAX's own price |",
        "|---" * 5 + "|",
    ]
    for size, seconds in engine.items():
        cells = [f"{value:.1f}" for verb in ("save", "load") for value in overheads.per_leaf(seconds, int(size), verb)]
        lines.append(f"| {int(size):,} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _ratio(times: Results | None, one: str, other: str) -> float | None:
    """Return the median over the rounds of one time through the other."""
    if times is None or one not in times["seconds"] or other not in times["seconds"]:
        return None
    samples: dict[str, list[float]] = times["seconds"]
    return statistics.median(a / b for a, b in zip(samples[one], samples[other], strict=False))


def _short(value: float) -> str:
    """Return a number with three significant digits, without exponent.

    >>> _short(0.01234), _short(1234.5), _short(1.5)
    ('0.0123', '1234', '1.50')
    """
    if not value:
        return "0"
    digits = next((n for n, bound in enumerate((100, 10, 1, 0.1, 0.01)) if abs(value) >= bound), 5)
    return f"{value:.{digits}f}"
