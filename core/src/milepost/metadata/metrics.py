"""How metrics are kept in a commit object, which holds finite JSON numbers only and one object at the top.

The rule: what was given comes back, as Python values. Numbers of NumPy and JAX become Python's, tuples become lists.
What JSON cannot say is an object with one key that begins with `!`: `{"!float": "nan"}`, `"inf"` or `"-inf"`, and, at
the top, `{"!value": ...}` for what is no mapping. A mapping of the caller's that looks like one of these gets one more
`!`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from milepost.errors import RequestError, noted

__all__ = ["as_stored", "from_stored"]


class _MetricsError(RequestError, ValueError, TypeError):
    """Metrics that cannot be kept."""


def as_stored(metrics: Any) -> dict[str, Any] | None:
    """Return what is kept of metrics; None for None.

    Raises an error that is both a `ValueError` and a `TypeError` for what is no tree of numbers, texts, booleans and
    None in lists and mappings with string keys.

    >>> as_stored({"loss": float("nan"), "steps": (1, 2)}), as_stored(0.5)
    ({'loss': {'!float': 'nan'}, 'steps': [1, 2]}, {'!value': 0.5})
    """
    if metrics is None:
        return None
    try:
        stored = _stored(metrics, "metrics")
    except RecursionError as error:
        raise _MetricsError("cannot save metrics: they are nested too deeply, or hold themselves") from error
    return stored if isinstance(metrics, Mapping) else {"!value": stored}


def from_stored(stored: Any) -> Any:
    """Return the metrics that were given; None for None.

    >>> from_stored({"loss": {"!float": "-inf"}}), from_stored({"!value": [1]})
    ({'loss': -inf}, [1])
    """
    if isinstance(stored, list):
        return [from_stored(one) for one in stored]
    if not isinstance(stored, dict):
        return stored
    if len(stored) == 1:
        ((key, value),) = stored.items()
        if key == "!float" and isinstance(value, str):
            return float(value)
        if key == "!value":
            return from_stored(value)
        if key.startswith("!!"):
            return {key[1:]: from_stored(value)}
    return {key: from_stored(value) for key, value in stored.items()}


def _stored(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, (int, float)):
        plain = int(value) if isinstance(value, int) else float(value)
        return plain if math.isfinite(plain) else {"!float": str(plain)}
    if isinstance(value, Mapping):
        return _stored_mapping(value, where)
    if isinstance(value, (list, tuple)):
        return [_stored(one, f"{where}[{index}]") for index, one in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        plain = value.item()
        if type(plain) in {bool, int, float}:
            return _stored(plain, where)
    raise noted(
        _MetricsError(f"cannot save {where} {value!r:.200}: it is a {type(value).__name__}, not a number"),
        "metrics are numbers, texts, booleans and None, in lists and mappings; arrays belong into an item",
    )


def _stored_mapping(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
    for key in value:
        if not isinstance(key, str):
            raise _MetricsError(f"cannot save {where} {value!r:.200}: the key {key!r} is no string")
    stored = {str(key): _stored(one, f"{where}[{key!r}]") for key, one in value.items()}
    if len(stored) == 1 and next(iter(stored)).startswith("!"):
        return {f"!{key}": one for key, one in stored.items()}
    return stored
