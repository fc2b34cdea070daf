"""How an answer looks to people.

The rule: lines that programs can cut up, whatever the width of the terminal; colours only where rich finds a terminal
that wants them; and no character that a terminal would obey, since names and metadata may come from anybody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.text import Text

__all__ = ["Page", "plain", "size_text"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_STEP = 1024


def plain(text: object) -> str:
    r"""Return a text on one line, with everything escaped that does not print.

    >>> plain("a\x1b[31m\n")
    'a\\x1b[31m\\n'
    """
    shown = str(text)
    return shown if shown.isprintable() else "".join(one if one.isprintable() else repr(one)[1:-1] for one in shown)


def size_text(size: int) -> str:
    """Return a number of bytes for people.

    >>> size_text(0), size_text(1536), size_text(1 << 60)
    ('0 B', '1.5 KiB', '1.0 EiB')
    """
    if size < _STEP:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{size / _STEP**power:,.1f} {_UNITS[power]}"


class Page:
    """What a command prints on stdout."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=True)

    def line(self, text: object = "", style: str = "") -> None:
        """Print one line."""
        from rich.text import Text

        self._print(Text(plain(text), style))

    def table(self, rows: Iterable[Sequence[object]], *, head: Sequence[str] = (), indent: int = 2) -> None:
        """Print rows with their columns aligned."""
        from rich.cells import cell_len
        from rich.text import Text

        cells = [[plain(cell) for cell in row] for row in ([head, *rows] if head else rows)]
        widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
        for at, row in enumerate(cells):
            padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
            self._print(Text((" " * indent + "  ".join(padded)).rstrip(), "bold" if head and at == 0 else ""))

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)
