"""Which installed layout knows a folder that holds no manifest of ours.

This module decides what may be a checkpoint of others at all. The rules: where one of ours was begun, or one is being
deleted, there is none, whatever the files look like; a layout that recognises its checkpoints cheaply is asked so, the
others have to read them; and one that does not work hinders nobody else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost.attempts import parse_attempt
from milepost.errors import DamagedError, InvalidLayoutError, PluginError
from milepost.fixed import CLAIM
from milepost.plugins import LAYOUTS
from milepost.protocols import COMMIT_OBJECT, OwnsFolders, RecognisesLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from milepost.plugins import Plugins
    from milepost.protocols import Layout, Storage

__all__ = ["TOMBSTONE", "erase", "is_excluded", "layouts", "owner", "recognised"]

TOMBSTONE = "milepost_deleting.txt"
"""The object that stands in a folder of others from the moment at which its deletion cannot be taken back."""


def is_excluded(names: Sequence[str]) -> bool:
    """Say whether a folder with such children is no checkpoint of others, whatever its files look like.

    >>> is_excluded(["_METADATA", "milepost_deleting.txt"]), is_excluded(["_METADATA"])
    (True, False)
    """
    if CLAIM in names and COMMIT_OBJECT not in names:
        return True
    return TOMBSTONE in names or any(parse_attempt(name.removesuffix("/")) for name in names)


def layouts(
    plugins: Plugins, broken: Callable[[str, PluginError], object] | None = None
) -> Iterator[tuple[str, Layout]]:
    """Yield the installed layouts by name, ours first; `broken` is told of those that do not work."""
    for claim in plugins.claims(LAYOUTS):
        try:
            layout = plugins.layout(claim.name)()
        except PluginError as problem:
            if broken is not None:
                broken(claim.name, problem)
            continue
        yield claim.name, layout


def recognised(storage: Storage, prefix: str, names: Sequence[str], plugins: Plugins) -> str | None:
    """Return the name of the layout that a folder with such children is of, whether or not it can be read."""
    if not names or is_excluded(names):
        return None
    found = (name for name, layout in layouts(plugins) if _recognises(layout, storage, prefix, names))
    return next(found, None)


def owner(storage: Storage, prefix: str, names: Sequence[str], plugins: Plugins) -> str | None:
    """Return the name of the layout whose checkpoint a folder is for certain, such that it may be deleted."""
    if not names or is_excluded(names):
        return None
    for name, layout in layouts(plugins):
        if isinstance(layout, OwnsFolders) and layout.owns(storage, prefix, names):
            return name
    return None


def erase(storage: Storage, prefix: str) -> None:
    """Delete what is left of a folder of others, the tombstone last; called again, go on where it stopped.

    A save to the same name may have begun meanwhile: its attempt and its commit object stay.
    """
    for child in list(storage.children(prefix)):
        of_attempt = parse_attempt(child.removesuffix("/").partition(".")[0]) is not None
        if not of_attempt and child not in {TOMBSTONE, COMMIT_OBJECT}:
            storage.delete(f"{prefix}{child}")
    storage.delete(f"{prefix}{TOMBSTONE}")


def _recognises(layout: Layout, storage: Storage, prefix: str, names: Sequence[str]) -> bool:
    try:
        if isinstance(layout, RecognisesLayout):
            return layout.recognises(storage, prefix, names)
        return layout.read(storage, prefix, names) is not None
    except DamagedError:
        return True  # it is one: whoever loads it will be told what is wrong with it
    except InvalidLayoutError:
        return False
