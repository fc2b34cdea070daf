"""Whether a folder is a checkpoint of Orbax, by names alone.

The rule: what Orbax labels, or what holds a tree, is one for certain, by itself or as a folder of items. Older
releases left folders that only look so: arrays and nothing else, or a file by a common name. These can be loaded, and
nobody deletes them for us. However many arrays there are, only so many folders are looked into.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from milepost.errors import InvalidLayoutError

from milepost_tensorstore.documents import FILES
from milepost_tensorstore.orbax.recognising_items import is_tree, single_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from milepost_tensorstore.orbax.recognising_files import Folder

__all__ = ["INDICATOR", "KEYS", "STEP", "is_certain", "is_likely"]

STEP = "_CHECKPOINT_METADATA"
INDICATOR = "orbax.checkpoint"
KEYS = frozenset({"jax_random_key/", "np_random_key/"})

_LOOKS = 8
_DEEPEST = 32


def is_certain(folder: Folder, check_finished: Callable[[Folder], None]) -> bool:
    """Say whether a folder can be nothing but a checkpoint, readable or not."""
    known = _is_marked(folder, certain=True) or _holds_items(folder, certain=True)
    return known and _is_finished(folder, check_finished)


def is_likely(folder: Folder, check_finished: Callable[[Folder], None]) -> bool:
    """Say whether a folder is one that Orbax would restore, or would if it were not damaged."""
    looks_so = (
        _is_marked(folder, certain=False)
        or _holds_items(folder, certain=False)
        or (not _holds_checkpoints(folder) and (single_file(folder.names) is not None or _holds_arrays(folder)))
    )
    return looks_so and _is_finished(folder, check_finished)


def _is_marked(folder: Folder, *, certain: bool) -> bool:
    labelled = STEP in folder.names or INDICATOR in folder.names
    return labelled or bool(KEYS & folder.names) or is_tree(folder, certain=certain)


def _holds_items(folder: Folder, *, certain: bool) -> bool:
    found = list(itertools.islice(folder.folders(), _LOOKS))
    if any(STEP in one.names for one in found):
        return False
    if certain and any(one.name[-1:].isdigit() for one in found):
        return False  # these may be steps of releases without labels, each of them a checkpoint
    return any(is_tree(one, certain=certain) or KEYS & one.names for one in found)


def _holds_checkpoints(folder: Folder) -> bool:
    return any(STEP in one.names for one in itertools.islice(folder.folders(), _LOOKS))


def _holds_arrays(folder: Folder) -> bool:
    """Say whether there is nothing but arrays, as far as the first few folders tell."""
    if any(not name.endswith("/") for name in folder.names if name not in ("commit_success.txt", "_sharding")):
        return False
    waiting, looks = [(one, 1) for one in itertools.islice(folder.folders(), _LOOKS)], 0
    while waiting and looks < _LOOKS:
        one, depth = waiting.pop(0)
        looks += 1
        if any(file in one.names for file in FILES.values()):
            return True
        if depth < _DEEPEST:
            # Downwards first: it takes as many looks as the tree is deep.
            waiting[:0] = [(below, depth + 1) for below in itertools.islice(one.folders(), _LOOKS)]
    return False


def _is_finished(folder: Folder, check: Callable[[Folder], None]) -> bool:
    try:
        check(folder)
    except InvalidLayoutError:
        return False
    return True
