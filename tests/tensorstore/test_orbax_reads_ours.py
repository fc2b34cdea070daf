"""What milepost writes through TensorStore, restored by the real Orbax: bit for bit, in every format.

Orbax runs in a process of its own (`orbax_reads.py`), once with one device and once with eight, where all cases are
tried. The oracle is the state that was saved, and what Orbax writes of the same state.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
PROGRAM = HERE / "orbax_reads.py"
FORMATS = ("ocdbt zarr2", "ocdbt zarr3", "plain zarr2", "plain zarr3")
CASES = tuple(
    node.name.replace("_", " ")
    for node in ast.parse(PROGRAM.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.decorator_list
)


@functools.cache
def answers(devices):
    """Return what went wrong, by case and format: "" for nothing."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", PROGRAM],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return {(case, words): wrong for case, words, wrong in map(json.loads, done.stdout.splitlines())}


def test_there_are_cases():
    assert len(CASES) > 5


@pytest.mark.parametrize("words", FORMATS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("devices", [1, 8])
def test_orbax_restores_what_we_saved(devices, case, words):
    wrong = answers(devices)[case, words]
    assert not wrong, wrong
