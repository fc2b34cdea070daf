from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import milepost
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from milepost import cli
from milepost.engine import sweeping
from milepost.engine.exporting import ExportRequest, export
from milepost.errors import StorageError
from milepost.generic import FsspecStorage
from typer.testing import CliRunner

MIB = 1 << 20
GENERIC = 'url."memory://exports".storage = "fsspec"'


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    for name in ("MILEPOST_CONFIG", "MILEPOST_TOML", "MILEPOST_DISABLE_PLUGINS", "MILEPOST_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def tree():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    return {
        "params": {
            "dense": {
                "kernel": jax.device_put(np.arange(96, dtype=np.float32).reshape(8, 12), spread),
                "bias": jnp.arange(3, dtype=jnp.bfloat16),
            },
            "layers": [np.arange(6, dtype=np.int16).reshape(3, 2), np.array([True, False, True])],
        },
        "step": 7,
        "rate": 0.5,
        "small": np.float16(1.5),
        "name": "adam",
        "none": None,
        "empty": np.zeros((0, 4), np.int8),
    }


EXPECTED = {
    "params.dense.kernel": np.arange(96, dtype=np.float32).reshape(8, 12),
    "params.dense.bias": np.arange(3, dtype=ml_dtypes.bfloat16),
    "params.layers.0": np.arange(6, dtype=np.int16).reshape(3, 2),
    "params.layers.1": np.array([True, False, True]),
    "step": np.array(7, np.int64),
    "rate": np.array(0.5),
    "small": np.array(1.5, np.float16),
    "empty": np.zeros((0, 4), np.int8),
}
CODES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}


@pytest.fixture
def saved(tmp_path):
    milepost.save(tmp_path / "7", tree())
    return tmp_path / "7"


def run(*arguments):
    return CliRunner().invoke(cli.app(), list(map(str, arguments)))


def document(*arguments):
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def tensors_of(path):
    """What the library of the format itself finds in a file; its NumPy reader does not know all dtypes."""
    found = {}
    for name, tensor in safetensors.deserialize(path.read_bytes()):
        code = tensor["dtype"]
        dtype = np.dtype(CODES.get(code) or code.replace("I", "int").replace("U", "uint"))
        found[name] = np.frombuffer(bytes(tensor["data"]), dtype).reshape(tensor["shape"])
    return found


def loaded(folder):
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return tensors_of(folder / "model.safetensors")
    homes = json.loads(index.read_text())["weight_map"]
    files = {name: tensors_of(folder / name) for name in set(homes.values())}
    assert {name for tensors in files.values() for name in tensors} == set(homes)
    return {name: files[home][name] for name, home in homes.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True, err_msg=name)


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "files"), [("5GB", 1), ("100", 3)])
def test_the_library_of_the_format_reads_what_was_exported(saved, tmp_path, size, files):
    told = document("export", saved, "--to", tmp_path / "out", "--shard-size", size)
    assert_same(loaded(tmp_path / "out"), EXPECTED)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert sorted(file["path"] for file in told["files"]) == names
    assert len([name for name in names if name.endswith(".safetensors")]) == files
    assert (told["tensors"], told["left_out"]) == (8, ["['name']"])
    assert told["tensor_bytes"] == sum(tensor.nbytes for tensor in EXPECTED.values())


def test_the_answer_says_what_was_left_out(saved, tmp_path):
    text = run("export", saved, "--to", tmp_path / "out").stdout
    assert f"to: {(tmp_path / 'out').as_uri()}: 8 tensors in 1 file" in text
    assert "left out: ['name'] is no array and no number" in text


def test_rules_rename_one_after_the_other(saved, tmp_path):
    rules = [r"^params\.=", r"layers\.(\d)=h.\1.w", r"(?<=dense\.)kernel$=weight", r"^h\.=model.h."]
    document("export", saved, "--to", tmp_path / "out", *(word for rule in rules for word in ("--map", rule)))
    renamed = {
        "dense.weight": EXPECTED["params.dense.kernel"],
        "dense.bias": EXPECTED["params.dense.bias"],
        "model.h.0.w": EXPECTED["params.layers.0"],
        "model.h.1.w": EXPECTED["params.layers.1"],
    }
    rest = {name: tensor for name, tensor in EXPECTED.items() if not name.startswith("params.")}
    assert_same(loaded(tmp_path / "out"), renamed | rest)


def test_patterns_choose_leaves(saved, tmp_path):
    document("export", saved, "--to", tmp_path / "out", "--include", "params/**", "--exclude", "**/bias")
    chosen = ("params.dense.kernel", "params.layers.0", "params.layers.1")
    assert_same(loaded(tmp_path / "out"), {name: EXPECTED[name] for name in chosen})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map", "^paarms=x"], "no name matches '^paarms'"),
        (["--map", "(=x"], "cannot rename by '('"),
        (["--map", r"step=\9"], "cannot rename by 'step'"),
        (["--map", "^step$="], "'' for ['step']"),
        (["--map", "^step$=rate"], "'rate' for ['rate'] and ['step']"),
        (["--include", "paarms/**"], "no leaf matches the pattern 'paarms/**'"),
        (["--item", "other"], "cannot load item 'other'"),
        (["--shard-size", "large"], "'large'"),
    ],
)
def test_wrong_use_is_told_before_anything_is_written(saved, tmp_path, options, message):
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run("export", saved, "--to", tmp_path / "out", *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_rule_without_replacement_is_wrong_use(saved, tmp_path):
    done = run("export", saved, "--to", tmp_path / "out", "--map", "params")
    assert done.exit_code == 2
    assert "REGEX=REPLACEMENT" in done.stderr


def test_all_names_that_would_be_given_twice_are_listed(tmp_path):
    milepost.save(tmp_path / "7", {"a": {"b": np.ones(1)}, "a.b": np.ones(1), "c": {"d": np.ones(1)}, "c.d": 1})
    said = run("export", tmp_path / "7", "--to", tmp_path / "out").stderr
    assert "'a.b' for ['a']['b'] and ['a.b']" in said
    assert "'c.d' for ['c']['d'] and ['c.d']" in said
    document("export", tmp_path / "7", "--to", tmp_path / "out", "--exclude", "?.?")


def test_dtypes_that_the_files_cannot_hold_are_listed_before_anything_is_written(tmp_path):
    state = {"fine": np.ones(2), "z": np.ones(2, np.complex64), "four": jnp.ones(2, jnp.int4), "i": 1j, "huge": 1 << 70}
    milepost.save(tmp_path / "7", state)
    done = run("export", tmp_path / "7", "--to", tmp_path / "out")
    assert done.exit_code == 2
    assert [name for name in ("'z'", "'four'", "'i'", "'huge'") if name not in done.stderr] == []
    assert "'fine'" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_a_folder_that_is_there_is_replaced_only_when_asked_and_if_nothing_else_is_in_it(saved, tmp_path):
    out = tmp_path / "out"
    document("export", saved, "--to", out, "--shard-size", "100")
    done = run("export", saved, "--to", out)
    assert (done.exit_code, "--overwrite" in done.stderr) == (2, True)
    assert_same(loaded(out), EXPECTED)
    document("export", saved, "--to", out, "--overwrite")
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert_same(loaded(out), EXPECTED)
    (out / "config.json").write_text("{}")
    done = run("export", saved, "--to", out, "--overwrite")
    assert (done.exit_code, "'config.json'" in done.stderr) == (2, True)
    assert (out / "config.json").exists()
    for target in (saved, saved / "model", tmp_path / "out/model.safetensors"):
        assert run("export", saved, "--to", target, "--overwrite").exit_code == 2
    assert milepost.load(saved)["step"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "out"]


def test_damage_of_the_source_is_told_and_leaves_nothing(saved, tmp_path):
    (file,) = (saved / "state").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[data.index(np.arange(6, dtype=np.int16).tobytes()) + 7] ^= 1
    file.write_bytes(data)
    done = run("export", saved, "--to", tmp_path / "out")
    assert (done.exit_code, "params/layers/0" in done.stderr) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_bytes_that_do_not_come_back_as_written_are_noticed_before_the_folder_appears(saved, tmp_path):
    def spoil(phase, _total):
        if phase == "verifying":
            (file,) = tmp_path.glob("out*/model.safetensors")
            file.write_bytes(file.read_bytes()[:-1] + b"\7")
        return lambda _size: None

    with pytest.raises(StorageError, match=r"other bytes: of file 'model\.safetensors'"):
        export(ExportRequest(saved, tmp_path / "out", progress=spoil))
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_while_it_is_written_a_folder_has_no_name_and_a_sweep_knows_it(saved, tmp_path):
    seen = {}

    def look(phase, total):
        seen[phase] = (
            (tmp_path / "out").exists(),
            [(one.name, one.dead) for one in sweeping.leftovers(tmp_path.as_uri())],
        )
        done = []
        totals[phase] = (total, done)
        return done.append

    totals = {}
    result = export(ExportRequest(saved, tmp_path / "out", progress=look))
    assert seen["verifying"] == (False, [("out", False)])
    assert totals["writing"][0] == result.data_bytes
    assert totals["verifying"][0] == sum(totals["verifying"][1]) == sum(file.size for file in result.files)
    assert (tmp_path / "out").exists()


def test_arrays_larger_than_the_budget_pass_in_parts(tmp_path, monkeypatch):
    large = np.arange(12 * MIB, dtype=np.float32).reshape(3072, 4096)
    milepost.save(tmp_path / "7", {"w": large, "v": large[:512]})
    monkeypatch.setenv("MILEPOST_TOML", f"default.load_budget = {2 * MIB}")
    tracemalloc.start()
    try:
        export(ExportRequest(tmp_path / "7", tmp_path / "out", options={"shard_size": "49MiB"}))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < large.nbytes / 2
    found = loaded(tmp_path / "out")
    assert_same(found, {"w": large, "v": large[:512]})


def test_in_a_store_without_folders_the_index_comes_last_and_goes_first(saved, monkeypatch):
    monkeypatch.setenv("MILEPOST_TOML", GENERIC)
    changes = []
    write, delete = FsspecStorage.write, FsspecStorage.delete
    monkeypatch.setattr(FsspecStorage, "write", lambda *call: changes.append(("write", call[1])) or write(*call))
    monkeypatch.setattr(FsspecStorage, "delete", lambda *call: changes.append(("delete", call[1])) or delete(*call))
    target = "memory://exports/model"
    for overwrite in (False, True):
        request = ExportRequest(saved, target, options={"shard_size": 100}, overwrite=overwrite)
        names = [file.path for file in export(request).files]
    index = "model/model.safetensors.index.json"
    assert (changes[len(names) - 1], changes[len(names)]) == (("write", index), ("delete", index))
    assert (changes[-1], len(changes)) == (("write", index), 3 * len(names))
    loaded = milepost.load(target)
    assert set(loaded) == set(EXPECTED)
    np.testing.assert_array_equal(loaded["params.layers.0"], np.arange(6).reshape(3, 2))


def test_in_a_store_without_folders_a_failure_removes_what_was_written(saved, monkeypatch):
    monkeypatch.setenv("MILEPOST_TOML", GENERIC)
    store = FsspecStorage("memory://exports")

    def fail(phase, _total):
        if phase == "verifying":
            assert list(store.children("broken/")) == ["model.safetensors"]
            raise RuntimeError("enough")
        return lambda _size: None

    with pytest.raises(RuntimeError, match="enough"):
        export(ExportRequest(saved, "memory://exports/broken", progress=fail))
    assert list(store.children("broken/")) == []


def test_neither_command_needs_jax(saved, tmp_path):
    for command in (["export", saved, "--to", tmp_path / "out"], ["import", tmp_path / "out", "--to", tmp_path / "8"]):
        code = "import sys\nsys.modules['jax'] = None\nfrom milepost.__main__ import main\nsys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ},
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert milepost.load(tmp_path / "8")["step"] == 7


@pytest.mark.parametrize("axes", [("x", "y"), ("x",), (None, "x")])
def test_a_checkpoint_of_orbax_is_exported(tmp_path, axes):
    import orbax.checkpoint as ocp

    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    kernel = jax.device_put(np.arange(96, dtype=np.float32).reshape(8, 12), spread)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "7", {"params": {"kernel": kernel}, "step": 7})
    document("export", tmp_path / "7", "--to", tmp_path / "out", "--include", "params/**")
    assert_same(loaded(tmp_path / "out"), {"params.kernel": EXPECTED["params.dense.kernel"]})


# --- import ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    weights = {f"model.layers.{at}.weight": np.full((3, 2), at, np.float32) for at in range(3)}
    weights["lm_head"] = np.arange(5, dtype=np.float16)
    (tmp_path / "model").mkdir()
    safetensors.numpy.save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    return tmp_path / "model"


def test_import_makes_a_checkpoint_with_the_names_as_they_are(model, tmp_path):
    document("import", model, "--to", tmp_path / "7")
    loaded = milepost.load(tmp_path / "7")
    expected = safetensors.numpy.load_file(model / "model.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(np.array_equal(loaded[name], expected[name]) for name in expected)
    assert run("verify", tmp_path / "7").exit_code == 0
    assert milepost.v1.metadata(tmp_path / "7").custom_metadata == {"format": "pt"}


def test_import_renames_and_nests(model, tmp_path):
    document("import", model, "--to", tmp_path / "7", "--map", "^model=params", "--map", "weight$=w", "--nest", ".")
    loaded = milepost.load(tmp_path / "7")
    assert set(loaded) == {"params", "lm_head"}
    assert {at: layer["w"].tolist() for at, layer in loaded["params"]["layers"].items()} == {
        str(at): [[at] * 2] * 3 for at in range(3)
    }
    assert loaded["lm_head"].tolist() == list(range(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map", "^modle=x"], "no name matches '^modle'"),
        (["--map", r"\d=0"], "'model.layers.0.weight' for"),
        (["--map", "lm_head=model.layers", "--nest", "."], "in the way of others"),
        (["--map", "lm_head=model.layers.0.weight.x", "--nest", "."], "in the way of others"),
    ],
)
def test_import_refuses_names_that_cannot_be_given(model, tmp_path, options, message):
    done = run("import", model, "--to", tmp_path / "7", *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert not (tmp_path / "7").exists()


def test_import_refuses_a_checkpoint_that_is_there(model, tmp_path):
    milepost.save(tmp_path / "7", {"x": 1})
    assert run("import", model, "--to", tmp_path / "7").exit_code == 2
    assert milepost.load(tmp_path / "7") == {"x": 1}
    document("import", model, "--to", tmp_path / "7", "--overwrite")
    assert set(milepost.load(tmp_path / "7")) == set(safetensors.numpy.load_file(model / "model.safetensors"))


def test_a_tree_goes_out_and_comes_back_the_same(tmp_path):
    state = {"a": {"b": {"c": np.arange(6).reshape(2, 3)}, "d": np.ones(2, np.float16)}, "e": np.zeros((2, 0))}
    milepost.save(tmp_path / "7", state)
    document("export", tmp_path / "7", "--to", tmp_path / "out", "--shard-size", "20")
    document("import", tmp_path / "out", "--to", tmp_path / "8", "--nest", ".")
    loaded = milepost.load(tmp_path / "8")
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
