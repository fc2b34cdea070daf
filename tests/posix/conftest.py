from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from milepost_posix import _system

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def old_kernel(monkeypatch):
    """Be a system without renameat2, such as NFS or FUSE: the flags of rename are not known there."""
    monkeypatch.setattr(_system, "_renameat2", lambda: None)


@pytest.fixture
def tmpfs(tmp_path):
    """Mount a file system of 512 KiB; the function returned mounts it again with other options."""
    point = tmp_path / "mounted"
    point.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        return point

    yield mount
    if point.is_mount():
        subprocess.run(["umount", str(point)], check=True)


@pytest.fixture
def nobody():
    """Be somebody to whom permissions apply."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def tree():
    """Return a function that lists what is below a directory: files with their bytes, directories without."""

    def look(root: Path) -> dict[str, bytes | None]:
        return {str(p.relative_to(root)): None if p.is_dir() else p.read_bytes() for p in sorted(root.rglob("*"))}

    return look
