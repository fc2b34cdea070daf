"""Decide when a request is acted upon, and carry out what rules say goes wrong.

The rule: whoever was killed by this server changes nothing afterwards. Before a process is killed nobody may act any
more, and everybody who does is waited for; connections that were open then, or waited to be accepted, never act again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING

from milepost.testing.objects import gcs, s3, wire
from milepost.testing.objects.rules import Book, Gate, Rule
from milepost.testing.objects.store import Store
from milepost.testing.objects.values import RefusedError
from milepost.testing.objects.wire import Reply, Target

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, Self

    from milepost.testing.objects.rules import Request
    from milepost.testing.objects.wire import Call, Face

__all__ = ["ObjectServer"]

_PATIENCE = 60.0  # seconds until what should be immediate is a failure
_CODES = {
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    503: "SlowDown",
}


class _Connection:
    """A client, as long as it is connected."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.file = io.BufferedReader(sock.makefile("rb", buffering=0), 1 << 16)
        self.ended = False

    def end(self) -> None:
        """Act for it no more, though requests may wait in it, and let both sides see; who serves it closes it."""
        self.ended = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back."""
        self.end()
        self.file.close()
        self.sock.close()


class ObjectServer:
    """A store of objects on loopback, with the REST API of S3 and the JSON API of Google Cloud Storage.

    ```python
    with ObjectServer(buckets=("bucket",)) as server:
        lost = server.rule("drop_after", kind="put", nth=2)
        ...  # clients of `server.url`
        assert server.store.get("bucket", "key") == b"data"
    ```

    What a client is told is true at once for all of them. Every method may be called from any thread.
    """

    def __init__(self, buckets: Iterable[str] = ("bucket",), *, port: int = 0) -> None:
        self.store: Store = Store(buckets)
        self._book = Book()
        self._gate = Gate()
        self._lock = threading.Condition()
        self._connections: set[_Connection] = set()
        self._greeted: dict[int, threading.Event] = {}
        self._stopped = False
        self._listener = socket.create_server(("127.0.0.1", port), backlog=256)
        self.url: str = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, name=f"objects {self.url}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all connections and take no more; again is no error."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        self._book.clear()
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname(), _PATIENCE).close()
        self._thread.join(_PATIENCE)
        self._listener.close()
        self._end_all()
        with self._lock:
            ended = self._lock.wait_for(lambda: not self._connections, _PATIENCE)
        if not ended or self._thread.is_alive():
            raise TimeoutError(f"{self.url} did not stop within {_PATIENCE} seconds: a request is still being served")

    # --- for tests ---------------------------------------------------------------------------------------------------

    @property
    def requests(self) -> list[Request]:
        """What was asked since the last `forget`, in the order in which it came."""
        return self._book.requests

    @property
    def mutations(self) -> int:
        """How many requests came that may change something."""
        return sum(request.mutating for request in self.requests)

    @property
    def weak(self) -> frozenset[str]:
        """What the store does badly: of "if-none-match", "if-match" and "list"."""
        return self.store.weak

    @weak.setter
    def weak(self, weak: Iterable[str]) -> None:
        self.store.weak = frozenset(weak)

    def forget(self) -> None:
        """Count from 1 again."""
        self._book.forget()

    def rule(self, action: str, **words: Any) -> Rule:
        """Add a rule; the words are the fields of `Rule`."""
        rule = Rule(action, **words)
        self._book.add(rule)
        return rule

    def clear_rules(self) -> None:
        """Follow no rule any more; requests that wait for one are dropped."""
        self._book.clear()

    def only(self, kinds: Iterable[str] | None = None) -> None:
        """Permit these kinds of requests and deny all others; None permits everything."""
        self._book.permit(kinds)

    def thaw(self) -> None:
        """Answer again after a kill: clients that connect from now on."""
        if not self._gate.shut:
            return
        # Connections are accepted in order. Once one of our own is, nobody is left who asked while nobody was answered.
        with socket.create_connection(self._listener.getsockname(), _PATIENCE) as sock:
            port = sock.getsockname()[1]
            with self._lock:
                greeted = self._greeted.setdefault(port, threading.Event())
            if not greeted.wait(_PATIENCE):
                raise TimeoutError(f"{self.url} did not accept a connection for {_PATIENCE} seconds")
        with self._lock:
            del self._greeted[port]
        self._end_all()
        self._gate.open()

    # --- connections -------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            sock, (_, port) = self._listener.accept()
            connection = _Connection(sock)
            with self._lock:
                if self._stopped:
                    connection.close()
                    return
                self._connections.add(connection)
                if self._gate.shut:
                    self._greeted.setdefault(port, threading.Event()).set()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: _Connection) -> None:
        try:
            with contextlib.suppress(OSError, ValueError):
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while call := wire.read_call(connection.file, connection.sock):
                    if not self._exchange(connection, call):
                        break
        finally:
            connection.close()
            with self._lock:
                self._connections.discard(connection)
                self._lock.notify_all()

    def _end_all(self) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.end()

    # --- requests ----------------------------------------------------------------------------------------------------

    def _exchange(self, connection: _Connection, call: Call) -> bool:
        """Serve one request; return whether the connection goes on."""
        if call.path == "/_count":
            count = Reply(200, {}, str(len(self.requests)).encode())
            wire.send(connection.sock, wire.head(count, self.store.now()), count.body)
            return True
        if self._gate.shut or connection.ended:
            return False
        face = gcs.FACE if gcs.speaks(call.path) else s3.FACE
        target = face.aim(self.store, call)
        entry, rule = self._book.received(call, target)
        if rule is not None and not rule.action.endswith("_after"):
            rule.reached.set()
        if not self._before(connection, rule):
            return False
        reply = self._act(connection, call, face, target, rule)
        if reply is None or not self._after(connection, rule):
            return False
        start, body = wire.head(reply, self.store.now()), memoryview(reply.body)[: 0 if call.method == "HEAD" else None]
        cut = rule is not None and rule.action == "cut"
        if cut:
            # Where there is no body, half of the headers is what is lost.
            start, body = (start, body[: len(body) // 2]) if body else (start[: len(start) // 2], body)
        entry.ended(reply.status, len(body))
        wire.send(connection.sock, start, body)
        return not cut and call.headers.get("connection", "").lower() != "close"

    def _before(self, connection: _Connection, rule: Rule | None) -> bool:
        action = rule.action if rule else ""
        if rule is None or action not in {"drop_before", "kill_before", "delay", "hold", "stall"}:
            return True
        if action == "kill_before":
            self._kill(rule.pid, connection)
        if action in {"delay", "hold", "stall"}:
            return rule.wait(rule.seconds if action == "delay" else None) and action != "stall"
        return False

    def _after(self, connection: _Connection, rule: Rule | None) -> bool:
        if rule is None or not rule.action.endswith("_after"):
            return True
        rule.reached.set()
        if rule.action == "kill_after":
            self._kill(rule.pid, connection)
        return rule.action == "hold_after" and rule.wait()

    def _act(self, connection: _Connection, call: Call, face: Face, target: Target, rule: Rule | None) -> Reply | None:
        if rule is not None and rule.action == "status":
            return _told(rule, face, target)
        if not self._book.permits(target.kind):
            return face.refuse(RefusedError(403, "AccessDenied", f"{target.kind} is not permitted"), target)
        if not self._gate.enter():
            return None
        try:
            each = dataclasses.replace(call, each=self._each)
            return None if connection.ended else face.answer(self.store, each, target)
        except RefusedError as refused:
            return face.refuse(refused, target)
        except (LookupError, ValueError) as error:
            return face.refuse(RefusedError(400, "InvalidRequest", f"{call.method} {call.path}: {error!r}"), target)
        finally:
            self._gate.leave()

    def _kill(self, pid: int, killer: _Connection) -> None:
        self._gate.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        killer.end()
        self._end_all()

    def _each(self, target: Target) -> None:
        rule = self._book.within(target)
        if rule is not None:
            rule.reached.set()
            raise _refusal(rule)


def _told(rule: Rule, face: Face, target: Target) -> Reply:
    reply = face.refuse(_refusal(rule), target)
    if rule.retry_after is None:
        return reply
    return Reply(reply.status, {**reply.headers, "Retry-After": f"{rule.retry_after:g}"}, reply.body)


def _refusal(rule: Rule) -> RefusedError:
    usual = "InternalError" if rule.status >= 500 else "InvalidRequest"  # noqa: PLR2004 - the server's own faults
    return RefusedError(rule.status, rule.code or _CODES.get(rule.status, usual), "a rule says so")
