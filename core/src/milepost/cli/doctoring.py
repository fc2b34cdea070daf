"""What `milepost doctor` says: property by property, and what to do about those that are missing.

The rule: what is missing comes with its remedy, and only what is needed here makes the answer bad news.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from milepost.cli.answers import BAD_NEWS, FINE, Answer
from milepost.cli.printing import size_text
from milepost.config import as_bytes
from milepost.engine import doctoring
from milepost.urls import locate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from milepost.cli.printing import Page

__all__ = ["doctor"]

_STYLES = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": ""}


def _bytes(text: object) -> int:
    try:
        return as_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not {error}") from error


def doctor(
    root: Annotated[str, typer.Argument(help="A folder or URL, with checkpoints below it or not.", show_default=False)],
    *,
    size: Annotated[
        int,
        typer.Option(
            "--size",  # older releases of Typer would take the metavar for its name
            parser=_bytes,
            metavar="SIZE",
            show_default=size_text(doctoring.SIZE),
            help="The bytes of a large object, which is written three times: more than two parts have.",
        ),
    ] = doctoring.SIZE,
) -> Answer:
    """Try out at a root what checkpoints need of their storage, and say what to do about what is missing.

    Writes below one prefix that nobody else has, and removes it, also when interrupted. The exit code is 1 if something
    is missing that saving or finding checkpoints there stands on; warnings leave it 0.
    """
    url = locate(root)
    with _telling() as told:
        findings = doctoring.doctor(url, size=size, told=told)
    failed = any(one.verdict == "failed" for one in findings)
    document = {"root": url, "fine": not failed, "findings": [dataclasses.asdict(one) for one in findings]}

    def shown(page: Page) -> None:
        page.line(url, "bold")
        cells = [(one.check, one.verdict, one.means) for one in findings]
        page.table(cells, head=("check", "verdict", "what it means"), indent=0)
        for one in findings:
            if one.remedy:
                page.line(f"{one.verdict}: {one.check}: {one.remedy}", _STYLES[one.verdict])

    return Answer(document, shown, BAD_NEWS if failed else FINE)


@contextlib.contextmanager
def _telling() -> Iterator[Callable[[str], object]]:
    """Say what is being tried out, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update
