"""The checkpoints of one training, as a sequence of steps below one root; what stands under both managers.

This module decides which steps there are, when the next may be saved, and which are let go. The rules:

1. A step exists if its commit object does; beside the committed ones at most one is under way. One listing finds the
   names; whether a name is a checkpoint is looked up when it matters, newest first, and what is in it only when a
   policy asks.
2. A step is never replaced unless the caller says so, whoever wrote it.
3. Steps are let go after a commit only, by what is committed then; the newest only where the caller has said so.
4. Deleting happens behind everybody's back: no save waits for it, but for the deletion of the very step it saves;
   `wait` and `close` do. What could not be deleted is logged, and is still there; the checkpoint that was just
   committed has not failed.
"""

from __future__ import annotations

import contextlib
import contextvars
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
from milepost.engine.reading import open_ours
from milepost.errors import (
    AbortedError,
    AlreadyExistsError,
    ConfigError,
    MilepostError,
    NotFoundError,
    RequestError,
    StepAlreadyExistsError,
    StepNotFoundError,
    noted,
)
from milepost.metadata.metrics import as_stored, from_stored
from milepost.path._finding import open_root
from milepost.path.step import maybe_find_step_metadata, step_names
from milepost.preemption import reached_sync_point
from milepost.preservation import PreservationContext, to_delete
from milepost.protocols import RenamesPrefixes

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

__all__ = ["ClosedError", "ReadOnlyError", "Rules", "Sequence", "Step", "StepRequest"]

_logger = logging.getLogger("milepost")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How a sequence is kept: names, policies, and what becomes of steps that are let go.

    `trash` is a folder below the root into which steps are moved instead of being deleted. With `keep_newest` no policy
    retires the newest step; without it, a warning says once that one did. Without `tell_of_saves`, the policy that
    decides is not told that a save is in progress.
    """

    names: NameFormat[Any]
    decide: SaveDecisionPolicy
    preserve: PreservationPolicy
    keep_newest: bool = True
    read_only: bool = False
    tell_of_saves: bool = True
    trash: str | None = None
    deleting_threads: int = 1
    multiprocessing_options: Any = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest:
    """What to save as a step; `metrics` are what `milepost.metadata.metrics` can keep, `committed` is called after.

    Without `keep_metrics` the metrics are known to policies of this process, and not written.
    """

    items: Mapping[str, TreeItem[Any] | OwnItem]
    metrics: Any = None
    keep_metrics: bool = True
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
            found = open_ours(self.url)
            if found is None:
                self._known = _of_the_reference(self)
            else:
                manifest = found.manifest
                self._known = _utc(manifest.commit_timestamp_nsecs), from_stored(manifest.metrics)
        return self._known

    def __repr__(self) -> str:
        return f"Step({self.step}, {self.url!r})"


def _utc(nsecs: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(nsecs / 1e9, dt.UTC)


def _of_the_reference(step: Step) -> tuple[dt.datetime, Any]:
    """Return time and metrics of a step that another program committed, from where the reference keeps them."""
    from milepost.metadata.store import read_document
    from milepost.path.step import Metadata

    return Metadata(step.step, step.path).commit_timestamp, read_document(urls.join(step.url, "metrics/metrics"))


class Sequence:
    """The steps below a root. One object, one user: its methods are called from one thread at a time."""

    def __init__(self, root: str | os.PathLike[str], rules: Rules) -> None:
        self.rules = rules
        self._root = open_root(root)
        if rules.trash is not None and not isinstance(self._root.storage, RenamesPrefixes):
            raise ConfigError(
                f"cannot keep deleted steps in {rules.trash!r}: {self.url!r} is on no storage that renames"
            )
        self._saves = Background(at_exit=True)
        self._deletions = _Deletions(rules.deleting_threads)
        self._lock = threading.RLock()
        self._under_way: Step | None = None
        self._saving: tuple[Save, Pending[None]] | None = None
        self._steps: dict[int, Step] = {}
        self._unproven: dict[int, list[str]] = {}
        self._closed = False
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
        with self._lock:
            before = set(self._steps)
        names = step_names(self.rules.names, self._root)
        with self._lock:
            # A save may have been committed, and steps let go, while the listing was under way.
            since = {number: step for number, step in self._steps.items() if number not in before}
            gone = before - set(self._steps)
            self._unproven = {step: found for step, found in names.items() if step not in since and step not in gone}
            listed = {step: Step(step, urls.join(self.url, found[0])) for step, found in self._unproven.items()}
            self._steps = listed | since

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
        found = self.latest() if step is None else self.find(step) or self._look(step)
        if found is None:
            what = "any step" if step is None else f"step {step}"
            raise noted(StepNotFoundError(f"cannot find {what} in {self.url!r}"), *self._near(step))
        return found

    def committed(self, step: int | None) -> Step:
        """Return what `get` does, once it is committed; raise the failure of a save, if nobody has seen it."""
        self._saves.check()
        found = self.get(step)
        if found is self._under_way:
            self._saves.wait()
            found = self.get(step)
        return found

    def _look(self, step: int) -> Step | None:
        """Look on the storage for a step that somebody else may have saved meanwhile."""
        there = maybe_find_step_metadata(self.url, self.rules.names, step=step)
        if there is None or not any(self._root.checkpoints([there.path.name])):
            return None
        with self._lock:
            return self._steps.setdefault(step, Step(step, urls.join(self.url, there.path.name)))

    def _near(self, step: int | None) -> Iterator[str]:
        there = [one.step for one in self.steps()]
        if there:
            near = sorted(there, key=lambda one: abs(one - (step or 0)))[:5]
            yield f"there are {len(there)} steps, the newest {there[-1]}; near by: {', '.join(map(str, sorted(near)))}"
        else:
            yield "there are no steps"

    def _prove(self, steps: list[int]) -> list[int]:
        """Look which of some names are checkpoints, and forget those that are none."""
        names = {name: step for step in steps for name in self._unproven[step]}
        proven: dict[int, str] = {}
        for name in self._root.checkpoints(names):
            proven.setdefault(names[name], name)
        for step in steps:
            del self._unproven[step]
            if step not in proven:
                del self._steps[step]
            elif self._steps[step].name != proven[step]:
                self._steps[step] = Step(step, urls.join(self.url, proven[step]))
        return sorted(proven)

    # --- saving ---

    def should_save(self, step: int, *, replacing: bool = False) -> bool:
        """Ask the policy about a step that is newer than all there are; with `replacing`, as if it were not there."""
        if self.rules.read_only:
            return False
        previous = _Previous(self, but=step if replacing else None)
        if previous and previous[-1].step >= step:
            return False
        about = Step(step, urls.join(self.url, self.rules.names.build_name(step)))
        about.know(dt.datetime.now(dt.UTC), None)
        return bool(self.rules.decide.should_save(about, previous, context=self._context(step)))

    def _context(self, step: int) -> DecisionContext:
        return DecisionContext(
            is_saving_in_progress=self.rules.tell_of_saves and self.is_saving(),
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
        if step < 0:
            raise ConfigError(f"cannot save step {step} in {self.url!r}: steps are numbered from 0")  # nobody finds it
        metrics = as_stored(request.metrics)
        began = time.monotonic()
        self._saves.wait()
        self._deletions.wait(step)
        path = urls.join(self.url, self.rules.names.build_name(step))
        there = self.find(step)
        if there is not None:
            if not request.overwrite:
                raise _exists(step, self.url)
            path = there.url
        save = Save(
            SaveRequest(
                path,
                request.items,
                overwrite=there is not None,
                custom_metadata=request.custom_metadata,
                metrics=metrics if request.keep_metrics else None,
                progress=request.progress,
            )
        )
        about = Step(step, path)
        about.know(dt.datetime.now(dt.UTC), from_stored(metrics))
        try:
            return self._start(save, about, request.committed, lasting=lasting)
        finally:
            self._costs = self._costs.after(began, time.monotonic())

    def _start(
        self, save: Save, about: Step, committed: Callable[[], object] | None, *, lasting: bool
    ) -> Pending[None]:
        try:
            snapshot = save.prepare(lasting=lasting)
        except AlreadyExistsError as error:
            raise _exists(about.step, self.url) from error
        self._under_way = about
        # The other thread, too, must know what `milepost.configured` says around the caller.
        context, finish = contextvars.copy_context(), functools.partial(self._finish, save.finish, about, committed)
        pending = self._saves.start(lambda: context.run(finish), f"the save of step {about.step}")
        self._saving = save, pending
        if lasting:
            snapshot()
        else:
            pending.result()
        return pending

    def cancel(self, step: int | None = None) -> bool:
        """Give up the save under way, if it is that of the step, and wait for its end; say whether it was given up.

        A save that is at its commit point already stays. Whoever asks for the result gets `AbortedError`.
        """
        under_way, saving = self._under_way, self._saving
        if under_way is None or saving is None or step not in (None, under_way.step):
            return False
        save, pending = saving
        save.cancel()
        try:
            pending.result()
        except AbortedError:
            return True
        return False

    def _finish(self, finish: Callable[[], Manifest], about: Step, committed: Callable[[], object] | None) -> None:
        try:
            manifest = finish()
        except BaseException as error:
            self._under_way = None
            if isinstance(error, AlreadyExistsError):
                raise _exists(about.step, self.url) from error
            raise
        about.know(_utc(manifest.commit_timestamp_nsecs), about.metrics)
        with self._lock:
            self._steps[about.step] = about
            self._unproven.pop(about.step, None)
            self._under_way = None
        for what, act in (("callback", committed), ("retention", self._retain)):
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
        try:
            if self.rules.trash is None:
                delete(step.url, missing_ok=True)
            else:
                self._root.move(step.name, self.rules.trash)
        except NotFoundError:
            pass  # somebody else was faster
        except BaseException:
            with self._lock:  # the next retention tries again, if it is still a checkpoint
                self._steps.setdefault(step.step, step)
                self._unproven.setdefault(step.step, [step.name])
            raise

    def delete(self, step: int) -> None:
        """Delete a step, and wait for it; raise `StepNotFoundError` if there is none of that number.

        Raises the failure of a save, if nobody has seen it, and then deletes nothing.
        """
        self._check_writable(f"delete step {step}")
        self._let_go(self.committed(step)).result()

    def clean(self) -> None:
        """Begin to remove what unfinished saves have left that are known to be dead; the next save waits for it."""
        self._check_writable("clean up")
        self._deletions.start(self._root.clean, None)

    def _check_writable(self, what: str) -> None:
        if self._closed:
            # A failure in the background would have nobody left to be raised to.
            raise ClosedError(f"cannot {what} in {self.url!r}: it was closed")
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
        self._closed = True
        failure = self._saves.close()
        self._deletions.close()
        if failure is not None:
            raise failure


class ClosedError(RequestError, RuntimeError):
    """A change that was asked of a sequence after its end."""


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

    def __init__(self, sequence: Sequence, *, but: int | None = None) -> None:
        self._sequence = sequence
        self._but = but

    def __bool__(self) -> bool:
        latest = self._sequence.latest()
        return latest is not None and (latest.step != self._but or bool(self._all))

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...
    def __getitem__(self, index: int | slice) -> Step | list[Step]:
        latest = self._sequence.latest() if index == -1 else None
        return self._all[index] if latest is None or latest.step == self._but else latest

    @functools.cached_property
    def _all(self) -> list[Step]:
        return [step for step in self._sequence.steps() if step.step != self._but]


class _Deletions:
    """Steps on their way out, in threads of their own."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: dict[Future[None], Step | None] = {}

    def start(self, act: Callable[[], None], step: Step | None) -> Future[None]:
        """Delete a step soon; with None, do something else about what is to go."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "milepost-delete")
        future = self._pool.submit(contextvars.copy_context().run, _logged, act, step)
        self._under_way[future] = step
        future.add_done_callback(lambda done: self._under_way.pop(done, None))
        return future

    def wait(self, step: int | None = None) -> None:
        """Wait for all of them, or only for those that a save of one step must not meet."""
        for future, one in list(self._under_way.items()):
            if step is None or one is None or one.step == step:
                with contextlib.suppress(MilepostError, OSError):
                    future.result()

    def close(self) -> None:
        """Wait for all of them, and end."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _logged(act: Callable[[], None], step: Step | None) -> None:
    try:
        act()
    except BaseException:
        if step is None:
            _logger.warning("could not remove what unfinished saves have left", exc_info=True)
        else:
            _logger.warning("could not delete %s; it is still there", step.url, exc_info=True)
        raise
