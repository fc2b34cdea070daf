"""Where the command line begins: `milepost` and `python -m milepost`."""

from __future__ import annotations

import sys
import warnings

__all__ = ["main"]


def main() -> int:
    """Run the command line; return its exit code, or the hint to install what it needs."""
    try:
        import rich
        import typer
    except ImportError as error:
        print(f"milepost: the command line needs a package that is missing: {error}", file=sys.stderr)  # noqa: T201
        print('pip install "milepost[cli]"', file=sys.stderr)  # noqa: T201 - nothing better to print with is installed
        return 2
    del rich, typer

    from milepost.cli import app

    warnings.showwarning = _show_warning
    app()(prog_name="milepost")
    return 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"milepost: warning: {message}", file=sys.stderr)  # noqa: T201 - where it was raised says nothing to a user


if __name__ == "__main__":
    sys.exit(main())
