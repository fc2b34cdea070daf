from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import milepost
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "core/src", *sorted(ROOT.glob("backends/*/src")), *sorted(ROOT.glob("plugins/*/src"))]
FILES = {
    ".".join(file.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): file
    for source in SOURCES
    for file in sorted(source.rglob("*.py"))
}

HEAVY = {"jax", "jaxlib", "fsspec", "upath", "typer", "click", "rich", "pandas", "scipy", "sklearn", "safetensors"}
HEAVY |= {"tensorstore", "zarr", "gcsfs", "s3fs", "aiohttp", "asyncio", "multiprocessing", "orbax", "etils", "IPython"}

WITH_JAX = {
    f"milepost.{name}"
    for name in (
        "trees",
        *(f"engine.{one}" for one in ("arriving", "loading", "placing")),
        *(f"v1.{one}" for one in ("_loading", "_parts")),
    )
}
"""The modules that take trees apart and put them together: the first save or load imports them."""

NEW_MODULES = """
import json, sys
import numpy
before = set(sys.modules)
import {module}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def run(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_of(module):
    return json.loads(run(NEW_MODULES.format(module=module)))


@pytest.mark.parametrize("module", FILES)
def test_every_module_can_be_imported_alone_and_only_those_that_handle_trees_bring_jax(module):
    brings_jax = bool({name.partition(".")[0] for name in modules_of(module)} & {"jax", "jaxlib"})
    assert brings_jax == (module in WITH_JAX)


@pytest.mark.parametrize("module", ["milepost", "milepost.v1", "milepost_posix", "milepost_safetensors"])
def test_nothing_heavy_comes_with_an_import(module):
    assert {name.partition(".")[0] for name in modules_of(module)} & HEAVY == set()


@pytest.mark.parametrize("module", ["milepost_gcs", "milepost_s3"])
def test_a_backend_brings_its_client_only_when_a_store_is_opened(module):
    # Whoever imports one is about to open a store, which needs asyncio in any case.
    assert {name.partition(".")[0] for name in modules_of(module)} & HEAVY <= {"asyncio"}


def test_importing_milepost_costs_few_modules_beyond_numpy():
    # Time cannot be asserted on a shared machine; benchmarks/ measures it. Each module costs about half a millisecond.
    assert len(modules_of("milepost")) < 150


def test_import_registers_no_plugin_and_reads_no_metadata():
    loaded = modules_of("milepost")
    assert [name for name in loaded if name.startswith(("milepost_", "importlib.metadata._"))] == []


def test_dir_shows_the_public_names_and_nothing_else():
    shown = run("import milepost; print(*dir(milepost))").split()
    assert sorted(milepost.__all__) == shown


def test_every_public_name_is_there():
    assert [name for name in milepost.__all__ if not hasattr(milepost, name)] == []


@pytest.mark.parametrize("module", FILES)
def test_every_module_says_what_it_offers(module):
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    targets = [node.targets[0] for node in tree.body if isinstance(node, ast.Assign)]
    says = "__all__" in {target.id for target in targets if isinstance(target, ast.Name)}
    offers = any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign) for node in tree.body)
    assert says == offers


def test_the_server_for_tests_needs_no_pytest():
    run("import sys; sys.modules['pytest'] = None; import milepost.testing.objects")
