"""Measure milepost side by side with its peers, and write down what came out.

    python benchmarks/run.py --workloads W1,W4 --repeat 3 --json out.json --results benchmarks/RESULTS.md

The rule: numbers that are compared come from one run on one machine; `RESULTS.md` is rendered from them, never typed. A
run takes long: what it leaves out may be taken from an earlier one of the same machine, and the report then says so.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import libraries
import overheads
import report
import workloads

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["main"]

HERE = Path(__file__).parent
MEMORY_WORKLOADS = ("W1", "W2", "W5")
MEMORY_LIBRARIES = ("orbax", "safetensors", "milepost", "milepost tensorstore", "milepost zarr")
STEP_WORKLOADS = ("W1", "W2")
STORE_WORKLOADS = ("W1", "W3", "W4")
STEP_LIBRARIES = ("orbax", "milepost")
VERSIONS = (
    *("milepost-core", "jax", "jaxlib", "numpy"),
    *("orbax-checkpoint", "tensorstore", "safetensors", "zarr", "s3fs", "gcsfs"),
)
IN_MEMORY = ("tmpfs", "ramfs")


def main() -> None:
    """Run what the command line asks for."""
    options = _options()
    root = Path(tempfile.mkdtemp(prefix="milepost-bench-", dir=options.root))
    results: dict[str, Any] = {"environment": _environment(root, options.repeat)}
    results |= {"times": {}, "steps": {}, "memory": {}, "stores": {}}
    if options.earlier:
        _take_over(results, json.loads(options.earlier.read_text(encoding="utf-8")), options.workloads.split(","))
    try:
        for _ in _measure(options, root, results):
            results["environment"]["load at the end"] = os.getloadavg()[0]
            if options.json:  # after every part, so that a run that is stopped is not lost
                options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    text = report.render(results)
    if options.results:
        options.results.write_text(text, encoding="utf-8")
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default=",".join(workloads.WORKLOADS), help="names, with commas between")
    parser.add_argument("--libraries", default=",".join(libraries.LIBRARIES), help="names, with commas between")
    parser.add_argument(
        "--parts", default="times,steps,memory,stores,imports,engine", help="what to measure, with commas between"
    )
    parser.add_argument("--repeat", type=int, default=5, help="rounds; medians are reported")
    parser.add_argument("--root", default=tempfile.gettempdir(), help="a folder on the disk to measure")
    parser.add_argument("--earlier", type=Path, help="what another run wrote, for all that this one leaves out")
    parser.add_argument("--json", type=Path, help="where to write all samples")
    parser.add_argument("--results", type=Path, help="where to write the tables")
    return parser.parse_args()


def _take_over(results: dict[str, Any], earlier: dict[str, Any], measured: list[str]) -> None:
    """Take what is not measured now from an earlier run."""
    for part in ("times", "steps", "memory", "stores"):
        results[part] |= {name: one for name, one in earlier.get(part, {}).items() if name not in measured}
    results |= {part: earlier[part] for part in ("imports", "engine") if part in earlier}
    taken = sorted({*results["times"], *(part for part in ("imports", "engine") if part in earlier)})
    results["environment"]["earlier"] = taken


def _measure(options: argparse.Namespace, root: Path, results: dict[str, Any]) -> Iterator[None]:
    """Fill in the results, part by part."""
    names, members = options.workloads.split(","), options.libraries.split(",")
    parts = options.parts.split(",")
    if "imports" in parts:
        print("measuring imports", file=sys.stderr, flush=True)
        results["imports"] = overheads.imports(15)
        yield
    if "engine" in parts:
        results["engine"] = _child("overheads.py", {"repeat": options.repeat}, root)
        yield
    for name in names:
        job = {"workload": name, "repeat": options.repeat}
        if "times" in parts:
            results["times"][name] = _child("measure.py", {**job, "kind": "times", "libraries": members}, root)
        if "steps" in parts and name in STEP_WORKLOADS:
            job |= {"kind": "steps", "libraries": _among(members, STEP_LIBRARIES)}
            results["steps"][name] = _child("measure.py", job, root)
        if "memory" in parts and name in MEMORY_WORKLOADS:
            results["memory"][name] = _memory(name, _among(members, MEMORY_LIBRARIES), root)
        if "stores" in parts and name in STORE_WORKLOADS:
            results["stores"][name] = _child("stores.py", {"workload": name, "repeat": options.repeat}, root)
        yield


def _memory(workload: str, members: list[str], root: Path) -> dict[str, Any]:
    measured = {}
    for library in members:
        job = {"kind": "memory", "workload": workload, "library": library}
        saved = measured[f"{library} save"] = _child("measure.py", {**job, "operation": "save"}, root)
        for operation in saved["loads"]:
            measured[f"{library} {operation}"] = _child("measure.py", {**job, "operation": operation}, root)
        shutil.rmtree(root / "checkpoint")
    return measured


def _among(members: list[str], wanted: tuple[str, ...]) -> list[str]:
    return [member for member in members if member in wanted]


def _child(script: str, job: dict[str, Any], root: Path) -> Any:
    """Run one measurement in a fresh process."""
    print("measuring", *(f"{key}={value}" for key, value in job.items()), file=sys.stderr, flush=True)
    out = root / "out.json"
    out.unlink(missing_ok=True)
    job = {**job, "root": str(root), "out": str(out)}
    devices = workloads.WORKLOADS[job["workload"]].devices if "workload" in job else 1
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, HERE / script, json.dumps(job)], check=True, env=environment)
    return json.loads(out.read_text(encoding="utf-8"))


def _environment(root: Path, repeat: int) -> dict[str, Any]:
    kind = _file_system(root)
    if kind in IN_MEMORY:
        sys.exit(f"--root is on {kind}, which is memory: name a folder on a disk")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "kernel": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": pages,
        "file system": kind,
        "repeat": repeat,
        "load at the start": os.getloadavg()[0],
    }


def _file_system(path: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    covering = [(where, kind) for where, kind in mounts if path.resolve().is_relative_to(where)]
    return max(covering, key=lambda mount: len(mount[0]))[1]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
