"""How leftovers are removed: only what is proven to be ours and dead.

The rule: the commit strategy tells what an attempt left behind, whose it was and whether its writer can still be alive;
whatever is dead is fenced off before it is removed, so that a writer taken for dead fails clearly instead of committing
half of a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost import urls
from milepost.attempts import DAY
from milepost.plugins import Plugins, installed
from milepost.routes import open_route, resolve

if TYPE_CHECKING:
    import os

    from milepost.protocols import Leftover

__all__ = ["leftovers", "sweep"]


def leftovers(
    path: str | os.PathLike[str], *, older_than: float = DAY, plugins: Plugins | None = None
) -> list[Leftover]:
    """Return what unfinished saves and deletions left directly below a root; changes nothing.

    `older_than` is the age in seconds from which a writer on another machine counts as dead.
    """
    plugins = plugins or installed()
    route = open_route(resolve(urls.join(urls.locate(path), "_"), plugins), plugins)
    return sorted(route.commit.leftovers(route.storage, older_than=older_than), key=lambda found: found.prefix)


def sweep(path: str | os.PathLike[str], *, older_than: float = DAY, plugins: Plugins | None = None) -> list[Leftover]:
    """Remove the leftovers below a root whose writers are dead; return those that were removed."""
    plugins = plugins or installed()
    route = open_route(resolve(urls.join(urls.locate(path), "_"), plugins), plugins)
    found = list(route.commit.leftovers(route.storage, older_than=older_than))
    return [leftover for leftover in found if leftover.dead and route.commit.clear(route.storage, leftover)]
