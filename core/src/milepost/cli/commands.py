"""The commands: what each takes, what it finds out, and how that is shown.

The rule: a command decides nothing about checkpoints; it asks the engine. Each returns its whole answer before anything
is printed, so that with `--json` there is one document or none.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milepost import plugins as plugins_module
from milepost.attempts import DAY
from milepost.cli.answers import BAD_NEWS, FINE, Answer, answering
from milepost.cli.copying import cp
from milepost.cli.describing import checkpoint_bytes, item_document, manifest_document, row_cells, rows, when
from milepost.cli.doctoring import doctor
from milepost.cli.exporting import export, import_
from milepost.cli.printing import size_text
from milepost.cli.verdicts import verified
from milepost.engine import sweeping
from milepost.engine.reading import Entry, choose_item, list_checkpoints, open_checkpoint
from milepost.errors import PluginWarning
from milepost.metadata.metrics import from_stored
from milepost.routes import explain as explained
from milepost.urls import join, locate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from milepost.cli.printing import Page
    from milepost.manifest import Item, Manifest
    from milepost.plugins import Claim, Problem
    from milepost.protocols import Leftover

__all__ = ["build"]

_AGE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

Root = Annotated[str, typer.Argument(help="A folder or URL with checkpoints below it.", show_default=False)]
Path = Annotated[str, typer.Argument(help="The path or URL of a checkpoint.", show_default=False)]


def _tell_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it
    if wanted:
        typer.echo(f"milepost {importlib.metadata.version('milepost-core')}")
        raise typer.Exit


def build() -> typer.Typer:
    """Return the application."""
    app = typer.Typer(
        name="milepost",
        help="Look at checkpoints, check them, and clear up after saves that died.",
        epilog="Exit codes: 0 fine, 1 damaged or broken, 2 wrong use or nothing there, 3 storage or plugin trouble.",
        add_completion=False,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
    )
    app.callback()(_about)
    for body in (ls, show, verify, cp, export, explain, doctor, plugins, sweep):
        app.command()(answering(body))
    app.command("import")(answering(import_))
    return app


def _about(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version, and exit.", is_eager=True, callback=_tell_version)
    ] = False,
) -> None:
    pass


# --- ls --------------------------------------------------------------------------------------------------------------


def ls(
    root: Root,
    *,
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Also list what unfinished saves and deletions left behind.")
    ] = False,
) -> Answer:
    """List the checkpoints directly below a root.

    For each: its name, when it was committed (UTC), the bytes of its files, the number of leaves and its items. One
    that cannot be read is listed with the reason, and the exit code is 1.
    """
    url = locate(root)
    entries = list_checkpoints(url)
    left = sweeping.leftovers(url) if everything else None
    document: dict[str, Any] = {"root": url, "checkpoints": [_entry_document(url, entry) for entry in entries]}
    if left is not None:
        document["leftovers"] = [_leftover_document(one) for one in left]
    bad = any(entry.manifest is None for entry in entries)

    def shown(page: Page) -> None:
        if entries:
            page.table(map(_entry_cells, entries), head=("name", "committed", "size", "leaves", "items"), indent=0)
        else:
            page.line(f"no checkpoints directly below {url}")
        if left is not None:
            page.line()
            _show_leftovers(page, left)

    return Answer(document, shown, BAD_NEWS if bad else FINE)


def _entry_document(root: str, entry: Entry) -> dict[str, Any]:
    document: dict[str, Any] = {"name": entry.name, "url": join(root, entry.name)}
    if entry.manifest is None:
        return {**document, "error": str(entry.error)}
    manifest = entry.manifest
    return {
        **document,
        "committed": when(manifest.commit_timestamp_nsecs),
        "layout": entry.layout or "milepost",
        "bytes": checkpoint_bytes(manifest, entry.layout),
        "items": sorted(manifest.items),
        "leaves": _count_leaves(manifest),
        "error": None,
    }


def _count_leaves(manifest: Manifest) -> int:
    return sum(len(item.leaves) for item in manifest.items.values())


def _entry_cells(entry: Entry) -> tuple[object, ...]:
    if entry.manifest is None:
        return entry.name, "unreadable", "", "", entry.error
    manifest = entry.manifest
    size, names = size_text(checkpoint_bytes(manifest, entry.layout)), ", ".join(sorted(manifest.items))
    return entry.name, when(manifest.commit_timestamp_nsecs) or "?", size, _count_leaves(manifest), names


# --- show ------------------------------------------------------------------------------------------------------------


def show(
    path: Path,
    *,
    item: Annotated[str | None, typer.Option(help="Show this item alone.", show_default=False)] = None,
    max_leaves: Annotated[
        int, typer.Option(min=0, help="Print so many leaves of an item and so many files; 0 for all of them.")
    ] = 200,
) -> Answer:
    """Show what is in a checkpoint: its tree, shapes, dtypes, bytes, who wrote it, and when.

    Reads the manifest alone. With --json every leaf and every file is in the document, whatever --max-leaves says.
    """
    checkpoint = open_checkpoint(path)
    manifest = checkpoint.manifest
    items = dict(manifest.items)
    if item is not None:
        items = dict([choose_item(manifest, item, checkpoint.url)])
    document = {
        "url": checkpoint.url,
        **manifest_document(manifest, checkpoint.layout),
        "items": {name: item_document(one) for name, one in items.items()},
    }

    def shown(page: Page) -> None:
        _show_head(page, document)
        for name, one in items.items():
            _show_item(page, name, one, document["items"][name], max_leaves)
        if checkpoint.foreign:
            page.line()
            page.line(f"files: laid out by {checkpoint.layout!r}, not listed one by one")
        else:
            _show_files(page, document["files"], max_leaves)

    return Answer(document, shown)


def _show_head(page: Page, document: dict[str, Any]) -> None:
    page.line(document["url"], "bold")
    by = ", ".join(f"{key} {value}" for key, value in document["written_by"].items())
    page.table(
        [
            ("committed", _committed_text(document)),
            ("written by", by),
            ("attempt", document["attempt"]),
            ("format", f"version {document['format_version']}"),
            ("size", _size_text(document)),
            *([("metrics", from_stored(document["metrics"]))] if document["metrics"] else []),
            *([("metadata", document["custom_metadata"])] if document["custom_metadata"] else []),
        ]
    )


def _committed_text(document: dict[str, Any]) -> str:
    if None in (document["committed"], document["began"]) or not document["seconds"]:
        return document["committed"] or "at an unknown time"
    return f"{document['committed']}, {document['seconds']:.1f} seconds after the save began"


def _size_text(document: dict[str, Any]) -> str:
    if document["layout"] != "milepost":
        return f"{size_text(document['bytes'])} of arrays and other items, as they are in memory"
    return f"{size_text(document['bytes'])} in {_counted(len(document['files']), 'file')}"


def _show_item(page: Page, name: str, item: Item, document: dict[str, Any], most: int) -> None:
    page.line()
    if not item.writer:
        page.line(f"item {name!r}: files of its own, written by {item.handler or 'somebody who gave no name'}", "bold")
        return
    count = _counted(len(item.leaves), "leaf", "leaves")
    page.line(f"item {name!r}: {count}, {size_text(document['bytes'])} of arrays, written by {item.writer!r}", "bold")
    cells, leaves = [], 0
    for row in rows(item):
        leaves += row.leaf is not None
        if most and leaves > most:
            break
        cells.append(row_cells(row, item))
    page.table(cells)
    if most and len(item.leaves) > most:
        page.line(
            f"  ... and {_counted(len(item.leaves) - most, 'more leaf', 'more leaves')}: --max-leaves 0 shows all"
        )


def _show_files(page: Page, files: list[dict[str, Any]], most: int) -> None:
    page.line()
    page.line("files", "bold")
    shown = files[:most] if most else files
    page.table((file["path"], size_text(file["size"]), file["checksum"] or "no checksum") for file in shown)
    if len(files) > len(shown):
        page.line(f"  ... and {_counted(len(files) - len(shown), 'more file')}: --max-leaves 0 shows all")


def _counted(count: int, word: str, plural: str = "") -> str:
    return f"{count:,} {word if count == 1 else plural or f'{word}s'}"


# --- verify ----------------------------------------------------------------------------------------------------------


def verify(
    paths: Annotated[
        list[str], typer.Argument(help="Checkpoints, or folders with checkpoints below them.", show_default=False)
    ],
) -> Answer:
    """Read every byte of checkpoints, and compare every size and checksum.

    A path with no checkpoint at it stands for all checkpoints directly below it. Names each damaged file and the leaves
    in it; the exit code is then 1. Files that the manifest does not list are mentioned, and no error.
    """
    return verified(paths)


# --- explain ---------------------------------------------------------------------------------------------------------


def explain(
    url: Annotated[str, typer.Argument(help="A path or URL, with something there or not.", show_default=False)],
) -> Answer:
    """Say which storage, commit strategy and array writer serve a URL, who chose them, and what is promised.

    Touches nothing at the URL. The exit code is 1 if a save there could not even begin.
    """
    found = explained(url)
    document = {
        "url": found.url,
        "root": found.root,
        "name": found.name,
        "settings": {one.setting: {"value": one.value, "origin": one.origin} for one in found.choices},
        "storage_class": found.storage_class,
        "commit_promise": found.commit_promise,
        "problems": list(found.problems),
    }

    def shown(page: Page) -> None:
        page.line(found.url, "bold")
        page.table(
            [
                ("root", found.root or "none"),
                ("name", found.name or "none"),
                ("opened by", found.storage_class or "nothing"),
            ]
        )
        page.line()
        page.table([(one.setting, one.value, one.origin) for one in found.choices], head=("setting", "value", "from"))
        page.line()
        page.line(f"promise: {found.commit_promise or 'none, see the problems'}")
        for problem in found.problems:
            page.line(f"problem: {problem}", "red")

    return Answer(document, shown, BAD_NEWS if found.problems else FINE)


# --- plugins ---------------------------------------------------------------------------------------------------------


def plugins() -> Answer:
    """List the packages that join milepost, what they claim, and what is broken and why.

    Imports each of them. The exit code is 1 if one is broken.
    """
    installed = plugins_module.installed()
    problems = installed.problems()
    off = installed.switched_off()
    claims = [claim for group in plugins_module.GROUPS for claim in installed.claims(group)]
    listed = [_claim_document(claim, [one for one in problems if one.claim == claim]) for claim in claims]
    listed += [{**_claim_document(claim, []), "state": "switched off"} for claim in off]
    together = [_problem_text(problem) for problem in problems if problem.claim is None]
    bad = any(not isinstance(problem.error, PluginWarning) for problem in problems)

    def shown(page: Page) -> None:
        cells = (
            [one[key] for key in ("group", "name", "distribution", "version", "module", "state")] for one in listed
        )
        page.table(cells, head=("group", "name", "package", "version", "module", "state"), indent=0)
        for text in [text for one in listed for text in one["problems"]] + together:
            page.line(f"problem: {text}", "red")

    return Answer({"plugins": listed, "problems": together}, shown, BAD_NEWS if bad else FINE)


def _claim_document(claim: Claim, problems: list[Problem]) -> dict[str, Any]:
    broken = any(not isinstance(problem.error, PluginWarning) for problem in problems)
    return {
        "group": claim.group,
        "name": claim.name,
        "distribution": claim.distribution,
        "version": claim.version,
        "module": claim.value,
        "state": "broken" if broken else "in part" if problems else "fine",
        "problems": [_problem_text(problem) for problem in problems],
    }


def _problem_text(problem: Problem) -> str:
    cause = problem.error.__cause__
    said = [str(problem.error)]
    if cause is not None and str(cause) not in said[0]:
        said.append(f"{type(cause).__name__}: {cause}")
    return "; ".join([*said, *getattr(problem.error, "__notes__", ())])


# --- sweep -----------------------------------------------------------------------------------------------------------


def _age(text: object) -> float:
    found = _AGE.fullmatch(str(text).strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no age: write 90s, 30m, 24h or 7d")
    return float(found["number"]) * _SECONDS[found["unit"]]


def sweep(
    root: Root,
    *,
    older_than: Annotated[
        float,
        typer.Option(
            parser=_age,
            metavar="AGE",
            show_default="24h",
            help="The age from which a save counts as dead, wherever it runs: 90s, 30m, 24h, 7d.",
        ),
    ] = DAY,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is dead; without this, only list it.")] = False,
) -> Answer:
    """List what unfinished saves, deletions and uploads left below a root, and remove what is dead.

    Committed checkpoints are never touched, nor is a save that may still be alive. Without --yes nothing is changed.
    """
    url = locate(root)
    found = sweeping.leftovers(url, older_than=older_than)
    removed = {one.prefix for one in sweeping.sweep(url, older_than=older_than)} if yes else set()
    listed = [{**_leftover_document(one), "removed": one.prefix in removed} for one in found]
    document = {"root": url, "older_than_seconds": older_than, "dry_run": not yes, "leftovers": listed}
    dead = Counter(one.dead for one in found)[True]

    def shown(page: Page) -> None:
        _show_leftovers(page, found, removed)
        if yes:
            page.line(f"removed {len(removed)} of {dead} that were dead")
        elif dead:
            page.line(f"nothing was removed: --yes removes the {dead} that {'is' if dead == 1 else 'are'} dead")

    return Answer(document, shown)


def _leftover_document(one: Leftover) -> dict[str, Any]:
    return {"prefix": one.prefix, "name": one.name, "attempt": one.attempt, "dead": one.dead, "reason": one.reason}


def _show_leftovers(page: Page, found: list[Leftover], removed: Iterable[str] = ()) -> None:
    if not found:
        page.line("no leftovers")
        return
    states = ("removed" if one.prefix in removed else "dead" if one.dead else "kept" for one in found)
    cells = ((one.prefix, one.name, state, one.reason) for one, state in zip(found, states, strict=True))
    page.table(cells, head=("leftover", "of", "state", "because"), indent=0)
