"""The preloaded library sees what it must: each kind of change, of every thread, below its folder and nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from crash import audit

pytestmark = pytest.mark.gcc

CHANGES = """
import os, pathlib, shutil, sys, tempfile, threading
from crash import counter

folder = pathlib.Path(sys.argv[1])
counter.arm(counter.Plan(end_at=int(sys.argv[2]), log=sys.argv[3]), str(folder), str(folder))
os.mkdir(folder / "a")
file = os.open(folder / "a" / "f", os.O_CREAT | os.O_RDWR)
os.write(file, b"1")
os.pwrite(file, b"2", 0)
os.writev(file, [b"3", b"4"])
os.pwritev(file, [b"5"], 1)
os.posix_fallocate(file, 0, 100)
os.ftruncate(file, 3)
os.fchmod(file, 0o600)
os.fsync(file)
os.fdatasync(file)
os.link(folder / "a" / "f", folder / "a" / "g")
os.symlink("f", folder / "a" / "s")
os.rename(folder / "a" / "g", folder / "a" / "h")
at = os.open(folder / "a", os.O_RDONLY)
os.unlink("h", dir_fd=at)
os.chdir(folder)
os.chmod("a/f", 0o600)
for number in range(3):
    thread = threading.Thread(target=os.mkdir, args=(f"t{number}",))
    thread.start()
    thread.join()
os.rmdir("t0")
# None of these changes anything below the folder.
os.read(file, 1), os.listdir(folder), open(folder / "a" / "f").close()
with tempfile.TemporaryFile() as elsewhere:
    elsewhere.write(b"5")
print(counter.disarm())
"""

SEEN = [
    "mkdir", "open", "write", "pwrite", "writev", "pwritev", "posix_fallocate", "ftruncate", "fchmod", "fsync",
    "fdatasync", "link", "symlink", "rename", "unlinkat", "chmod", "mkdir", "mkdir", "mkdir", "rmdir",
]  # fmt: skip

SPELLED = {"pwritev64v2": "pwritev", "linkat": "link", "fchmodat": "chmod", "unlink": "unlink", "openat64": "open"}
"""What C libraries and versions of Python make of the same call."""


def change(library: Path, folder: Path, end_at: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(Path(__file__).parent.parent)}
    (folder / "root").mkdir(parents=True)
    command = [sys.executable, "-c", CHANGES, str(folder / "root"), str(end_at), str(folder / "log")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_kind_of_change_is_counted_once_and_nothing_else(library, tmp_path):
    done = change(library, tmp_path, 0)
    log = [*audit.changes((tmp_path / "log").read_text())]
    assert [SPELLED.get(change.call, change.call.removesuffix("64")) for change in log] == SEEN
    assert (0, f"{len(SEEN)}\n") == (done.returncode, done.stdout)


@pytest.mark.parametrize(("end_at", "there"), [(17, set()), (18, {"t0"}), (20, {"t0", "t1", "t2"})])
def test_a_process_ended_at_a_change_has_made_exactly_those_before(library, tmp_path, end_at, there):
    assert change(library, tmp_path, end_at).returncode == -signal.SIGKILL
    assert {"a"} | there == {path.name for path in (tmp_path / "root").iterdir()}


def test_a_process_that_changes_less_than_its_end_gets_through(library, tmp_path):
    assert change(library, tmp_path, len(SEEN) + 1).returncode == 0
