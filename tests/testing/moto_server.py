"""The second opinion: moto's S3, which knows nothing of ours, made to take one request after the other.

moto looks and then acts, and two requests can do so at once; a lock around its application is what makes it atomic. A
body is read before the lock is taken, so that a slow client holds up nobody.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import threading
import urllib.parse
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["moto", "serving"]


class _OneByOne:
    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        size = int(environ.get("CONTENT_LENGTH") or 0)
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(size))
        with self._lock:
            return list(self._application(environ, start_response))


@contextlib.contextmanager
def serving(*buckets: str) -> Iterator[str]:
    """Serve moto's S3 with these buckets; give its URL."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            pass

    application = _OneByOne(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        for bucket in buckets:
            made = http.client.HTTPConnection("127.0.0.1", server.server_port)
            made.request("PUT", f"/{urllib.parse.quote(bucket)}")
            assert made.getresponse().status == 200
            made.close()
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """Return the URL of moto's S3, with the bucket "bucket"."""
    with serving("bucket") as url:
        yield url
