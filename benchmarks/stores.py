"""Measure saving to and loading from object stores, beside the same bytes as one object by the same client.

The rule: the store is the server for tests, in a process of its own on loopback; compared are calls of one client in
one run, so that ratios mean something where seconds do not. Requests are counted by the server.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import workloads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["STORES", "main", "most_requests", "serve"]

BUCKET = "bucket"
PART = 16 << 20
STORES = ("s3", "gs")


def main() -> None:
    """Measure what the JSON on the command line says, and write JSON to the file named there."""
    job = json.loads(sys.argv[1])
    workload = workloads.WORKLOADS[job["workload"]]
    state = workloads.ready(workload.make())
    with _served() as server:
        os.environ |= _environment(server.url)
        results: dict[str, Any] = {store: _measured(store, server, state, job["repeat"]) for store in STORES}
    results["bytes"] = workloads.byte_count(state)
    Path(job["out"]).write_text(json.dumps(results), encoding="utf-8")


def most_requests(size: int) -> int:
    """Return how many requests a save of so many bytes may need: one for each part, and eight.

    >>> most_requests(256 << 20), most_requests(1)
    (24, 9)
    """
    return math.ceil(size / PART) + 8


def _measured(store: str, server: _Server, state: Any, repeat: int) -> dict[str, Any]:
    import milepost

    whole = b"".join(bytes(view) for view in workloads.host_views(state))
    client = _client(store, server.url)
    target = workloads.abstract(state)
    names = [f"{store}://{BUCKET}/{store}/{turn}" for turn in range(repeat + 1)]
    acts: dict[str, Callable[[str], Any]] = {
        "plain save": lambda _: client.pipe_file(f"{BUCKET}/plain", whole, chunksize=PART),
        "milepost save": lambda name: milepost.save(name, state),
        "plain load": lambda _: client.cat_file(f"{BUCKET}/plain"),
        "milepost load": lambda name: workloads.ready(milepost.load(name, target)),
    }
    seconds: dict[str, list[float]] = {key: [] for key in acts}
    requests: dict[str, int] = {}
    for name in names:
        for key, act in acts.items():
            before = server.count()
            began = time.perf_counter()
            act(name)
            if name is names[0]:  # not timed: it opens connections, and imports
                requests[key] = server.count() - before
            else:
                seconds[key].append(time.perf_counter() - began)
        milepost.v1.delete(name)
    return {"seconds": seconds, "requests": requests}


def _client(store: str, url: str) -> Any:
    if store == "s3":
        import s3fs

        return s3fs.S3FileSystem(endpoint_url=url, use_listings_cache=False, skip_instance_cache=True)
    from gcsfs.core import GCSFileSystem

    return GCSFileSystem(endpoint_url=url, token="anon", use_listings_cache=False, skip_instance_cache=True)  # noqa: S106


def _environment(url: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "STORAGE_EMULATOR_HOST": url,
    }


class _Server:
    """The server, in a process of its own: a second interpreter, as a store would be a second machine."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.url = self._line()

    def count(self) -> int:
        """Return how many requests there were so far."""
        assert self._process.stdin
        self._process.stdin.write("count\n")
        self._process.stdin.flush()
        return int(self._line())

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


@contextlib.contextmanager
def _served() -> Iterator[_Server]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", "import stores; stores.serve()"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=Path(__file__).parent) as process:
        yield _Server(process)


def serve() -> None:
    """Serve until stdin ends; say where, and for each line how many requests there were."""
    from milepost.testing.objects import ObjectServer

    with ObjectServer((BUCKET,)) as server:
        print(server.url, flush=True)
        for _ in sys.stdin:
            print(len(server.requests), flush=True)


if __name__ == "__main__":
    main()
