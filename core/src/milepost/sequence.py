"""The checkpoints of one training, as a sequence of steps below one root; what stands under both managers.

This module decides which steps there are, when the next may be saved, and which are let go. The rules:

1. A step exists if its commit object does; beside the committed ones at most one is under way. One listing finds the
   names; whether a name is a checkpoint is looked up when it matters, newest first, and what is in it only when a
   policy asks.
2. A step is never replaced unless the caller says so, whoever wrote it.
3. Steps are let go after a commit only, by what is committed then; the newest only where the caller has said so.
4. Deleting happens behind everybody's back: no save waits for it, `wait` and `close` do. What could not be deleted is
   logged, and is still there; the checkpoint that was just committed has not failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import functools
import logging
import threading
import time
from collections.abc import Sequence as AbstractSequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, overload

from milepost import urls
from milepost.decisions import DecisionContext, SaveCosts
from milepost.engine.background import Background, Pending
from milepost.engine.deleting import delete
from milepost.engine.reading import open_checkpoint
from milepost.errors import (
    AlreadyExistsError,
    MilepostError,
    NotFoundError,
    RequestError,
    StepAlreadyExistsError,
    StepNotFoundError,
    noted,
)
from milepost.path._finding import open_root
from milepost.path.step import step_names
from milepost.preemption import reached_sync_point
from milepost.preservation import PreservationContext, to_delete

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    from upath import UPath

    from milepost.decisions import SaveDecisionPolicy
    from milepost.engine.items import OwnItem, TreeItem
    from milepost.engine.progress import Progress
    from milepost.engine.saving import Save
    from milepost.manifest import Manifest
    from milepost.path.step import NameFormat
    from milepost.preservation import PreservationPolicy

__all__ = ["Rules", "Sequence", "Step", "StepRequest"]

_logger = logging.getLogger("milepost")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How a sequence is kept: names, policies, and what becomes of steps that are let go.

    `trash` is a folder below the root into which steps are moved instead of being deleted. With `keep_newest` no policy
    retires the newest step; without it, a warning says once that one did.
    """

    names: NameFormat[Any]
    decide: SaveDecisionPolicy
    preserve: PreservationPolicy
    keep_newest: bool = True
    read_only: bool = False
    trash: str | None = None
    deleting_threads: int = 1
    multiprocessing_options: Any = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest:
    """What to save as a step."""

    items: Mapping[str, TreeItem[Any] | OwnItem]
    metrics: Mapping[str, Any] | None = None
    custom_metadata: Mapping[str, Any] | None = None
    overwrite: bool = False
    progress: Progress | None = None
    committed: Callable[[], object] | None = None


class Step:
    """One step: its number and place; when it was committed, and its metrics, are read when first asked for."""

    def __init__(self, step: int, url: str) -> None:
        self.step = step
        self.url = url
        self._known: tuple[dt.datetime, Any] | None = None

    def know(self, when: dt.datetime, metrics: Any) -> None:
        """Take note of what needs not be read any more."""
        self._known = when, metrics

    @property
    def name(self) -> str:
        """The name of its folder."""
        return urls.parts(self.url)[-1]

    @property
    def path(self) -> UPath:
        """Where it is."""
        from milepost.path._finding import as_path

        return as_path(self.url)

    @property
    def time(self) -> dt.datetime:
        """When it was committed, or for one under way, begun; in UTC."""
        return self._read()[0]

    @property
    def metrics(self) -> Any | None:
        """The metrics it was saved with, if any."""
        return self._read()[1]

    def _read(self) -> tuple[dt.datetime, Any]:
        if self._known is None:
            manifest = open_checkpoint(self.url).manifest
            self._known = _utc(manifest.commit_timestamp_nsecs), manifest.metrics
        return self._known

    def __repr__(self) -> str:
        return f"Step({self.step}, {self.url!r})"


def _utc(nsecs: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(nsecs / 1e9, dt.UTC)


class Sequence:
    """The steps below a root. One object, one user: its methods are called from one thread at a time."""

    def __init__(self, root: str | os.PathLike[str], rules: Rules) -> None:
        self.rules = rules
        self._root = open_root(root)
        self._saves = Background(at_exit=True)
        self._deletions = _Deletions(rules.deleting_threads)
        self._lock = threading.RLock()
        self._under_way: Step | None = None
        now = time.monotonic()
        self._costs = SaveCosts(began=now, now=now)
        self.reload()

    @property
    def url(self) -> str:
        """The root."""
        return self._root.url

    # --- which steps there are ---

    def reload(self) -> None:
        """Look at the storage again, once what is on its way out is gone."""
        self._deletions.wait()
        names = step_names(self.rules.names, self._root)
        with self._lock:
            self._steps = {step: Step(step, urls.join(self.url, found[0])) for step, found in sorted(names.items())}
            self._unproven = names

    def steps(self) -> list[Step]:
        """Return all steps by number, the one under way among them."""
        with self._lock:
            self._prove(sorted(self._unproven))
            found = dict(self._steps)
            if self._under_way is not None:
                found[self._under_way.step] = self._under_way
        return [found[step] for step in sorted(found)]

    def latest(self) -> Step | None:
        """Return the step with the highest number, which may be under way; None without any."""
        with self._lock:
            while self._steps:
                newest = max(self._steps)
                if newest not in self._unproven or self._prove([newest]):
                    break
            under_way = self._under_way
            newest_known = self._steps[max(self._steps)] if self._steps else None
        both = [step for step in (newest_known, under_way) if step is not None]
        return max(both, key=lambda step: step.step, default=None)

    def find(self, step: int) -> Step | None:
        """Return a step; None if there is none of that number."""
        with self._lock:
            if self._under_way is not None and self._under_way.step == step:
                return self._under_way
            if step in self._unproven:
                self._prove([step])
            return self._steps.get(step)

    def get(self, step: int | None) -> Step:
        """Return a step, or with None the newest; raise `StepNotFoundError`, which says what there is."""
        found = self.latest() if step is None else self.find(step)
        if found is None:
            what = "any step" if step is None else f"step {step}"
            raise noted(StepNotFoundError(f"cannot find {what} in {self.url!r}"), *self._near(step))
        return found

    def _near(self, step: int | None) -> Iterator[str]:
        there = [one.step for one in self.steps()]
        if there:
            near = sorted(there, key=lambda one: abs(one - (step or 0)))[:5]
            yield f"there are {len(there)} steps, the newest {there[-1]}; near by: {', '.join(map(str, sorted(near)))}"
        else:
            yield "there are no steps"

    def _prove(self, steps: list[int]) -> list[int]:
        """Look which of some names are checkpoints, and forget those that are none."""
        names = {name: step for step in steps for name in self._unproven.pop(step)}
        proven: dict[int, str] = {}
        for name in self._root.checkpoints(names):
            proven.setdefault(names[name], name)
        for step in steps:
            if step not in proven:
                del self._steps[step]
            elif self._steps[step].name != proven[step]:
                self._steps[step] = Step(step, urls.join(self.url, proven[step]))
        return sorted(proven)

    # --- saving ---

    def should_save(self, step: int) -> bool:
        """Ask the policy about a step that is newer than all there are."""
        if self.rules.read_only:
            return False
        latest = self.latest()
        if latest is not None and latest.step >= step:
            return False
        about = Step(step, urls.join(self.url, self.rules.names.build_name(step)))
        about.know(dt.datetime.now(dt.UTC), None)
        return bool(self.rules.decide.should_save(about, _Previous(self), context=self._context(step)))

    def _context(self, step: int) -> DecisionContext:
        return DecisionContext(
            is_saving_in_progress=self.is_saving(),
            reached_preemption=reached_sync_point(step),
            multiprocessing_options=self.rules.multiprocessing_options,
            costs=self._costs.at(time.monotonic()),
        )

    def is_saving(self) -> bool:
        """Say whether a save is under way."""
        return self._under_way is not None

    def save(self, step: int, request: StepRequest, *, lasting: bool) -> Pending[None]:
        """Save a step, whatever the policy says; with `lasting`, return once the caller may change what is saved.

        Waits for the save before, and raises its failure if nobody has seen it. Raises `StepAlreadyExistsError` for a
        step that exists, unless the request says to replace it.
        """
        from milepost.engine.saving import Save, SaveRequest

        self._check_writable(f"save step {step}")
        began = time.monotonic()
        self._saves.wait()
        path = urls.join(self.url, self.rules.names.build_name(step))
        there = self.find(step)
        if there is not None:
            if not request.overwrite:
                raise _exists(step, self.url)
            path = there.url
        save = Save(
            SaveRequest(
                path, request.items, there is not None, request.custom_metadata, request.metrics, request.progress
            )
        )
        try:
            return self._start(save, Step(step, path), request, lasting=lasting)
        except AlreadyExistsError as error:
            raise _exists(step, self.url) from error
        finally:
            self._costs = self._costs.after(began, time.monotonic())

    def _start(self, save: Save, about: Step, request: StepRequest, *, lasting: bool) -> Pending[None]:
        snapshot = save.prepare(lasting=lasting)
        about.know(dt.datetime.now(dt.UTC), request.metrics)
        self._under_way = about
        pending = self._saves.start(lambda: self._finish(save.finish, about, request), f"the save of step {about.step}")
        if lasting:
            snapshot()
        else:
            pending.result()
        return pending

    def _finish(self, finish: Callable[[], Manifest], about: Step, request: StepRequest) -> None:
        try:
            manifest = finish()
        finally:
            self._under_way = None
        about.know(_utc(manifest.commit_timestamp_nsecs), manifest.metrics)
        with self._lock:
            self._steps[about.step] = about
            self._unproven.pop(about.step, None)
        for what, act in (("callback", request.committed), ("retention", self._retain)):
            try:
                if act is not None:
                    act()
            except Exception:
                _logger.exception("the %s after the commit of step %d failed; the step is safe", what, about.step)

    # --- letting go ---

    def _retain(self) -> None:
        steps = self.steps()
        gone = to_delete(steps, self.rules.preserve, context=PreservationContext(), keep_newest=self.rules.keep_newest)
        if gone and gone[-1] is steps[-1]:
            _warn_of_retiring(self.url)
        for step in gone:
            self._let_go(step)

    def _let_go(self, step: Step) -> Future[None]:
        with self._lock:
            self._steps.pop(step.step, None)
            self._unproven.pop(step.step, None)
        return self._deletions.start(functools.partial(self._remove, step), step)

    def _remove(self, step: Step) -> None:
        if self.rules.trash is None:
            delete(step.url, missing_ok=True)
        else:
            self._root.move(step.name, self.rules.trash)

    def delete(self, step: int) -> None:
        """Delete a step, and wait for it; raise `StepNotFoundError` if there is none of that number."""
        self._check_writable(f"delete step {step}")
        found = self.get(step)
        if found is self._under_way:
            with contextlib.suppress(Exception):
                self._saves.wait()
            found = self.get(step)
        self._let_go(found).result()

    def _check_writable(self, what: str) -> None:
        if self.rules.read_only:
            raise ReadOnlyError(f"cannot {what} in {self.url!r}: it was opened to be read only")

    # --- the end ---

    def check(self) -> None:
        """Raise the failure of a save that has ended, if nobody has seen it."""
        self._saves.check()

    def wait(self) -> None:
        """Wait for the save under way, and for deletions; raise the save's failure if nobody has seen it."""
        try:
            self._saves.wait()
        finally:
            self._deletions.wait()

    def close(self) -> None:
        """Wait, and end; raise the failure of a save that nobody has seen."""
        failure = self._saves.close()
        self._deletions.close()
        if failure is not None:
            raise failure


class ReadOnlyError(RequestError, ValueError):
    """A change that was asked of a sequence which is only read."""


def _exists(step: int, url: str) -> StepAlreadyExistsError:
    return noted(
        StepAlreadyExistsError(f"cannot save step {step} in {url!r}: it is there already"),
        "delete it first, or pass overwrite=True where the call takes it",
    )


@functools.cache
def _warn_of_retiring(url: str) -> None:
    _logger.warning(
        "the options of %s retire the newest step: a training that resumes from the newest goes further back", url
    )


class _Previous(AbstractSequence[Step]):
    """The steps before the one about to be saved, looked up no further than a policy asks."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence

    def __bool__(self) -> bool:
        return self._sequence.latest() is not None

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...
    def __getitem__(self, index: int | slice) -> Step | list[Step]:
        latest = self._sequence.latest() if index == -1 else None
        return self._all[index] if latest is None else latest

    @functools.cached_property
    def _all(self) -> list[Step]:
        return self._sequence.steps()


class _Deletions:
    """Steps on their way out, in threads of their own."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: set[Future[None]] = set()

    def start(self, act: Callable[[], None], step: Step) -> Future[None]:
        """Delete a step soon."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "milepost-delete")
        future = self._pool.submit(act)
        self._under_way.add(future)
        future.add_done_callback(functools.partial(self._ended, step))
        return future

    def _ended(self, step: Step, future: Future[None]) -> None:
        self._under_way.discard(future)
        error = future.exception()
        if error is not None and not isinstance(error, NotFoundError):
            _logger.warning("could not delete %s; it is still there", step.url, exc_info=error)

    def wait(self) -> None:
        """Wait for all of them."""
        for future in list(self._under_way):
            with contextlib.suppress(MilepostError, OSError):
                future.result()

    def close(self) -> None:
        """Wait for all of them, and end."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
