"""Whatever happens to the files of a checkpoint: it is found, named, and never loaded as something else."""

from __future__ import annotations

import functools
import shutil

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import pytest
from milepost import errors
from milepost.hookspecs import hookimpl
from milepost.plugins import installed
from milepost.testing.faults import WrappedStorage


def state(value=1.0):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    return {
        "weights": np.full(40_000, value, np.float32),
        "bias": jax.device_put(jnp.full(64, value), sharding),
        "step": int(value),
    }


@functools.cache
def _original(folder):
    milepost.save(folder / "original", state())
    return folder / "original"


@pytest.fixture
def saved(tmp_path, tmp_path_factory):
    original = _original(tmp_path_factory.getbasetemp())
    return shutil.copytree(original, tmp_path / "1")


def data_file(saved):
    (file,) = (saved / "state").glob("*.safetensors")
    return file


def offset_of(file, leaf):
    """Return where a leaf's data begins, by the header of the file and not by the manifest."""
    import json

    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    name = min(key for key in header if key.partition("@")[0] == leaf)
    return 8 + length + header[name]["data_offsets"][0]


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 0x40
    file.write_bytes(data)


@pytest.mark.parametrize("leaf", ["weights", "bias"])
@pytest.mark.parametrize("target", [False, True])
def test_one_flipped_byte_names_file_and_leaf(saved, leaf, target):
    file = data_file(saved)
    flip(file, offset_of(file, leaf) + 5)
    with pytest.raises(errors.ChecksumError) as caught:
        milepost.load(saved, state(0.0)) if target else milepost.load(saved)
    assert isinstance(caught.value, ValueError)
    assert file.name in str(caught.value)
    assert repr(leaf) in str(caught.value)


def test_every_byte_of_an_array_is_covered(saved):
    file = data_file(saved)
    start = offset_of(file, "bias")
    for at in range(start, start + 32):  # the first of eight boxes
        flip(file, at)
        with pytest.raises(errors.ChecksumError, match="'bias'"):
            milepost.load(saved)
        flip(file, at)
    np.testing.assert_array_equal(np.ones(64), milepost.load(saved)["bias"])


def test_a_leaf_that_is_not_damaged_can_still_be_loaded(saved):
    file = data_file(saved)
    flip(file, offset_of(file, "bias") + 5)
    loaded = milepost.load(saved, {"weights": np.zeros(40_000, np.float32), "bias": ..., "step": 0})
    assert (loaded["weights"].sum(), loaded["step"]) == (40_000, 1)


def test_without_verification_flipped_data_is_loaded(saved):
    file = data_file(saved)
    flip(file, offset_of(file, "weights") + 3)
    with milepost.configured({"default": {"verify": False}}):
        weights = milepost.load(saved)["weights"]
    assert (weights != 1).sum() == 1


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("change", ["deleted", "emptied", "one byte short", "half", "one byte more", "a folder"])
def test_a_data_file_that_is_not_whole_is_named_with_a_leaf(saved, change, verify, mapped):
    file = data_file(saved)
    data = file.read_bytes()
    file.unlink()
    if change == "a folder":
        file.mkdir()
    elif change != "deleted":
        length = {"emptied": 0, "one byte short": len(data) - 1, "half": len(data) // 2}.get(change, len(data) + 1)
        file.write_bytes((data + b"\0")[:length])
    with (
        milepost.configured({"default": {"verify": verify, "mapped": mapped}}),
        pytest.raises((errors.DamagedError, errors.StorageError)) as caught,
    ):
        milepost.load(saved)
    assert file.name in str(caught.value)
    if change != "a folder":
        assert isinstance(caught.value, errors.MissingDataError)
        assert "'weights'" in str(caught.value) or "'bias'" in str(caught.value)


@pytest.mark.parametrize("at", [0, 100, -1, -20, -200])
def test_a_flipped_byte_in_the_manifest_is_found(saved, at):
    flip(saved / "commit_success.txt", at)
    with pytest.raises((errors.ManifestError, errors.InvalidLayoutError)) as caught:
        milepost.load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 1000])
def test_a_manifest_that_was_cut_is_found(saved, length):
    file = saved / "commit_success.txt"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises((errors.ManifestError, errors.InvalidLayoutError)):
        milepost.load(saved)


def test_without_its_manifest_it_is_no_checkpoint(saved):
    (saved / "commit_success.txt").unlink()
    with pytest.raises(errors.InvalidLayoutError, match="no commit_success"):
        milepost.load(saved)


def test_a_damaged_checkpoint_can_be_looked_at(saved):
    data_file(saved).unlink()
    assert milepost.v1.metadata(saved).metadata["weights"].shape == (40_000,)


# --- overwritten while it is read ------------------------------------------------------------------------------------


class _Meanwhile(WrappedStorage):
    """A storage on which something happens right before the n-th look at a data file."""

    def __init__(self, storage, plan):
        super().__init__(storage)
        for name in ("read", "size", "read_into", "map"):
            if hasattr(storage, name):
                setattr(self, name, plan.before(getattr(storage, name)))


class Meanwhile:
    def __init__(self, act, at, times=1):
        self.act, self.at, self.left, self.seen = act, at, times, 0
        self.busy = False

    @hookimpl(wrapper=True)
    def open_storage(self):
        opened = yield
        return _Meanwhile(opened, self)

    def before(self, look):
        def stepped(key, *where):
            self.step(key)
            return look(key, *where)

        return stepped

    def step(self, key):
        if self.busy or not key.endswith(".safetensors"):
            return
        self.seen += 1
        if self.seen > self.at and self.left:
            self.left -= 1
            self.busy = True
            self.act()
            self.busy = False


@pytest.fixture
def meanwhile():
    installed().load_all()
    registered = []

    def start(act, at, times=1):
        plan = Meanwhile(act, at, times)
        installed()._manager.register(plan)
        registered.append(plan)
        return plan

    yield start
    for plan in registered:
        installed()._manager.unregister(plan)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("place", ["file", "memory"])
def test_a_checkpoint_that_is_overwritten_while_it_is_read_is_loaded_whole(tmp_path, meanwhile, place, mapped, verify):
    settings = {"default": {"verify": verify, "mapped": mapped, "threads": 1}}
    url = f"{place}://{tmp_path}/1"
    happened = 0
    for at in range(12):
        with milepost.configured(settings):
            milepost.save(url, state(1.0), overwrite=True)
            plan = meanwhile(lambda: milepost.save(url, state(2.0), overwrite=True), at)
            loaded = milepost.load(url)
            installed()._manager.unregister(plan)
            installed()._manager.register(plan)  # the fixture takes it out
            plan.left, came = 0, plan.left == 0
        happened += came
        values = {loaded["step"], *np.unique(loaded["weights"]), *np.unique(loaded["bias"])}
        assert values in ({1.0}, {2.0}), f"a mixture of two checkpoints at look {at}"
        assert came or values == {1.0}
        if not came:
            break
    assert happened >= (1 if mapped else 2)


def test_a_checkpoint_that_is_overwritten_again_and_again_ends_in_a_clear_error(tmp_path, meanwhile):
    milepost.save(tmp_path / "1", state(1.0))
    meanwhile(lambda: milepost.save(tmp_path / "1", state(2.0), overwrite=True), 0, times=1000)
    with (
        milepost.configured({"default": {"verify": False, "threads": 1}}),
        pytest.raises(errors.DamagedError, match="overwritten while it was read"),
    ):
        milepost.load(tmp_path / "1")


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_found(saved, meanwhile):
    meanwhile(lambda: shutil.rmtree(saved), 0)
    with pytest.raises(errors.CheckpointNotFoundError) as caught:
        milepost.load(saved)
    assert isinstance(caught.value.__context__, errors.MissingDataError)
