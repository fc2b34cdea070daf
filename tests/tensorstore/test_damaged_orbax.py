"""Checkpoints of Orbax that are damaged, unfinished or hostile: one clear error, which names what is wrong.

Each test damages a copy of what the real Orbax wrote.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import uuid

import jax
import milepost
import numpy as np
import orbax.checkpoint as ocp
import pytest
from milepost.errors import CheckpointNotFoundError, DamagedError, InvalidLayoutError, MissingDataError
from milepost.routes import open_route, resolve
from milepost_tensorstore.orbax.recognising import OrbaxLayout
from orbax.checkpoint import v1

STATE = {
    "params": {"w": np.arange(4096, dtype=np.float32), "b": jax.random.key(0)},
    "list": [np.arange(3), {"x": 1.5}],
    "text": "words",
    "none": None,
}
FORMS = {"ocdbt": {"use_ocdbt": True}, "plain": {"use_ocdbt": False}}
JSON_FILES = ("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "_strings.json", "array_metadatas/process_0")
ODD = (None, True, 7, -1, 2.5, "text", [], [[]], {}, {"": None}, 1 << 70)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a folder with checkpoints that nothing is wrong with, by form."""
    root = tmp_path_factory.mktemp("whole")
    for form, options in FORMS.items():
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as theirs:
            theirs.save(root / form, STATE)
    v1.save(root / "v1", STATE)
    with ocp.CheckpointManager(root / "manager", options=ocp.CheckpointManagerOptions(best_fn=dict.popitem)) as theirs:
        args = ocp.args.Composite(state=ocp.args.StandardSave({"w": np.arange(3)}), words=ocp.args.JsonSave({"a": 1}))
        theirs.save(1, args=args, metrics={"loss": 0.5})
    return root


@pytest.fixture
def damaged(whole, tmp_path):
    """Return a function that copies a checkpoint to where it may be damaged."""

    def copied(form):
        return shutil.copytree(whole / form, tmp_path / form)

    return copied


def rewrite(file, change):
    """Change what a JSON file says."""
    document = json.loads(file.read_text())
    file.write_text(json.dumps(change(document)))


def refused(path, kind, *words):
    """Load a checkpoint, which must be refused with an error of a kind that has these words; return its message."""
    with pytest.raises(kind) as caught:
        milepost.load(path)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


def test_what_is_not_damaged_loads(damaged):
    for form in (*FORMS, "v1"):
        found = milepost.load(damaged(form))
        assert np.array_equal(found["params"]["w"], STATE["params"]["w"])


# --- missing ---------------------------------------------------------------------------------------------------------


def test_missing_manifest_is_named(damaged):
    path = damaged("ocdbt")
    for manifest in path.rglob("manifest.ocdbt"):
        manifest.unlink()
    refused(path, MissingDataError, "manifest.ocdbt", str(path))


def test_missing_node_of_the_database_is_named(damaged):
    path = damaged("ocdbt")
    (node,) = (path / "d").iterdir()
    node.unlink()
    refused(path, MissingDataError, node.name)


def test_missing_file_of_data_is_named_with_its_leaf(damaged):
    path = damaged("ocdbt")
    largest = max(path.glob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)
    largest.unlink()
    refused(path, MissingDataError, "params", "w", largest.name)
    assert milepost.v1.load(path, include="list/*")["list"][1] == {"x": 1.5}


def test_file_of_data_that_was_cut_short_is_damage(damaged):
    path = damaged("ocdbt")
    largest = max(path.glob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    refused(path, DamagedError, "params", "w")


def test_missing_chunk_of_a_plain_array_is_named(damaged):
    path = damaged("plain")
    (path / "params.w" / "0").unlink()
    refused(path, MissingDataError, "params", "w")


def test_missing_arrays_are_listed_all_at_once(damaged):
    path = damaged("plain")
    shutil.rmtree(path / "params.w")
    (path / "list.0" / ".zarray").unlink()
    refused(path, MissingDataError, "'list.0'", "'params.w'", "of 6 leaves 2")


def test_missing_strings_are_listed(damaged):
    path = damaged("ocdbt")
    (path / "_strings.json").unlink()
    refused(path, MissingDataError, "'text'")


def test_checkpoint_without_its_items_is_damaged(damaged):
    path = damaged("v1")
    shutil.rmtree(path / "state")
    refused(path, MissingDataError, "'state'")


def test_missing_file_of_an_item_is_named(damaged):
    path = damaged("manager") / "1"
    (path / "words" / "metadata").unlink()
    with milepost.CheckpointManager(path.parent) as ours, pytest.raises((DamagedError, FileNotFoundError)) as caught:
        ours.restore(1, args=milepost.args.Composite(words=milepost.args.JsonRestore()))
    assert "metadata" in str(caught.value)


def test_arrays_that_were_never_merged_load(damaged):
    path = damaged("ocdbt")
    (path / "manifest.ocdbt").unlink()
    shutil.rmtree(path / "d")
    assert np.array_equal(milepost.load(path)["params"]["w"], STATE["params"]["w"])


# --- wrong -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JSON_FILES)
def test_truncated_json_is_named(damaged, name):
    path = damaged("ocdbt")
    file = path / name
    file.write_bytes(file.read_bytes()[:-20])
    refused(path, DamagedError, str(file), "no JSON")


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d/*"])
@pytest.mark.parametrize("change", ["cut", "flipped"])
def test_damaged_database_is_named(damaged, name, change):
    path = damaged("ocdbt")
    (file,) = path.glob(name)
    body = bytearray(file.read_bytes())
    if change == "flipped":
        body[len(body) // 2] ^= 0xFF
    file.write_bytes(body[:50] if change == "cut" else body)
    refused(path, DamagedError, "manifest.ocdbt")


def test_damaged_metrics_are_named(damaged):
    path = damaged("manager") / "1"
    (path / "metrics" / "metrics").write_text('{"loss": ')
    refused(path, DamagedError, "metrics/metrics")


def nodes(document, keys=()):
    """Yield the keys that lead to every value of a document."""
    yield keys
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inside:
        yield from nodes(value, (*keys, key))


def changed(document, keys, value):
    """Return a document with another value at one place."""
    if not keys:
        return value
    document = copy.deepcopy(document)
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return document


@pytest.mark.parametrize(
    ("form", "name"),
    [*(("ocdbt", name) for name in JSON_FILES), ("plain", "params.w/.zarray"), ("v1", "_CHECKPOINT_METADATA")],
)
def test_wrong_json_is_damage_and_never_a_crash(damaged, form, name):
    path = damaged(form)
    file = path / name
    document = json.loads(file.read_text())
    tried = 0
    for keys, value in itertools.product(nodes(document), ODD):
        file.write_text(json.dumps(changed(document, keys, value)))
        tried += 1
        try:
            milepost.v1.metadata(path)
        except DamagedError as error:
            assert str(path) in str(error), f"{keys} {value}: {error}"  # noqa: PT017 - most are refused, not all
        except InvalidLayoutError as error:
            assert "handler" in " ".join(keys[:1]) and "files" in str(error), f"{keys} {value}: {error}"  # noqa: PT017, PT018
    assert tried >= 2 * len(ODD)


def test_wrong_numbers_of_an_array_are_refused_before_memory_is_taken(damaged):
    path = damaged("plain")
    rewrite(path / "params.w" / ".zarray", lambda document: document | {"shape": [1 << 62], "chunks": [1 << 62]})
    refused(path, DamagedError, "params.w")


def test_tree_that_is_nested_too_deeply_is_refused(damaged):
    path = damaged("ocdbt")
    keys = [{"key": "a", "key_type": 2}] * 10_000

    def nest(document):
        entry = document["tree_metadata"]["('text',)"] | {"key_metadata": keys}
        return document | {"tree_metadata": {"deep": entry}}

    rewrite(path / "_METADATA", nest)
    refused(path, DamagedError, "'deep'")


def test_json_that_is_nested_too_deeply_is_refused(damaged):
    path = damaged("ocdbt")
    (path / "_METADATA").write_text("[" * 100_000 + "]" * 100_000)
    refused(path, DamagedError, "_METADATA")


@pytest.mark.parametrize("key", ["../../outside", "a/../../outside", "/etc", "a\0b"])
def test_names_that_lead_out_of_the_checkpoint_are_refused(damaged, tmp_path, key):
    path = damaged("plain")
    shutil.copytree(path / "list.0", tmp_path / "outside")

    def rename(document):
        entry = document["tree_metadata"]["('list', '0')"] | {"key_metadata": [{"key": key, "key_type": 2}]}
        return document | {"tree_metadata": {"hostile": entry}}

    rewrite(path / "_METADATA", rename)
    refused(path, DamagedError)


def test_tree_that_contradicts_itself_is_refused(damaged):
    path = damaged("ocdbt")

    def contradict(document):
        entry = copy.deepcopy(document["tree_metadata"]["('list', '0')"])
        entry["key_metadata"] = [{"key": "text", "key_type": 2}, {"key": "below", "key_type": 2}]
        entry["value_metadata"] = {"value_type": "None", "skip_deserialize": True}
        document["tree_metadata"]["below a leaf"] = entry
        return document

    rewrite(path / "_METADATA", contradict)
    refused(path, DamagedError, "'text' is a leaf")


# --- none at all -----------------------------------------------------------------------------------------------------


def test_a_folder_of_checkpoints_is_none(whole):
    refused(whole, InvalidLayoutError)
    refused(whole / "manager", InvalidLayoutError)
    refused(whole / "manager" / "metadata", CheckpointNotFoundError)


def test_an_unfinished_save_is_none(damaged, tmp_path):
    path = damaged("ocdbt").rename(tmp_path / "1.orbax-checkpoint-tmp")
    refused(path, InvalidLayoutError, "not finished")


class OnGcs:
    """A storage that says it is on gs://, where checkpoints are written in place."""

    url = "gs://bucket"

    def __init__(self, storage):
        self._storage = storage

    def __getattr__(self, name):
        return getattr(self._storage, name)


def test_on_gcs_what_was_not_committed_is_unfinished(damaged):
    path = damaged("v1")
    storage = OnGcs(open_route(resolve(str(path))).storage)
    layout = OrbaxLayout()
    assert layout.read(storage, "v1/", list(storage.children("v1/")))["items"].keys() == {"state"}
    assert layout.read(storage, "v1/state/", list(storage.children("v1/state/"))) is not None
    (path / "commit_success.txt").unlink()
    for prefix in ("v1/", "v1/state/"):
        with pytest.raises(InvalidLayoutError, match="not finished"):
            layout.read(storage, prefix, list(storage.children(prefix)))


# --- elsewhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMS, "v1"])
def test_checkpoints_on_any_storage_load(whole, form):
    url = f"memory://{uuid.uuid4().hex}/{form}"
    storage = open_route(resolve(url)).storage
    for file in (whole / form).rglob("*"):
        if file.is_file():
            storage.write(f"{form}/{file.relative_to(whole / form).as_posix()}", [file.read_bytes()])
    found = milepost.load(url)
    assert np.array_equal(found["params"]["w"], STATE["params"]["w"])
    assert found["text"] == "words"
