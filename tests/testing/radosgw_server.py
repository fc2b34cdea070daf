"""Ceph's S3: a cluster of one monitor, one store in memory and one gateway, of the programs that are installed.

The third opinion, by a server that people run. All ports are free ones of loopback, and everything else is below one
temporary folder, so that a cluster of this machine is neither asked nor disturbed. It keeps what milepost should
cope with: its signatures are checked, and what it gets wrong it gets wrong.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["KEY", "SECRET", "missing", "serving"]

KEY: Final = "id"
SECRET: Final = "secret"  # noqa: S105 - of a server that ends with the test

_PROGRAMS: Final = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_PATIENCE: Final = 120.0
_MOMENT: Final = 0.1

# The gateway by itself insists on encryption to the monitor, which there is none of without keys.
_SETTINGS: Final = """
[global]
fsid = {fsid}
mon initial members = a
mon host = [v2:127.0.0.1:{port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
run dir = {folder}
admin socket =
log file = {folder}/$name.log
log to stderr = false
crash dir = {folder}
mon data = {folder}/mon
mon cluster log file = {folder}/cluster.log
mon allow pool size one = true
mon data avail crit = 0
mon data avail warn = 0
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4G
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
rgw data = {folder}
rgw gc obj min wait = 10
rgw gc processor period = 10
rgw gc processor max time = 10
"""


def missing() -> list[str]:
    """Return the programs that a cluster needs and that are not installed."""
    return [program for program in _PROGRAMS if shutil.which(program) is None]


@contextlib.contextmanager
def serving(*buckets: str) -> Iterator[str]:
    """Serve a new cluster's S3 with these buckets, to whoever signs with `KEY` and `SECRET`; give its URL."""
    with tempfile.TemporaryDirectory(prefix="ceph-") as folder, contextlib.ExitStack() as started:
        cluster = _Cluster(Path(folder), started)
        cluster.start()
        for bucket in buckets:
            cluster.make(bucket)
        yield cluster.url


class _Cluster:
    def __init__(self, folder: Path, started: contextlib.ExitStack) -> None:
        self._folder = folder
        self._started = started
        self._deadline = time.monotonic() + _PATIENCE
        self._fsid = str(uuid.uuid4())
        self._mon, self._http = _free_ports(2)
        self.url = f"http://127.0.0.1:{self._http}"

    def start(self) -> None:
        settings = _SETTINGS.format(fsid=self._fsid, port=self._mon, folder=self._folder) + _plugins()
        (self._folder / "ceph.conf").write_text(settings, encoding="utf-8")
        for name in ("mon", "osd"):
            (self._folder / name).mkdir()
        map_ = f"{self._folder}/monmap"
        address = f"[v2:127.0.0.1:{self._mon}]"
        self._do("monmaptool", "--create", "--clobber", "--fsid", self._fsid, "--addv", "a", address, map_)
        self._do("ceph-mon", "-i", "a", "--mkfs", "--monmap", map_)
        self._serve("ceph-mon", "-i", "a")
        store = str(uuid.uuid4())
        self._do("ceph", "--connect-timeout", "60", "osd", "new", store)
        self._do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", store)
        self._serve("ceph-osd", "-i", "0")
        self._until(lambda: "1 up" in self._do("ceph", "osd", "stat"), "the store in memory is not up")
        user = ("--uid", "milepost", "--display-name", "milepost", "--access-key", KEY, "--secret", SECRET)
        self._do("radosgw-admin", "user", "create", *user)
        self._serve("radosgw", "-n", "client.gateway", "--rgw-frontends", f"beast endpoint=127.0.0.1:{self._http}")
        self._until(lambda: _listens(self._http), "the gateway does not listen")

    def make(self, bucket: str) -> None:
        import boto3

        words = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=self.url, **words)
        try:
            client.create_bucket(Bucket=bucket)
        finally:
            client.close()

    def _command(self, program: str, *words: str) -> list[str]:
        found = shutil.which(program)
        assert found, f"{program} is not installed"
        return [found, "-c", f"{self._folder}/ceph.conf", *words]

    def _do(self, program: str, *words: str) -> str:
        command = self._command(program, *words)
        left = max(1.0, self._deadline - time.monotonic())
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=left)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        return done.stdout

    def _serve(self, program: str, *words: str) -> None:
        """Start a program that ends with the cluster."""
        out = self._started.enter_context((self._folder / f"{program}.out").open("wb"))
        process = subprocess.Popen(self._command(program, "-f", *words), stdout=out, stderr=out)
        self._started.callback(_stop, process)

    def _until(self, holds: Callable[[], bool], otherwise: str) -> None:
        while not holds():
            assert time.monotonic() < self._deadline, f"{otherwise}: {self._said()}"
            time.sleep(_MOMENT)

    def _said(self) -> str:
        return "\n".join(file.read_text(errors="replace")[-2000:] for file in self._folder.glob("*.out"))


def _stop(process: subprocess.Popen[bytes]) -> None:
    # What it holds is in memory and thrown away: nothing is gained by asking it to end in order.
    process.send_signal(signal.SIGKILL)
    process.wait()


def _plugins() -> str:
    """Say where the libraries are that the programs load by name: beside them, wherever they are installed."""
    found = shutil.which("ceph-osd")
    assert found
    for folder in sorted((Path(found).resolve().parent.parent / "lib").glob("*/rados-classes")):
        ceph = folder.parent / "ceph"
        return f"plugin dir = {ceph}\nosd class dir = {folder}\nerasure code dir = {ceph}/erasure-code\n"
    return ""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(each.getsockname()[1]) for each in sockets]


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
