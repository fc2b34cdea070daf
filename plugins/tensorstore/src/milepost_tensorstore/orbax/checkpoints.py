"""What Orbax reads of a checkpoint as a whole: `_CHECKPOINT_METADATA`, the mark of its younger interface, metrics.

The rule: pure functions of the manifest. That the checkpoint is committed is said by `commit_success.txt`, of which
Orbax asks only whether it exists; its body is the manifest.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from milepost_tensorstore.orbax.names import METRICS_V0, METRICS_V1, handler_of, is_v1

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["files", "plain_metrics"]

_INDICATOR = "orbax.checkpoint"
_METRICS = "metrics"


def files(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and text of every file that Orbax has beside the items of a checkpoint."""
    items: Mapping[str, Mapping[str, Any]] = checkpoint["items"]
    metrics, younger = checkpoint.get("metrics"), is_v1(items)
    handlers: Any = {name: handler for name, item in items.items() if (handler := handler_of(item)) is not None}
    if any(not item["prefix"] for item in items.values()):
        handlers = next(iter(handlers.values()), None)
    elif metrics is not None and _METRICS not in items:
        handlers[_METRICS] = METRICS_V1 if younger else METRICS_V0
        yield f"{_METRICS}/{_METRICS}", json.dumps(plain_metrics(metrics))
    yield (
        "_CHECKPOINT_METADATA",
        json.dumps(
            {
                "item_handlers": handlers,
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": checkpoint["init_timestamp_nsecs"],
                "commit_timestamp_nsecs": checkpoint["commit_timestamp_nsecs"],
                "custom_metadata": checkpoint.get("custom_metadata") or {},
            }
        ),
    )
    if younger:
        yield _INDICATOR, ""


def plain_metrics(stored: Any) -> Any:
    """Return metrics as Orbax writes them, of which JSON cannot say all: NaN and infinities stand there as such.

    >>> plain_metrics({"loss": {"!float": "-inf"}}), plain_metrics({"!value": [1]}), plain_metrics({"!!a": 1})
    ({'loss': -inf}, [1], {'!a': 1})
    """
    if isinstance(stored, list):
        return [plain_metrics(one) for one in stored]
    if not isinstance(stored, dict):
        return stored
    if len(stored) == 1:
        ((key, value),) = stored.items()
        if key == "!float" and isinstance(value, str):
            return float(value)
        if key == "!value":
            return plain_metrics(value)
        if key.startswith("!!"):
            return {key[1:]: plain_metrics(value)}
    return {key: plain_metrics(value) for key, value in stored.items()}
