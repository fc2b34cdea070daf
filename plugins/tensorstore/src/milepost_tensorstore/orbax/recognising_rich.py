"""Which kinds of containers a tree of Orbax has, where it wrote them down: tuples and named tuples.

The rule: kinds are looked up by the texts of the keys that lead to a container; what is not understood stays what it is
without them, a dict or a list. Classes are named and not looked for: that is the reader's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from milepost.errors import DamagedError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Kind", "kinds_of"]

_DEEPEST = 200


class Kind(NamedTuple):
    """The kind of a container: "tuple", or "namedtuple" with the name of its class and its fields."""

    kind: str
    type: str = ""
    fields: tuple[str, ...] = ()


def kinds_of(tree: Any, where: str) -> dict[tuple[str, ...], Kind]:
    """Return the kinds of the containers in a `value_metadata_tree`, by their keys; raises `DamagedError`.

    >>> leaf = {"category": "custom", "clazz": "ValueMetadataEntry", "data": {}}
    >>> kinds_of({"a": {"category": "custom", "clazz": "tuple", "entries": [leaf]}}, "_METADATA")
    {('a',): Kind(kind='tuple', type='', fields=())}
    """
    try:
        return dict(_walk(tree, ()))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedError(f"cannot believe {where!r}: its 'value_metadata_tree' makes no sense: {error!r}") from error


def _walk(node: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Kind]]:
    if len(keys) > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} containers deep")
    children: list[tuple[str, Any]] = []
    if isinstance(node, list):
        children = [(str(at), child) for at, child in enumerate(node)]
    elif node.get("category") == "namedtuple":
        children = [(_text(entry["key"]), entry["value"]) for entry in node["entries"]]
        name = f"{_text(node.get('module') or '')}:{_text(node['clazz'])}"
        yield keys, Kind("namedtuple", name, tuple(key for key, _ in children))
    elif node.get("category") == "custom":
        if node["clazz"] == "tuple":
            children = [(str(at), child) for at, child in enumerate(node["entries"])]
            yield keys, Kind("tuple")
    else:
        children = list(node.items())
    for key, child in children:
        yield from _walk(child, (*keys, key))


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{value!r:.60} is no name")
    return value
