"""How the coroutines of a handler are run by callers that are none.

Decides where they run: never on the caller's thread, on which an event loop may be running already, and all of one
object's on one loop, so that a task which the first phase of a save begins can end in the second. The active context
of the caller holds for them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["TwoPhases", "awaited"]


def awaited(act: Callable[[], Awaitable[Any]]) -> Any:
    """Run what gives an awaitable, and wait for it, and for the awaitable that this may give in turn."""

    async def both() -> Any:
        value = await act()
        return await value if inspect.isawaitable(value) else value

    return _elsewhere(lambda: asyncio.run(both()))


class TwoPhases:
    """A save in two phases: `act` is awaited at once, what it gives when this is called."""

    def __init__(self, act: Callable[[], Awaitable[Any]]) -> None:
        self._runner: asyncio.Runner | None = asyncio.Runner()
        self._rest: Any = None
        try:
            self._rest = self._run(act)
        except BaseException:
            self._close()
            raise

    def __call__(self) -> None:
        """Wait for the second phase."""
        rest, self._rest = self._rest, None
        try:
            if inspect.isawaitable(rest):
                self._run(lambda: rest)
        finally:
            self._close()

    def _run(self, act: Callable[[], Awaitable[Any]]) -> Any:
        async def act_now() -> Any:
            return await act()

        runner = self._runner
        assert runner is not None  # noqa: S101 - it ends with the second phase
        return _elsewhere(lambda: runner.run(act_now()))

    def _close(self) -> None:
        runner, self._runner = self._runner, None
        if inspect.iscoroutine(self._rest):
            self._rest.close()  # nobody will wait for it
        self._rest = None
        if runner is not None:
            _elsewhere(runner.close)

    def __del__(self) -> None:
        # A save that failed elsewhere never comes to its second phase.
        self._close()


def _elsewhere(act: Callable[[], Any]) -> Any:
    with concurrent.futures.ThreadPoolExecutor(1, "milepost-async") as pool:
        return pool.submit(contextvars.copy_context().run, act).result()
