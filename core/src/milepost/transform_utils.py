"""How a saved tree is made to fit another structure: which saved leaf, or which other value, each leaf becomes.

The rule: the new tree decides the structure. What each of its leaves is made of is found out for all of them, from
names alone, before a value is looked at or a function is called; so it can be told which saved leaves need to be read.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from milepost.errors import ConfigError, noted
from milepost.tree import from_flat_dict, to_flat_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from milepost.type_handlers import RestoreArgs

__all__ = [
    "RestoreTransform",
    "Source",
    "Transform",
    "apply_transformations",
    "intersect_trees",
    "merge_trees",
    "plan_transformations",
]

_SEP = "/"


@dataclasses.dataclass
class Transform:
    r"""What a leaf of the new tree is made of; raises `ConfigError` (a ValueError) for fields that exclude each other.

    `original_key` names the saved leaf: its keys joined by "/", or as a tuple; groups of the pattern that matched the
    new leaf's name can be put in (`r"params/\1"`). By default it is the leaf of the same name. `value_fn` is called
    with the saved value, and gives the new one. `multi_value_fn` is called with the new leaf's name and the whole saved
    tree instead. `use_fallback` takes the new tree's value; where values are not taken from the saved tree by default,
    it takes the saved one.
    """

    original_key: str | tuple[str, ...] | None = None
    use_fallback: bool = False
    value_fn: Callable[..., Any] | None = None
    multi_value_fn: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("original_key", "value_fn") if getattr(self, name) is not None]
        if self.use_fallback and (given or self.multi_value_fn is not None):
            raise ConfigError("cannot make a transform with use_fallback: it has other fields, which would not be used")
        if given and self.multi_value_fn is not None:
            raise ConfigError(
                f"cannot make a transform with multi_value_fn: it has {given[0]}, which would not be used"
            )


@dataclasses.dataclass
class RestoreTransform(Transform):
    """A transform for restoring: its functions get the leaf's `RestoreArgs`, too, as the last argument.

    `multi_value_fn_input_args` says which saved leaves `multi_value_fn` needs, and how to restore them.
    """

    value_fn: Callable[[Any, RestoreArgs], Any] | None = None
    multi_value_fn: Callable[[str, Any, RestoreArgs], Any] | None = None
    multi_value_fn_input_args: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """What a leaf of the new tree is made of: a saved leaf, by name, the whole saved tree, or, without either, itself.

    The transform is the one that its name matched, if there is one; its functions remain to be called.
    """

    original_key: str | None = None
    transform: Transform | None = None
    whole_tree: bool = False


def plan_transformations(
    original_keys: Collection[str],
    transformations: Any,
    new_keys: Iterable[str],
    *,
    default_to_original: bool = True,
) -> dict[str, Source]:
    r"""Return what each leaf of a new tree is made of, by name; names are the leaves' keys joined by "/".

    Raises `ConfigError` (a ValueError) for saved leaves that are asked for and are not there, and for patterns that are
    no regular expressions. Where several patterns match a name, the last one counts, those of a dict being sorted.

    >>> plan = plan_transformations({"a", "b/w"}, {r"c/(.*)": Transform(original_key=r"b/\1")}, ["a", "c/w", "d"])
    >>> {key: source.original_key for key, source in plan.items()}
    {'a': 'a', 'c/w': 'b/w', 'd': None}
    """
    patterns = _patterns(transformations)
    return {key: _source(key, patterns, original_keys, default_to_original=default_to_original) for key in new_keys}


def _patterns(transformations: Any) -> list[tuple[re.Pattern[str], Transform]]:
    found = []
    for pattern, transform in to_flat_dict(transformations, sep=_SEP).items():
        if not isinstance(transform, Transform):
            raise ConfigError(f"cannot transform '{pattern}': there is {transform!r:.60} instead of a Transform")
        try:
            found.append((re.compile(pattern), transform))
        except re.error as error:
            raise ConfigError(f"cannot transform '{pattern}': it is no regular expression: {error}") from error
    return found


def _source(
    key: str,
    patterns: list[tuple[re.Pattern[str], Transform]],
    original_keys: Collection[str],
    *,
    default_to_original: bool,
) -> Source:
    found = None
    for pattern, transform in patterns:
        match = pattern.fullmatch(key)
        if match is None:
            continue
        if not (transform.use_fallback and default_to_original):
            found = _matched(match, transform, original_keys)
        elif found is None:
            # It only says not to take the saved leaf by default, which an earlier match has not done.
            found = Source(None, transform)
    return found or Source(key if default_to_original and key in original_keys else None)


def _matched(match: re.Match[str], transform: Transform, original_keys: Collection[str]) -> Source:
    if transform.multi_value_fn is not None:
        return Source(None, transform, whole_tree=True)
    original_key = _original_key(match, transform.original_key)
    if original_key not in original_keys:
        near = [name for name in original_keys if name.startswith(f"{original_key}{_SEP}")]
        error = ConfigError(f"cannot transform '{match.string}': the original tree has no leaf '{original_key}'")
        raise noted(error, f"it is a container, of '{min(near)}' among others") if near else error
    return Source(original_key, transform)


def _original_key(match: re.Match[str], original_key: str | tuple[str, ...] | None) -> str:
    if original_key is None:
        return match.string
    template = original_key if isinstance(original_key, str) else _SEP.join(original_key)
    try:
        return match.expand(template)
    except (re.error, IndexError) as error:
        raise ConfigError(f"cannot transform '{match.string}': '{template}' names no groups of its match") from error


def apply_transformations(
    original_tree: Any,
    transformations: Any,
    new_tree: Any,
    default_to_original: bool | None = True,  # noqa: FBT001, FBT002 - the documented signature
) -> Any:
    r"""Return a tree of the new tree's structure, with the original tree's values as the transformations say.

    `transformations` is a tree with a `Transform` for each leaf it speaks of. Its keys, joined by "/", are regular
    expressions that have to match the whole name of a leaf of the new tree. Leaves that none of them matches get the
    original's value of the same name, if there is one and `default_to_original` is set, and keep their own otherwise.
    Raises what `plan_transformations` raises, before any function is called.

    >>> original, new = {"a": 1, "b": {"w": 2}}, {"a": 0, "c": {"w": 0}, "d": 5}
    >>> transformations = {r"c/(.*)": Transform(original_key=r"b/\1", value_fn=lambda value: -value)}
    >>> apply_transformations(original, transformations, new)
    {'a': 1, 'c': {'w': -2}, 'd': 5}
    """
    original, new = to_flat_dict(original_tree, sep=_SEP), to_flat_dict(new_tree, sep=_SEP)
    plan = plan_transformations(original.keys(), transformations, new, default_to_original=bool(default_to_original))
    made = {key: _value(key, source, original, original_tree, new) for key, source in plan.items()}
    return from_flat_dict(made, target=new_tree, sep=_SEP)


def _value(key: str, source: Source, original: Mapping[str, Any], original_tree: Any, new: Mapping[str, Any]) -> Any:
    transform = source.transform
    if source.whole_tree and transform is not None and transform.multi_value_fn is not None:
        return transform.multi_value_fn(key, original_tree)
    if source.original_key is None:
        return new[key]
    value = original[source.original_key]
    return value if transform is None or transform.value_fn is None else transform.value_fn(value)


def merge_trees(*trees: Any, target: Any | None = None) -> Any:
    """Return a tree with the leaves of all; where several have a leaf of one name, the last one's is taken.

    The result is of nested dicts, or of the target's structure. Empty nodes are left out. Raises `ConfigError` (a
    ValueError) where a leaf of one tree is a container of another, and `MismatchError` (a ValueError, and here a
    KeyError, too) for leaves of the target that no tree has.

    >>> merge_trees({"a": 1, "b": {"c": 2}}, {"b": {"d": 3}})
    {'a': 1, 'b': {'c': 2, 'd': 3}}
    """
    merged: dict[Any, Any] = {}
    for tree in trees:
        merged |= to_flat_dict(tree)
    return from_flat_dict(merged, target=target)


def intersect_trees(*trees: Any, target: Any | None = None) -> Any:
    """Return a tree with the leaves that all have, with the values of the last.

    The result is of nested dicts, or of the target's structure. Raises `ConfigError` (a ValueError) without any tree,
    and `MismatchError` (a ValueError, and here a KeyError, too) for leaves of the target that not all trees have.

    >>> intersect_trees({"a": 1, "b": 2}, {"b": 3, "c": 4})
    {'b': 3}
    """
    if not trees:
        raise ConfigError("cannot intersect trees: there are none")
    *others, last = [to_flat_dict(tree) for tree in trees]
    common = {key: leaf for key, leaf in last.items() if all(key in other for other in others)}
    return from_flat_dict(common, target=target)
