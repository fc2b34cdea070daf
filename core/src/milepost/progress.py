"""A progress bar for a long save or load.

Decides nothing but how it looks; what is told, and when, is the engine's. The rule: a bar needs the package rich, and
nothing else here does.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from milepost.errors import PluginError, noted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["bar"]


class _NoRichError(PluginError, ImportError):
    """Say that the package which draws bars is not installed."""


@contextlib.contextmanager
def bar(description: str = "", *, console: Any = None) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar inside the `with` block, for what is given its value as `progress=`.

    ```
    with milepost.progress.bar("saving") as progress:
        milepost.save(path, state, progress=progress)
    ```

    It shows bytes, speed and the time that is left, on a `rich.console.Console`: standard error without one. Where that
    is no terminal, nothing but the last state is shown. It may be given to a save that goes on in the background, as
    long as the block lasts. Raises an `ImportError` if the package rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as SpeedColumn
    except ImportError as cause:
        error = _NoRichError("cannot show a progress bar: the package rich is not installed")
        raise noted(error, "pip install milepost[cli]") from cause
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), SpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True)) as shown:
        task = shown.add_task(description, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
