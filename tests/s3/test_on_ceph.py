"""The same contracts, and checkpoints, on Ceph's radosgw: a server that people run, and that errs in its own ways.

It runs where its programs are installed (Debian: ceph-common, ceph-mon, ceph-osd and radosgw), on loopback and in
memory.
"""

from __future__ import annotations

import concurrent.futures
import threading

import milepost
import numpy as np
import pytest
from milepost import errors
from milepost.commit import CreateCommit
from milepost.engine.deleting import delete
from milepost.engine.doctoring import doctor
from milepost.errors import AlreadyExistsError, CheckpointNotFoundError
from milepost.fixed import FixedCommit
from milepost.testing.commit import CommitContract
from milepost.testing.faults import keys
from milepost.testing.storage import StorageContract
from milepost_s3 import S3Storage
from testing.radosgw_server import KEY, SECRET, missing, serving

if missing():
    pytest.skip(f"there is no Ceph here: no {', '.join(missing())} on the path", allow_module_level=True)

ROOT = "s3://bucket/run"
URL = f"{ROOT}/7"


@pytest.fixture(scope="session")
def ceph():
    with serving("bucket") as url:
        yield url


@pytest.fixture
def opened(ceph):
    def open_storage(**options):
        return S3Storage(ROOT, endpoint_url=ceph, timeout=30.0, **options)

    open_storage().delete("")
    return open_storage


@pytest.fixture(autouse=True)
def environment(environment, monkeypatch):
    """Have credentials that are right here."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture
def told(ceph, opened, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", ceph)
    return opened()


def test_a_condition_that_must_fail_fails_there(opened):
    storage = opened()
    storage.write("key", [b"old"])
    with pytest.raises(AlreadyExistsError):
        storage.create("key", [b"new"])
    version = storage.version("key")
    storage.write("key", [b"newer"])
    with pytest.raises(AlreadyExistsError):
        storage.replace("key", [b"newest"], version)
    assert bytes(storage.read("key")) == b"newer"


def test_a_signature_that_is_wrong_is_refused(opened, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{SECRET}-of-somebody-else")
    with pytest.raises(errors.StorageDeniedError):
        opened().write("key", [b"1"])


@pytest.mark.parametrize("key", ["in parts", "a+b", "a%20b", "ä"])
def test_an_upload_is_found_by_its_own_name_and_given_up(opened, key):
    storage, other = opened(part_bytes=5 << 20), opened()
    found = []

    def watched():
        yield bytes(12 << 20)
        found.extend(other.uploads("7/"))
        for upload in found:
            other.abort_upload(upload)
        yield b"1"

    with pytest.raises(errors.MilepostError):
        storage.write(f"7/{key}", watched())
    assert [f"7/{key}"] == [upload.key for upload in found]
    assert [*storage.uploads(""), *storage.children("")] == []


class TestS3StorageOnCeph(StorageContract):
    @pytest.fixture
    def storage(self, opened):
        return opened(part_bytes=5 << 20)

    @pytest.fixture
    def other(self, opened):
        return opened()

    def test_of_many_replacers_of_one_version_exactly_one_wins(self, storage, other):
        """Replace by other bytes only: Ceph heeds no condition at the end of an upload, which the same ones need."""
        storage.write("key", [b"before"])
        for turn in range(20):
            version = storage.version("key")
            gate = threading.Barrier(4)

            def won(who, version=version, turn=turn, gate=gate):
                gate.wait(60)
                try:
                    storage.replace("key", [b"%d by %d" % (turn, who)], version)
                except AlreadyExistsError:
                    return False
                return True

            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                (winner,) = (who for who, had in enumerate(pool.map(won, range(4))) if had)
            assert bytes(other.read("key")) == b"%d by %d" % (turn, winner)
        version = storage.version("key")
        storage.delete("key")
        with pytest.raises(AlreadyExistsError):
            storage.replace("key", [b"new"], version)
        assert list(other.children("")) == []


class TestCreateCommitOnCeph(CommitContract):
    # What is left behind by whom is the strategy's doing, and the same on every store.
    test_the_power_may_be_cut_before_every_change = None

    @pytest.fixture
    def storage(self, opened):
        return opened()

    @pytest.fixture
    def strategy(self):
        return CreateCommit()

    @pytest.fixture
    def reaper(self):
        return CreateCommit(grace=0)


class TestFixedCommitOnCeph(CommitContract):
    overwrites = False
    shares = False
    test_the_power_may_be_cut_before_every_change = None

    @pytest.fixture
    def storage(self, opened):
        return opened()

    @pytest.fixture
    def strategy(self):
        return FixedCommit()

    @pytest.fixture
    def reaper(self):
        return FixedCommit(grace=0)


def state(seed):
    random = np.random.default_rng(seed)
    return {
        "weights": random.standard_normal((300, 200), dtype=np.float32),
        "nothing": np.zeros((0, 4), np.int8),
        "layers": [{"bias": np.full(10, seed + index, np.int32)} for index in range(20)],
    }


def leaves(tree):
    return [tree["weights"], tree["nothing"], *(layer["bias"] for layer in tree["layers"])]


def told_of(tree):
    return [(leaf.shape, leaf.dtype, np.asarray(leaf).tobytes()) for leaf in leaves(tree)]


@pytest.mark.parametrize("writer", ["safetensors", "tensorstore", "zarr"])
def test_what_was_saved_comes_back_and_is_replaced_and_deleted(told, writer):
    with milepost.configured({"default": {"arrays": writer}}):
        milepost.save(URL, state(0))
        assert told_of(state(0)) == told_of(milepost.load(URL))
        with pytest.raises(AlreadyExistsError):
            milepost.save(URL, state(1))
        milepost.save(URL, state(1), overwrite=True)
        assert told_of(state(1)) == told_of(milepost.load(URL))
        delete(URL)
    with pytest.raises(CheckpointNotFoundError):
        milepost.load(URL)
    assert list(told.children("")) == []


@pytest.mark.parametrize("ocdbt", [True, False])
def test_tensorstore_comes_by_its_own_driver(told, monkeypatch, ocdbt):
    written = []
    write = S3Storage.write

    def noted(self, key, buffers):
        written.append(key)
        write(self, key, buffers)

    monkeypatch.setattr(S3Storage, "write", noted)
    with milepost.configured({"default": {"arrays": "tensorstore", "arrays_options": {"ocdbt": ocdbt}}}):
        milepost.save(URL, state(0))
        assert told_of(state(0)) == told_of(milepost.load(URL))
    by_driver = {key.rpartition("/")[2] for key in set(keys(told)) - set(written)}
    assert ({"manifest.ocdbt"} if ocdbt else {".zarray", "0.0"}) <= by_driver


def test_the_doctor_finds_nothing_that_a_checkpoint_would_miss(told):
    findings = doctor(ROOT)
    assert [(finding.check, finding.means) for finding in findings if finding.verdict in {"failed", "warning"}] == []
    assert list(told.children("")) == []
