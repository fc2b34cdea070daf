"""How a command ends: with an answer or an error, on which stream, in which form, and with which exit code.

The rule: stdout holds the answer and nothing else, with `--json` exactly one document; errors and warnings go to
stderr; the exit code alone tells a script what to do. It follows the class of the error, never its text.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from milepost.cli.printing import Page, plain
from milepost.errors import DamagedError, FutureFormatError, MilepostError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["BAD_NEWS", "FINE", "TROUBLE", "WRONG_USE", "Answer", "answering", "error_document", "exit_code", "worst"]

FINE = 0
BAD_NEWS = 1
WRONG_USE = 2
TROUBLE = 3

_BY_WEIGHT = (BAD_NEWS, TROUBLE, WRONG_USE, FINE)

_JSON = inspect.Parameter(
    "as_json",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else.")],
)
_TRACEBACK = inspect.Parameter(
    "show_traceback",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option("--traceback", envvar="MILEPOST_TRACEBACK", help="Print the traceback of an error, too."),
    ],
)


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a command found out: as a document for programs, as what to print for people, and as an exit code."""

    document: Mapping[str, Any]
    show: Callable[[Page], None]
    code: int = FINE


Body: TypeAlias = "Callable[..., Answer]"


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error.

    >>> from milepost.errors import ChecksumError, NotFoundError, StorageError
    >>> [exit_code(cls("")) for cls in (ChecksumError, NotFoundError, StorageError)]
    [1, 2, 3]
    """
    if isinstance(error, FutureFormatError):
        return TROUBLE  # nothing is known against the checkpoint
    if isinstance(error, DamagedError):
        return BAD_NEWS
    return WRONG_USE if isinstance(error, RequestError) else TROUBLE


def worst(codes: list[int]) -> int:
    """Return the code that matters most: what is known to be bad before what could not be found out.

    >>> worst([0, 3, 1]), worst([2, 3]), worst([])
    (1, 3, 0)
    """
    return min(codes, key=_BY_WEIGHT.index, default=FINE)


def error_document(error: BaseException) -> dict[str, Any]:
    """Return an error as JSON can hold it."""
    return {
        "error": type(error).__name__,
        "message": str(error),
        "notes": [str(note) for note in getattr(error, "__notes__", ())],
    }


def answering(body: Body) -> Callable[..., None]:
    """Return the command of a body: with the options that all commands share, and ending as all of them end."""

    @functools.wraps(body)
    def command(*, as_json: bool, show_traceback: bool, **given: Any) -> None:
        try:
            answer = body(**given)
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything; a user is told in one line
            _tell(error, as_json=as_json, show_traceback=show_traceback)
            code = exit_code(error)
        else:
            _print(answer, as_json=as_json)
            code = answer.code
        raise typer.Exit(code)

    # typer reads the parameters from here; it would otherwise follow the link to the body, which lacks the shared ones.
    signature = inspect.signature(body, eval_str=True)
    parameters = [*signature.parameters.values(), _JSON, _TRACEBACK]
    del command.__wrapped__
    command.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def _print(answer: Answer, *, as_json: bool) -> None:
    try:
        if as_json:
            sys.stdout.write(json.dumps(answer.document, indent=2, default=str) + "\n")
        else:
            answer.show(Page())
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):
        # Whoever read has seen enough, as `head` does, which rich would end the process for; the flush at exit must
        # not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(error: Exception, *, as_json: bool, show_traceback: bool) -> None:
    if show_traceback:
        traceback.print_exception(error)
    if as_json:
        sys.stderr.write(json.dumps(error_document(error)) + "\n")
        return
    said = error_document(error)
    message = said["message"] if isinstance(error, MilepostError) else f"{said['error']}: {said['message']}"
    lines = [f"milepost: {plain(message)}", *map(plain, said["notes"])]
    sys.stderr.write("\n".join(lines) + "\n")
