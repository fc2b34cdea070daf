"""How a save goes, from the caller's tree to a checkpoint that exists.

The rule: everything that can be refused is refused before a byte is written; whatever fails before the commit point
leaves no checkpoint and removes what it wrote; nothing after the commit point can turn success into failure.

    prepare    resolve the route, take the trees apart, refuse what cannot be saved
    begin      one host looks whether the name is free, and opens an attempt
    snapshot   what the caller does from here on changes nothing
    write      every host writes its boxes; one host then what else the format of the arrays needs
    commit     one host writes the manifest: the checkpoint exists
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import platform
import threading
import time
from typing import TYPE_CHECKING, Any

from milepost import manifest as manifests
from milepost.attempts import new_attempt
from milepost.engine.budgets import automatic_budget
from milepost.engine.collecting import resting_collector
from milepost.engine.items import OwnFiles, OwnItem, TreeItem
from milepost.engine.pieces import Budget, Plan, Planner, chunks_of
from milepost.engine.progress import Progress, Progressing, log_seconds
from milepost.engine.recording import RecordingStorage, recording
from milepost.errors import AbortedError, AlreadyExistsError, NotFoundError, RequestError, StorageError, noted
from milepost.hookspecs import CheckpointEvent
from milepost.hosts import OneHost
from milepost.manifest import FileEntry, Item, Manifest
from milepost.plugins import Plugins, installed
from milepost.protocols import (
    COMMIT_OBJECT,
    ArrayIO,
    CompletesCheckpoints,
    Hosts,
    Json,
    Location,
    Staging,
    WriteOptions,
)
from milepost.routes import OpenRoute, open_route, resolve, taken_options

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    from milepost.trees import Taken

__all__ = ["Save", "SaveRequest"]

_logger = logging.getLogger("milepost")


@dataclasses.dataclass(frozen=True, slots=True)
class SaveRequest:
    """What to save, under which name: items by name, and what the caller wants noted about them.

    `progress` is called with the bytes written so far and the bytes there are, from any thread.
    """

    path: str | os.PathLike[str]
    items: Mapping[str, TreeItem[Any] | OwnItem]
    overwrite: bool = False
    custom_metadata: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None
    progress: Progress | None = None


@dataclasses.dataclass(slots=True)
class _Clock:
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - began


class _Tree:
    """What the manifest says of a tree, without the arrays."""

    def __init__(self, item: TreeItem[Any], taken: Taken) -> None:
        self.handler, self.custom_metadata, self.flat = item.handler, item.custom_metadata, item.flat
        self.wishes = item.wishes
        self.structure = taken.structure
        self.types = taken.types
        self.jsons = [parts.json for parts in taken.parts]


class Save:
    """One save under way. `prepare` first; then `finish`, on any thread."""

    def __init__(self, request: SaveRequest, *, hosts: Hosts | None = None, plugins: Plugins | None = None) -> None:
        self._request = request
        self._hosts = hosts or OneHost()
        self._plugins = plugins or installed()
        self._clock = _Clock()
        self._own: dict[str, OwnFiles] = {}
        self._cancelled = threading.Event()

    def prepare(self, *, lasting: bool) -> Callable[[], None]:
        """Refuse what cannot be saved, and begin; return what completes the snapshot.

        With `lasting`, the caller goes on once the snapshot is complete, while `finish` still runs.
        """
        self._lasting = lasting
        with resting_collector():
            self._prepare()
        self._tell("save_started")
        return self._snapshot

    def _prepare(self) -> None:
        with self._clock.phase("prepare"):
            self._hosts.together("prepare", self._refuse)
        with self._clock.phase("begin"):
            self._began = time.time_ns()
            self._attempt = self._hosts.decide("begin", self._begin)
        with self._clock.phase("snapshot"):
            self._hosts.together("plan", self._plan)

    def _refuse(self) -> None:
        self._open = open_route(resolve(self._request.path, self._plugins, writing=True), self._plugins)
        self._custom_metadata = _plain_json(self._request.custom_metadata, "custom_metadata")
        self._metrics = _plain_json(self._request.metrics, "metrics")
        self._writers: dict[str, ArrayIO] = {}
        self._arrays = self._array_writer({})
        self._take_apart()

    def _take_apart(self) -> None:
        from milepost.trees import handlers_of, take_apart  # brings JAX, which copying does without

        trees = {name: item for name, item in self._request.items.items() if isinstance(item, TreeItem)}
        for name, item in trees.items():
            _plain_json(item.custom_metadata, f"custom_metadata of item {name!r}")
            if item.options:
                self._writers[name] = self._array_writer(item.options)
        self._taken = {name: take_apart(item.tree, handlers_of(self._plugins)) for name, item in trees.items()}
        self._trees = {name: _Tree(item, self._taken[name]) for name, item in trees.items()}

    def _array_writer(self, options: Mapping[str, Any]) -> ArrayIO:
        route = self._open.route
        factory = self._plugins.arrays(route.arrays)
        writer: ArrayIO = factory(**{**route.arrays_options, **taken_options(factory, options)})
        return writer

    def _writer(self, name: str) -> ArrayIO:
        return self._writers.get(name, self._arrays)

    def _plan(self) -> None:
        route = self._open.route
        self._options = WriteOptions(route.save_budget or automatic_budget(lasting=False), route.threads)
        self._plans = {}
        for name, taken in self._taken.items():
            budget = Budget(lambda: route.save_budget or automatic_budget(lasting=self._lasting), route.threads)
            arrays = [parts.arrays for parts in taken.parts]
            planner = Planner(self._hosts, budget, lasting=self._lasting, chunk=chunks_of(self._writer(name)))
            self._plans[name] = planner.plan_all(taken.names, arrays, self._trees[name].wishes)
        self._begin_own()
        # From here on only the plans refer to arrays, so that each can go as soon as it is written or copied.
        self._taken = {}
        self._request = dataclasses.replace(self._request, items={})

    def _begin_own(self) -> None:
        try:
            for name, item in self._request.items.items():
                if isinstance(item, OwnItem):
                    self._own[name] = OwnFiles(item)
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        for plan in self._plans.values():
            plan.close()
        for own in self._own.values():
            own.close()
        self._plans, self._own = {}, {}

    def _snapshot(self) -> None:
        began = time.perf_counter()
        for plan in self._plans.values():
            plan.snapshot()
        self._clock.seconds["snapshot"] += time.perf_counter() - began

    def _begin(self) -> str:
        route = self._open.route
        if not self._request.overwrite and _is_taken(self._open):
            raise noted(
                AlreadyExistsError(f"cannot save {route.url!r}: a checkpoint is there already"),
                "choose another name, or pass overwrite=True to replace it",
            )
        return new_attempt()

    def cancel(self) -> None:
        """Have `finish` end with `AbortedError`, as any failed save does, unless it is at the commit point already."""
        self._cancelled.set()

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise AbortedError(f"cannot save {self._open.route.url!r}: the save was cancelled")

    def finish(self) -> Manifest:
        """Write, and commit. On any failure what was written is removed, and nothing else has changed."""
        storage, strategy = self._open.storage, self._open.commit
        staging: Staging | None = None
        try:
            with self._clock.phase("write"):
                staging = Staging(
                    **self._hosts.decide(
                        "stage",
                        lambda: dataclasses.asdict(strategy.stage(storage, self._open.route.name, self._attempt)),
                    )
                )
                manifest = self._write(staging)
            with self._clock.phase("commit"):
                self._commit(staging, manifest)
        except BaseException as error:
            self._abandon(staging)
            self._tell("save_failed", error=error)
            raise
        finally:
            self._close()
        self._tell("save_committed", size=manifest.data_bytes)
        log_seconds("saved", self._open.route.url, manifest.data_bytes, self._clock.seconds)
        return manifest

    def _write(self, staging: Staging) -> Manifest:
        storage = recording(self._open.storage, staging.prefix, staging.data, self._progress())
        manifest = self._manifest(self._write_items(staging, storage))
        self._complete(manifest, staging, storage)
        answers = self._hosts.together("files", lambda: [dataclasses.asdict(file) for file in storage.files()])
        return dataclasses.replace(manifest, files=tuple(FileEntry(**file) for files in answers for file in files))

    def _write_items(self, staging: Staging, storage: RecordingStorage) -> dict[str, Item]:
        items = {name: self._write_tree(name, plan, staging, storage) for name, plan in self._plans.items()}
        return items | {name: self._write_own(name, own, staging, storage) for name, own in self._own.items()}

    def _write_tree(self, name: str, plan: Plan, staging: Staging, storage: RecordingStorage) -> Item:
        location = self._location(storage, staging, _folder(name, flat=self._trees[name].flat))
        writer = self._writer(name)
        self._hosts.decide(f"create {name}", functools.partial(writer.create, location, plan.specs))
        write = functools.partial(writer.write, location, plan.pieces, self._options)
        return self._item(name, plan, staging, self._hosts.together(f"write {name}", write))

    def _write_own(self, name: str, own: OwnFiles, staging: Staging, storage: RecordingStorage) -> Item:
        folder = _folder(name, flat=own.flat)
        self._hosts.together(f"write {name}", functools.partial(own.store, storage, f"{staging.prefix}{folder}"))
        return Item(None, [], [], "", f"{staging.data}{folder}", [], own.handler)

    def _complete(self, manifest: Manifest, staging: Staging, storage: RecordingStorage) -> None:
        writer, location = self._arrays, self._location(storage, staging, "")
        if isinstance(writer, CompletesCheckpoints):
            document = manifests.to_document(manifest)
            for item in document["items"].values():
                item["prefix"] = item["prefix"].removeprefix(staging.data)
            self._hosts.decide("complete", functools.partial(writer.complete, location, document))

    def _progress(self) -> Callable[[int], object]:
        progress = self._request.progress
        if progress is None:
            return lambda _: self._check_cancelled()
        total = Progressing(progress, sum(plan.data_bytes for plan in self._plans.values()))

        def add(size: int) -> None:
            self._check_cancelled()
            total.add(size)

        return add

    def _location(self, storage: RecordingStorage, staging: Staging, folder: str) -> Location:
        prefix = f"{staging.prefix}{folder}"
        return Location(storage, prefix, f"{storage.url}/{prefix}", self._hosts.index, self._hosts.count)

    def _item(self, name: str, plan: Plan, staging: Staging, records: list[Any]) -> Item:
        taken = self._trees[name]
        with resting_collector():
            leaves = [
                {"type": kind, **json, "arrays": arrays} if arrays else {"type": kind, **json}
                for kind, json, arrays in zip(taken.types, taken.jsons, plan.arrays, strict=True)
            ]
        return Item(
            structure=taken.structure,
            leaves=leaves,
            shardings=plan.shardings,
            writer=self._open.route.arrays,
            prefix=f"{staging.data}{_folder(name, flat=taken.flat)}",
            records=records,
            handler=taken.handler,
            custom_metadata=None if taken.custom_metadata is None else dict(taken.custom_metadata),
        )

    def _manifest(self, items: Mapping[str, Item]) -> Manifest:
        return Manifest(
            attempt=self._attempt,
            init_timestamp_nsecs=self._began,
            commit_timestamp_nsecs=time.time_ns(),
            written_by=_written_by(self._hosts.count),
            items=items,
            files=(),
            custom_metadata=self._custom_metadata,
            metrics=self._metrics,
        )

    def _commit(self, staging: Staging, manifest: Manifest) -> None:
        def publish() -> None:
            self._check_cancelled()
            with resting_collector():
                body = manifests.encode(manifest)
            self._open.commit.publish(self._open.storage, staging, body, overwrite=self._request.overwrite)

        self._hosts.decide("commit", publish)

    def _abandon(self, staging: Staging | None) -> None:
        if staging is None or self._hosts.index != 0:
            return
        try:
            self._open.commit.abandon(self._open.storage, staging)
        except Exception:
            _logger.warning("could not remove what the failed save of %s wrote", self._open.route.url, exc_info=True)

    def _tell(self, hook: str, *, size: int = 0, error: BaseException | None = None) -> None:
        if self._hosts.index == 0:
            url = self._open.route.url
            self._plugins.tell(hook, CheckpointEvent(url, self._attempt, size, dict(self._clock.seconds), error))


def _folder(name: str, *, flat: bool) -> str:
    return "" if flat else f"{name}/"


def _is_taken(route: OpenRoute) -> bool:
    try:
        route.storage.size(f"{route.route.name}/{COMMIT_OBJECT}")
    except NotFoundError:
        return False
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            return True
        raise
    return True


def _plain_json(value: Mapping[str, Any] | None, what: str) -> Json:
    """Return a copy of what JSON can hold, or raise at once what would otherwise be raised at the commit."""
    if value is None:
        return None
    if any(not isinstance(key, str) for key in value):
        raise _JsonError(f"cannot save {what} {value!r:.200}: its keys must be strings")
    try:
        plain: Json = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise _JsonError(f"cannot save {what} {value!r:.200}: {error}") from error
    return plain


class _JsonError(RequestError, ValueError, TypeError):
    """What the reference raises as the one or the other."""


def _written_by(hosts: int) -> dict[str, Any]:
    version = importlib.metadata.version("milepost-core")
    return {"milepost": version, "python": platform.python_version(), "host": platform.node(), "hosts": hosts}
