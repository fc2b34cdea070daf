from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from milepost import progress as bars
from milepost import v1 as ocp
from milepost.errors import ConfigError
from rich.console import Console

STATE = {"params": {"w": jnp.arange(8.0), "b": np.ones(2)}, "opt": [1, 2.5], "name": "x" * 2000}


def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(8), ("x",))


def split():
    return jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec("x"))


@pytest.fixture
def path(tmp_path):
    ocp.save(tmp_path / "1", STATE)
    return tmp_path / "1"


def test_patterns_choose_what_is_loaded(path):
    found = ocp.load(path, include="params/**", exclude=["**/b"])
    assert list(found) == ["params"]
    assert list(found["params"]) == ["w"]


def test_what_is_excluded_keeps_the_value_of_the_target(path):
    found = ocp.load(path, {**STATE, "opt": [7, 7.5]}, exclude="opt/*")
    assert found["opt"] == [7, 7.5]
    assert found["name"] == STATE["name"]


def test_a_pattern_that_names_nothing_is_an_error(path):
    with pytest.raises(ValueError, match="parms"):
        ocp.load(path, include="parms/**")


def test_leaves_that_were_not_saved_are_an_error_are_kept_or_are_made(path):
    target = {**STATE, "new": 5}
    with pytest.raises(ValueError, match="new"):
        ocp.load(path, target)
    assert ocp.load(path, target, missing="keep")["new"] == 5
    assert ocp.load(path, target, missing=lambda name, leaf: (name, leaf))["new"] == ("new", 5)


def test_leaves_that_the_target_lacks_are_an_error_or_ignored(path):
    with pytest.raises(ValueError, match="params"):
        ocp.load(path, {"opt": [0, 0.0]})
    assert ocp.load(path, {"opt": [0, 0.0]}, extra="ignore") == {"opt": [1, 2.5]}


def test_partial_loading_by_the_context_ignores_what_the_target_lacks(path):
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        assert ocp.load(path, {"opt": [0, 0.0]}) == {"opt": [1, 2.5]}
        assert ocp.load_checkpointables(path, {"state": {"opt": [0, 0.0]}}) == {"state": {"opt": [1, 2.5]}}


@pytest.mark.parametrize("wrong", [{"missing": "skip"}, {"extra": "keep"}, {"sharding": "x"}])
def test_words_that_mean_nothing_are_errors(path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ocp.load(path, **wrong)


def test_a_sharding_is_for_what_was_saved_from_devices(path):
    found = ocp.load(path, sharding=split())
    assert found["params"]["w"].sharding == split()
    assert isinstance(found["params"]["b"], np.ndarray)
    assert found["name"] == STATE["name"]


def test_a_function_gives_the_sharding_of_each_array(path):
    asked = {}

    def rule(name, array):
        asked[name] = array.shape, array.dtype
        return split() if name.endswith("w") else None

    assert ocp.load(path, sharding=rule)["params"]["w"].sharding == split()
    assert asked == {"params/w": ((8,), np.float32)}


def test_a_sharding_that_cannot_split_an_array_is_told_by_path_before_anything_is_read(tmp_path):
    ocp.save(tmp_path / "1", {"odd": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"\['odd'\].*cannot split"):
        ocp.load(tmp_path / "1", sharding=split())


def test_arrays_can_be_loaded_into_host_memory(path):
    found = ocp.load(path, sharding=np.ndarray)
    assert type(found["params"]["w"]) is np.ndarray
    assert found["params"]["w"].tolist() == list(range(8))


def test_a_sharding_is_for_the_leaves_of_a_target_that_have_none(path):
    abstract = jax.eval_shape(lambda tree: tree, {"w": STATE["params"]["w"]})
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    told = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=whole)}
    for target, wanted in ((abstract, split()), (told, whole)):
        found = ocp.load(path, {"params": target}, extra="ignore", sharding=split())
        assert found["params"]["w"].sharding == wanted
    host = ocp.load(path, {"params": abstract}, extra="ignore", sharding=np.ndarray)
    assert type(host["params"]["w"]) is np.ndarray


def test_an_abstract_array_without_a_sharding_goes_where_it_was_saved(tmp_path):
    ocp.save(tmp_path / "1", {"w": jax.device_put(jnp.arange(8.0), split()), "n": np.arange(3)})
    target = {"w": jax.ShapeDtypeStruct((8,), jnp.float32), "n": jax.ShapeDtypeStruct((3,), np.int32)}
    found = ocp.load(tmp_path / "1", target)
    assert found["w"].sharding == split()
    assert isinstance(found["n"], jax.Array)


def test_classes_of_numbers_stand_for_numbers(path):
    assert ocp.load(path, {"opt": [int, float], "name": str}, extra="ignore") == {"opt": [1, 2.5], "name": "x" * 2000}


def test_arrays_are_cut_and_filled_where_the_context_says_so(path):
    options = ocp.options.ArrayOptions(loading=ocp.options.ArrayOptions.Loading(enable_padding_and_truncation=True))
    target = {"params": {"w": jax.ShapeDtypeStruct((10,), jnp.float32), "b": np.zeros(1)}}
    with ocp.Context(array_options=options):
        found = ocp.load(path, target, extra="ignore")
    assert found["params"]["w"].tolist() == [*range(8), 0, 0]
    assert found["params"]["b"].tolist() == [1]


def test_metadata_is_a_target(path):
    about = ocp.metadata(path)
    found = ocp.load(path, about)
    assert jax.tree.map(np.asarray, found["params"])["w"].tolist() == list(range(8))
    assert found["opt"] == [1, 2.5]


def test_progress_is_told_while_saving_and_loading(tmp_path):
    told = []
    ocp.save(tmp_path / "1", {"w": np.zeros(1 << 20)}, progress=lambda done, total: told.append((done, total)))
    done, total = told[-1]
    assert done >= 8 << 20
    assert total >= done
    assert told == sorted(told)
    told.clear()
    ocp.load(tmp_path / "1", progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] >= 8 << 20


def test_a_bar_shows_the_progress(tmp_path):
    console = Console(file=(tmp_path / "shown").open("w"), width=100)
    with bars.bar("saving", console=console) as progress:
        ocp.save(tmp_path / "1", {"w": np.zeros(1 << 20)}, progress=progress)
    console.file.close()
    shown = (tmp_path / "shown").read_text()
    assert "saving" in shown
    assert "8.4/8.4 MB" in shown


def test_every_save_and_load_logs_its_phases_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "milepost"):
        ocp.save(tmp_path / "1", STATE)
        ocp.load(tmp_path / "1")
    saved, loaded = [record.getMessage() for record in caplog.records]
    assert saved.startswith(f"saved file://{tmp_path}/1: ")
    assert [phase for phase in ("prepare", "snapshot", "write", "commit") if f" {phase} " not in saved] == []
    assert loaded.startswith(f"loaded file://{tmp_path}/1: ")
