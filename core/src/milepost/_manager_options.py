"""What a manager can be told about when to save and what to keep, and what that means for a sequence of steps.

The rule: the documented options, name for name, become one policy for each decision and one frozen value of rules. What
excludes each other is refused before anything is looked at.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Any

from milepost.decisions import SaveDecisionPolicy, SpecificStepsPolicy, decision_from_options
from milepost.errors import ConfigError, RequestError, noted
from milepost.options import AsyncOptions, FileOptions, MultiprocessingOptions
from milepost.preservation import PreservationPolicy, check_count, fixed_steps, preservation_from_options
from milepost.sequence import Rules

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Container

    from milepost.options import AtomicityOptions
    from milepost.path.step import NameFormat
    from milepost.settings import Settings

__all__ = ["CheckpointManagerOptions", "rules_of", "settings_of"]

_logger = logging.getLogger("milepost")

_NOT_READ_ONLY: dict[str, Any] = {
    "save_interval_steps": 0,
    "max_to_keep": None,
    "keep_time_interval": None,
    "keep_period": None,
    "create": False,
    "cleanup_tmp_directories": False,
    "save_on_steps": frozenset(),
    "todelete_subdir": None,
    "todelete_full_path": None,
    "should_save_fn": None,
}
"""What options are set to where nothing is written."""


@dataclasses.dataclass
class CheckpointManagerOptions:
    """What a manager saves, keeps, and how; a manager looks at it once, when it is made.

    When to save: every multiple of `save_interval_steps`, the steps in `save_on_steps`, the first step, and whenever
    the machine is about to be taken away; `should_save_fn`, called with the step and the newest one (None: there is
    none), takes the place of interval, steps and first step; `save_decision_policy` that of all. With
    `enable_should_save_is_saving_in_progress_check=False` policies are not told that a save is in progress.

    What to keep: the newest `max_to_keep` steps (None: all), or with `best_fn`, a function of the metrics, the best:
    those with the highest value, or with `best_mode="min"` the lowest. Steps without metrics are kept beside them
    unless `keep_checkpoints_without_metrics` is False. Multiples of `keep_period`, and steps committed at least
    `keep_time_interval` after the last one kept for this, are kept, too. A `preservation_policy` takes the place of all
    of these, and may not be given with them. With `preserve_newest` the newest step is kept whatever they say; that is
    the default for a `preservation_policy`, while for the other options the counts hold as documented.

    Names of steps: `step_name_format`, or the standard one with `step_prefix` and `step_format_fixed_length`.

    Deleting happens in `num_deletion_threads` background threads (None: one, with `enable_background_delete` several).
    `todelete_subdir` is a folder below the directory into which steps are moved instead. `cleanup_tmp_directories`
    removes, at the start, what unfinished saves have left that are known to be dead.

    `create` makes the directory. `read_only` never writes; options that have no meaning then are reset, with a warning.
    `enable_async_checkpointing` lets `save` return before the checkpoint is written. `save_root_metadata` keeps the
    manager's `metadata`. With `prevent_write_metrics` metrics are used to rank steps, and not kept. `async_options`,
    `multiprocessing_options`, `file_options` and `atomicity_options` are described there.

    Without effect: `single_host_load_and_broadcast` (one process looks for all in any case), `temporary_path_class`
    (the storage's commit strategy says where is written), `enable_per_process_directory_creation`, and
    `lightweight_initialize` (nothing is ever read before it is asked for). `todelete_full_path` is refused.

    Raises ConfigError (a ValueError) for values without meaning.
    """

    save_interval_steps: int = 1
    max_to_keep: int | None = None
    keep_time_interval: dt.timedelta | None = None
    keep_period: int | None = None
    best_fn: Callable[[Any], float] | None = None
    best_mode: str = "max"
    keep_checkpoints_without_metrics: bool = True
    step_prefix: str | None = None
    step_format_fixed_length: int | None = None
    step_name_format: NameFormat[Any] | None = None
    create: bool = True
    cleanup_tmp_directories: bool = False
    save_on_steps: Container[int] | None = None
    single_host_load_and_broadcast: bool = False
    todelete_subdir: str | None = None
    todelete_full_path: str | None = None
    enable_background_delete: bool = False
    num_deletion_threads: int | None = None
    read_only: bool = False
    enable_async_checkpointing: bool = True
    async_options: AsyncOptions | None = None
    multiprocessing_options: MultiprocessingOptions = dataclasses.field(default_factory=MultiprocessingOptions)
    should_save_fn: Callable[[int, int | None], bool] | None = None
    file_options: FileOptions = dataclasses.field(default_factory=FileOptions)
    atomicity_options: AtomicityOptions | None = None
    save_root_metadata: bool = True
    temporary_path_class: type[Any] | None = None
    save_decision_policy: SaveDecisionPolicy | None = None
    preservation_policy: PreservationPolicy | None = None
    prevent_write_metrics: bool = False
    enable_should_save_is_saving_in_progress_check: bool = True
    enable_per_process_directory_creation: bool = False
    lightweight_initialize: bool = False
    _: dataclasses.KW_ONLY
    preserve_newest: bool | None = None

    def __post_init__(self) -> None:
        if self.best_mode not in {None, "min", "max"}:
            raise ConfigError(f"best_mode must be 'min' or 'max': {self.best_mode!r}")
        check_count("max_to_keep", self.max_to_keep)
        if self.todelete_subdir is not None and self.todelete_full_path is not None:
            raise ConfigError("todelete_subdir and todelete_full_path exclude each other: both are given")
        self.save_on_steps = frozenset() if self.save_on_steps is None else fixed_steps(self.save_on_steps)
        if self.read_only:
            self._reset_what_writes()

    def _reset_what_writes(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in _NOT_READ_ONLY.items():
            given = getattr(self, name)
            if given not in (value, defaults[name]):
                _logger.warning("a manager that only reads takes no %s: %r is left out", name, given)
            setattr(self, name, value)


class _NotHereError(RequestError, NotImplementedError):
    """Say that an option of the reference is not to be had here."""


def rules_of(options: CheckpointManagerOptions) -> Rules:
    """Return how the options want a sequence kept; raise ConfigError (a ValueError) where they exclude each other."""
    from milepost.path.step import standard_name_format

    names = options.step_name_format
    if options.todelete_full_path is not None:
        raise noted(
            _NotHereError(f"cannot move deleted steps to {options.todelete_full_path!r}: no storage offers it"),
            "todelete_subdir moves them into a folder below the directory; or let a rule of the bucket expire them",
        )
    return Rules(
        names=names or standard_name_format(options.step_prefix, options.step_format_fixed_length),
        decide=_decision(options),
        preserve=_preservation(options),
        keep_newest=(options.preservation_policy is not None)
        if options.preserve_newest is None
        else options.preserve_newest,
        read_only=options.read_only,
        tell_of_saves=options.enable_should_save_is_saving_in_progress_check,
        trash=_folder(options.todelete_subdir),
        deleting_threads=_threads(options),
        multiprocessing_options=options.multiprocessing_options,
    )


def _decision(options: CheckpointManagerOptions) -> SaveDecisionPolicy:
    if options.save_decision_policy is not None:
        return options.save_decision_policy
    if options.read_only:
        return SpecificStepsPolicy(())
    return decision_from_options(
        save_interval_steps=options.save_interval_steps,
        save_on_steps=options.save_on_steps,
        should_save_fn=options.should_save_fn,
    )


def _preservation(options: CheckpointManagerOptions) -> PreservationPolicy:
    if options.preservation_policy is None:
        return preservation_from_options(
            max_to_keep=options.max_to_keep,
            keep_time_interval=options.keep_time_interval,
            keep_period=options.keep_period,
            best_fn=options.best_fn,
            best_mode=options.best_mode,
            keep_checkpoints_without_metrics=options.keep_checkpoints_without_metrics,
        )
    for name in ("max_to_keep", "keep_time_interval", "keep_period"):
        if getattr(options, name):
            raise noted(
                ConfigError(f"preservation_policy and {name} exclude each other: both are given"),
                "policies are joined by `|`: LatestN(3) | EveryNSteps(1000)",
            )
    return options.preservation_policy


def _folder(name: str | None) -> str | None:
    if name is not None and {"", ".", ".."} & set(name.split("/")):
        raise ConfigError(f"todelete_subdir must name a folder below the directory: {name!r}")
    return name


def _threads(options: CheckpointManagerOptions) -> int:
    if options.num_deletion_threads:
        return options.num_deletion_threads
    return max(min(16, (os.cpu_count() or 1) // 2), 1) if options.enable_background_delete else 1


def settings_of(options: CheckpointManagerOptions) -> Settings:
    """Return what the options say about routes."""
    from milepost.checkpointers import _settings

    return _settings(options.file_options, options.atomicity_options)
