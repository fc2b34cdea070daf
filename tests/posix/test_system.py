from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from milepost_posix import PosixStorage, _system
from milepost_posix._system import file_system

MOUNTS = [
    "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw",
    "30 22 0:26 / /mnt/bucket rw - fuse.gcsfuse bucket rw",
    r"31 22 0:27 / /mnt/two\040words rw master:7 - fuse x rw",
    "32 22 0:28 / /mnt/windows rw - fuseblk /dev/sdb rw",
    "33 30 0:29 / /mnt/bucket/local rw - xfs /dev/sdc rw",
    "34 22 0:30 / /mnt/over rw - fuse.first x rw",
    "35 34 0:31 / /mnt/over rw - tmpfs x rw",
]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", "ext4"),
        ("/mnt", "ext4"),
        ("/mnt/bucket", "fuse.gcsfuse"),
        ("/mnt/bucket/a/b", "fuse.gcsfuse"),
        ("/mnt/bucket2/a", "ext4"),
        ("/mnt/bucket/local/a", "xfs"),
        ("/mnt/two words/a", "fuse"),
        ("/mnt/over/a", "tmpfs"),
    ],
)
def test_the_longest_mount_point_by_whole_segments_decides(path, expected):
    assert file_system(Path(path), MOUNTS) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [("bucket/runs", "create"), ("two words", "create"), ("windows/runs", "rename"), ("bucket/local", "rename")],
)
def test_fuse_commits_without_a_rename(monkeypatch, path, expected):
    monkeypatch.setattr(_system, "_mounts", lambda: MOUNTS)
    assert PosixStorage(f"file:///mnt/{path}").commit == expected


def test_the_mounts_of_this_system_are_understood(tmp_path):
    where = subprocess.run(["stat", "-f", "-c", "%T", "/proc"], check=True, capture_output=True, text=True)
    assert where.stdout.strip() == file_system(Path("/proc/self"))
    assert file_system(tmp_path)


def test_a_system_without_mountinfo_is_no_fuse(tmp_path):
    assert file_system(tmp_path, []) == ""
