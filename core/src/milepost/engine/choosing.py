"""Which leaves of a checkpoint are loaded, and what becomes of those that have no counterpart.

The rule: by default everything must fit, in both directions; whoever wants less says so, and what was named and is not
there is an error, since a pattern with a slip of the pen would otherwise load nothing. Pure functions on structures.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from milepost.structure import LEAF, Key, child_keys, key_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from milepost.engine.progress import Progress
    from milepost.manifest import ArrayLeaf

__all__ = ["LoadRules", "Missing", "Place", "Selection", "pruned", "without_classes"]

Missing: TypeAlias = "Literal['error', 'keep'] | Callable[[str, Any], Any]"
Place: TypeAlias = "Callable[[str, ArrayLeaf], Any]"


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """Leaves chosen by patterns on their paths.

    A pattern is a path of keys joined by "/", in which `*`, `?` and `[...]` stand for text within a key and `**` for
    any number of keys. A pattern that names a container chooses everything below it. Without `include` everything is
    chosen that `exclude` does not name.

    >>> Selection(("params/**",), ("**/bias",)).chooses(("params", "dense", "kernel"))
    True
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def chooses(self, path: Sequence[Key]) -> bool:
        """Say whether the leaf of that path is chosen."""
        keys = tuple(map(key_text, path))
        if any(_names(pattern, keys) for pattern in self.exclude):
            return False
        return not self.include or any(_names(pattern, keys) for pattern in self.include)

    def idle(self, paths: Sequence[Sequence[Key]]) -> list[str]:
        """Return the patterns that name none of these leaves."""
        texts = [tuple(map(key_text, path)) for path in paths]
        patterns = (*self.include, *self.exclude)
        return [pattern for pattern in patterns if not any(_names(pattern, keys) for keys in texts)]


def _names(pattern: str, keys: tuple[str, ...]) -> bool:
    return _compiled(pattern).match("".join(f"{key}\0" for key in keys)) is not None


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = []
    for part in pattern.strip("/").split("/"):
        if part == "**":
            parts.append("(?:[^\0]*\0)*?")
            continue
        text = fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z").removesuffix(r")\z")
        parts.append(f"(?s:{text})\0".replace(".*", "[^\0]*"))
    return re.compile("".join(parts))


@dataclasses.dataclass(frozen=True, slots=True)
class LoadRules:
    """How a checkpoint and a target must fit, and what is done where they do not.

    `missing` is for leaves of the target that were not saved: an error, the target's own value, or a function of the
    path and the target's leaf. `extra` is for saved leaves that the target does not have. `place` is asked, without a
    target, for the sharding of an array (None: as saved); `fallback` is the sharding of those whose saved one cannot be
    had here. Without `classes`, registered classes and named tuples come back as dicts.
    """

    missing: Missing = "error"
    extra: Literal["error", "ignore"] = "error"
    selection: Selection = Selection()
    place: Place | None = None
    fallback: Any = None
    classes: bool = True
    progress: Progress | None = None


_Index: TypeAlias = "list[int | None]"


def pruned(structure: Any, chosen: Sequence[bool]) -> tuple[Any, _Index]:
    """Return what is left of a structure when some leaves are not loaded, and which leaf is where in it.

    Mappings lose the keys below which nothing is chosen. Other containers keep their length, with a leaf of number None
    in the place of what is not loaded.

    >>> pruned({"kind": "list", "children": ["*", "*"]}, [False, True])
    ({'kind': 'list', 'children': ['*', '*']}, [None, 1])
    """
    count = iter(range(len(chosen)))
    left, index = _pruned(structure, chosen, count)
    return (LEAF, [None]) if left is _GONE else (left, index)


_GONE = object()
_MAPPINGS = ("dict", "OrderedDict", "defaultdict")


def _pruned(node: Any, chosen: Sequence[bool], count: Any) -> tuple[Any, _Index]:
    if node == LEAF:
        at = next(count)
        return (LEAF, [at]) if chosen[at] else (_GONE, [])
    if node is None or not node["children"]:
        return (node, []) if all(chosen) else (_GONE, [])
    left = [_pruned(child, chosen, count) for child in node["children"]]
    if all(child is _GONE for child, _ in left):
        return _GONE, []
    if node["kind"] in _MAPPINGS:
        keys = [key for key, (child, _) in zip(node["keys"], left, strict=True) if child is not _GONE]
        left = [(child, index) for child, index in left if child is not _GONE]
        return _with(node, left, keys=keys)
    return _with(node, [(LEAF, [None]) if child is _GONE else (child, index) for child, index in left])


def _with(node: Mapping[str, Any], left: list[tuple[Any, _Index]], **changes: Any) -> tuple[Any, _Index]:
    index: _Index = [at for _, part in left for at in part]
    return {**node, **changes, "children": [child for child, _ in left]}, index


def without_classes(structure: Any) -> Any:
    """Return a structure of dicts, lists and tuples only: registered classes and named tuples become dicts.

    >>> without_classes({"kind": "namedtuple", "type": "a:B", "fields": ["x"], "children": ["*"]})
    {'kind': 'dict', 'keys': ['x'], 'children': ['*']}
    """
    if structure == LEAF or structure is None:
        return structure
    children = [without_classes(child) for child in structure["children"]]
    if structure["kind"] in ("dict", "list", "tuple"):
        return {**structure, "children": children}
    keys = child_keys(structure)
    if structure["kind"] in _MAPPINGS:
        return {"kind": "dict", "keys": structure["keys"], "children": children}
    if children and all(isinstance(key, int) for key in keys):
        return {"kind": "list", "children": children}
    return {"kind": "dict", "keys": [key_text(key) for key in keys], "children": children}
