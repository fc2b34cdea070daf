"""What Orbax calls the parts of a checkpoint: handlers, leaves, and the keys that lead to them.

The rule: Orbax knows a leaf by the texts of its keys joined by dots, and a handler by module and class. What it has no
name for is left out, never guessed.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "ARRAY",
    "HANDLERS",
    "JAX_KEY",
    "METRICS_V0",
    "METRICS_V1",
    "NUMPY_KEY",
    "Names",
    "handler_of",
    "is_v1",
    "key_text",
]

_V0 = "orbax.checkpoint._src.handlers."
_V1 = "orbax.checkpoint.experimental.v1._src.handlers."

ARRAY = "milepost.handlers.ArrayCheckpointHandler"
JAX_KEY = "milepost.handlers.JaxRandomKeyCheckpointHandler"
NUMPY_KEY = "milepost.handlers.NumpyRandomKeyCheckpointHandler"
_BASE = "milepost.handlers.BasePyTreeCheckpointHandler"

HANDLERS: Mapping[str, str] = MappingProxyType(
    {
        "milepost.handlers.StandardCheckpointHandler": f"{_V0}standard_checkpoint_handler.StandardCheckpointHandler",
        "milepost.handlers.PyTreeCheckpointHandler": f"{_V0}pytree_checkpoint_handler.PyTreeCheckpointHandler",
        _BASE: f"{_V0}base_pytree_checkpoint_handler.BasePyTreeCheckpointHandler",
        ARRAY: f"{_V0}array_checkpoint_handler.ArrayCheckpointHandler",
        "milepost.handlers.JsonCheckpointHandler": f"{_V0}json_checkpoint_handler.JsonCheckpointHandler",
        "milepost.handlers.ProtoCheckpointHandler": f"{_V0}proto_checkpoint_handler.ProtoCheckpointHandler",
        JAX_KEY: f"{_V0}random_key_checkpoint_handler.JaxRandomKeyCheckpointHandler",
        NUMPY_KEY: f"{_V0}random_key_checkpoint_handler.NumpyRandomKeyCheckpointHandler",
        "milepost.v1.handlers.PyTreeHandler": f"{_V1}pytree_handler.PyTreeHandler",
        "milepost.v1.handlers.JsonHandler": f"{_V1}json_handler.JsonHandler",
        "milepost.v1.handlers.ProtoHandler": f"{_V1}proto_handler.ProtoHandler",
    }
)
"""The handlers of Orbax by the names under which milepost remembers its own."""

METRICS_V0 = HANDLERS["milepost.handlers.JsonCheckpointHandler"]
METRICS_V1 = f"{_V1}json_handler.MetricsHandler"


def handler_of(item: Mapping[str, Any]) -> str | None:
    """Return what Orbax calls the handler of an item, None if it has none.

    >>> handler_of({"handler": "milepost.v1.handlers.JsonHandler", "writer": ""})
    'orbax.checkpoint.experimental.v1._src.handlers.json_handler.JsonHandler'
    """
    # A tree without a handler is one of the younger interface, which has one kind of tree.
    return HANDLERS.get(item.get("handler") or ("milepost.v1.handlers.PyTreeHandler" if item["writer"] else ""))


def is_v1(items: Mapping[str, Mapping[str, Any]]) -> bool:
    """Say whether the items were saved through the younger interface of Orbax's, `v1`.

    >>> is_v1({"state": {"handler": "", "writer": "tensorstore"}})
    True
    """
    handlers = [item.get("handler") or "" for item in items.values()]
    return all(not name or not name.startswith("milepost.handlers.") for name in handlers) and any(
        (item["writer"] and not item.get("handler")) or name.startswith("milepost.v1.")
        for item, name in zip(items.values(), handlers, strict=True)
    )


# --- keys ------------------------------------------------------------------------------------------------------------


def key_text(key: Any) -> str:
    """Return the text of a key as it stands in a manifest: what `str` made of it when it was saved.

    >>> key_text({"attr": "w"}), key_text(1), key_text({"tuple": [1, "a"]}), key_text({"class": "builtins:int"})
    ('w', '1', "(1, 'a')", "<class 'int'>")
    """
    return key if type(key) is str else str(_key(key))


def _key(key: Any) -> Any:
    if not isinstance(key, dict):
        return key
    ((kind, value),) = key.items()
    match kind:
        case "tuple":
            return tuple(map(_key, value))
        case "list":
            return list(map(_key, value))
        case "dict":
            return {_key(name): _key(one) for name, one in value}
        case "class":
            return _Class(value)
    return value


class _Class(str):
    """A class by its name, shown as Python shows classes."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"<class '{self.removeprefix('builtins:').replace(':', '.', 1)}'>"

    __repr__ = __str__


class Names:
    """Names for leaves, as docs/reference/format.md has them, each given once."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def of(self, texts: Sequence[str]) -> tuple[str, str]:
        """Return the name of the next leaf, whose path has these keys, and what was put behind it to make it unique.

        >>> names = Names()
        >>> names.of(["a/b", "0"]), names.of(["1"]), names.of(["1"]), names.of([])
        (('a~1b/0', ''), ('1', ''), ('1~2', '~2'), ('value', ''))
        """
        name = "/".join([text.replace("~", "~0").replace("/", "~1") for text in texts]) or "value"
        count = self._seen[name] = self._seen.get(name, 0) + 1
        suffix = "" if count == 1 else f"~{count}"
        return name + suffix, suffix
