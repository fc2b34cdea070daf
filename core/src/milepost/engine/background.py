"""How work goes on behind the caller's back, and how its failure cannot be missed.

The rules. One piece of work at a time: what comes next waits, so that memory stays bounded and checkpoints are
committed in order. A failure is raised by whoever asks for the result; if nobody does, by the next call, and at the
latest when the `with` block or the process ends: then the exit status is not 0. An exception that is already on its way
is never replaced; it gets a note.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
import threading
import traceback
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["Background", "Pending", "of_this_process"]

T = TypeVar("T")

_logger = logging.getLogger("milepost")

_FAILED_AT_EXIT = 1


class Pending(Generic[T]):
    """What will be the result of work in the background.

    As a context manager it waits on leaving, and raises the failure unless another exception is on its way.
    """

    def __init__(self, future: Future[T], what: str) -> None:
        self.future = future
        self.what = what
        self._seen = False

    def result(self, timeout: float | None = None) -> T:
        """Wait, then return the result or raise the failure; `TimeoutError` after so many seconds."""
        try:
            value = self.future.result(timeout)
        except TimeoutError:
            # The work itself may have failed with a timeout; only then has the failure been seen.
            self._seen = self.future.done()
            raise
        except BaseException:
            self._seen = True
            raise
        self._seen = True
        return value

    def done(self) -> bool:
        """Say whether the work has ended, well or not."""
        return self.future.done()

    def on_complete(self, callback: Callable[[Pending[T]], object]) -> None:
        """Have a function called with this object when the work has ended; at once if it has."""
        self.future.add_done_callback(lambda _: callback(self))

    def unseen_failure(self) -> BaseException | None:
        """Return the failure of work that has ended, the first time that anybody asks for it."""
        if self._seen or not self.future.done():
            return None
        self._seen = True
        return self.future.exception()

    def __enter__(self) -> Pending[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _settle(self, error)


def _settle(pending: Pending[Any], error: BaseException | None) -> None:
    """Wait for the work; raise its failure, or note it on the exception that is on its way already."""
    if error is None:
        pending.result()
        return
    with contextlib.suppress(BaseException):
        pending.result()
    failure = pending.future.exception()
    if failure is not None:
        error.add_note(f"and {pending.what} failed: {failure}")
        _logger.error("%s failed, while another error was on its way", pending.what, exc_info=failure)


class Background:
    """A queue of one: work in the background, in order.

    With `at_exit`, a failure that nobody has seen by then ends the process with an exit status that is not 0.
    """

    def __init__(self, *, at_exit: bool = False) -> None:
        self._lock = threading.Lock()
        self._last: Pending[Any] | None = None
        self._exit = functools.partial(_at_exit, self)
        if at_exit:
            atexit.register(self._exit)

    def start(self, work: Callable[[], T], what: str) -> Pending[T]:
        """Wait for the work before, raise its failure if nobody has seen it, then start this."""
        with self._lock:
            self._wait()
            future: Future[T] = Future()
            pending = Pending(future, what)
            # Not a daemon: the interpreter waits for it, so that a script may end right after its last save.
            # It begins when the caller has gone on: a new thread would keep the interpreter's lock for milliseconds.
            gate = threading.Lock()
            with gate:
                threading.Thread(target=_run, args=(gate, future, work), name="milepost", daemon=False).start()
            self._last = pending
            return pending

    def _wait(self) -> None:
        if self._last is not None:
            with contextlib.suppress(BaseException):
                self._last.future.result()
            self.check()

    def check(self) -> None:
        """Raise the failure of work that has ended, if nobody has seen it; never waits."""
        failure = self._last.unseen_failure() if self._last is not None else None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Wait for the work under way, and raise its failure if nobody has seen it."""
        with self._lock:
            self._wait()

    def close(self) -> BaseException | None:
        """Wait for the work under way, and return its failure if nobody has seen it."""
        atexit.unregister(self._exit)
        try:
            self.wait()
        except BaseException as error:  # noqa: BLE001 - it is handed on
            return error
        return None


def _run(gate: threading.Lock, future: Future[T], work: Callable[[], T]) -> None:
    gate.acquire()
    try:
        value = work()
    except BaseException as error:  # noqa: BLE001 - it is raised to whoever asks
        future.set_exception(error)
    else:
        future.set_result(value)


@functools.cache
def of_this_process() -> Background:
    """Return the queue of the functions that are called without an object of their own."""
    return Background(at_exit=True)


def _at_exit(background: Background) -> None:
    failure = background.close()
    if failure is None:
        return
    print("milepost: a save failed and nobody asked for its result:", file=sys.stderr)  # noqa: T201 - the last word
    traceback.print_exception(failure)
    if getattr(sys, "last_value", None) is not None:
        return  # the process is ending with an error of its own already
    # An exception in an exit handler does not change the exit status, and a scheduler sees nothing else.
    atexit._run_exitfuncs()  # noqa: SLF001 - there is no public way to run the others first
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_FAILED_AT_EXIT)
