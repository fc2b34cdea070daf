"""What was written stays readable: checkpoints of every released format, and the fields of the one written today."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import pytest
import xxhash
from golden.state import METADATA, state
from milepost.manifest import VERSION
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = sorted((ROOT / "tests" / "golden").glob("v*/*"))
TODAY = [golden for golden in GOLDEN if golden.parent.name == f"v{VERSION}"]
FORMAT = (ROOT / "docs" / "reference" / "format.md").read_text(encoding="utf-8")


def name_of(golden):
    return f"{golden.parent.name}/{golden.name}"


def test_there_are_golden_checkpoints_of_every_format_and_layout():
    assert {golden.parent.name for golden in GOLDEN} == {f"v{number}" for number in range(1, VERSION + 1)}
    assert {golden.name for golden in TODAY} == {"rename", "create"}


def described(leaf):
    """Return all there is to a leaf, as values that compare by kind and bits."""
    if isinstance(leaf, jax.Array):
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        data = np.asarray(data)
        where = leaf.sharding if leaf.committed else None
        return type(leaf), str(leaf.dtype), data.shape, data.tobytes(), where, getattr(leaf, "weak_type", False)
    if isinstance(leaf, np.ndarray | np.generic) or hasattr(leaf, "dtype"):
        return type(leaf), leaf.dtype, np.shape(leaf), np.asarray(leaf).tobytes()
    return type(leaf), repr(leaf)


@pytest.mark.parametrize("golden", GOLDEN, ids=name_of)
@pytest.mark.parametrize("target", [False, True])
def test_a_golden_checkpoint_holds_what_was_saved(golden, target):
    expected = state()
    loaded = milepost.load(golden, expected) if target else milepost.load(golden)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    found = jax.tree_util.tree_flatten_with_path(loaded)[0]
    for (path, leaf), wanted in zip(found, jax.tree.leaves(expected), strict=True):
        assert described(leaf) == described(wanted), path


@pytest.mark.parametrize("golden", GOLDEN, ids=name_of)
def test_a_golden_checkpoint_says_what_it_holds(golden):
    found = milepost.v1.metadata(golden)
    assert found.custom_metadata == METADATA
    assert found.init_timestamp_nsecs < found.commit_timestamp_nsecs
    assert found.metadata["jax"]["sharded"].shape == (8, 4)
    assert found.metadata["dtypes"]["bfloat16"].dtype == "bfloat16"


@pytest.mark.parametrize("golden", GOLDEN, ids=name_of)
def test_a_golden_checkpoint_may_be_copied_by_any_tool(golden, tmp_path):
    shutil.copytree(golden, tmp_path / "elsewhere")
    assert milepost.load(tmp_path / "elsewhere")["names"] == state()["names"]


@pytest.mark.parametrize("golden", GOLDEN, ids=name_of)
def test_the_files_of_a_golden_checkpoint_are_those_of_its_manifest(golden):
    document = json.loads((golden / "commit_success.txt").read_bytes())
    for file in document["files"]:
        data = (golden / file["path"]).read_bytes()
        assert (len(data), f"xxh3_64:{xxhash.xxh3_64_hexdigest(data)}") == (file["size"], file["checksum"])
    with safe_open(golden / document["files"][0]["path"], framework="numpy") as opened:
        np.testing.assert_array_equal(state()["large"], opened.get_tensor("large"))


# --- today's writer --------------------------------------------------------------------------------------------------


@pytest.fixture(params=TODAY, ids=name_of)
def both(request, tmp_path):
    """Return the golden manifest, and the one that is written for the same state now."""
    with milepost.configured({"default": {"commit": request.param.name}}):
        milepost.save(tmp_path / "7", state(), custom_metadata=METADATA)
    return [json.loads((folder / "commit_success.txt").read_bytes()) for folder in (request.param, tmp_path / "7")]


def comparable(document):
    """Return a manifest without what differs from save to save."""
    attempt = document["attempt"]
    result = copy.deepcopy(json.loads(json.dumps(document).replace(attempt, "ATTEMPT")))
    for name in ("init_timestamp_nsecs", "commit_timestamp_nsecs", "checksum"):
        result[name] = type(result[name]).__name__
    result["written_by"] = shape_of(result["written_by"])
    for item in result["items"].values():
        item["shardings"] = shape_of(item["shardings"])  # JAX has changed the words for kinds of axes
    return result


def shape_of(value):
    if isinstance(value, dict):
        return {key: shape_of(part) for key, part in value.items()}
    return [shape_of(part) for part in value] if isinstance(value, list) else type(value).__name__


def test_the_format_that_is_written_has_not_changed(both):
    golden, now = map(comparable, both)
    assert list(golden) == list(now)
    assert golden == now


# --- its documentation -----------------------------------------------------------------------------------------------


def documented(section):
    """Return the names in the first column of the table below a heading."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", FORMAT, re.MULTILINE | re.DOTALL)[1]
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_every_field_of_the_manifest_is_documented(both):
    document = both[1]
    item = document["items"]["state"]
    assert documented("Manifest") == list(document)
    assert documented("Items") == list(item)
    assert documented("Files") == list(document["files"][0])
    array = next(leaf["arrays"][""] for leaf in item["leaves"] if "arrays" in leaf)
    assert documented("Arrays") == list(array)


def test_every_kind_of_leaf_and_container_is_documented(both):
    from milepost.plugins import installed

    assert set(documented("Leaves")) == {handler.name for handler in installed().leaf_handlers()}
    kinds = set(re.findall(r'"kind": "(\w+)"', json.dumps(both[1]["items"]["state"]["structure"])))
    assert set(documented("Structure")) == kinds


def test_the_documented_version_is_the_one_that_is_written(both):
    assert f"format version {both[1]['version']}" in FORMAT
