"""How far a save or a load has come, as told to whoever asked to be told.

The rule: telling is not the work. What the listener raises is logged once and ends the telling, nothing else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TypeAlias

__all__ = ["Progress", "Progressing", "log_seconds"]

Progress: TypeAlias = Callable[[int, int], object]
"""Called with the bytes that are done and the bytes there are; from any thread, never from two at once."""

_logger = logging.getLogger("milepost")


class Progressing:
    """The bytes of one save or load, counted."""

    def __init__(self, listener: Progress, total: int) -> None:
        self._listener: Progress | None = listener
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        """Count bytes, and tell the listener."""
        with self._lock:
            self._done += size
            if self._listener is None:
                return
            try:
                self._listener(self._done, max(self._done, self._total))
            except Exception:
                self._listener = None
                _logger.warning("the progress listener failed and is not called again", exc_info=True)


def log_seconds(what: str, url: str, size: int, seconds: Mapping[str, float]) -> None:
    """Log how long the phases of a save or a load took."""
    phases = ", ".join(f"{phase} {took:.3f} s" for phase, took in seconds.items())
    _logger.info("%s %s: %d bytes; %s", what, url, size, phases)
