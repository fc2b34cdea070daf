"""What `milepost cp` does: a checkpoint is copied to another place, into another format, or both.

The rule: the command decides nothing; what may be copied, and how, the engine says.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milepost.cli.answers import Answer
from milepost.cli.printing import size_text
from milepost.cli.verdicts import progress_bars
from milepost.engine.copying import Copied, Copy, CopyRequest
from milepost.errors import ConfigError, noted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milepost.cli.printing import Page

__all__ = ["copied_answer", "cp", "option_values"]


def option_values(texts: Sequence[str]) -> dict[str, Any]:
    """Read options as they are typed: `key=value`, the value as JSON where it is JSON, else as text.

    Raises `ConfigError` for a text without "=".

    >>> option_values(["level=3", "codec=zstd", "checked=false"])
    {'level': 3, 'codec': 'zstd', 'checked': False}
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise noted(ConfigError(f"cannot read the option {text!r}: it has no '='"), "write KEY=VALUE")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def cp(
    source: Annotated[str, typer.Argument(help="The path or URL of a checkpoint.", show_default=False)],
    target: Annotated[str, typer.Argument(help="The path or URL that the copy gets.", show_default=False)],
    *,
    arrays: Annotated[
        str | None, typer.Option(metavar="NAME", help="The array writer of the copy.", show_default=False)
    ] = None,
    arrays_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the array writer; may be repeated.", show_default=False),
    ] = None,
    item: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Copy this item alone; may be repeated.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
) -> Answer:
    """Copy a checkpoint to another place, or into another format.

    Files are copied as they are where the format stays the same. Everything is checked while it is read, and read back
    after it was written; the copy appears whole, or not at all.
    """
    options = option_values(arrays_option) if arrays_option else None
    with progress_bars() as progress:
        request = CopyRequest(source, target, arrays, options, item or (), overwrite=overwrite, progress=progress)
        copied = Copy(request).run()
    return copied_answer(copied)


def copied_answer(copied: Copied) -> Answer:
    """Return the answer that tells what was copied."""
    manifest = copied.manifest
    writers = {name: one.writer or None for name, one in manifest.items.items()}
    document = {
        "source": copied.source,
        "target": copied.target,
        "files_as_they_are": copied.verbatim,
        "items": writers,
        "attempt": manifest.attempt,
        "files": len(manifest.files),
        "bytes": manifest.data_bytes,
    }

    def shown(page: Page) -> None:
        how = "as they are" if copied.verbatim else f"written by {', '.join(sorted({*filter(None, writers.values())}))}"
        count = f"{len(manifest.files)} file{'' if len(manifest.files) == 1 else 's'}"
        page.line(f"copied: {copied.source}", "green")
        page.line(f"to: {copied.target}: {count}, {size_text(manifest.data_bytes)}, {how}, read back and compared")

    return Answer(document, shown)
