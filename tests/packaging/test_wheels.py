from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    tomllib.loads(path.read_text(encoding="utf-8"))["project"]["name"]: path.parent
    for pattern in ("pyproject.toml", "core/pyproject.toml", "*/*/pyproject.toml")
    for path in sorted(ROOT.glob(pattern))
}
MODULES = {
    "milepost-core": "milepost",
    "milepost-gcs": "milepost_gcs",
    "milepost-posix": "milepost_posix",
    "milepost-s3": "milepost_s3",
    "milepost-safetensors": "milepost_safetensors",
    "milepost-tensorstore": "milepost_tensorstore",
    "milepost-zarr": "milepost_zarr",
}

USE = """
import sys
import numpy as np
import importlib
import milepost

names = "gcs", "posix", "s3", "safetensors", "tensorstore", "zarr"
for module in (milepost, *(importlib.import_module(f"milepost_{name}") for name in names)):
    assert module.__file__.startswith(sys.prefix), module.__file__
for step, writer in enumerate(("safetensors", "tensorstore", "zarr")):
    with milepost.configured({"default": {"arrays": writer}}):
        milepost.save(f"runs/{step}", {"weights": np.arange(6.0), "step": step})
    state = milepost.load(f"runs/{step}")
    assert state["step"] == step
    assert np.asarray(state["weights"]).tolist() == [0, 1, 2, 3, 4, 5]
"""


def run(*command, cwd=ROOT):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    for source in FOLDERS.values():
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source)
    return {file.name.partition("-")[0].replace("_", "-"): file for file in folder.glob("*.whl")}


def contents(wheel):
    with zipfile.ZipFile(wheel) as opened:
        return opened.namelist()


def metadata_of(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(opened.read(name).decode())


def test_every_package_becomes_a_wheel(wheels):
    assert sorted(FOLDERS) == sorted(wheels)


def test_the_umbrella_has_no_code(wheels):
    assert [name for name in contents(wheels["milepost"]) if ".dist-info/" not in name] == []


@pytest.mark.parametrize(("package", "module"), MODULES.items())
def test_a_wheel_holds_its_module_and_says_that_it_is_typed(wheels, package, module):
    inside = contents(wheels[package])
    source = next(FOLDERS[package].rglob(f"src/{module}"))
    expected = {f"{module}/{path.relative_to(source).as_posix()}" for path in source.rglob("*.py")}
    assert expected | {f"{module}/py.typed"} <= set(inside)
    assert {name.partition("/")[0] for name in inside if ".dist-info/" not in name} == {module}


def test_every_wheel_holds_the_licence(wheels):
    assert [name for name, wheel in wheels.items() if not any("LICENSE" in file for file in contents(wheel))] == []
    assert {(folder / "LICENSE").read_text(encoding="utf-8") for folder in FOLDERS.values()} == {
        (ROOT / "LICENSE").read_text(encoding="utf-8")
    }


def test_the_umbrella_brings_every_package_of_its_own_version(wheels):
    about = metadata_of(wheels["milepost"])
    needed = [Requirement(text) for text in about.get_all("Requires-Dist")]
    assert {need.name for need in needed} - {"milepost"} == set(MODULES)
    assert {str(need.specifier) for need in needed if need.name != "milepost"} == {f"=={about['Version']}"}


def test_installed_wheels_save_and_load_in_an_environment_of_their_own(wheels, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    python = tmp_path / "env" / scripts / "python"
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", *wheels.values(), cwd=tmp_path)
    # NumPy and JAX come from here, so that nothing is downloaded; paths listed in a .pth do not bring their own .pth
    # files with them, so the sources of this checkout stay out.
    (site,) = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").split()
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    run(python, "-c", USE, cwd=tmp_path)
    assert "2" in run(tmp_path / "env" / scripts / "milepost", "ls", "runs", cwd=tmp_path)
