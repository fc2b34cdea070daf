"""Why the garbage collector rests while a tree of many leaves is taken apart or put together.

The rule: planning a tree makes some ten small objects a leaf, none of them garbage. For 20,000 leaves the collector
would walk the whole heap several times meanwhile, which was measured to take as long again as the work itself.
"""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["resting_collector"]


@contextlib.contextmanager
def resting_collector() -> Iterator[None]:
    """Switch the cyclic garbage collector off, and on again if it was on."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
