"""What a reader survives: every damage is found, and a manifest made to mislead gives a clear error, nothing else."""

from __future__ import annotations

import collections
import contextlib
import json
import string
import sys

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milepost import errors
from milepost.manifest import ArrayLeaf, FileEntry, Item, Manifest, check_path, decode, encode, is_manifest

from core import manifests

Pair = collections.namedtuple("Pair", "x y")  # noqa: PYI024 - the kind of class many have

names = st.text(st.characters(codec="utf-8", exclude_characters="/\\\0"), min_size=1).filter(
    lambda name: name not in (".", "..")
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
arrays = st.builds(
    ArrayLeaf, st.lists(st.integers(0, 2**62)).map(tuple), st.text(string.ascii_letters), st.sampled_from([None, 0])
)
items = st.lists(st.dictionaries(st.text(max_size=5), arrays, max_size=2), max_size=4).map(
    lambda leaves: Item(
        {"kind": "list", "children": ["*"] * len(leaves)},
        [{"type": "some", "arrays": each} for each in leaves],
        [{"sharding_type": "SomeSharding"}],
        "safetensors",
        "state/",
        [{"format": 1}],
    )
)
counts = st.integers(0, 2**63 - 1)
entries = st.builds(FileEntry, names, counts, st.sampled_from(["", "xxh3_64:0123456789abcdef"]))
whole = st.builds(
    Manifest,
    attempt=st.text(),
    init_timestamp_nsecs=counts,
    commit_timestamp_nsecs=counts,
    written_by=st.dictionaries(st.text(), values, max_size=3),
    items=st.dictionaries(st.text(), items, max_size=2),
    files=st.lists(entries, unique_by=lambda file: file.path, max_size=3).map(tuple),
    custom_metadata=st.none() | st.dictionaries(st.text(), values, max_size=3),
    metrics=st.none() | st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False), max_size=3),
)


def plain(manifest):
    """Return a manifest as `encode` takes it: arrays as the JSON they are before they are read."""
    shown = {
        name: Item(
            item.structure,
            [
                leaf
                | {
                    "arrays": {
                        part: {"shape": list(array.shape), "dtype": array.dtype, "sharding": array.sharding}
                        for part, array in leaf["arrays"].items()
                    }
                }
                for leaf in item.leaves
            ],
            *(item.shardings, item.writer, item.prefix, item.records),
        )
        for name, item in manifest.items.items()
    }
    return Manifest(
        **{name: getattr(manifest, name) for name in Manifest.__dataclass_fields__ if name != "items"}, items=shown
    )


@given(whole)
def test_what_is_encoded_is_what_is_decoded(manifest):
    assert decode(encode(plain(manifest)), where="x") == manifest


@pytest.fixture(scope="module")
def body():
    leaf = {"type": "np.ndarray", "arrays": {"": {"shape": [2], "dtype": "int8", "sharding": None}}}
    item = Item({"kind": "dict", "keys": ["a"], "children": ["*"]}, [leaf], [], "safetensors", "state/", [{}])
    entry = FileEntry("state/f", 2, "xxh3_64:0123456789abcdef")
    return encode(Manifest("attempt", 1, 2, {"milepost": "0"}, {"state": item}, (entry,), {"lr": 0.5}))


def opened(body):
    if not is_manifest(body):
        raise errors.InvalidLayoutError("not ours")
    return decode(body, where="x")


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_every_single_flipped_byte_is_found(body, mask):
    assert opened(body)
    for at in range(len(body)):
        damaged = body[:at] + bytes([body[at] ^ mask]) + body[at + 1 :]
        with pytest.raises((errors.ManifestError, errors.InvalidLayoutError)):
            opened(damaged)


def test_a_manifest_cut_anywhere_is_found(body):
    for length in range(len(body)):
        with pytest.raises((errors.ManifestError, errors.InvalidLayoutError)):
            opened(body[:length])


def test_a_line_end_that_a_tool_added_does_no_harm(body):
    assert opened(body + b"\r\n") == opened(body)


@pytest.mark.parametrize("junk", [b"\0", b"{", b"}", b"x", b',"a":1}'])
def test_bytes_that_were_appended_are_found(body, junk):
    with pytest.raises(errors.ManifestError):
        opened(body + junk)


# --- a real checkpoint -----------------------------------------------------------------------------------------------


def state():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("x", "y"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    return {
        "pair": Pair(np.arange(4.0), 1),
        "sharded": jax.device_put(jnp.arange(32.0).reshape(8, 4), sharding),
        "key": jax.random.key(1),
        "scalars": [1, 1.5, 1j, True, "x", b"y", np.float32(3), 10**30],
        "kinds": [collections.OrderedDict(a=1), collections.defaultdict(list, a=2), (None, {})],
    }


@pytest.fixture
def saved(tmp_path):
    milepost.save(tmp_path / "1", state(), custom_metadata={"a": [1]})
    return tmp_path / "1"


def refused(saved, *kinds, match=None):
    with pytest.raises(kinds or errors.ManifestError, match=match) as caught:
        milepost.load(saved)
    return caught.value


def test_the_checksum_follows_the_documented_rule(saved):
    assert manifests.signed(manifests.read(saved)) == (saved / "commit_success.txt").read_bytes()


VALUES = [None, "", "x", -1, 1 << 62, 1 << 70, 1.5, float("inf"), True, [], ["*"], {}, {"a": 1}, manifests.GONE]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: "gone" if value is manifests.GONE else repr(value))
def test_no_value_anywhere_in_a_manifest_ends_in_an_error_of_another_kind(saved, value):
    document, target = manifests.read(saved), state()
    tried = 0
    for path in manifests.sites(document):
        if path[0] in ("checksum", "custom_metadata", "written_by"):
            continue
        manifests.write(saved, manifests.changed(document, path, value))
        for act in (milepost.load, milepost.v1.metadata, lambda at: milepost.load(at, target)):
            tried += 1
            try:
                act(saved)
            except errors.MilepostError:
                pass
            except Exception as error:
                raise AssertionError(f"{path} = {value!r} gave {error!r}") from error
    assert tried > 500


@pytest.mark.parametrize(
    "text",
    [b"{}", b"[]", b"null", b'"milepost"', b'{"format":"milepost"', b'{"format":"milepost"}', b"\xff\xfe{\0}\0"],
)
def test_what_is_no_manifest_at_all_is_refused(saved, text):
    (saved / "commit_success.txt").write_bytes(text)
    refused(saved, errors.ManifestError, errors.InvalidLayoutError)


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(saved, token):
    document = manifests.read(saved)
    document["custom_metadata"] = {"lr": float(token)}
    manifests.write(saved, document)
    assert token.encode() in (saved / "commit_success.txt").read_bytes()
    refused(saved, match=token)


def test_a_number_of_a_million_digits_is_refused(saved):
    text = (saved / "commit_success.txt").read_text()
    (saved / "commit_success.txt").write_text(text.replace('"metrics":null', f'"metrics":{"9" * 1_000_000}'))
    refused(saved)


@pytest.mark.parametrize("depth", [201, 480, 100_000])
@pytest.mark.parametrize("where", ["structure", "record", "mesh", "key"])
def test_deep_nesting_is_refused(saved, where, depth):
    deep = {"structure": ('{"kind":"list","children":[', "]}"), "key": ('{"tuple":[', "]}")}.get(where, ("[", "]"))
    inner = {"structure": '"*"', "key": "1"}.get(where, "")
    text = deep[0] * depth + inner + deep[1] * depth
    document = manifests.read(saved)
    item = document["items"]["state"]
    at, key = {
        "structure": (item, "structure"),
        "record": (item["records"], 0),
        "mesh": (item["shardings"][0], "device_mesh"),
        "key": (item["structure"]["keys"], 0),
    }[where]
    at[key] = "HERE"
    if where == "structure":
        item["leaves"] = item["leaves"][:1]
    (saved / "commit_success.txt").write_bytes(_resigned(manifests.signed(document), text))
    if where == "structure" or depth == 100_000:
        refused(saved, match="nested")
    else:
        with contextlib.suppress(errors.MilepostError):  # whether it is too deep depends on the stack so far
            milepost.load(saved)


def _resigned(body, text):
    import xxhash

    body = body.replace(b'"HERE"', text.encode())[: -len(',"checksum":"xxh3_64:0123456789abcdef"}')]
    return body + f',"checksum":"xxh3_64:{xxhash.xxh3_64_hexdigest(body)}"}}'.encode()


BAD_PATHS = ["", "/", "/etc/passwd", "..", "../x", "a/../../x", "a//b", "./a", "a/.", "a\0b", "..\\x", "a\\b", "a/"]


@pytest.mark.parametrize("path", BAD_PATHS, ids=repr)
def test_no_path_leads_out_of_the_checkpoint(saved, path):
    with pytest.raises(ValueError, match="leads out"):
        check_path(path)
    document = manifests.read(saved)
    manifests.write(saved, manifests.changed(document, ("files", 0, "path"), path))
    refused(saved, match="leads out")
    record = ("items", "state", "records", 0, "files", 0, "name")
    manifests.write(saved, manifests.changed(document, record, path))
    refused(saved)
    if path not in ("", "a/"):  # a prefix may end in a slash, or be the checkpoint itself
        manifests.write(saved, manifests.changed(document, ("items", "state", "prefix"), path))
        refused(saved, match="leads out")


def array_leaf(document):
    return next(leaf for leaf in document["items"]["state"]["leaves"] if leaf["type"] == "np.ndarray")


def row_of(document, name):
    for file in document["items"]["state"]["records"][0]["files"]:
        for row in file["pieces"]:
            if row[0] == name:
                return file, row
    raise LookupError(name)


@pytest.mark.parametrize("shape", [[1 << 62], [1 << 31, 1 << 31], [1 << 62, 1 << 62], [0, 1 << 62], [1] * 100], ids=str)
@pytest.mark.parametrize("also", ["the leaf alone", "its record too"])
def test_a_huge_shape_with_a_tiny_file_is_refused(saved, shape, also):
    document = manifests.read(saved)
    array_leaf(document)["arrays"][""]["shape"] = shape
    if also == "its record too":
        row_of(document, "pair/x")[1][2] = shape
    manifests.write(saved, document)
    refused(saved, errors.DamagedError)


@pytest.mark.parametrize("odd", [True, 1.0], ids=repr)
@pytest.mark.parametrize("where", ["leaf", "sharding", "record"])
def test_a_number_of_another_kind_is_refused_also_where_an_equal_one_was_believed(tmp_path, where, odd):
    other = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    one = np.ones(1, np.float32)
    milepost.save(tmp_path / "1", [jax.device_put(one), *jax.device_put([one] * 3, other)])
    document = manifests.read(tmp_path / "1")
    item = document["items"]["state"]
    last = item["leaves"][-1]["arrays"][""]
    assert (last["shape"], last["sharding"]) == ([1], 1)
    match where:
        case "leaf":
            last["shape"] = [odd]
        case "sharding":
            last["sharding"] = odd
        case "record":
            item["records"][0]["files"][0]["pieces"][-1][2] = [odd]
    manifests.write(tmp_path / "1", document)
    refused(tmp_path / "1")


@pytest.mark.parametrize("offset", [0, 1, 1 << 20, 1 << 62, -64])
def test_a_lying_offset_is_refused(saved, offset):
    document = manifests.read(saved)
    row_of(document, "pair/x")[1][3] = offset
    manifests.write(saved, document)
    refused(saved)


@pytest.mark.parametrize("size", [0, 1 << 20, 1 << 62])
def test_a_lying_size_is_refused(saved, size):
    document = manifests.read(saved)
    row_of(document, "pair/x")[0]["size"] = size
    manifests.write(saved, document)
    refused(saved, errors.DamagedError)


def test_arrays_that_overlap_are_refused(saved):
    document = manifests.read(saved)
    row_of(document, "pair/x")[1][3] = row_of(document, "sharded")[1][3]
    manifests.write(saved, document)
    refused(saved, match="overlap")


def test_a_file_that_is_listed_twice_is_refused(saved):
    document = manifests.read(saved)
    document["files"] *= 2
    manifests.write(saved, document)
    refused(saved, match="twice")


def test_a_key_that_stands_twice_in_a_dict_is_refused(saved):
    document = manifests.read(saved)
    document["items"]["state"]["structure"]["keys"][1] = document["items"]["state"]["structure"]["keys"][0]
    manifests.write(saved, document)
    refused(saved, match="twice")


def test_a_future_format_says_how_to_upgrade(saved):
    document = manifests.read(saved) | {"version": 2}
    manifests.write(saved, document)
    error = refused(saved, errors.FutureFormatError, match="version 2")
    assert error.__notes__ == ["pip install --upgrade milepost"]


def test_a_future_format_may_have_another_checksum_and_other_fields(saved):
    (saved / "commit_success.txt").write_bytes(b'{"format":"milepost","version":17,"whatever":[]}')
    refused(saved, errors.FutureFormatError, match="version 17")


def test_an_unknown_kind_of_leaf_is_named_before_data_is_read(saved):
    document = manifests.read(saved)
    array_leaf(document)["type"] = "torch.Tensor"
    manifests.write(saved, document)
    for file in (saved / "state").iterdir():
        file.unlink()
    error = refused(saved, errors.PluginNotFoundError, match=r"torch\.Tensor")
    assert "milepost.plugins" in error.__notes__[0]
    assert milepost.v1.metadata(saved).metadata["pair"].x["type"] == "torch.Tensor"


def test_an_unknown_array_writer_is_named(saved):
    document = manifests.read(saved)
    document["items"]["state"]["writer"] = "feather"
    manifests.write(saved, document)
    error = refused(saved, errors.PluginNotFoundError, match="'feather'")
    assert any("milepost.arrays" in note for note in error.__notes__)


def test_an_array_writer_that_is_not_installed_is_named_with_its_package(saved, monkeypatch):
    from milepost import plugins

    without = plugins.Plugins(["safetensors"])
    without._off = ()
    monkeypatch.setattr("milepost.engine.loading.installed", lambda: without)
    error = refused(saved, errors.PluginNotFoundError, match="'safetensors'")
    assert error.__notes__ == ["pip install milepost-safetensors"]


@pytest.mark.parametrize("dtype", ["float33", "object", "O", "<f8", "S10", "str", ""])
def test_an_unknown_dtype_is_refused(saved, dtype):
    document = manifests.read(saved)
    array_leaf(document)["arrays"][""]["dtype"] = dtype
    manifests.write(saved, document)
    refused(saved)
    row_of(document, "pair/x")[1][1] = dtype
    manifests.write(saved, document)
    refused(saved, match=repr(dtype))


# --- classes ---------------------------------------------------------------------------------------------------------


def test_no_module_is_imported_because_a_manifest_names_it(saved):
    document = manifests.read(saved)
    structure = document["items"]["state"]["structure"]
    pair = next(child for child in structure["children"] if isinstance(child, dict) and child["kind"] == "namedtuple")
    for module in ("antigravity", "this"):
        assert module not in sys.modules
        static = {"static": {"class": f"{module}:Thing"}}
        for kind in ({"kind": "namedtuple"}, {"kind": "custom", "keys": [{"attr": "x"}, {"attr": "y"}]} | static):
            pair.update(kind, type=f"{module}:Thing")
            manifests.write(saved, document)
            milepost.load(saved)
            milepost.v1.metadata(saved)
            assert module not in sys.modules


def test_a_loaded_module_that_imports_when_it_is_asked_is_not_asked(saved, monkeypatch):
    import types

    asked = []
    lazy = types.ModuleType("lazy_module")
    lazy.__getattr__ = asked.append
    monkeypatch.setitem(sys.modules, "lazy_module", lazy)
    document = manifests.read(saved)
    document["items"]["state"]["structure"]["children"][2]["type"] = "lazy_module:sub"
    assert document["items"]["state"]["structure"]["children"][2]["kind"] == "namedtuple"
    manifests.write(saved, document)
    assert milepost.load(saved)["pair"]._asdict()["y"] == 1
    assert asked == []


class Armed:
    made: list[object] = []  # noqa: RUF012 - it is what the test looks at

    def __init__(self, *args):
        self.made.append(args)

    __setstate__ = __new__ = None  # nobody may try


@pytest.mark.parametrize(
    "name", ["subprocess:Popen", f"{__name__}:Armed", "builtins:dict", "builtins:tuple", "builtins:type"]
)
@pytest.mark.parametrize("static", [None, {"tuple": []}, {"list": ["a"]}, "x", {"class": "builtins:list"}], ids=str)
def test_a_class_that_is_not_registered_is_never_made(saved, name, static):
    document = manifests.read(saved)
    for at, child in enumerate(document["items"]["state"]["structure"]["children"]):
        if isinstance(child, dict) and child["kind"] == "namedtuple":
            custom = {"kind": "custom", "type": name, "static": static, "keys": [{"attr": "x"}, {"attr": "y"}]}
            document["items"]["state"]["structure"]["children"][at] = custom | {"children": child["children"]}
    manifests.write(saved, document)
    loaded = milepost.load(saved)["pair"]
    assert type(loaded) in (dict, tuple)
    assert len(loaded) == 2
    assert Armed.made == []


def test_a_name_no_class_can_have_still_gives_the_fields(saved):
    document = manifests.read(saved)
    for child in document["items"]["state"]["structure"]["children"]:
        if isinstance(child, dict) and child["kind"] == "namedtuple":
            child.update(type="a:def", fields=["x", "__import__('os')"])
    manifests.write(saved, document)
    assert list(milepost.load(saved)["pair"]._fields) == ["x", "_1"]


def test_a_saved_sharding_that_does_not_fit_is_only_information(saved):
    document = manifests.read(saved)
    leaf = next(leaf for leaf in document["items"]["state"]["leaves"] if leaf["type"] == "np.ndarray")
    sharding = manifests.read(saved)["items"]["state"]["leaves"]
    leaf["type"], leaf["arrays"][""]["sharding"] = (
        "jax.Array",
        next(
            other["arrays"][""]["sharding"]
            for other in sharding
            if "arrays" in other and other["arrays"][""]["shape"] == [8, 4]
        ),
    )
    manifests.write(saved, document)
    np.testing.assert_array_equal(np.arange(4.0), milepost.load(saved)["pair"].x)


def test_a_target_that_cannot_hold_a_leaf_is_a_difference_and_no_crash(saved):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    across = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    target = state()
    target["sharded"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=across)
    target["scalars"][0] = np.array(["text"])
    with pytest.raises(errors.MismatchError) as caught:
        milepost.load(saved, target)
    assert "['sharded']" in str(caught.value)
    assert "['scalars'][0]" in str(caught.value)


def test_the_manifest_is_json_that_anybody_can_read(saved):
    text = (saved / "commit_success.txt").read_bytes()
    assert text.isascii()
    assert json.loads(text)["format"] == "milepost"
