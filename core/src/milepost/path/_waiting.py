"""How somebody else's new checkpoints are waited for: an evaluation beside a training.

The rule: only what is committed counts, and only the newest; what came and went in between is not missed, it was never
asked for. A wait ends when the caller says so, by a number of seconds or a function, and never by itself before.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from milepost.path.step import latest_step_metadata, standard_name_format

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from upath import UPath

    from milepost.path._finding import PathLike
    from milepost.path.step import Metadata, NameFormat

__all__ = ["checkpoints_iterator", "wait_for_new_checkpoint"]


def checkpoints_iterator(  # noqa: PLR0913 - the documented signature
    checkpoint_dir: PathLike,
    *,
    min_interval_secs: int = 0,
    seconds_to_sleep: int = 1,
    timeout: int | None = None,
    timeout_fn: Callable[[], bool] | None = None,
    step_prefix: str | None = None,
    step_format_fixed_length: int | None = None,
    step_name_format: NameFormat[Metadata] | None = None,
    snapshot_dir: UPath | None = None,
    set_immutable: bool | None = None,
    ignore_snapshot_errors: bool | None = True,
) -> Iterator[int]:
    """Yield the newest step below a root, whenever there is a newer one than was yielded before.

    `min_interval_secs` is the least time between two steps, `seconds_to_sleep` the time between two looks. After
    `timeout` seconds without a newer step, `timeout_fn` is asked whether to end; without it the iterator ends. The
    options for snapshots have no effect: a checkpoint that is let go while it is read is noticed by the load.
    """
    del snapshot_dir, set_immutable, ignore_snapshot_errors
    names = step_name_format or standard_name_format(step_prefix, step_format_fixed_length)
    seen = -1
    while True:
        began = time.monotonic()
        found = _newer(checkpoint_dir, names, seen, seconds_to_sleep, timeout)
        if found is None:
            if timeout_fn is None or timeout_fn():
                return
            continue
        seen = found
        yield found
        time.sleep(max(0.0, min_interval_secs - (time.monotonic() - began)))


@contextlib.contextmanager
def wait_for_new_checkpoint(  # noqa: PLR0913 - the documented signature
    checkpoint_dir: PathLike,
    *,
    until_step: int | None = None,
    seconds_to_sleep: int = 1,
    timeout: int | None = None,
    timeout_fn: Callable[[], bool] | None = None,
    step_prefix: str | None = None,
    step_format_fixed_length: int | None = None,
    step_name_format: NameFormat[Metadata] | None = None,
    snapshot_dir: UPath | None = None,
    set_immutable: bool | None = None,
    ignore_snapshot_errors: bool | None = True,
) -> Iterator[int]:
    """Wait for a step, at least `until_step`, and give its number within the `with` block; -1 if none came in time.

    The other arguments are those of `checkpoints_iterator`.
    """
    del snapshot_dir, set_immutable, ignore_snapshot_errors
    names = step_name_format or standard_name_format(step_prefix, step_format_fixed_length)
    seen = -1 if until_step is None else until_step - 1
    found = _newer(checkpoint_dir, names, seen, seconds_to_sleep, timeout)
    while found is None and timeout_fn is not None and not timeout_fn():
        found = _newer(checkpoint_dir, names, seen, seconds_to_sleep, timeout)
    yield -1 if found is None else found


def _newer(
    root: PathLike, names: NameFormat[Metadata], seen: int, seconds_to_sleep: float, timeout: float | None
) -> int | None:
    """Return the newest step once it is above the one seen; None if none came in so many seconds."""
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        found = latest_step_metadata(root, names)
        if found is not None and found.step > seen:
            return found.step
        if end is not None and time.monotonic() >= end:
            return None
        left = seconds_to_sleep if end is None else min(seconds_to_sleep, end - time.monotonic())
        time.sleep(max(0.0, left))
