"""Whether a root can be trusted with checkpoints: every property is probed there, and nothing is left.

This module decides how much a missing property matters. The rule: it is a failure if the commit strategy of the root
stands on it, or every reader; what another strategy would need is a warning. All probes work below one prefix, which is
called like an attempt to save, so that a sweep removes what a probe leaves that was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Literal, TypeAlias

from milepost import urls
from milepost.attempts import new_attempt
from milepost.engine.probing import BASIC, PROBES, Place, Probe, SeenError, UnsureError
from milepost.errors import MilepostError, StorageDeniedError, StorageFullError
from milepost.plugins import Plugins, installed
from milepost.protocols import (
    CreatesOnly,
    ExchangesPrefixes,
    FindsUploads,
    KeepsFolders,
    RenamesPrefixes,
    ReplacesObjects,
    Storage,
)
from milepost.routes import open_route, resolve

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from milepost.protocols import CommitStrategy

__all__ = ["SIZE", "Finding", "Verdict", "doctor"]

Verdict: TypeAlias = Literal["ok", "warning", "failed", "skipped"]

SIZE = 40 << 20
"""The bytes of a large object: more than two parts of an upload have, unless they are told to be larger."""

_NAME = "milepost-doctor"
_CLIENTS = 6
_LAST = "nothing left behind"
_SWEEP = "milepost sweep --yes removes it once this process has ended"


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about one property: `means` says what it is good for or what was seen, `remedy` what to do."""

    check: str
    verdict: Verdict
    means: str
    remedy: str = ""


def doctor(
    path: str | os.PathLike[str],
    *,
    size: int = SIZE,
    plugins: Plugins | None = None,
    told: Callable[[str], object] = lambda _: None,
) -> list[Finding]:
    """Probe what checkpoints below a root need of their storage; leave nothing there, also when interrupted.

    `size` is that of a large object, which is written some times. `told` is called with the name of each probe before
    it. Raises `ConfigError` and `PluginError` for a root that cannot be opened.
    """
    plugins = plugins or installed()
    url = urls.join(urls.locate(path), "_")
    opened = [open_route(resolve(url, plugins, writing=True), plugins) for _ in range(_CLIENTS)]
    strategy = opened[0].commit
    place = Place(tuple(one.storage for one in opened), _prefix(strategy), size)
    findings: list[Finding] = []
    with _folders_kept(place.writer):
        try:
            for probe in PROBES:
                told(probe.name)
                findings.append(_finding(probe, place, strategy, findings))
        finally:
            findings.append(_cleaned(place))
    return findings


def _prefix(strategy: CommitStrategy) -> str:
    """Return a prefix that nobody else has, and that a sweep takes for that of an attempt to save."""
    attempt = new_attempt()
    if RenamesPrefixes in strategy.needs:
        return f"{_NAME}.orbax-checkpoint-tmp-{attempt}/"
    return f"{_NAME}/{attempt}/"


# --- one finding -----------------------------------------------------------------------------------------------------


def _finding(probe: Probe, place: Place, strategy: CommitStrategy, before: list[Finding]) -> Finding:
    if probe.needs is not None and not isinstance(place.writer, probe.needs):
        return Finding(probe.name, "skipped", probe.without)
    if probe.after and not any(one.check == probe.after and one.verdict == "ok" for one in before):
        return Finding(probe.name, "skipped", f"it stands on {probe.after!r}, which is not ok")
    try:
        said = probe.act(place)
    except UnsureError as error:
        return Finding(probe.name, "warning", str(error), probe.remedy)
    except SeenError as error:
        return Finding(probe.name, _weight(probe, strategy), str(error), probe.remedy)
    except Exception as error:  # noqa: BLE001 - a plugin may raise anything, and the other probes go on
        return Finding(probe.name, _weight(probe, strategy), _text(error), _remedy(error, probe, place))
    return Finding(probe.name, "ok", f"{probe.means} ({said})" if said else probe.means)


def _weight(probe: Probe, strategy: CommitStrategy) -> Verdict:
    stands_on: dict[type | None, type] = {
        CreatesOnly: CreatesOnly,
        ReplacesObjects: CreatesOnly,  # by which `create` overwrites
        RenamesPrefixes: RenamesPrefixes,
        ExchangesPrefixes: RenamesPrefixes,
    }
    if probe.needs is FindsUploads:
        return "warning"  # nothing is lost but room
    needed = stands_on.get(probe.needs)
    return "failed" if needed is None or needed in strategy.needs else "warning"


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, MilepostError) else repr(error)


def _remedy(error: Exception, probe: Probe, place: Place) -> str:
    if isinstance(error, StorageDeniedError) and probe.needs is not FindsUploads:
        return (
            f"grant these credentials permission to list, read, write and delete objects below {place.writer.url}; "
            "without permission to list, some stores also deny what is merely not there"
        )
    if isinstance(error, StorageFullError):
        return "make room"
    if probe.name == BASIC and isinstance(error, MilepostError):
        return "check the URL, the endpoint, the credentials and the network: milepost explain shows what is set"
    notes = "; ".join(getattr(error, "__notes__", ()))
    return notes or probe.remedy


# --- the end ---------------------------------------------------------------------------------------------------------


def _cleaned(place: Place) -> Finding:
    try:
        return _clean(place)
    except BaseException:
        _clean(place)  # whoever interrupts this, too, wants it to end, and not to leave something
        raise


def _clean(place: Place) -> Finding:
    try:
        left = _removed(place)
    except Exception as error:  # noqa: BLE001 - a finding like every other
        return Finding(_LAST, "failed", f"{place.prefix!r} cannot be removed: {_text(error)}", _SWEEP)
    if left:
        return Finding(_LAST, "failed", f"{', '.join(map(repr, left))} is still there", _SWEEP)
    return Finding(_LAST, "ok", "the probes removed what they had written")


def _removed(place: Place) -> list[str]:
    """Remove whatever the probes wrote; return what is there all the same."""
    storage = place.writer
    storage.delete(place.prefix)
    if isinstance(storage, FindsUploads):
        with contextlib.suppress(MilepostError):  # not to be allowed to is a finding of its own
            for upload in list(storage.uploads(place.prefix)):
                storage.abort_upload(upload)
    return [place.prefix + name for name in place.reader.children(place.prefix)]


@contextlib.contextmanager
def _folders_kept(storage: Storage) -> Iterator[None]:
    """Remove the empty folders at the end that a first write made on the way to the root."""
    missing: list[Path] = []
    if isinstance(storage, KeepsFolders):
        root = storage.folder("")
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # somebody has begun to use it
            for folder in missing:
                folder.rmdir()
