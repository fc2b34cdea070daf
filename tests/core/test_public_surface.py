"""The public names beside those of the installed reference: where they are, what they take, and what they derive from.

Every difference is a line in a table below, with its reason; a line that no longer describes a difference fails.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import warnings

import orbax.checkpoint as reference
import pytest
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


def left_out(module: str, reason: str, *names: str) -> dict[str, str]:
    return {f"{module}:{name}": reason for name in names}


LEFT_OUT: dict[str, str] = {
    **left_out(
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
    **left_out(
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
    **left_out(
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
    **left_out(
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
    **left_out(
        "path.step",
        "names are parsed by the formats; the patterns are nobody's business",
        "ALLOWED_STEP_NAME_PATTERN",
        "TMP_DIR_STEP_PATTERN",
        "TMP_DIR_SUFFIX",
    ),
    **left_out("tree", "undocumented; `v1.tree.merge` and `transform_utils.merge_trees` do it", "merge_trees", "tree_trim"),
    **left_out("transform_utils", "imported there by chance; its home is `type_handlers`", "RestoreArgs"),
    **left_out("checkpoint_utils", "machinery of snapshots, which milepost does not need", "get_snapshot_dir_from_step_dir"),
    **left_out("checkpoint_utils", "undocumented", "STANDARD_ARRAY_TYPES"),
    **left_out("", "undocumented machinery of `async_save`; futures are those of `concurrent.futures`", "Future"),
}
"""Names of the reference that are not there, and why."""

SIGNATURES: dict[str, str] = {}
"""Callables that take something else, and why."""

BASES: dict[str, str] = {}
"""Classes that derive from something else, and why."""


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


def parameters(function: object) -> list[tuple[str, str, object]] | None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    return [
        (one.name, one.kind.name, "..." if one.default is not one.empty else one.empty)
        for one in signature.parameters.values()
    ]


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
    expected, actual = parameters(theirs), parameters(ours)
    if which in SIGNATURES:
        assert actual != expected
        return
    if expected is None:
        assert ours is not None
        return
    if isinstance(theirs, property) or not callable(theirs):
        assert ours is not None
        return
    assert actual is not None
    # What takes more than the reference takes what the reference takes.
    wanted = [one for one in actual if one[0] in {name for name, _, _ in expected} or one[2] is inspect.Parameter.empty]
    assert wanted == expected


@pytest.mark.parametrize("which", [which for which in names() if inspect.isclass(getattr(of_reference(which.partition(":")[0]), which.partition(":")[2], None))])
def test_every_class_derives_from_what_the_reference_derives_it_from(which):
    if which in LEFT_OUT or not there(which):
        pytest.fail(f"{which} is not there") if which not in LEFT_OUT else None
        return
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


DEFAULTS: dict[str, dict[str, tuple[object, object]]] = {}
