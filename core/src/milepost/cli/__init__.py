"""The command line: what there is, what is in it, and whether it is intact. No command needs JAX.

The rule: a command computes an answer, which is printed for people or as one JSON document, and whose exit code says
how it turned out. typer and rich are imported by the first use, so that this module may be imported without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

__all__ = ["app"]


def app() -> typer.Typer:
    """Return the application with all its commands."""
    from milepost.cli.commands import build

    return build()
