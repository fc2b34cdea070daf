from __future__ import annotations

import dataclasses
import hashlib
import json
import threading

import milepost
import numpy as np
import pytest
import xxhash
from milepost.engine import verifying
from milepost.engine.reading import open_checkpoint
from milepost.engine.verifying import FileReport, LeafName, strangers, verify
from milepost.errors import StorageError
from milepost.plugins import Plugins

TREE = {
    "a": np.arange(64, dtype=np.float32),
    "b": np.full((128,), 7, np.uint8),
    "c": {"deep": np.full((64,), 9, np.uint8)},
    "text": "no array",
}


@pytest.fixture
def folder(tmp_path):
    milepost.save(tmp_path / "runs/7", TREE)
    return tmp_path / "runs/7"


def data_file(folder):
    (found,) = folder.rglob("*.safetensors")
    return found


def reports(folder, threads=2):
    return list(verify(open_checkpoint(folder), threads=threads))


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def without_checksums(folder):
    """Write the manifest anew, as it is where something wrote files that nobody measured."""
    commit = folder / "commit_success.txt"
    manifest = json.loads(commit.read_bytes())
    del manifest["checksum"]
    for file in manifest["files"]:
        file["checksum"] = ""
    body = json.dumps(manifest, separators=(",", ":"))[:-1]
    commit.write_text(f'{body},"checksum":"xxh3_64:{xxhash.xxh3_64_hexdigest(body.encode())}"}}')


def test_an_intact_checkpoint_has_no_problem_and_every_file_is_reported(folder):
    manifest = json.loads((folder / "commit_success.txt").read_text())
    assert [FileReport(file["path"], file["size"]) for file in manifest["files"]] == reports(folder)


def test_a_flipped_byte_names_the_file_and_the_leaf_it_lies_in_and_no_other(folder):
    file = data_file(folder)
    flip(file, file.read_bytes().index(bytes([9] * 64)) + 5)
    (report,) = reports(folder)
    assert report.path == file.relative_to(folder).as_posix()
    assert xxhash.xxh3_64_hexdigest(file.read_bytes()) in report.problem
    assert report.leaves == (LeafName("state", "['c']['deep']"),)
    assert report.readable


def test_damage_outside_all_arrays_is_found_and_concerns_no_leaf(folder):
    flip(data_file(folder), data_file(folder).read_bytes().index(b"{") + 1)
    (report,) = reports(folder)
    assert "not those that were saved" in report.problem
    assert report.leaves == ()


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda _: b""])
def test_a_file_of_another_size_is_found(folder, change):
    file = data_file(folder)
    size = file.stat().st_size
    file.write_bytes(change(file.read_bytes()))
    (report,) = reports(folder)
    assert report.problem == f"it has {file.stat().st_size} bytes where {size} were saved"


def test_a_deleted_file_names_all_its_leaves(folder):
    data_file(folder).unlink()
    (report,) = reports(folder)
    assert report.problem == "it is missing"
    assert [leaf.path for leaf in report.leaves] == ["['a']", "['b']", "['c']['deep']"]


def test_damage_is_found_by_checksum_alone_and_by_every_number_of_threads(folder):
    flip(data_file(folder), -1)
    assert [one.problem is None for threads in (1, 2, 8) for one in reports(folder, threads)] == [False] * 3


def test_a_file_without_a_checksum_is_checked_by_its_arrays(folder):
    without_checksums(folder)
    assert [report.problem for report in reports(folder)] == [None]
    file = data_file(folder)
    flip(file, file.read_bytes().index(bytes([7] * 128)))
    (report,) = reports(folder)
    assert report.problem.startswith("arrays in it are damaged: ")
    assert report.leaves == (LeafName("state", "['b']"),)


def test_a_large_array_is_looked_through_in_parts(folder, monkeypatch):
    file = data_file(folder)
    flip(file, file.read_bytes().index(np.float32(40).tobytes()))
    monkeypatch.setattr(verifying, "_HELD", 16)
    (report,) = reports(folder)
    assert report.leaves == (LeafName("state", "['a']"),)


class Refusing:
    """A storage that fails to read files, as a disk with a bad sector does."""

    def __init__(self, storage):
        self._storage = storage

    def __getattr__(self, name):
        return getattr(self._storage, name)

    def read(self, key, start=0, stop=None):
        raise StorageError(f"cannot read {key!r}: input/output error")


def test_a_file_that_cannot_be_read_is_not_called_damaged(folder):
    checkpoint = open_checkpoint(folder)
    checkpoint = dataclasses.replace(checkpoint, storage=Refusing(checkpoint.storage))
    (report,) = verify(checkpoint, threads=1)
    assert not report.readable
    assert "input/output error" in report.problem
    assert report.leaves == ()


def test_a_missing_array_writer_does_not_hide_the_damage(folder):
    flip(data_file(folder), -1)
    (report,) = verify(open_checkpoint(folder), threads=1, plugins=Plugins(["safetensors"]))
    assert "not those that were saved" in report.problem
    assert "switched off" in report.problem
    assert report.readable


def test_progress_counts_every_byte(folder):
    lock, counted = threading.Lock(), []

    def progress(size):
        with lock:
            counted.append(size)

    list(verify(open_checkpoint(folder), threads=2, progress=progress))
    assert sum(counted) == data_file(folder).stat().st_size


def test_verifying_changes_nothing(folder):
    def digests():
        files = sorted(path for path in folder.parent.rglob("*") if path.is_file())
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    flip(data_file(folder), -1)
    before = digests()
    reports(folder)
    assert before == digests()


def test_what_the_manifest_does_not_list_is_named(folder):
    assert strangers(open_checkpoint(folder)) == []
    (folder / "notes.txt").write_text("mine")
    (folder / "plots").mkdir()
    (folder / "plots/loss.png").write_bytes(b"")
    (data_file(folder).parent / "old.bin").write_bytes(b"")
    assert strangers(open_checkpoint(folder)) == ["notes.txt", "plots/", "state/old.bin"]


def test_what_a_commit_strategy_keeps_beside_the_data_is_no_stranger():
    url = "memory://test-verifying/runs/7"
    milepost.save(url, TREE)
    milepost.save(url, TREE, overwrite=True)
    checkpoint = open_checkpoint(url)
    assert strangers(checkpoint) == []
    assert [report.problem for report in verify(checkpoint, threads=2)] == [None]
    checkpoint.storage.write("7/20010101T000000Z-0badcafe-1f-0123456789ab/state/x", [b"another attempt's"])
    checkpoint.storage.write("7/mine", [b"?"])
    assert strangers(checkpoint) == ["mine"]
