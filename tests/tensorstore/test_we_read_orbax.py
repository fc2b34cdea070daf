"""What the real Orbax writes, loaded by milepost: bit for bit, in every format, by both faces, on any machine.

Orbax runs in a process of its own (`we_read.py`), once with one device and once with eight, where all cases are tried.
The oracle is the state that was saved.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

HERE = pathlib.Path(__file__).parent
PROGRAM = HERE / "we_read.py"
DEVICES = (1, 8)
FORMATS = ("ocdbt zarr2", "ocdbt zarr3", "plain zarr2", "plain zarr3")
CASES = {
    node.name.replace("_", " "): {decorator.id for decorator in node.decorator_list}
    for node in ast.parse(PROGRAM.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.decorator_list
}
TRIED = [(case, words) for case, marks in CASES.items() for words in (FORMATS[:1] if "once" in marks else FORMATS)]


def run(devices, *arguments):
    """Run Python with so many devices; return what it printed."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@functools.cache
def answers():
    """Return what went wrong, by number of devices, case and format: "" for nothing."""
    with ThreadPoolExecutor() as pool:
        printed = pool.map(lambda devices: (devices, run(devices, PROGRAM)), DEVICES)
    return {
        (devices, case, words): wrong
        for devices, text in printed
        for case, words, wrong in map(json.loads, text.splitlines())
    }


def test_there_are_cases():
    assert len(TRIED) > 40
    assert {(devices, *one) for devices in DEVICES for one in TRIED} == set(answers())


@pytest.mark.parametrize(("case", "words"), TRIED)
@pytest.mark.parametrize("devices", DEVICES)
def test_we_load_what_orbax_saved(devices, case, words):
    wrong = answers()[devices, case, words]
    assert not wrong, wrong


# --- other machines --------------------------------------------------------------------------------------------------

SAVE = """
import sys, orbax.checkpoint as ocp, states
from orbax.checkpoint import v1
with ocp.StandardCheckpointer() as theirs:
    theirs.save(sys.argv[1] + "/v0", states.arrays())
v1.save(sys.argv[1] + "/v1", states.arrays())
"""

LOAD = """
import sys, jax, milepost, numpy as np, states
devices = np.array(jax.devices())
for path in (sys.argv[1] + "/v0", sys.argv[1] + "/v1"):
    found = milepost.load(path)
    for name, dtype, shape, seed in (("rows", "float32", (16, 3), 4), ("columns", "float32", (3, 16), 5)):
        expected = states.bits(dtype, shape, seed)
        assert found[name].sharding.device_set == {devices[0]}, found[name].sharding
        assert np.asarray(found[name]).tobytes() == expected.tobytes(), name
        mesh = jax.sharding.Mesh(devices.reshape(-1, 3 if len(devices) % 3 == 0 else 1), ("x", "y"))
        spec = jax.sharding.PartitionSpec(*("y" if length == 3 else "x" for length in shape))
        sharding = jax.sharding.NamedSharding(mesh, spec)
        target = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)}
        other = milepost.v1.load(path, target, extra="ignore")[name]
        assert other.sharding == sharding
        assert np.asarray(other).tobytes() == expected.tobytes(), name
    for name, dtype in (("sharded", "bfloat16"), ("sharded", "int4")):
        assert np.asarray(found[name][dtype]).tobytes() == states.bits(dtype, (8, 16), 3).tobytes()
print(len(devices))
"""

DESCRIBE = """
import sys
sys.modules["jax"] = None  # to import it is an error from now on
import milepost.v1
for path in (sys.argv[1] + "/v0", sys.argv[1] + "/v1"):
    found = milepost.v1.metadata(path).metadata
    assert (found["rows"].shape, found["rows"].dtype) == ((16, 3), "float32")
    assert found["rows"].sharding_metadata.axis_names == ["a", "b"]
    print(len(found))
"""


@pytest.fixture(scope="module")
def of_eight(tmp_path_factory):
    """Return a folder with checkpoints that were saved on eight devices."""
    folder = tmp_path_factory.mktemp("of_eight")
    run(8, "-c", SAVE, folder)
    return folder


@pytest.mark.parametrize("devices", [1, 6])
def test_what_eight_devices_saved_loads_on_others(of_eight, devices):
    assert run(devices, "-c", LOAD, of_eight) == f"{devices}\n"


def test_metadata_need_no_jax(of_eight):
    counted = run(1, "-c", DESCRIBE, of_eight).split()
    assert counted == ["10", "10"]
