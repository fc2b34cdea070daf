"""The v1 API beside the installed reference: names, signatures, and what a table of calls does."""

from __future__ import annotations

import importlib
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from milepost import v1 as ours
from orbax.checkpoint import v1 as theirs

# The reference leaves coroutines unfinished where it refuses a call.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <coroutine:pytest.PytestUnraisableExceptionWarning"
)

MODULES = [
    "",
    "arrays",
    "errors",
    "handlers",
    "multihost",
    "options",
    "partial",
    "path.step",
    "training",
    "training.errors",
    "tree",
]

LEFT_OUT = {
    "handlers.orbax": "an accident of its imports",
    "training.pathways": "snapshots of one vendor's cluster manager; no checkpoint comes of them",
}
OTHER_SIGNATURES = {
    # what is more than the reference's, beside keyword arguments added at the end
    "handlers.CheckpointableHandlerRegistry": "a class to be made, there a protocol",
    "handlers.PyTreeHandler": "the default of array_metadata_validator is None: the manifest needs no validator",
    "path.step.NameFormat": "a protocol",
    "load_async": "checkpointable_name may be None, as in load",
    "options.FileOptions": "path_class is of no effect, so its default is None",
    "options.ArrayOptions": "the classes of its defaults are ours",
}


def of(package, module):
    found = package
    for name in module.split(".") if module else ():
        found = getattr(found, name)
    return found


def public(module):
    there = of(theirs, module)
    own = module.rpartition(".")[2]
    names = [name for name in dir(there) if not name.startswith("_") and name != own]
    typing = {"Any", "Protocol", "Sequence", "Dict", "NestedDict", "PyTree", "typing", "types"}
    return [name for name in names if name not in typing or module == "tree"]


NAMES = [(module, name) for module in MODULES for name in public(module)]


def dotted(module, name):
    return f"{module}.{name}".lstrip(".")


@pytest.mark.parametrize(("module", "name"), NAMES, ids=str)
def test_every_name_is_where_the_reference_has_it(module, name):
    if dotted(module, name) in LEFT_OUT:
        return
    assert hasattr(of(ours, module), name)


def callables():
    for module, name in NAMES:
        what = getattr(of(theirs, module), name)
        if dotted(module, name) in {**LEFT_OUT, **OTHER_SIGNATURES} or not callable(what):
            continue
        if inspect.isfunction(what) or dotted(module, name) in {
            "Context",
            "CheckpointMetadata",
            "training.CheckpointMetadata",
            "training.RootMetadata",
        }:
            yield dotted(module, name)
    for name, member in inspect.getmembers(theirs.training.Checkpointer):
        if name == "__init__" or (not name.startswith("_") and inspect.isfunction(member)):
            yield f"training.Checkpointer.{name}"
    for kind in ("JsonHandler", "ProtoHandler"):
        yield f"handlers.{kind}"


def parameters(package, name):
    found = inspect.signature(of(package, name)).parameters.values()
    return {one.name: (one.kind, one.default) for one in found}


@pytest.mark.parametrize("name", list(callables()))
def test_signatures_begin_with_those_of_the_reference(name):
    wanted, found = parameters(theirs, name), parameters(ours, name)
    common = {key: found.get(key) for key in wanted}
    assert common == wanted
    more = {kind for key, (kind, _) in found.items() if key not in wanted}
    assert more <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}


def test_positional_arguments_are_in_the_same_order():
    for name in callables():
        there = [key for key, (kind, _) in parameters(theirs, name).items() if kind is kind.POSITIONAL_OR_KEYWORD]
        here = [key for key, (kind, _) in parameters(ours, name).items() if kind is kind.POSITIONAL_OR_KEYWORD]
        assert (name, here) == (name, there)


@pytest.mark.parametrize(
    "name",
    [
        "errors.InvalidLayoutError",
        "errors.DeletionInProgressError",
        "errors.DeletionRecoveryError",
        "training.errors.StepAlreadyExistsError",
        "training.errors.StepNotFoundError",
    ],
)
def test_errors_are_the_same_builtins(name):
    builtin = [base for base in of(theirs, name).__mro__ if base.__module__ == "builtins"]
    assert set(builtin) <= set(of(ours, name).__mro__)


# --- a table of calls ------------------------------------------------------------------------------------------------

STATE = {"w": jnp.arange(4.0), "n": np.arange(3), "i": 3, "f": 1.5, "s": "x", "none": None, "nested": [{}, (1, 2)]}
ABSTRACT = {
    "w": jax.ShapeDtypeStruct((4,), jnp.float32),
    "n": np.zeros(3),
    "i": 0,
    "f": 0.0,
    "s": "",
    "none": None,
    "nested": [{}, [0, 0]],
}


def saved(ocp, root):
    ocp.save(root / "a", STATE)
    return root / "a"


def partly(ocp, path, target):
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(path, target)


def two(ocp, root):
    ocp.save_checkpointables(root / "m", {"a": {"x": 1}, "b": {"y": np.ones(2)}})
    return root / "m"


def parts(ocp, path):
    ocp.partial.save(path, {"a": jnp.ones(2)})
    ocp.partial.save(path, {"b": {"c": np.ones(2)}})
    ocp.partial.finalize(path)
    return ocp.load(path)


CALLS = {
    "save there": lambda ocp, root: ocp.save(saved(ocp, root), STATE),
    "overwrite": lambda ocp, root: (ocp.save(saved(ocp, root), {"x": 1}, overwrite=True), ocp.load(root / "a"))[1],
    "save None": lambda ocp, root: ocp.save(root / "a", None),
    "save an object": lambda ocp, root: ocp.save(root / "a", {"x": object()}),
    "save as metrics": lambda ocp, root: ocp.save(root / "a", STATE, checkpointable_name="metrics"),
    "save as nothing": lambda ocp, root: ocp.save(root / "a", STATE, checkpointable_name=""),
    "save metadata": lambda ocp, root: (
        ocp.save(root / "a", STATE, custom_metadata={"x": [1]}),
        ocp.metadata(root / "a").custom_metadata,
    )[1],
    "save no JSON": lambda ocp, root: ocp.save(root / "a", STATE, custom_metadata={"x": object()}),
    "load": lambda ocp, root: ocp.load(saved(ocp, root), {**ABSTRACT}),
    "load a name": lambda ocp, root: ocp.load(saved(ocp, root), checkpointable_name="state")["w"],
    "load flat": lambda ocp, root: ocp.load(saved(ocp, root), checkpointable_name=None),
    "load no name": lambda ocp, root: ocp.load(saved(ocp, root), checkpointable_name="no"),
    "load nothing": lambda ocp, root: ocp.load(root / "nothing"),
    "load a subset": lambda ocp, root: ocp.load(saved(ocp, root), {"i": 0}),
    "load partly": lambda ocp, root: partly(ocp, saved(ocp, root), {"i": 0}),
    "load more": lambda ocp, root: ocp.load(saved(ocp, root), {**ABSTRACT, "z": 0}),
    "load placeholders": lambda ocp, root: ocp.load(saved(ocp, root), {**ABSTRACT, "w": ..., "s": ...}),
    "load all": lambda ocp, root: ocp.load_checkpointables(two(ocp, root)),
    "load none of all": lambda ocp, root: ocp.load_checkpointables(two(ocp, root), {}),
    "load one of all": lambda ocp, root: ocp.load_checkpointables(two(ocp, root), {"a": None}),
    "load a missing one": lambda ocp, root: ocp.load_checkpointables(two(ocp, root), {"z": None}),
    "load the first": lambda ocp, root: ocp.load(two(ocp, root)),
    "save no objects": lambda ocp, root: ocp.save_checkpointables(root / "a", {}),
    "save a list": lambda ocp, root: ocp.save_checkpointables(root / "a", [1]),
    "metadata": lambda ocp, root: ocp.metadata(saved(ocp, root)).metadata["w"].shape,
    "metadata of scalars": lambda ocp, root: [ocp.metadata(saved(ocp, root)).metadata[key] for key in "ifs"],
    "metadata of all": lambda ocp, root: sorted(ocp.checkpointables_metadata(two(ocp, root)).metadata),
    "metadata of nothing": lambda ocp, root: ocp.metadata(root / "nothing"),
    "is a checkpoint": lambda ocp, root: [ocp.is_orbax_checkpoint(one) for one in (saved(ocp, root), root, root / "x")],
    "delete": lambda ocp, root: (ocp.delete(saved(ocp, root)), (root / "a").exists()),
    "delete nothing": lambda ocp, root: ocp.delete(root / "a"),
    "delete nothing, fine": lambda ocp, root: ocp.delete(root / "a", missing_ok=True),
    "delete an item": lambda ocp, root: (
        ocp.delete(two(ocp, root), checkpointable_name="a"),
        sorted(ocp.load_checkpointables(root / "m")),
    ),
    "delete no item": lambda ocp, root: ocp.delete(two(ocp, root), checkpointable_name="z"),
    "delete no item, fine": lambda ocp, root: ocp.delete(two(ocp, root), checkpointable_name="z", missing_ok=True),
    "delete the metrics": lambda ocp, root: ocp.delete(two(ocp, root), checkpointable_name="metrics"),
    "delete the last item": lambda ocp, root: ocp.delete(saved(ocp, root), checkpointable_name="state"),
    "delete in the background": lambda ocp, root: ocp.delete_async(saved(ocp, root)).result(),
    "save in the background": lambda ocp, root: (ocp.save_async(root / "a", {"x": 1}).result(), ocp.load(root / "a")),
    "parts": lambda ocp, root: parts(ocp, root / "p"),
    "parts twice": lambda ocp, root: (parts(ocp, root / "p"), ocp.partial.finalize(root / "p")),
    "more parts": lambda ocp, root: (parts(ocp, root / "p"), ocp.partial.save(root / "p", {"z": 1})),
    "no parts": lambda ocp, root: ocp.partial.finalize(root / "p"),
    "bound twice": lambda ocp, _: ocp.handlers.local_registry().add(
        ocp.handlers.JsonHandler, checkpointable_name="state"
    ),
    "registered twice": lambda ocp, _: ocp.handlers.local_registry().add(ocp.handlers.JsonHandler),
    "bound to nothing": lambda ocp, _: ocp.handlers.local_registry().get("z"),
    "what JSON takes": lambda ocp, _: [
        ocp.handlers.JsonHandler().is_handleable(one) for one in ({"a": 1}, [1], "s", {"a": object()}, np.ones(1))
    ],
    "what trees take": lambda ocp, _: [
        ocp.handlers.PyTreeHandler().is_handleable(one) for one in ({"a": 1}, [1], "s", {"a": object()}, object())
    ],
    "what trees are loaded into": lambda ocp, _: [
        ocp.handlers.PyTreeHandler().is_abstract_handleable(one) for one in (None, {"a": 1}, object())
    ],
}


def outcome(act, ocp, root):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "returned", plain(act(ocp, root))
        except Exception as error:  # noqa: BLE001 - it is what is compared
            kinds = [kind for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            return "raised", kinds[0]


def plain(value):
    return jax.tree.map(
        lambda leaf: (type(leaf).__name__, np.asarray(leaf).tolist()) if leaf is not ... else ..., value
    )


@pytest.mark.parametrize("name", CALLS)
def test_calls_do_what_they_do_there(name, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    (how, wanted), (ended, found) = outcome(CALLS[name], theirs, there), outcome(CALLS[name], ours, here)
    assert ended == how
    if how == "raised":
        assert issubclass(_raised(CALLS[name], here), wanted)
    else:
        assert found == wanted


def _raised(act, root):
    again = root / "again"
    again.mkdir()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its class is what is asked for
        act(ours, again)
    return caught.type


S = {"w": jnp.arange(4.0), "i": 3}


class Story:
    """What each of a row of calls has returned or raised."""

    def __init__(self):
        self.told = []

    def __call__(self, act):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.told.append(("returned", plain(act())))
            except Exception as error:  # noqa: BLE001 - it is what is compared
                self.told.append(("raised", [kind for kind in type(error).__mro__ if kind.__module__ == "builtins"]))


def saves_and_loads(ocp, c, tell):
    tell(lambda: c.latest is None)
    tell(c.load)
    for step in range(4):
        tell(lambda step=step: c.save(step, S, metrics={"l": float(step)}))
    tell(lambda: c.save(2, S))
    tell(lambda: c.save(0, S, force=True))
    tell(lambda: c.save(1, S))
    tell(lambda: c.save(1, S, force=True))
    tell(lambda: [one.step for one in c.checkpoints])
    tell(lambda: [one.metrics for one in c.checkpoints])
    tell(lambda: c.latest.step)
    tell(lambda: [c.should_save(step) for step in (0, 1, 3, 4, 5)])
    tell(lambda: c.load(2))
    tell(lambda: c.load(c.latest))
    tell(lambda: c.load(9))
    tell(lambda: c.load(2, checkpointable_name="z"))
    tell(lambda: c.load_checkpointables(2, {"z": None}))
    tell(lambda: sorted(c.load_checkpointables(2)))
    tell(lambda: c.metadata(2).metrics)
    tell(lambda: c.metadata(9))
    tell(lambda: sorted(c.checkpointables_metadata(2).metadata))


def changes_and_deletes(ocp, c, tell):
    tell(lambda: c.root_metadata().custom_metadata)
    tell(lambda: c.save_async(4, S).result())
    tell(lambda: c.save_async(5, S) is None)
    tell(lambda: c.save_async(4, S))
    tell(lambda: c.save(4, {"i": 7}, overwrite=True))
    tell(lambda: c.load(4))
    tell(lambda: c.delete(9))
    tell(lambda: c.delete(9, missing_ok=True))
    for step in (-1, "3", None, True):
        tell(lambda step=step: c.delete(step))
    tell(lambda: c.delete(0))
    tell(lambda: c.delete_async(c.latest).result())
    tell(lambda: c.delete(2, checkpointable_name="z"))
    tell(lambda: c.delete(2, checkpointable_name="state"))
    tell(lambda: [one.step for one in c.checkpoints])


def saves_objects(ocp, c, tell):
    tell(lambda: c.save_checkpointables(6, {"metrics": S}))
    tell(lambda: c.save_checkpointables(6, {}))
    tell(lambda: c.save(6, None))
    tell(lambda: c.save_checkpointables(6, {"a": S, "b": [1, 2]}))
    tell(lambda: c.load_checkpointables(6))
    tell(lambda: c.load(6))
    tell(lambda: c.cancel(1))
    tell(lambda: [one.step for one in c.checkpoints])


def story(ocp, root):
    tell = Story()
    when = ocp.training.save_decision_policies.FixedIntervalPolicy(2)
    with ocp.training.Checkpointer(root / "r", save_decision_policy=when, custom_metadata={"e": 1}) as c:
        saves_and_loads(ocp, c, tell)
        changes_and_deletes(ocp, c, tell)
        saves_objects(ocp, c, tell)
    with ocp.training.Checkpointer(root / "r", custom_metadata={"e": 2}) as c:
        tell(lambda: [one.step for one in c.checkpoints])
        tell(lambda: c.root_metadata().custom_metadata)
        tell(lambda: ocp.load(root / "r" / "2"))
    return tell.told


def test_a_training_goes_as_it_goes_there(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    for number, (here, there) in enumerate(
        zip(story(ours, tmp_path / "here"), story(theirs, tmp_path / "there"), strict=True)
    ):
        (ended, found), (how, wanted) = here, there
        assert (number, ended) == (number, how)
        if how == "raised":
            assert (number, wanted[0]) == (number, next((kind for kind in found if kind is wanted[0]), found))
        else:
            assert (number, found) == (number, wanted)


def test_policies_are_the_modules_of_the_reference():
    for name in ("preservation_policies", "save_decision_policies"):
        there = getattr(theirs.training, name)
        here = importlib.import_module(f"milepost.v1.training.{name}")
        wanted = {one for one in dir(there) if inspect.isclass(getattr(there, one)) and "Polic" in one}
        assert wanted <= set(dir(here))
