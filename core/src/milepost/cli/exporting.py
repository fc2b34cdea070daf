"""What `milepost export` and `milepost import` do: a tree goes to programs that know no checkpoints, or comes from one.

The rule: the commands decide nothing but how rules and sizes are typed; what is left out, and what may be replaced, the
engine says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from milepost.cli.answers import Answer
from milepost.cli.copying import copied_answer
from milepost.cli.printing import size_text
from milepost.cli.verdicts import progress_bars
from milepost.engine.choosing import Selection
from milepost.engine.copying import Copy, CopyRequest
from milepost.engine.exporting import ExportRequest
from milepost.engine.exporting import export as exported
from milepost.engine.renaming import Rule, nested, renamed
from milepost.errors import ConfigError, noted
from milepost.structure import leaf_paths
from milepost.urls import locate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milepost.cli.printing import Page
    from milepost.engine.exporting import Exported
    from milepost.manifest import Item

__all__ = ["export", "import_"]

_Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="REGEX=REPLACEMENT",
        help="Rename: what the regular expression matches in a name becomes the replacement; may be repeated.",
        show_default=False,
    ),
]


def _rule(text: str) -> Rule:
    r"""Read a rule; a regular expression may hold "=", so that the last one counts.

    >>> _rule(r"(?<=\.)kernel$=weight")
    Rule(pattern='(?<=\\.)kernel$', replacement='weight')
    """
    pattern, equals, replacement = text.rpartition("=")
    if not (pattern and equals):
        raise noted(ConfigError(f"cannot rename by {text!r}: it is no rule"), "write REGEX=REPLACEMENT")
    return Rule(pattern, replacement)


def export(  # noqa: PLR0913 - one for each option
    path: Annotated[str, typer.Argument(help="The path or URL of a checkpoint, of any format.", show_default=False)],
    *,
    to: Annotated[str, typer.Option(metavar="DIR", help="The folder that is made.", show_default=False)],
    item: Annotated[str | None, typer.Option(help="Export this item.", show_default=False)] = None,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The most bytes in one file: 5GB, 512MiB.")] = "5GB",
    rules: _Rules = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Export these leaves alone, such as 'params/**'.", show_default=False),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Do not export these leaves.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that holds nothing but safetensors files.")
    ] = False,
) -> Answer:
    """Write a tree as a folder of safetensors files with an index, as Hugging Face lays them out.

    Names are the keys of a path joined by dots. Arrays and numbers are written; strings, bytes and None have no place
    in such files and are listed. What was written is read back; the folder appears whole, or not at all.
    """
    with progress_bars() as progress:
        request = ExportRequest(
            path,
            to,
            item="AUTO" if item is None else item,
            options={"shard_size": shard_size},
            rules=[_rule(text) for text in rules or ()],
            selection=Selection(tuple(include or ()), tuple(exclude or ())),
            overwrite=overwrite,
            progress=progress,
        )
        done = exported(request)
    return _exported_answer(done)


def _exported_answer(done: Exported) -> Answer:
    size = sum(file.size for file in done.files)
    document = {
        "source": done.source,
        "target": done.url,
        "item": done.item,
        "tensors": done.tensors,
        "tensor_bytes": done.data_bytes,
        "files": [{"path": file.path, "size": file.size, "checksum": file.checksum} for file in done.files],
        "left_out": list(done.left_out),
    }

    def shown(page: Page) -> None:
        count = f"{len(done.files)} file{'' if len(done.files) == 1 else 's'}, {size_text(size)}"
        tensors = f"{done.tensors:,} tensor{'' if done.tensors == 1 else 's'}"
        page.line(f"exported: item {done.item!r} of {done.source}", "green")
        page.line(f"to: {done.url}: {tensors} in {count}, read back and compared")
        for path in done.left_out:
            page.line(f"  left out: {path} is no array and no number")

    return Answer(document, shown)


def import_(
    path: Annotated[str, typer.Argument(help="A folder of safetensors files.", show_default=False)],
    *,
    to: Annotated[str, typer.Option(metavar="PATH", help="The checkpoint that is made.", show_default=False)],
    rules: _Rules = None,
    nest: Annotated[
        str | None,
        typer.Option(metavar="SEPARATOR", help="Split names into nested dicts, such as at '.'.", show_default=False),
    ] = None,
    arrays: Annotated[
        str | None, typer.Option(metavar="NAME", help="The array writer of the checkpoint.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
) -> Answer:
    """Make a checkpoint of a folder of safetensors files.

    The tree is a dict from names to arrays, or with --nest dicts within dicts. Nothing is held in memory that need not
    be, and what was written is read back before the checkpoint appears.
    """
    url, given = locate(path), [_rule(text) for text in rules or ()]

    def rename(_name: str, item: Item) -> tuple[Any, Sequence[int]]:
        names = renamed(list(leaf_paths(item.structure)), given, url)
        return nested(list(names.values()), nest, url)

    with progress_bars() as progress:
        request = CopyRequest(
            path, to, arrays, overwrite=overwrite, rename=rename if given or nest else None, progress=progress
        )
        done = Copy(request).run()
    return copied_answer(done)
