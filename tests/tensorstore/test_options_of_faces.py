"""What both APIs say of the format, and of how arrays are divided, is what is on the disk."""

from __future__ import annotations

import json

import milepost
import numpy as np
import orbax.checkpoint as ocp
import pytest
from milepost import v1

STATE = {"a": np.arange(64, dtype=np.float32).reshape(8, 8), "b": {"c": np.arange(6, dtype=np.int16)}}


@pytest.fixture(autouse=True)
def tensorstore():
    with milepost.configured({"default": {"arrays": "tensorstore"}}):
        yield


def same(restored):
    np.testing.assert_array_equal(restored["a"], STATE["a"], strict=True)
    np.testing.assert_array_equal(restored["b"]["c"], STATE["b"]["c"], strict=True)


def saving(**options):
    return v1.Context(array_options=v1.options.ArrayOptions(saving=v1.options.ArrayOptions.Saving(**options)))


@pytest.mark.parametrize(
    ("options", "document"), [({}, ".zarray"), ({"use_zarr3": True}, "zarr.json")], ids=["zarr2", "zarr3"]
)
def test_a_checkpointer_without_ocdbt_has_a_folder_for_each_array(tmp_path, options, document):
    milepost.PyTreeCheckpointer(use_ocdbt=False, **options).save(tmp_path / "1", STATE)
    assert (tmp_path / "1" / "a" / document).exists()
    assert (tmp_path / "1" / "b.c" / document).exists()
    assert not (tmp_path / "1" / "manifest.ocdbt").exists()
    same(ocp.PyTreeCheckpointer().restore(tmp_path / "1"))


def test_a_standard_checkpointer_without_ocdbt_has_a_folder_for_each_array(tmp_path):
    with milepost.StandardCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(tmp_path / "1", STATE)
    assert (tmp_path / "1" / "b.c" / ".zarray").exists()


def test_a_checkpointer_has_one_database_by_default(tmp_path):
    milepost.PyTreeCheckpointer().save(tmp_path / "1", STATE)
    assert (tmp_path / "1" / "manifest.ocdbt").exists()
    assert not (tmp_path / "1" / "a").exists()


def test_a_context_says_the_format(tmp_path):
    with (
        milepost.configured({"default": {"arrays_options": {"zarr_format": 3}}}),
        saving(use_zarr3=False, use_ocdbt=False),
    ):
        v1.save(tmp_path / "1", STATE)
    assert (tmp_path / "1" / "state" / "a" / ".zarray").exists()


@pytest.mark.parametrize("compressed", [True, False])
def test_compression_is_switched_off_where_the_route_has_it(tmp_path, compressed):
    options = {"arrays_options": {"compression": "zstd", "ocdbt": False}}
    with milepost.configured({"default": options}), saving(use_compression=compressed):
        v1.save(tmp_path / "1", STATE)
    found = json.loads((tmp_path / "1" / "state" / "a" / ".zarray").read_text())
    assert (found["compressor"] is not None) == compressed
    same(v1.load(tmp_path / "1"))


def chunks_of(folder):
    return json.loads((folder / ".zarray").read_text())["chunks"]


def test_save_args_bound_the_chunks_of_one_array(tmp_path):
    save_args = {"a": milepost.SaveArgs(chunk_byte_size=64), "b": {"c": milepost.SaveArgs()}}
    milepost.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "1", STATE, save_args=save_args)
    assert np.prod(chunks_of(tmp_path / "1" / "a")) * 4 <= 64
    assert chunks_of(tmp_path / "1" / "b.c") == [6]
    same(ocp.PyTreeCheckpointer().restore(tmp_path / "1"))


def test_save_args_say_which_axis_is_divided_first(tmp_path):
    save_args = {"a": milepost.SaveArgs(chunk_byte_size=64, shard_axes=(1,)), "b": {"c": milepost.SaveArgs()}}
    milepost.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "1", STATE, save_args=save_args)
    rows, columns = chunks_of(tmp_path / "1" / "a")
    assert (rows, columns) == (8, 2)


def test_storage_options_of_a_context_bound_the_chunks(tmp_path):
    storing = v1.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=64)
    with saving(storage_options=storing, use_ocdbt=False):
        v1.save(tmp_path / "1", STATE)
    assert np.prod(chunks_of(tmp_path / "1" / "state" / "a")) * 4 <= 64
    same(v1.load(tmp_path / "1"))


def test_the_size_of_files_is_the_one_asked_for(tmp_path):
    state = {f"a{at}": np.full(50_000, at, np.float32) for at in range(10)}
    sizes = {}
    for name, target in (("small", 300_000), ("large", None)):
        with saving(ocdbt_target_data_file_size=target):
            v1.save(tmp_path / name, state)
        sizes[name] = len(list((tmp_path / name / "state" / "d").iterdir()))
    assert sizes["small"] > sizes["large"]
    restored = ocp.PyTreeCheckpointer().restore(tmp_path / "small" / "state")
    assert [int(restored[f"a{at}"][0]) for at in range(10)] == list(range(10))
