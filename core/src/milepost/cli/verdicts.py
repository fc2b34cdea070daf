"""What `milepost verify` says: checkpoint by checkpoint, file by file.

The rule: what is damaged is told apart from what could not be found out, for a script may delete the former. A
checkpoint that was overwritten while it was read is read again before anything is said against it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from milepost.cli.answers import BAD_NEWS, FINE, TROUBLE, Answer, error_document, exit_code, worst
from milepost.cli.printing import plain, size_text
from milepost.engine.reading import Checkpoint, list_checkpoints, open_checkpoint
from milepost.engine.verifying import FileReport, strangers
from milepost.engine.verifying import verify as verify_files
from milepost.errors import MilepostError, RequestError
from milepost.urls import join, locate

if TYPE_CHECKING:
    from milepost.cli.printing import Page

__all__ = ["Started", "progress_bars", "verified"]

_TRIES = 3
_STATES = {FINE: "intact", BAD_NEWS: "damaged", TROUBLE: "not read"}
_STYLES = {FINE: "green", BAD_NEWS: "red", TROUBLE: "yellow"}


@dataclasses.dataclass(frozen=True, slots=True)
class _Verdict:
    """What was found out about one checkpoint: its files and what lies beside them, or the error that prevented it."""

    url: str
    reports: Sequence[FileReport] = ()
    unlisted: Sequence[str] = ()
    error: Exception | None = None

    @property
    def code(self) -> int:
        """The exit code if this were the only one."""
        if self.error is not None:
            return exit_code(self.error)
        bad = [report for report in self.reports if report.problem is not None]
        return worst([BAD_NEWS if report.readable else TROUBLE for report in bad])

    @property
    def size(self) -> int:
        """The bytes that were to be read."""
        return sum(report.size for report in self.reports)

    def document(self) -> dict[str, Any]:
        """Return the verdict as JSON can hold it."""
        return {
            "url": self.url,
            "state": _STATES.get(self.code, "not there"),
            "bytes": self.size,
            "files": [_file_document(report) for report in self.reports],
            "unlisted": list(self.unlisted),
            "error": self.error and error_document(self.error),
        }

    def show(self, page: Page) -> None:
        """Print the verdict."""
        state = _STATES.get(self.code, "not there")
        count = f"{len(self.reports)} file{'' if len(self.reports) == 1 else 's'}, {size_text(self.size)}"
        page.line(f"{state}: {self.url}" + ("" if self.error else f": {count}"), _STYLES.get(self.code, ""))
        if self.error is not None:
            for text in (self.error, *getattr(self.error, "__notes__", ())):
                page.line(f"  {text}")
        for report in (report for report in self.reports if report.problem is not None):
            page.line(f"  {report.path}: {report.problem}")
            for leaf in report.leaves:
                page.line(f"    leaf {leaf.path} of item {leaf.item!r}")
        for path in self.unlisted:
            page.line(f"  note: {path} is not in the manifest")


def _file_document(report: FileReport) -> dict[str, Any]:
    leaves = [leaf._asdict() for leaf in report.leaves]
    return {
        "path": report.path,
        "size": report.size,
        "problem": report.problem,
        "leaves": leaves,
        "readable": report.readable,
    }


def verified(paths: Sequence[str]) -> Answer:
    """Verify the checkpoints at some paths, and those below the paths where there is none."""
    with progress_bars() as progress:
        verdicts = [_verdict(url, progress) for path in paths for url in _checkpoints_at(path)]

    def shown(page: Page) -> None:
        for verdict in verdicts:
            verdict.show(page)

    document = {"checkpoints": [verdict.document() for verdict in verdicts]}
    return Answer(document, shown, worst([verdict.code for verdict in verdicts]))


def _checkpoints_at(path: str) -> list[str]:
    """Return the URLs to verify: of the path itself unless there is no checkpoint at it and some are below it."""
    url = locate(path)
    try:
        open_checkpoint(url)
    except RequestError:
        with contextlib.suppress(MilepostError):
            return [join(url, entry.name) for entry in list_checkpoints(url)] or [url]
    except MilepostError:
        pass  # it is there; what is wrong with it is told when it is verified
    return [url]


def _verdict(url: str, progress: Started) -> _Verdict:
    try:
        checkpoint, reports = _read(url, progress)
        for _ in range(_TRIES - 1):
            if all(report.problem is None for report in reports):
                break
            if open_checkpoint(url).manifest.attempt == checkpoint.manifest.attempt:
                break
            checkpoint, reports = _read(url, progress)
        return _Verdict(url, reports, strangers(checkpoint))
    except MilepostError as error:
        return _Verdict(url, error=error)


def _read(url: str, progress: Started) -> tuple[Checkpoint, list[FileReport]]:
    checkpoint = open_checkpoint(url)
    advance = progress(checkpoint.route.name, checkpoint.manifest.data_bytes)
    return checkpoint, list(verify_files(checkpoint, threads=checkpoint.route.threads, progress=advance))


Started = Callable[[str, int], Callable[[int], object]]
"""Called with a name and a number of bytes to come; returns what is called with the bytes that came."""


@contextlib.contextmanager
def progress_bars() -> Iterator[Started]:
    """Draw a bar for whatever is started inside the `with` block, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _name, _total: lambda _bytes: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def start(name: str, total: int) -> Callable[[int], object]:
            for shown in bars.tasks:
                bars.update(shown.id, visible=False)  # a root may have more checkpoints than a terminal has lines
            task = bars.add_task(plain(name), total=total)
            return lambda size: bars.advance(task, size)

        yield start
