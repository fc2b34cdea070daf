"""How leftovers are removed: only what is proven to be ours and dead.

The rule: the commit strategy tells what an attempt left behind, whose it was and whether its writer can still be alive;
whatever is dead is fenced off before it is removed, so that a writer taken for dead fails clearly instead of committing
half of a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost import urls
from milepost.attempts import DAY
from milepost.path._uploads import abort, unfinished_uploads
from milepost.plugins import Plugins, installed
from milepost.routes import OpenRoute, open_route, resolve

if TYPE_CHECKING:
    import os

    from milepost.protocols import Leftover

__all__ = ["leftovers", "sweep"]


def leftovers(
    path: str | os.PathLike[str], *, older_than: float = DAY, plugins: Plugins | None = None
) -> list[Leftover]:
    """Return what unfinished saves and deletions left directly below a root; changes nothing.

    `older_than` is the age in seconds from which a writer on another machine counts as dead. An upload that was never
    finished has the key of its object as prefix.
    """
    route = _opened(path, plugins)
    found = list(route.commit.leftovers(route.storage, older_than=older_than))
    found += [leftover for leftover, _ in unfinished_uploads(route.storage, older_than)]
    return sorted(found, key=lambda each: each.prefix)


def sweep(path: str | os.PathLike[str], *, older_than: float = DAY, plugins: Plugins | None = None) -> list[Leftover]:
    """Remove the leftovers below a root whose writers are dead; return those that were removed."""
    route = _opened(path, plugins)
    found = list(route.commit.leftovers(route.storage, older_than=older_than))
    removed = [each for each in found if each.dead and route.commit.clear(route.storage, each)]
    for leftover, unfinished in unfinished_uploads(route.storage, older_than):
        if leftover.dead:
            abort(route.storage, unfinished)
            removed.append(leftover)
    return removed


def _opened(path: str | os.PathLike[str], plugins: Plugins | None) -> OpenRoute:
    plugins = plugins or installed()
    return open_route(resolve(urls.join(urls.locate(path), "_"), plugins), plugins)
