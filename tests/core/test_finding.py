"""What is not a checkpoint: the error says what is there instead, and what to do next."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import uuid

import milepost
import numpy as np
import pytest
from milepost import errors
from milepost.engine.reading import open_checkpoint
from milepost.plugins import Plugins
from upath import UPath

STATE = {"a": np.arange(3), "b": 7}


@pytest.fixture
def runs(tmp_path):
    root = tmp_path / "runs"
    for step in (100, 200):
        milepost.save(root / f"step_{step}", STATE)
    return root


def refused(path, *classes, load=milepost.load):
    with pytest.raises(errors.MilepostError) as caught:
        load(path)
    for cls in classes:
        assert isinstance(caught.value, cls)
    return str(caught.value), " ".join(getattr(caught.value, "__notes__", ()))


NOT_FOUND = (errors.CheckpointNotFoundError, FileNotFoundError, ValueError)
INVALID = (errors.InvalidLayoutError, ValueError)


@pytest.mark.parametrize("load", [milepost.load, milepost.v1.metadata])
def test_a_name_that_is_not_there_tells_what_is_near_by(runs, load):
    said, notes = refused(runs / "step_300", *NOT_FOUND, load=load)
    assert "step_300" in said
    assert "nothing is there" in said
    assert "near by" in notes
    assert "step_200" in notes


def test_a_root_that_does_not_exist(tmp_path):
    said, _ = refused(tmp_path / "no" / "such" / "7", *NOT_FOUND)
    assert "is empty or does not exist" in said


def test_an_empty_folder(runs):
    (runs / "empty").mkdir()
    assert "it is an empty folder" in refused(runs / "empty", *NOT_FOUND)[0]


def test_a_root_of_checkpoints(runs):
    said, _ = refused(runs, *INVALID)
    assert "a folder of them" in said
    assert "'step_100'" in said


def test_an_item_within_a_checkpoint(runs):
    said, notes = refused(runs / "step_100" / "state", *INVALID)
    assert "within a checkpoint" in said
    assert "checkpointable_name='state'" in notes


def test_a_file_within_a_checkpoint(runs):
    (file,) = (runs / "step_100" / "state").iterdir()
    assert "it is a file" in refused(file, *NOT_FOUND)[0]
    assert "it is a file" in refused(runs / "step_100" / "commit_success.txt", *NOT_FOUND)[0]


def test_a_file_and_what_would_be_within_it(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert "it is a file" in refused(tmp_path / "notes.txt", *NOT_FOUND)[0]
    refused(tmp_path / "notes.txt" / "7", *NOT_FOUND)


def test_a_save_that_was_not_finished_is_no_checkpoint_even_when_it_is_whole(runs):
    staging = runs / "step_300.orbax-checkpoint-tmp-20261122T160000Z-0badcafe-1f-0123456789ab"
    shutil.copytree(runs / "step_100", staging)
    said, _ = refused(staging, *INVALID)
    assert "not finished" in said


ORBAX = {"_METADATA": "{}", "manifest.ocdbt": "", "d/0": "", "_CHECKPOINT_METADATA": "{}"}


def folder(path, files):
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def without_layouts(path):
    """Open what is at a path as if no package that reads layouts of others were installed."""
    return open_checkpoint(path, Plugins(disabled=["orbax", "huggingface"]))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"zarr.json": "{}"}, "Zarr"),
        ({".zgroup": "{}", "a/.zarray": "{}"}, "Zarr"),
        ({"thesis.tex": "", "notes": ""}, "'thesis.tex'"),
        ({"checkpoint": 'model_checkpoint_path: "model.ckpt-7"'}, "'checkpoint'"),
        ({f"file{number}": "" for number in range(20)}, "..."),
    ],
    ids=["zarr 3", "zarr 2", "something else", "another program's", "many files"],
)
def test_a_folder_of_something_else_is_called_what_it_is(tmp_path, files, words):
    said, notes = refused(folder(tmp_path / "7", files), *INVALID)
    assert words in said
    assert "no commit_success.txt" in said
    assert "pip install" not in notes


@pytest.mark.parametrize(
    ("files", "words", "package"),
    [
        (ORBAX, "checkpoint of Orbax", "milepost-tensorstore"),
        ({"model.safetensors": ""}, "safetensors", "milepost-safetensors"),
    ],
    ids=["orbax", "safetensors"],
)
def test_a_layout_that_is_not_installed_is_told_by_its_package(tmp_path, files, words, package):
    said, notes = refused(folder(tmp_path / "7", files), *INVALID, load=without_layouts)
    assert words in said
    assert "no commit_success.txt" in said
    assert f"pip install {package}" in notes


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (ORBAX, "'tree_metadata' is None"),
        (ORBAX | {"commit_success.txt": "of another program"}, "'tree_metadata' is None"),
        ({"model.safetensors": ""}, "its header would have 0 bytes"),
    ],
    ids=["orbax", "orbax on gs", "safetensors"],
)
def test_what_an_installed_layout_knows_as_its_own_and_cannot_read_is_damaged(tmp_path, files, words):
    said, notes = refused(folder(tmp_path / "7", files), errors.DamagedError)
    assert words in said
    assert "pip install" not in notes


def test_a_checkpoint_of_another_program_is_called_so(tmp_path):
    sentence = "Checkpoint commit was successful to gs://bucket/7"
    files = ORBAX | {"commit_success.txt": sentence}
    said, notes = refused(folder(tmp_path / "7", files), *INVALID, load=without_layouts)
    assert sentence[:40] in said
    assert "pip install milepost-tensorstore" in notes
    said, notes = refused(folder(tmp_path / "8", {"a": "", "commit_success.txt": sentence}), *INVALID)
    assert sentence[:40] in said
    assert "pip install" not in notes


def test_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "latest").symlink_to(tmp_path / "gone")
    assert "leads nowhere" in refused(tmp_path / "latest", *NOT_FOUND)[0]


def test_a_link_to_a_checkpoint_is_that_checkpoint(runs):
    (runs / "latest").symlink_to(runs / "step_200")
    assert milepost.load(runs / "latest")["b"] == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_a_folder_that_may_not_be_read_is_no_missing_checkpoint(runs):
    (runs / "step_100").chmod(0o700)
    for folder in (runs, *runs.parents):
        if folder.stat().st_uid == os.geteuid() and str(folder).startswith("/tmp/"):  # noqa: S108 - where pytest puts its own
            folder.chmod(0o755)
    code = (
        "import os, sys, milepost\n"
        "from milepost import errors, v1\n"
        "from milepost.engine import reading\n"
        "from milepost.plugins import installed\n"
        "installed().load_all(); installed().storage('file')('file:///'); installed().commit('rename')\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: reading.open_checkpoint(sys.argv[1])\n"
        "except PermissionError as error: assert isinstance(error, errors.StorageDeniedError); print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs / "step_100")], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "step_100" in done.stdout


# --- schemes ---------------------------------------------------------------------------------------------------------


def test_an_unknown_scheme_is_named():
    said, notes = refused("gopher://hole/7", errors.PluginNotFoundError, LookupError)
    assert "'gopher'" in said
    assert "entry point" in notes


def test_a_scheme_whose_package_is_missing_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    _, notes = refused("abfs://bucket/7", errors.PluginNotFoundError)
    assert "pip install adlfs" in notes


@pytest.mark.parametrize("path", ["/", "file:///", "memory://", "memory://bucket"])
def test_a_root_cannot_be_a_checkpoint(path):
    refused(path, errors.RequestError)


def test_an_empty_path_is_refused():
    refused("", errors.RequestError)


# --- spellings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["7", "with space", "é", "a#b", "100%20", "a?b", "a*b", "[x]", "a:b", "-", "~"])
@pytest.mark.parametrize(
    "spell",
    [
        str,
        lambda path: f"{path}/",
        lambda path: f"{path}//",
        lambda path: f"file://{path}",
        lambda path: f"{path.parent}/./x/../{path.name}",
        lambda path: path,
        pathlib.PurePosixPath,
        UPath,
        lambda path: path.relative_to(pathlib.Path.cwd()),
        lambda path: f"./{path.relative_to(pathlib.Path.cwd())}",
    ],
    ids=["str", "slash", "slashes", "url", "dots", "Path", "PurePath", "UPath", "relative", "relative str"],
)
def test_every_spelling_of_a_path_leads_to_the_same_checkpoint(tmp_path, monkeypatch, name, spell):
    monkeypatch.chdir(tmp_path)
    milepost.save(spell(tmp_path / "runs" / name), STATE)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [name]
    assert milepost.load(tmp_path / "runs" / name)["b"] == 7
    assert milepost.load(spell(tmp_path / "runs" / name))["b"] == 7
    found = milepost.v1.metadata(spell(tmp_path / "runs" / name)).path
    assert isinstance(found, UPath)
    assert (found / "commit_success.txt").exists()
    assert milepost.load(found)["b"] == 7


def test_a_url_of_memory_is_found_by_str_and_upath():
    url = f"memory://finding/{uuid.uuid4()}/7"
    milepost.save(url, STATE)
    assert milepost.load(url + "/")["b"] == 7
    found = milepost.v1.metadata(url).path
    assert isinstance(found, UPath)
    assert str(found) == url
    assert milepost.load(found)["b"] == 7
    assert "nothing is there" in refused(url + "0", *NOT_FOUND)[0]


def test_an_item_that_is_not_there_lists_those_that_are(runs):
    with pytest.raises(KeyError) as caught:
        milepost.load(runs / "step_100", checkpointable_name="optimizer")
    assert isinstance(caught.value, errors.ItemNotFoundError)
    assert "'optimizer'" in str(caught.value)
    assert "'state'" in str(caught.value)
