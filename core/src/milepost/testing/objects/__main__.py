"""Serve objects until the process is ended: `python -m milepost.testing.objects --bucket NAME`; prints its URL."""

from __future__ import annotations

import argparse
import contextlib
import threading

from milepost.testing.objects.server import ObjectServer

__all__ = ["main"]


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(prog="python -m milepost.testing.objects", description=__doc__)
    parser.add_argument("--bucket", action="append", help="a bucket to have; may be given several times")
    parser.add_argument("--port", type=int, default=0, help="the port to listen on; a free one if not given")
    options = parser.parse_args()
    with (
        ObjectServer(options.bucket or ("bucket",), port=options.port) as server,
        contextlib.suppress(KeyboardInterrupt),
    ):
        print(server.url, flush=True)  # noqa: T201 - what whoever started this waits for
        threading.Event().wait()


if __name__ == "__main__":
    main()
