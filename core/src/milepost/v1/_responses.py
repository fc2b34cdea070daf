"""What asynchronous calls return.

The rule: one protocol, which the engine's own pending work follows; what was asked for in the background is done under
the options that were active when it was asked for.
"""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["Answered", "AsyncResponse", "in_background"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class AsyncResponse(Protocol[T_co]):
    """What will be the result of an asynchronous call."""

    def result(self, timeout: float | None = None) -> T_co:
        """Wait, then return the result or raise the failure; `TimeoutError` after so many seconds."""
        ...

    def done(self) -> bool:
        """Say whether the work has ended, well or not."""
        ...

    def on_complete(self, callback: Callable[[Any], object]) -> None:
        """Have a function called with this object when the work has ended."""
        ...

    def __enter__(self) -> Any:
        """Return itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Wait; raise the failure unless another exception is on its way, which then gets a note."""
        ...


def in_background(act: Callable[[], T], what: str) -> AsyncResponse[T]:
    """Do something that nobody else waits for."""
    from milepost.engine.background import Background

    context = contextvars.copy_context()
    return Background().start(lambda: context.run(act), what)


class Answered(Generic[T]):
    """What another asynchronous call will have done, with a result of its own."""

    def __init__(self, pending: AsyncResponse[Any], value: T) -> None:
        self._pending = pending
        self._value = value

    def result(self, timeout: float | None = None) -> T:
        """Wait, then return the result or raise the failure; `TimeoutError` after so many seconds."""
        self._pending.result(timeout)
        return self._value

    def done(self) -> bool:
        """Say whether the work has ended, well or not."""
        return self._pending.done()

    def on_complete(self, callback: Callable[[Any], object]) -> None:
        """Have a function called with this object when the work has ended; at once if it has."""
        self._pending.on_complete(lambda _: callback(self))

    def __enter__(self) -> Answered[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pending.__exit__(kind, error, trace)
