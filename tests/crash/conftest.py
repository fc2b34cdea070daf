"""The compiled library, the server of child processes and the disks, once for the session.

The rule: a machine that cannot run a test says why; where `CI` is set, a missing compiler is a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from crash import checks, counter, machine

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["disk", "folder", "library", "server"]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library that counts changes, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        reason = "no C compiler is on the path: the library that ends a process at its n-th change cannot be built"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return counter.build(compiler, tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="session")
def server(library: Path) -> Iterator[machine.Server]:
    """Return a server of child processes that the library is preloaded into."""
    with machine.started(library) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> machine.Folder:
    """Return a place for runs on the disk of this machine."""
    return machine.Folder(tmp_path)


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, library: Path) -> Iterator[machine.Disk]:
    """Return a disk that can lose its power."""
    if os.geteuid():
        pytest.skip("only root can mount a file system and let it lose its power")
    # In memory where possible: what is lost is what the file system under test did not write, not what the host did.
    with tempfile.TemporaryDirectory(dir=checks.memory()) as folder:
        yield _disk(request.param, Path(folder))


def _disk(kind: str, folder: Path) -> machine.Disk:
    try:
        disk = machine.Disk.make(kind, folder)
        with disk.room(0):
            pass
    except FileNotFoundError as error:
        pytest.skip(f"no {kind} can be made on this machine: {error}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no {kind} in a file can be mounted on this machine: {error.stderr.strip()}")
    return disk
