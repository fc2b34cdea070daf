"""How leaves get other names on their way to or from programs that know no trees.

The rule: a name is the keys of a path joined by a separator; rules change it one after the other; and what cannot be
right is told for all names at once: a rule that matches nothing, a name that is empty, given twice, or in the way of
another. Pure functions.
"""

from __future__ import annotations

import collections
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from milepost.errors import ConfigError, noted
from milepost.structure import LEAF, Key, key_text, show_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Rule", "joined", "nested", "renamed"]

_SHOWN = 20


class Rule(NamedTuple):
    """A regular expression, and what takes the place of everything in a name that matches it."""

    pattern: str
    replacement: str


def joined(path: Sequence[Key], separator: str = ".") -> str:
    """Return the keys of a path as one name.

    >>> joined(("layers", 0, "kernel")), joined(())
    ('layers.0.kernel', 'value')
    """
    return separator.join(map(key_text, path)) if path else "value"


def renamed(paths: Iterable[tuple[Key, ...]], rules: Iterable[Rule], where: str) -> dict[tuple[Key, ...], str]:
    r"""Return the name of each path, after all rules were applied, each to what the one before left.

    Raises `ConfigError` for a rule that is no regular expression or matches nothing, and for names that are empty or
    given twice.

    >>> renamed([("params", "dense", "kernel")], [Rule(r"^params\.", ""), Rule("kernel", "weight")], "the example")
    {('params', 'dense', 'kernel'): 'dense.weight'}
    """
    names = {path: joined(path) for path in paths}
    for rule in rules:
        try:
            changed = {path: re.subn(rule.pattern, rule.replacement, name) for path, name in names.items()}
        except (re.error, IndexError) as error:
            raise ConfigError(f"cannot rename by {rule.pattern!r} to {rule.replacement!r}: {error}") from error
        if not any(count for _, count in changed.values()):
            idle = ConfigError(f"cannot rename the leaves of {where!r}: no name matches {rule.pattern!r}")
            raise noted(idle, f"there are {', '.join(map(repr, list(names.values())[:_SHOWN])) or 'none'}")
        names = {path: name for path, (name, _) in changed.items()}
    sharing = collections.defaultdict(list)
    for path, name in names.items():
        sharing[name].append(show_path(path))
    bad = [f"{name!r} for {' and '.join(those)}" for name, those in sharing.items() if len(those) > 1 or not name]
    if bad:
        raise _refusal(f"{len(bad)} names are empty or given twice", bad, where)
    return names


def nested(names: Sequence[str], separator: str | None, where: str) -> tuple[Any, list[int]]:
    """Return the structure of nested dicts that names stand for, and the number of the name which each leaf was.

    Without a separator the dict is flat. Raises `ConfigError` for names that are in the way of others.

    >>> nested(["b", "a.w"], ".", "the example")[1]
    [1, 0]
    """
    tree: dict[str, Any] = {}
    bad = []
    for number, name in enumerate(names):
        *above, last = name.split(separator) if separator else [name]
        node = tree
        for key in above:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or last in node:
            bad.append(repr(name))
        else:
            node[last] = number
    if bad:
        raise _refusal(f"split at {separator!r}, {len(bad)} names are in the way of others", bad, where)
    index: list[int] = []
    return _structure(tree, index), index


def _structure(node: dict[str, Any] | int, index: list[int]) -> Any:
    if isinstance(node, int):
        index.append(node)
        return LEAF
    keys = sorted(node)
    return {"kind": "dict", "keys": keys, "children": [_structure(node[key], index) for key in keys]}


def _refusal(what: str, lines: Sequence[str], where: str) -> ConfigError:
    listed = "\n".join(f"  {line}" for line in lines)
    error = ConfigError(f"cannot rename the leaves of {where!r}: {what}:\n{listed}")
    return noted(error, "a rule REGEX=REPLACEMENT can keep them apart")
