"""Whether this process has been told that it is about to end.

The rule: a notice is a flag that anybody may look at, as often as they like, on any thread; it costs nothing, waits for
nobody and needs no service. Two things raise it: the signal that schedulers send before they kill (SIGTERM), for as
long as somebody listens for it, and JAX's own preemption service where it runs. Nobody's signal handler is replaced
behind their back: a process that never asks is ended by SIGTERM as ever.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from typing import TYPE_CHECKING, Any

from milepost.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Notice", "listening", "preempted", "reached_sync_point"]


class Notice:
    """A flag that is raised when this process is about to be ended."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def given(self) -> bool:
        """Say whether the process has been told to end."""
        return self._event.is_set()

    def give(self) -> None:
        """Raise the flag, as the signal does."""
        self._event.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the flag is raised, at most so many seconds; say whether it is."""
        return self._event.wait(timeout)


@functools.cache
def _listeners() -> list[Notice]:
    return []


@contextlib.contextmanager
def listening(signals: Sequence[int] = (signal.SIGTERM,)) -> Iterator[Notice]:
    """Raise a flag when a signal arrives, instead of ending the process, within a `with` block.

    On leaving, the handlers of before are back; the flag stays as it is, and ending the process is up to the caller. A
    second signal of the kind meets the handler of before, so that a process that does not look can still be ended.

        with milepost.preemption.listening() as notice:
            for step in range(steps):
                ...
                if notice.given():
                    manager.save(step, state, force=True)
                    break

    Raises `RequestError` on another thread than the main one: the system calls signal handlers there only.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RequestError("cannot listen for signals on this thread: Python hands them to the main thread only")
    notice = Notice()
    former: dict[int, Any] = {}

    def arrived(number: int, _frame: object) -> None:
        signal.signal(number, former[number])
        notice.give()

    for number in signals:
        handler = signal.getsignal(number)
        # None: something that is not Python handles it, such as JAX's own service, which could not be put back.
        if handler is not None:
            former[number] = handler
    _listeners().append(notice)
    try:
        for number in former:
            signal.signal(number, arrived)
        yield notice
    finally:
        _listeners().remove(notice)
        for number, handler in former.items():
            signal.signal(number, handler)


def preempted() -> bool:
    """Say whether a signal has arrived that somebody listens for: cheap, and from any thread."""
    return any(notice.given() for notice in _listeners())


def reached_sync_point(step: int) -> bool:
    """Say whether all hosts should save at this step, because one of them is about to end.

    With JAX's preemption service all hosts answer alike at the same step; without it this process answers for itself.
    """
    # JAX's service has to be asked by every host at every step.
    agreed = _jax_says(step)
    return agreed or preempted()


def _jax_says(step: int) -> bool:
    import sys

    if "jax" not in sys.modules:
        return False
    from jax.experimental import multihost_utils

    try:
        return bool(multihost_utils.reached_preemption_sync_point(step))
    except RuntimeError:
        return False  # the service does not run
