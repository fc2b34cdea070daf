"""Make the golden checkpoints of one release of Orbax, in an environment that has it; those here are never made anew.

    uv venv old --python 3.11
    uv pip install --python old/bin/python --exclude-newer 2024-02-20 orbax-checkpoint==0.5.3 "jax[cpu]" setuptools
    old/bin/python tests/golden/orbax/make.py

The date takes JAX, NumPy and TensorStore as they were then. Those with JAX 0.8 or later want `flatbuffers`, too.

It writes `<release>.tar.xz`, with one folder for each case, and `<release>.json`: the versions of what wrote it, the
dtypes it can hold, and what each case is: the `tree` of state.py in it (or `items`, by name, or `steps`), whether its
arrays are `spread` over 8 devices. Each case is read with the release that wrote it, before it is packed, so that the
expectation in state.py is true of it.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import os
import shutil
import sys
import tarfile
import tempfile
import warnings
from contextlib import closing
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import jax  # noqa: E402 - after its devices are chosen
import orbax.checkpoint as ocp  # noqa: E402
import state  # noqa: E402

RELEASE = importlib.metadata.version("orbax-checkpoint")
VERSION = tuple(int(part) for part in RELEASE.split(".")[:3])
PACKAGES = ("orbax-checkpoint", "jax", "jaxlib", "numpy", "tensorstore", "ml_dtypes", "msgpack")
CASES = []


def case(tree=None, *, since=(0,), before=(99,), spread=False, **what):
    """Note a case: a function `(path, tree) -> what the release reads there, None if it cannot be told`."""

    def note(make):
        if since <= VERSION < before:
            CASES.append((make.__name__, make, tree, spread, what))
        return make

    return note


def pytree(**options):
    """Return a checkpointer of trees; options that this release has not are an error."""
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options))


def save_pytree(path, tree, **options):
    checkpointer = pytree(**options)
    checkpointer.save(path, tree)
    return checkpointer.restore(path)


# --- single checkpointers ---------------------------------------------------------------------------------------------


@case("standard", spread=True)
def standard(path, tree):
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path, tree)
    getattr(checkpointer, "wait_until_finished", lambda: None)()
    # The first releases give no arrays back without a target.
    return None if VERSION < (0, 6) else checkpointer.restore(path)


@case("standard")
def plain(path, tree):
    return save_pytree(path, tree, use_ocdbt=False)


@case("texts", spread=True)
def plain_spread(path, tree):
    return save_pytree(path, tree, use_ocdbt=False)


@case("texts")
def ocdbt(path, tree):
    return save_pytree(path, tree, use_ocdbt=True)


@case("small", since=(0, 5, 11), spread=True)
def zarr3_plain(path, tree):
    return save_pytree(path, tree, use_ocdbt=False, use_zarr3=True)


@case("texts", since=(0, 5, 11), spread=True)
def zarr3_ocdbt(path, tree):
    return save_pytree(path, tree, use_ocdbt=True, use_zarr3=True)


@case("small", since=(0, 11, 26))
def uncompressed(path, tree):
    return save_pytree(path, tree, use_compression=False)


@case("keys", since=(0, 11, 13))
def keys(path, tree):
    return save_pytree(path, tree)


@case("standard", since=(0, 11, 2))
def rich_types(path, tree):
    from orbax.checkpoint._src.metadata.tree import PyTreeMetadataOptions

    # No release reads this without a target.
    pytree(pytree_metadata_options=PyTreeMetadataOptions(support_rich_types=True)).save(path, tree)


# --- aggregate files: arrays within the description of the tree -------------------------------------------------------


def save_aggregate(path, tree, chosen, **options):
    checkpointer = pytree(**options)
    arguments = jax.tree_util.tree_map_with_path(lambda keys, _: ocp.SaveArgs(aggregate=chosen(keys)), tree)
    checkpointer.save(path, tree, save_args=arguments)
    return checkpointer.restore(path)


@case("texts", before=(0, 6), aggregate=True)
def aggregate(path, tree):
    return save_aggregate(path, tree, lambda keys: True, use_ocdbt=False)


@case("texts", before=(0, 6), aggregate=True)
def aggregate_mixed(path, tree):
    return save_aggregate(path, tree, lambda keys: keys[0].key in ("b", "text", "step"), use_ocdbt=False)


@case("texts", before=(0, 6), aggregate=True)
def aggregate_mixed_ocdbt(path, tree):
    return save_aggregate(path, tree, lambda keys: keys[0].key in ("w", "deep"), use_ocdbt=True)


@case("small", before=(0, 6), aggregate=True)
def aggregate_chunked(path, tree):
    from orbax.checkpoint import msgpack_utils

    msgpack_utils.MAX_CHUNK_SIZE = 24
    return save_aggregate(path, tree, lambda keys: True)


@case("small", before=(0, 5, 11), untyped=True)
def no_metadata(path, tree):
    return save_pytree(path, tree, use_ocdbt=False, write_tree_metadata=False)


@case("small", before=(0, 5, 11), untyped=True)
def no_metadata_ocdbt(path, tree):
    return save_pytree(path, tree, use_ocdbt=True, write_tree_metadata=False)


# --- managers ---------------------------------------------------------------------------------------------------------


@case("small", spread=True, manager="default", steps=[1, 2])
def manager(path, tree):
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], best_mode="min")
    with closing(ocp.CheckpointManager(path, options=options, metadata=state.CUSTOM)) as manager:
        for step in (1, 2):
            manager.save(step, args=ocp.args.StandardSave(tree), metrics=state.METRICS[step])
        manager.wait_until_finished()
        assert manager.best_step() == 2, manager.best_step()


ITEMS = {
    "params": "small",
    "other": "texts",
    "notes": "notes",
    "array": "array",
    "jax_key": "old_key",
    "typed_key": "new_key",
    "numpy_key": "numpy_key",
}


def composite(path, options=None):
    place = state.devices(spread=False)
    made = {item: state.TREES[name](place, DTYPES) for item, name in ITEMS.items()}
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(made["params"]),
        other=ocp.args.PyTreeSave(made["other"]),
        notes=ocp.args.JsonSave(made["notes"]),
        array=ocp.args.ArraySave(made["array"]),
        jax_key=ocp.args.JaxRandomKeySave(made["jax_key"]),
        typed_key=ocp.args.JaxRandomKeySave(made["typed_key"]),
        numpy_key=ocp.args.NumpyRandomKeySave(made["numpy_key"]),
    )
    with closing(ocp.CheckpointManager(path, options=options, item_names=tuple(ITEMS))) as manager:
        manager.save(5, args=args)
        manager.wait_until_finished()


@case(items=ITEMS, manager="items", steps=[5])
def items(path, tree):
    composite(path)


@case(items=ITEMS, manager="items", steps=[5], step_prefix="ckpt", step_format_fixed_length=4)
def named_steps(path, tree):
    composite(path, ocp.CheckpointManagerOptions(step_prefix="ckpt", step_format_fixed_length=4))


@case(items={"tree": "texts", "notes": "notes"}, manager="items", steps=[3], legacy=True)
def legacy_manager(path, tree):
    place = state.devices(spread=False)
    checkpointers = {
        "tree": ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()),
        "notes": ocp.Checkpointer(ocp.JsonCheckpointHandler()),
    }
    with closing(ocp.CheckpointManager(path, checkpointers)) as manager:
        manager.save(3, {"tree": state.texts(place, DTYPES), "notes": state.NOTES})
        manager.wait_until_finished()


# --- v1 ---------------------------------------------------------------------------------------------------------------


def v1():
    from orbax.checkpoint.experimental import v1

    return v1


@case("texts", since=(0, 11, 13), spread=True)
def v1_state(path, tree):
    save = v1().save if VERSION >= (0, 12) else v1().save_pytree
    save(path, tree, **({"custom_metadata": state.CUSTOM} if VERSION >= (0, 11, 26) else {}))
    load = v1().load if VERSION >= (0, 12) else v1().load_pytree
    return load(path)


@case("small", since=(0, 11, 26))
def v1_plain(path, tree):
    options = v1().options.ArrayOptions(saving=v1().options.ArrayOptions.Saving(use_ocdbt=False, use_zarr3=False))
    with v1().Context(array_options=options):
        (v1().save if VERSION >= (0, 12) else v1().save_pytree)(path, tree)


@case(since=(0, 11, 13), items={"one": "small", "two": "texts"})
def v1_items(path, tree):
    place = state.devices(spread=False)
    v1().save_checkpointables(path, {"one": state.small(place, DTYPES), "two": state.texts(place, DTYPES)})


@case("small", since=(0, 11, 26), spread=True, manager="v1", steps=[1, 2])
def v1_training(path, tree):
    with v1().training.Checkpointer(path, custom_metadata=state.CUSTOM) as checkpointer:
        for step in (1, 2):
            save = checkpointer.save if VERSION >= (0, 12) else checkpointer.save_pytree
            save(step, tree, metrics=state.METRICS[step])


# --- arrays as JAX itself writes them ---------------------------------------------------------------------------------


@case("named", spread=True, untyped=True)
def jax_arrays(path, tree):
    from jax.experimental.array_serialization import serialization

    manager = serialization.GlobalAsyncCheckpointManager()
    paths = [str(path / name) for name in tree]
    manager.serialize_with_paths(list(tree.values()), paths, on_commit_callback=lambda: None)
    manager.wait_until_finished()


@case("named", spread=True, untyped=True)
def jax_arrays_ocdbt(path, tree):
    from jax.experimental.array_serialization import serialization

    manager = serialization.GlobalAsyncCheckpointManager()
    specs = [serialization.get_tensorstore_spec(str(path / name), ocdbt=True) for name in tree]
    manager.serialize(list(tree.values()), specs, on_commit_callback=lambda: None)
    manager.wait_until_finished()


@case("nested", since=(0, 11, 26), spread=True, untyped=True)
def jax_pytree(path, tree):
    from jax.experimental.array_serialization import pytree_serialization

    pytree_serialization.save(tree, path)


@case("classes", since=(0, 11, 26), spread=True, untyped=True)
def jax_classes(path, tree):
    from jax import export
    from jax.experimental.array_serialization import pytree_serialization

    export.register_namedtuple_serialization(state.Moments, serialized_name="golden.Moments")
    pytree_serialization.save(tree, path)


# --- making them ------------------------------------------------------------------------------------------------------


def holds(folder, name):
    """Say whether this release holds a dtype, on a device and on the host."""
    tree = {"device": state.devices(spread=False).one(state.numbers(name, (3,))), "host": state.numbers(name, (3,))}
    try:
        return not state.difference(tree, save_pytree(folder / name, tree))
    except Exception as error:  # noqa: BLE001 - whatever it is, it cannot
        print(f"{RELEASE} does not hold {name}: {error!s:.80}")  # noqa: T201 - for who makes them
        return False


def pack(folder, target):
    """Write a tar that says nothing about who made it."""
    with tarfile.open(target, "w:xz", preset=9) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_dir() and any(path.iterdir()):
                continue
            info = tarfile.TarInfo(path.relative_to(folder).as_posix() + ("/" if path.is_dir() else ""))
            info.type = tarfile.DIRTYPE if path.is_dir() else tarfile.REGTYPE
            info.mode = 0o755 if path.is_dir() else 0o644
            body = b"" if path.is_dir() else path.read_bytes()
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


def main():
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    global DTYPES  # noqa: PLW0603 - known once this release was asked
    root = Path(tempfile.mkdtemp())
    DTYPES = tuple(name for name in state.CANDIDATES if holds(root, name))
    shutil.rmtree(root)
    # Some files hold the path they were written to: the same one for whoever makes them.
    root = Path("/tmp/golden")  # noqa: S108 - nobody else's
    shutil.rmtree(root, ignore_errors=True)
    cases = {}
    for name, make, tree, spread, what in CASES:
        root.mkdir(exist_ok=True)
        built = None if tree is None else state.TREES[tree](state.devices(spread=spread), DTYPES)
        found = make(root / name, built)
        if found is not None and (wrong := state.difference(state.flattened(built), found, typed=False)):
            raise AssertionError(f"{RELEASE} {name}: {wrong}")
        cases[name] = {"tree": tree, "spread": spread, **what}
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    document = {"versions": versions, "python": sys.version.split()[0], "dtypes": DTYPES, "cases": cases}
    (HERE / f"{RELEASE}.json").write_text(json.dumps(document, indent=1) + "\n")
    pack(root, HERE / f"{RELEASE}.tar.xz")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
