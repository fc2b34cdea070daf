"""The public names beside those of the installed reference: where they are, what they take, and what they derive from.

Every difference is a line in a table below, with its reason; a line that no longer describes a difference fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import warnings
from pathlib import Path

import orbax.checkpoint as reference
import pytest
from milepost.path import step
from orbax.checkpoint import v1 as reference_v1

ROOTS = {"": reference, "v1": reference_v1}

MODULES = (
    "",
    "args",
    "checkpoint_managers",
    "checkpoint_utils",
    "checkpointers",
    "handlers",
    "metadata",
    "multihost",
    "options",
    "path.step",
    "transform_utils",
    "tree",
    "type_handlers",
    "v1",
    "v1.arrays",
    "v1.errors",
    "v1.handlers",
    "v1.multihost",
    "v1.options",
    "v1.partial",
    "v1.path",
    "v1.path.step",
    "v1.training",
    "v1.training.errors",
    "v1.training.preservation_policies",
    "v1.training.save_decision_policies",
    "v1.tree",
)
"""The modules whose names are compared; what the reference has beyond them is machinery that it does not document."""

_PATHWAYS = "it serves Pathways, a runtime that milepost does not know"
_BARRIERS = "processes meet through JAX's coordination service, inside `Hosts`; there is no barrier to choose"
_TENSORSTORE = "it describes TensorStore's own specifications, which only the TensorStore writer needs to know"
_LEAVES = "what can be saved is extended by `LeafHandler`s that packages offer, not by a registry in the process"


def within(module: str, reason: str, *names: str) -> dict[str, str]:
    return {f"{module}:{name}": reason for name in names}


LEFT_OUT: dict[str, str] = {
    **within(
        "multihost",
        _PATHWAYS,
        "distributed_to_device_ids",
        "initialize_distributed_to_device_ids",
        "initialize_runtime_to_distributed_ids",
        "is_cloud_pathways_persistence_enabled",
        "is_distributed_to_device_ids_initialized",
        "is_native_pathways_backend",
        "is_pathways_colocated_runtime_active",
        "is_pathways_controller",
        "is_proxy_pathways_backend",
        "is_runtime_to_distributed_ids_initialized",
        "mark_pathways_colocated_runtime_active",
        "process_index_from_device",
        "runtime_to_distributed_ids",
        "runtime_to_distributed_process_id",
        "unique_processes_from_devices",
        "use_experimental_distributed_process_id",
    ),
    **within(
        "multihost",
        _BARRIERS,
        "BarrierSyncFn",
        "get_barrier_sync_fn",
        "get_jax_distributed_client",
        "global_max",
        "is_jax_distributed_client_initialized",
        "should_skip_process_sync",
        "unique_barrier_key",
    ),
    **within(
        "type_handlers",
        _TENSORSTORE,
        "get_cast_tspec_deserialize",
        "get_cast_tspec_serialize",
        "get_json_tspec_read",
        "get_json_tspec_write",
        "get_ts_context",
        "is_ocdbt_checkpoint",
        "merge_ocdbt_per_process_files",
    ),
    **within(
        "type_handlers",
        _LEAVES,
        "ArrayHandler",
        "NumpyHandler",
        "ParamInfo",
        "ScalarHandler",
        "SingleReplicaArrayHandler",
        "StringHandler",
        "TypeHandler",
        "TypeHandlerRegistry",
        "check_input_arguments",
        "create_type_handler_registry",
        "get_type_handler",
        "has_type_handler",
        "is_supported_empty_value",
        "is_supported_type",
        "register_standard_handlers_with_options",
        "register_type_handler",
        "supported_types",
    ),
    **within(
        "path.step",
        "names are parsed by the formats; the patterns are nobody's business",
        "ALLOWED_STEP_NAME_PATTERN",
        "TMP_DIR_STEP_PATTERN",
        "TMP_DIR_SUFFIX",
    ),
    **within(
        "tree", "undocumented; `v1.tree.merge` and `transform_utils.merge_trees` do it", "merge_trees", "tree_trim"
    ),
    **within("transform_utils", "imported there by chance; its home is `type_handlers`", "RestoreArgs"),
    **within(
        "checkpoint_utils", "machinery of snapshots, which milepost does not need", "get_snapshot_dir_from_step_dir"
    ),
    **within("checkpoint_utils", "undocumented", "STANDARD_ARRAY_TYPES"),
    **within("", "undocumented machinery of `async_save`; futures are those of `concurrent.futures`", "Future"),
}
"""Names of the reference that are not there, and why."""

_WHERE = {
    name: modules
    for modules, group in (
        (
            ("", "checkpointers"),
            "AbstractCheckpointer AsyncCheckpointer Checkpointer PyTreeCheckpointer StandardCheckpointer",
        ),
        (
            ("", "handlers"),
            "CompositeCheckpointHandler ProtoCheckpointHandler",
        ),
        (("", "handlers"), "JaxRandomKeyCheckpointHandler NumpyRandomKeyCheckpointHandler"),
        (("",), "BasePyTreeCheckpointHandler"),
        (("", "type_handlers", "handlers"), "ArrayRestoreArgs SingleReplicaArrayRestoreArgs"),
    )
    for name in group.split()
}


def wherever(reason: str, *members: str) -> dict[str, str]:
    """Return one line for each module in which the class of a member is."""
    return {f"{module}:{member}": reason for member in members for module in _WHERE[member.partition(".")[0]]}


_TEMPORARY = "where a save writes until it is committed is the business of the commit strategy"
_CHECKPOINTERS = ("AsyncCheckpointer", "Checkpointer", "PyTreeCheckpointer", "StandardCheckpointer")
_RANDOM_KEYS = ("JaxRandomKeyCheckpointHandler", "NumpyRandomKeyCheckpointHandler")

SIGNATURES: dict[str, str] = {
    **wherever("it takes no arguments, and says so; nobody can instantiate it anyway", "AbstractCheckpointer"),
    **wherever(_TEMPORARY, *(f"{one}.{way}_temporary_path" for one in _CHECKPOINTERS for way in ("create", "get"))),
    **wherever(
        "processes agree through `Hosts`; no operation has a number of its own",
        *(f"{one}.synchronize_next_awaitable_signal_operation_id" for one in _CHECKPOINTERS),
    ),
    **wherever(_TEMPORARY, "CompositeCheckpointHandler.metadata_from_temporary_paths"),
    **wherever(
        "random keys are leaves like others; no handler has to take them apart",
        *(
            f"{one}.{member}"
            for one in _RANDOM_KEYS
            for member in ("checkpoint_restore_args", "checkpoint_save_args", "post_restore")
        ),
    ),
    **wherever(
        "it takes arguments in either form, which the reference does elsewhere",
        "BasePyTreeCheckpointHandler.async_save",
        "BasePyTreeCheckpointHandler.restore",
        "BasePyTreeCheckpointHandler.save",
        *(f"{one}.async_save" for one in _RANDOM_KEYS),
    ),
    **wherever("it names what it takes", "ProtoCheckpointHandler.save"),
    **wherever(
        "the class is looked up when one is made: reading it from the class would need JAX",
        "ArrayRestoreArgs.restore_type",
    ),
    "type_handlers:SingleReplicaArrayRestoreArgs.restore_type": "as above",
    **within(
        "path.step",
        "the document names the parameter, which a wrapper of the newer release hides",
        "is_checkpoint_finalized",
        "is_path_finalized",
        "is_path_temporary",
        "is_tmp_checkpoint",
        "tmp_checkpoints",
    ),
    **within(
        "v1.options",
        "undocumented conversions between the two generations; here both stand on one engine",
        "AsyncOptions.v0",
        "AtomicityOptions.v0",
        "FileOptions.v0",
        "MultiprocessingOptions.v0",
    ),
    ":AsyncCheckpointer": "the document has a value for `file_options`, not None",
    "checkpointers:AsyncCheckpointer": "as above",
    ":AsyncOptions": "the document of the checkpointers has 600 seconds; it was doubled later",
    "options:AsyncOptions": "as above",
    "path.step:all_temporary_paths": "undocumented; it takes what `tmp_checkpoints` takes",
    "path.step:standard_name_format": "where a save writes is the commit strategy's business, not a name format's",
    "v1.handlers:CheckpointableHandlerRegistry": "a class that can be made, where the reference has a protocol",
    "v1.handlers:PyTreeHandler.validate_abstract_leaves_handleable": "undocumented; matching a target tells all of it",
    "v1.handlers:PyTreeHandler.validate_leaves_handleable": "undocumented; taking a tree apart tells all of it",
    "v1.options:FileOptions.path_class": "None, which means `UPath`: importing it takes longer than all of milepost",
    "v1.path:PathAwaitingCreation": "a class that can be made, where the reference has a protocol",
}
"""Callables that take something else, and why."""

BASES: dict[str, str] = within(
    "v1.handlers",
    "handlers of the newer generation fit a protocol, which nobody has to derive from",
    "JsonHandler",
    "ProtoHandler",
    "PyTreeHandler",
)
"""Classes that derive from something else, and why."""

OLDER = {
    "Metadata": "step, path",
    "NameFormat.build_metadata": "self, step_path, *args, **kwargs",
    "NameFormat.build_name": "self, step",
    "NameFormat.find_all": "self, base_path",
    "NameFormat.find_metadata": "self, base_path, step, *args, **kwargs",
    "NameFormat.find_step": "self, base_path, step",
    "any_checkpoint_step": "checkpoint_dir",
    "build_step_metadatas": "step_paths, build_metadata",
    "build_step_path": "base_path, name_format, step",
    "checkpoint_steps": "checkpoint_dir, single_host_load_and_broadcast=False",
    "checkpoint_steps_paths": "checkpoint_dir",
    "cleanup_tmp_directories": "directory, primary_host=0, active_processes=None",
    "composite_name_format": "write_name_format, read_name_formats",
    "create_tmp_directory": "final_dir, *, primary_host=0, active_processes=None",
    "find_step_path": "base_path, name_format, *, step, include_uncommitted=False",
    "get_save_directory": (
        "step, directory, name=None, step_prefix=None, override_directory=None, step_format_fixed_length=None, "
        "step_name_format=None"
    ),
    "get_tmp_directory": "path",
    "is_checkpoint_finalized": "path",
    "is_gcs_path": "path",
    "is_tmp_checkpoint": "path",
    "latest_step_metadata": "root_path, name_format",
    "standard_name_format": "step_prefix=None, step_format_fixed_length=None",
    "step_from_checkpoint_name": "name",
    "step_metadata_of_checkpoint_path": "checkpoint_path, name_format",
    "step_prefix_with_underscore": "step_prefix",
    "tmp_checkpoints": "checkpoint_dir",
}
"""What the document of `path.step` has, which is older than any release that has what the others describe."""


def of_reference(module: str) -> object:
    first, _, rest = module.partition(".")
    found = ROOTS.get(first)
    found, rest = (reference, module) if found is None else (found, rest)
    for part in filter(None, rest.split(".")):
        found = getattr(found, part)
    return found


def of_ours(module: str) -> object:
    return importlib.import_module(f"milepost.{module}".rstrip("."))


def public(module: object) -> dict[str, object]:
    """Return what a module of the reference offers: its own classes, functions and values, no modules, no imports."""
    found = {}
    for name in dir(module):
        value = getattr(module, name)
        home = getattr(value, "__module__", "") or ""
        if name.startswith("_") or inspect.ismodule(value):
            continue
        if home.startswith("orbax") or (not home and name.isupper()):
            found[name] = value
    return found


def names() -> list[str]:
    return [f"{module}:{name}" for module in MODULES for name in sorted(public(of_reference(module)))]


def pair(which: str) -> tuple[object, object]:
    module, _, name = which.partition(":")
    return getattr(of_reference(module), name), getattr(of_ours(module), name)


def there(which: str) -> bool:
    module, _, name = which.partition(":")
    try:
        return hasattr(of_ours(module), name)
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("which", names())
def test_every_name_of_the_reference_is_where_it_has_it_or_left_out_for_a_reason(which):
    assert there(which) == (which not in LEFT_OUT)


def differences(theirs: object, ours: object) -> list[str]:
    """Say what a call of theirs may pass that ours does not take in the same way."""
    if getattr(getattr(theirs, "__init__", None), "__name__", "") == "_no_init_or_replace_init":
        # Until the first one is made, Python shows a placeholder as the signature of such a class.
        with contextlib.suppress(TypeError):
            theirs()
    try:
        expected = inspect.signature(theirs).parameters
        actual = inspect.signature(ours).parameters
    except (TypeError, ValueError):
        return []
    kinds = {one.kind for one in actual.values()}
    open_ended = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
    order = [one.name for one in actual.values() if one.kind in POSITIONAL]
    found = []
    for index, one in enumerate(one for one in expected.values() if one.kind in POSITIONAL):
        if not open_ended and order[index : index + 1] != [one.name]:
            found.append(f"{one.name} at place {index}")
    for one in expected.values():
        mine = actual.get(one.name)
        if one.kind is one.KEYWORD_ONLY and mine is None and inspect.Parameter.VAR_KEYWORD not in kinds:
            found.append(f"{one.name} by name")
        if mine is not None and one.default is not one.empty and mine.default is mine.empty and not open_ended:
            found.append(f"{one.name} left out")
        if mine is not None and isinstance(one.default, SIMPLE) and mine.default != one.default and not open_ended:
            found.append(f"{one.name} by default {one.default}")
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) and one.kind not in kinds:
            found.append(f"any {one.name}")
    needed = [one.name for one in actual.values() if one.default is one.empty and one.kind in NAMED]
    return found + [f"{name} is needed" for name in needed if name not in expected and not open_ended]


POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
NAMED = (*POSITIONAL, inspect.Parameter.KEYWORD_ONLY)
SIMPLE = (bool, int, float, str, type(None))


def members(cls: type) -> dict[str, object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            name: value
            for name in dir(cls)
            if not name.startswith("_")
            for value in [inspect.getattr_static(cls, name)]
            if callable(value) or isinstance(value, (property, classmethod, staticmethod))
        }


def callables() -> list[str]:
    found = []
    for which in names():
        if which in LEFT_OUT or not there(which):
            continue
        theirs, _ = pair(which)
        if inspect.isclass(theirs):
            found.append(which)
            found += [f"{which}.{name}" for name in members(theirs)]
        elif callable(theirs):
            found.append(which)
    return found


def member_pair(which: str) -> tuple[object, object]:
    name, _, member = which.partition(":")[2].partition(".")
    theirs, ours = pair(f"{which.partition(':')[0]}:{name}")
    if not member:
        return theirs, ours
    return getattr(theirs, member, None), getattr(ours, member, None)


@pytest.mark.parametrize("which", callables())
def test_every_callable_takes_what_the_reference_takes(which):
    theirs, ours = member_pair(which)
    found = ["it is not there"] if ours is None else differences(theirs, ours) if callable(theirs) else []
    assert bool(found) == (which in SIGNATURES), found


def classes() -> list[str]:
    return [which for which in names() if which not in LEFT_OUT and there(which) and inspect.isclass(pair(which)[0])]


@pytest.mark.parametrize("which", classes())
def test_every_class_derives_from_what_the_reference_derives_it_from(which):
    theirs, ours = pair(which)
    known = {name.partition(":")[2] for name in names()}
    expected = {base.__name__ for base in theirs.__mro__[1:] if base.__name__ in known or base.__module__ == "builtins"}
    actual = {base.__name__ for base in ours.__mro__}
    missing = expected - actual - {"object"}
    if which in BASES:
        assert missing
    else:
        assert missing == set()


def test_fields_of_value_classes_have_the_documented_defaults():
    differing = {}
    for which in names():
        if which in LEFT_OUT or not there(which):
            continue
        theirs, ours = pair(which)
        if not (inspect.isclass(theirs) and dataclasses.is_dataclass(theirs) and dataclasses.is_dataclass(ours)):
            continue
        expected = {field.name: field.default for field in dataclasses.fields(theirs)}
        actual = {field.name: field.default for field in dataclasses.fields(ours)}
        wrong = {
            name: (default, actual.get(name))
            for name, default in expected.items()
            if isinstance(default, (int, float, str, bool, type(None))) and actual.get(name, "absent") != default
        }
        if wrong:
            differing[which] = wrong
    assert differing == DEFAULTS


_TIMEOUT = {"timeout_secs": (1200, 600)}  # the document of the checkpointers has the older one
DEFAULTS: dict[str, dict[str, tuple[object, object]]] = {":AsyncOptions": _TIMEOUT, "options:AsyncOptions": _TIMEOUT}


@pytest.mark.parametrize("name", OLDER)
def test_the_documented_step_functions_take_what_their_document_says(name):
    function = step
    for part in name.split("."):
        function = getattr(function, part)
    plain = [one.replace(annotation=one.empty) for one in inspect.signature(function).parameters.values()]
    written = str(inspect.Signature(plain)).strip("()")
    # What a later release added by name may follow.
    assert written == OLDER[name] or written.startswith(f"{OLDER[name]}, *, ")


# --- what calls do differently, on purpose ---------------------------------------------------------------------------

BEHAVIOUR: dict[str, tuple[str, str]] = {
    # Where the reference loses or corrupts data.
    "leaf names that are equal once joined by dots are two leaves": (
        "the reference writes both to one place and loads one of them twice",
        "test_round_trip.py::test_keys_may_hold_anything_text_can",
    ),
    "overwriting deletes nothing before the policy has said yes": (
        "the reference deletes the step, then asks, and may save nothing",
        "test_v1_training.py::test_overwriting_replaces_once_the_policy_has_said_yes",
    ),
    "an overwrite that fails leaves the old step": (
        "the reference has deleted it",
        "test_v1_training.py::test_an_overwrite_that_fails_leaves_the_old_step",
    ),
    "a step on disk that the manager does not know is not replaced": (
        "the reference replaces it without a word",
        "test_checkpoint_manager.py::test_a_step_on_the_storage_that_the_manager_does_not_know_is_not_replaced",
    ),
    "the latest step is the newest": (
        "the reference answers with the one that was saved last, until it is reopened",
        "test_manager_stories_like_reference.py::test_lower_numbers_and_retention",
    ),
    "an item called metrics is refused": (
        "the reference replaces it by the metrics",
        "test_checkpoint_manager.py::test_parameters_that_exclude_each_other_or_mean_nothing_are_value_errors",
    ),
    "cleaning up removes only what is ours and dead": (
        "the reference removes whatever has no commit object, running saves among them",
        "test_step_listings.py::test_cleaning_up_leaves_everything_that_is_not_known_to_be_abandoned",
    ),
    "a callback after the save cannot undo the commit": (
        "the reference calls it before the commit, and gives the checkpoint up if it fails",
        "test_checkpointers.py::test_a_callback_that_fails_is_told_and_undoes_nothing",
    ),
    "a failed save retires no older step": (
        "the reference decides before the write has been committed",
        "test_checkpoint_manager.py::test_a_save_that_fails_retires_nothing",
    ),
    "a NaN is never the best": (
        "the reference may rank it first",
        "test_preservation.py::test_a_nan_is_never_best",
    ),
    "a document that is damaged is not overwritten by an update": (
        "the reference takes it for empty",
        "test_metadata.py::test_a_damaged_document_is_an_error_and_is_not_overwritten_by_an_update",
    ),
    "a cast that loses the kind of number has to be asked for": (
        "the reference makes integers of floats because the target happens to hold some",
        "test_restore_targets.py::test_what_does_not_fit_is_an_error_that_says_where_and_why",
    ),
    # Where good data are refused, or come back as something else.
    "numbers stay numbers as keys, and tuples tuples, without a target": (
        "what you saved is what you get",
        "test_restore_targets.py::test_without_a_target_what_was_saved_comes_back",
    ),
    "empty trees and arrays without elements are saved": (
        "they are data like others",
        "test_checkpointers_like_reference.py::test_calls_give_what_they_give_in_the_reference_unless_there_is_a_reason",
    ),
    "random keys are targets for random keys, also abstract ones": (
        "the reference shows the numbers below them, which no load takes",
        "test_transforms.py::test_the_structs_of_random_keys_are_targets_for_them",
    ),
    "relative paths are paths": (
        "the reference refuses them after it has begun to write",
        "test_checkpointers.py::test_relative_paths_and_urls_are_paths",
    ),
    "a sharding whose devices are not here is information": (
        "the reference refuses to load",
        "test_round_trip.py::test_a_sharding_whose_devices_are_not_here_is_only_information",
    ),
    "loading in the background works": (
        "the reference has it for one layout only",
        "test_v1_training.py::test_loading_in_the_background_settles_the_step_at_once",
    ),
    # Where documents and releases disagree among themselves.
    "an abstract array without a sharding is restored as NumPy's by the older generation": (
        "its document says so; later releases take the saved sharding, as our newer generation does",
        "test_restore_targets.py::test_an_abstract_array_without_a_sharding_is_one_of_numpy",
    ),
    "whether a path is finished is an error for what is no directory": (
        "the document says so; later releases answer no",
        "test_steps_like_reference.py::test_where_the_document_and_the_release_differ_the_document_holds",
    ),
    # Where an answer would mislead.
    "a composite of formats finds a step once": (
        "the reference lists one step twice if it has two names",
        "test_step_listings.py::test_the_format_that_comes_first_is_preferred",
    ),
    "a folder without a commit object is no step of a manager": (
        "it cannot be restored",
        "test_sequence.py::test_a_folder_without_a_commit_object_is_no_step",
    ),
    "a given policy never retires the newest step, unless told to": (
        "a training resumes from it",
        "test_checkpoint_manager.py::test_a_policy_never_retires_the_newest_unless_told_to",
    ),
    "digits are ASCII and a prefix means itself": (
        "the reference takes a prefix for a pattern",
        "test_steps_like_reference.py::test_digits_are_ascii_and_a_prefix_means_itself",
    ),
    "shardings of different kinds differ": (
        "the reference fails to compare them",
        "test_metadata_like_reference.py::test_differences_in_equality_are_deliberate",
    ),
    "a missing item of a Composite is a missing key and a missing attribute": (
        "`hasattr` raises in the reference",
        "test_args.py::test_a_missing_item_is_a_missing_key_and_a_missing_attribute",
    ),
    "checking for errors reports them": (
        "in the reference another thread may have taken them",
        "test_checkpoint_manager.py::test_checking_for_errors_reports_and_never_waits",
    ),
    "a context that is active anywhere cannot be changed": (
        "the reference unlocks one that was entered twice at its first end",
        "test_context.py::test_a_context_that_another_thread_has_entered_cannot_be_changed",
    ),
}
"""What differs, why, and the test that shows it. What only reads differently is beside the calls that are compared."""


@pytest.mark.parametrize("difference", BEHAVIOUR)
def test_every_difference_in_behaviour_is_shown_by_a_test(difference):
    _, where = BEHAVIOUR[difference]
    file, _, name = where.partition("::")
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    assert f"def {name}(" in text
