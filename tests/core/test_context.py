from __future__ import annotations

import asyncio
import copy
import dataclasses
import pickle
import stat
import threading

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import pytest
from milepost.config import current_layers, lookup
from milepost.errors import ConfigError, MilepostError
from milepost.settings import Broadcast, Settings, StorageRule, applied, as_config
from milepost.urls import locate
from milepost.v1 import options as o
from milepost.v1._context import Context, current_context, current_settings

PAIRS = [
    ("pytree", "pytree_options", o.PyTreeOptions),
    ("array", "array_options", o.ArrayOptions),
    ("asynchronous", "async_options", o.AsyncOptions),
    ("multiprocessing", "multiprocessing_options", o.MultiprocessingOptions),
    ("file", "file_options", o.FileOptions),
    ("checkpointables", "checkpointables_options", o.CheckpointablesOptions),
    ("pathways", "pathways_options", o.PathwaysOptions),
    ("deletion", "deletion_options", o.DeletionOptions),
    ("memory", "memory_options", o.MemoryOptions),
    ("safetensors", "safetensors_options", o.SafetensorsOptions),
    ("atomicity", "atomicity_options", o.AtomicityOptions),
]


def notes(error):
    return " ".join(getattr(error.value, "__notes__", ()))


def partial(context):
    return context.pytree.loading.partial_load


def with_partial_load():
    return Context(pytree_options=o.PyTreeOptions(loading=o.PyTreeOptions.Loading(partial_load=True)))


# --- which context holds ---------------------------------------------------------------------------------------------


def test_without_a_context_the_defaults_hold():
    assert current_settings() == Settings()
    assert current_context().settings() == Settings()
    assert Context().settings() == Settings()


def test_the_innermost_context_holds_until_its_block_ends():
    outer, inner = Context(), with_partial_load()
    with outer:
        with inner as entered:
            assert entered is inner
            assert current_context() is inner
            assert current_settings().partial is True
        assert current_context() is outer
        assert current_settings().partial is False
    assert current_settings() == Settings()


def test_a_nested_context_begins_with_the_defaults():
    with with_partial_load(), Context():
        assert current_settings().partial is False


def test_a_context_made_from_another_begins_with_a_copy_of_its_options():
    outer = with_partial_load()
    outer.checkpoint_layout = "safetensors"
    with outer:
        inner = Context(outer, async_options=o.AsyncOptions(timeout_secs=5))
        assert partial(inner) is True
        assert inner.checkpoint_layout is o.CheckpointLayout.SAFETENSORS
        assert (inner.asynchronous.timeout_secs, outer.asynchronous.timeout_secs) == (5, 1200)
        inner.pytree.loading.partial_load = False
        assert partial(outer) is True


def test_a_block_that_fails_ends_its_context_too():
    context = with_partial_load()
    with pytest.raises(KeyError), context:
        raise KeyError
    assert current_settings().partial is False
    context.pytree.loading.partial_load = False


def test_a_new_thread_starts_with_the_defaults():
    seen = []
    with with_partial_load():
        thread = threading.Thread(target=lambda: seen.append(current_settings()))
        thread.start()
        thread.join()
    assert seen == [Settings()]


def test_threads_do_not_see_each_others_contexts():
    meet = threading.Barrier(2, timeout=60)
    seen = {}

    def run(name, context):
        with context:
            meet.wait()
            seen[name] = current_settings().partial
            meet.wait()

    threads = [
        threading.Thread(target=run, args=("partial", with_partial_load())),
        threading.Thread(target=run, args=("whole", Context())),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"partial": True, "whole": False}


def test_tasks_that_take_turns_keep_their_own_contexts():
    async def run(context, met, go):
        with context:
            met.set()
            await go.wait()
            return current_settings().partial

    async def both():
        one, other = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(run(with_partial_load(), one, other), run(Context(), other, one))

    assert asyncio.run(both()) == [True, False]


def test_a_task_starts_with_what_held_where_it_was_made():
    async def see():
        return current_settings().partial

    async def main():
        with with_partial_load():
            task = asyncio.create_task(see())
        return await task

    assert asyncio.run(main()) is True


def test_a_generator_that_closes_its_block_late_ends_its_own_context_only():
    def block():
        with with_partial_load():
            yield

    generator = block()
    next(generator)
    context = Context()
    with context:
        generator.close()
        assert current_context() is context
    assert current_settings().partial is False


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("short", "long", "kind"), PAIRS)
def test_each_kind_of_options_has_two_names_and_is_live(short, long, kind):
    context = Context()
    assert type(getattr(context, short)) is kind
    assert getattr(context, long) is getattr(context, short)
    assert getattr(context, short) == kind()
    with pytest.raises(AttributeError):
        setattr(context, short, kind())


def test_options_are_copied_in():
    given = o.ArrayOptions()
    context = Context(array_options=given)
    given.saving.storage_options.chunk_byte_size = 7
    assert context.array.saving.storage_options.chunk_byte_size is None
    assert given != context.array


def test_sets_are_copied_in():
    given = {0, 1}
    context = Context(multiprocessing_options=o.MultiprocessingOptions(active_processes=given))
    given.add(2)
    assert context.settings().active_processes == frozenset({0, 1})


def test_a_method_that_is_called_back_stays_the_method_of_its_object():
    class Log:
        def __init__(self):
            self.lines = []
            self.lock = threading.Lock()  # which nobody can copy

        def done(self):
            self.lines.append("done")

    log = Log()
    context = Context(async_options=o.AsyncOptions(post_finalization_callback=log.done))
    Context(context).settings().on_committed()
    assert log.lines == ["done"]


@pytest.mark.parametrize(
    "assign",
    [
        lambda context: setattr(context.pytree.loading, "partial_load", False),
        lambda context: setattr(context.pytree, "loading", o.PyTreeOptions.Loading()),
        lambda context: setattr(context.array.saving.storage_options, "dtype", "float32"),
        lambda context: setattr(context.memory, "write_concurrent_bytes", 1),
        lambda context: setattr(context, "checkpoint_layout", "auto"),
    ],
)
def test_what_is_active_cannot_be_changed(assign):
    context = Context()
    with context:
        with pytest.raises(RuntimeError, match="active") as error:
            assign(context)
        assert isinstance(error.value, MilepostError)
        with context, pytest.raises(RuntimeError, match="active"):
            assign(context)
        with pytest.raises(RuntimeError, match="active"):
            assign(context)
    assign(context)


def test_a_context_that_another_thread_has_entered_cannot_be_changed():
    context, entered, leave = Context(), threading.Event(), threading.Event()

    def run():
        with context:
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    assert entered.wait(60)
    with pytest.raises(RuntimeError, match="active"):
        context.pytree.loading.partial_load = True
    leave.set()
    thread.join()
    context.pytree.loading.partial_load = True
    assert partial(context) is True


def test_given_options_stay_free_while_the_context_is_active():
    given = o.PyTreeOptions()
    with Context(pytree_options=given):
        given.loading.partial_load = True
        assert current_settings().partial is False


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])  # noqa: S301 - its own
def test_a_copy_of_active_options_is_free(copier):
    context = Context()
    with context:
        new = copier(context.file)
        new.path_permission_mode = 0o700
        assert context.file.path_permission_mode is None
        assert dataclasses.replace(context.file, path_permission_mode=0o700) == new


def test_a_misspelt_option_is_an_error_that_names_the_right_one():
    context = Context()
    with pytest.raises(AttributeError, match="partial_lod") as error:
        context.pytree.loading.partial_lod = True
    assert "did you mean 'partial_load'?" in notes(error)
    with pytest.raises(AttributeError, match="partial_load"):
        context.partial_load = True
    with pytest.raises(TypeError, match="partial_load"):
        o.PyTreeOptions(partial_load=True)


def test_options_of_another_kind_are_refused():
    with pytest.raises(TypeError, match=r"FileOptions.*ArrayOptions") as error:
        Context(array_options=o.FileOptions())
    assert isinstance(error.value, MilepostError)


@pytest.mark.parametrize("layout", ["safetensors", o.CheckpointLayout.SAFETENSORS])
def test_a_layout_is_a_member_or_its_value(layout):
    context = Context(checkpoint_layout=layout)
    assert context.checkpoint_layout is o.CheckpointLayout.SAFETENSORS
    assert context.settings().layout == "safetensors"


def test_an_unknown_layout_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="tar") as error:
        Context(checkpoint_layout="tar")
    assert "'safetensors'" in notes(error)
    with pytest.raises(ValueError, match="tar"):
        Context().checkpoint_layout = "tar"


# --- what the engine is told -----------------------------------------------------------------------------------------


def test_settings_say_every_option_that_has_a_meaning():
    def done():
        pass

    registry = object()
    context = Context(
        pytree_options=o.PyTreeOptions(loading=o.PyTreeOptions.Loading(partial_load=True)),
        array_options=o.ArrayOptions(
            saving=o.ArrayOptions.Saving(
                storage_options=o.ArrayOptions.Saving.StorageOptions(
                    dtype=jnp.bfloat16, chunk_byte_size=9, shard_axes=(1,)
                )
            ),
            loading=o.ArrayOptions.Loading(enable_padding_and_truncation=True, use_load_and_broadcast=True),
        ),
        async_options=o.AsyncOptions(timeout_secs=7, post_finalization_callback=done),
        multiprocessing_options=o.MultiprocessingOptions(
            primary_host=None, active_processes={1}, barrier_sync_key_prefix="a"
        ),
        file_options=o.FileOptions(path_permission_mode=0o750),
        checkpointables_options=o.CheckpointablesOptions(registry=registry),
        checkpoint_layout="auto",
        deletion_options=o.DeletionOptions(
            gcs_deletion_options=o.DeletionOptions.GcsDeletionOptions(todelete_full_path="trash")
        ),
        memory_options=o.MemoryOptions(
            write_concurrent_bytes=5,
            read_concurrent_bytes=6,
            transfer_concurrent_bytes=4,
            deepcopy_host_arrays=False,
        ),
        safetensors_options=o.SafetensorsOptions(max_over_read_ratio=1.5, read_chunk_bytes=8),
        atomicity_options=o.AtomicityOptions(mode=o.AtomicityMode.COMMIT_FILE),
    )
    assert context.settings() == Settings(
        save_budget=4,
        load_budget=6,
        directory_mode=0o750,
        commit="create",
        trash="trash",
        storage=StorageRule(dtype=np.dtype(jnp.bfloat16), chunk_bytes=9, shard_axes=(1,)),
        copy_host_arrays=False,
        on_committed=done,
        layout="auto",
        partial=True,
        resize=True,
        broadcast=Broadcast(),
        read_chunk_bytes=8,
        over_read=1.5,
        registry=registry,
        timeout=7,
        primary_host=None,
        active_processes=frozenset({1}),
        barrier_prefix="a",
    )


@pytest.mark.parametrize(
    ("write", "transfer", "expected"), [(None, None, None), (3, None, 3), (None, 2, 2), (3, 2, 2), (2, 3, 2)]
)
def test_the_smaller_of_the_bounds_on_saving_holds(write, transfer, expected):
    context = Context()
    context.memory.write_concurrent_bytes = write
    context.memory.transfer_concurrent_bytes = transfer
    assert context.settings().save_budget == expected


@pytest.mark.parametrize("name", ["write_concurrent_bytes", "read_concurrent_bytes", "transfer_concurrent_bytes"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_bound_that_nothing_fits_in_is_refused(name, value):
    context = Context()
    setattr(context.memory, name, value)
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        context.settings()


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16)])
def test_a_dtype_may_be_given_in_every_way_numpy_and_jax_know(dtype):
    context = Context()
    context.array.saving.storage_options.dtype = dtype
    assert context.settings().storage.dtype == np.dtype(jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["float31", object, "U8", ">f4"])
def test_a_dtype_that_jax_does_not_have_is_refused(dtype):
    context = Context()
    context.array.saving.storage_options.dtype = dtype
    with pytest.raises(ConfigError, match="dtype"):
        context.settings()


def test_options_for_one_leaf_are_stronger_field_by_field():
    asked = []

    def creator(key, value):
        asked.append((key, value))
        return o.ArrayOptions.Saving.StorageOptions(chunk_byte_size=5) if value > 1 else None

    context = Context()
    saving = context.array.saving
    saving.storage_options.dtype = "float16"
    saving.storage_options.chunk_byte_size = 9
    saving.scoped_storage_options_creator = creator
    settings = context.settings()
    path = (jax.tree_util.DictKey("a"),)
    float16 = np.dtype("float16")
    assert settings.storage_of(path, 1) == StorageRule(dtype=float16, chunk_bytes=9)
    assert settings.storage_of(path, 2) == StorageRule(dtype=float16, chunk_bytes=5)
    assert asked == [(path, 1), (path, 2)]


# --- the settings of a URL -------------------------------------------------------------------------------------------


def test_settings_that_say_nothing_leave_the_configuration_alone():
    assert as_config(Settings(), "file:///runs/7") == {}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (o.AtomicityMode.AUTO, {}),
        (o.AtomicityMode.COMMIT_FILE, {"url": {"gs://b/7": {"commit": "create"}}}),
        (o.AtomicityMode.ATOMIC_RENAME, {"url": {"gs://b/7": {"commit": "rename"}}}),
    ],
)
def test_the_mode_of_atomicity_names_a_commit_strategy(mode, expected):
    context = Context(atomicity_options=o.AtomicityOptions(mode=mode))
    assert as_config(context.settings(), "gs://b/7") == expected


def test_settings_are_stronger_than_every_other_for_their_path_alone(tmp_path):
    with (
        milepost.configured({"url": {str(tmp_path / "7"): {"save_budget": 1, "threads": 3}}}),
        applied(Settings(save_budget=2), tmp_path / "7"),
    ):
        found = lookup(current_layers(), locate(tmp_path / "7"))
        assert (found["save_budget"].value, found["threads"].value) == (2, 3)
        assert lookup(current_layers(), locate(tmp_path / "8"))["save_budget"].value is None


def test_options_of_the_storage_that_are_configured_stay():
    table = as_config(Settings(directory_mode=0o700), "file:///7", {"other": 1, "mode": "0755"})
    assert table == {"url": {"file:///7": {"storage_options": {"other": 1, "mode": "700"}}}}


def test_permissions_hold_for_directories_and_files(tmp_path):
    context = Context(file_options=o.FileOptions(path_permission_mode=0o750))
    with applied(context.settings(), tmp_path / "1"):
        milepost.save(tmp_path / "1", {"a": np.arange(4)})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "1").stat().st_mode) == 0o750


@pytest.mark.parametrize("mode", [o.AtomicityMode.COMMIT_FILE, o.AtomicityMode.ATOMIC_RENAME])
def test_a_checkpoint_of_either_mode_is_loaded_with_and_without_it(tmp_path, mode):
    context = Context(atomicity_options=o.AtomicityOptions(mode=mode))
    with applied(context.settings(), tmp_path / "1"):
        milepost.save(tmp_path / "1", {"a": 3})
        assert milepost.load(tmp_path / "1") == {"a": 3}
    assert milepost.load(tmp_path / "1") == {"a": 3}
