"""Stores with one defect each, and what `milepost doctor` says of them."""

from __future__ import annotations

import json
import threading
import time
import uuid
from urllib.parse import unquote

import pytest
from milepost.attempts import parse_attempt
from milepost.cli import app
from milepost.engine import doctoring
from milepost.engine.doctoring import doctor
from milepost.engine.probing import PROBES
from milepost.errors import AlreadyExistsError, NotFoundError, StorageDeniedError, StorageError
from milepost.hookspecs import hookimpl
from milepost.memory import MemoryStorage
from milepost.plugins import installed
from milepost.protocols import Upload
from milepost.testing.faults import WrappedStorage, keys
from typer.testing import CliRunner

SIZE = 3 << 20
LAST = "nothing left behind"
NAMES = [probe.name for probe in PROBES] + [LAST]


class Complete(MemoryStorage):
    """A store that has everything that a doctor asks for; its uploads are objects that are being written."""

    under_way = ()
    clock = staticmethod(time.time)

    def write(self, key, buffers):
        if key.endswith("in parts"):
            buffers = self.in_parts(key, buffers)
        super().write(key, buffers)

    def in_parts(self, key, buffers):
        Complete.under_way = (Upload(key, "1", 0.0),)
        yield from buffers
        Complete.under_way = ()

    def uploads(self, prefix):
        return [upload for upload in self.under_way if upload.key.startswith(prefix)]

    def abort_upload(self, upload):
        raise AssertionError(upload)

    def time(self):
        return self.clock()

    def kvstore(self, prefix):
        return {"driver": "gcs", "path": prefix}


class Store(WrappedStorage):
    """A client of such a store, which also passes on what wrappers keep to themselves."""

    def kvstore(self, prefix):
        return self.wrapped.kvstore(prefix)


@pytest.fixture
def url():
    made = f"memory://tests/doctor/{uuid.uuid4().hex}"
    yield made
    MemoryStorage(made).delete("")


@pytest.fixture
def opened(url):
    """Return what chooses how each client of the root is opened."""
    installed().load_all()
    manager, chosen = installed()._manager, []

    class Opening:
        @hookimpl(wrapper=True)
        def open_storage(self, url):
            storage = yield
            return chosen[-1](Complete(url)) if chosen else storage

    plugin = Opening()
    manager.register(plugin)
    yield chosen.append
    manager.unregister(plugin)


def verdicts(findings):
    assert [found.check for found in findings] == NAMES
    return {found.check: found.verdict for found in findings}


def not_ok(findings):
    return {check: verdict for check, verdict in verdicts(findings).items() if verdict != "ok"}


# --- in order --------------------------------------------------------------------------------------------------------


def test_a_store_in_order_is_told_so_in_every_row(url, opened):
    opened(lambda storage: storage)
    findings = doctor(url, size=SIZE)
    assert not_ok(findings) == {}
    assert all(found.means and not found.remedy for found in findings)
    assert keys(MemoryStorage(url)) == []


def test_what_a_store_has_not_is_skipped_with_the_reason(tmp_path):
    findings = doctor(tmp_path, size=SIZE)
    assert set(not_ok(findings).values()) == {"skipped"}
    assert "cannot compare and swap" in {found.check: found for found in findings}["compare and swap"].means
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_not_there_is_not_there_afterwards(tmp_path):
    assert verdicts(doctor(tmp_path / "a" / "b", size=SIZE))[LAST] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_not_touched(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "a").write_bytes(b"1")
    doctor(tmp_path, size=SIZE)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["7", "7/a"]


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_what_a_killed_doctor_leaves_is_an_attempt_that_a_sweep_knows(url, tmp_path, opened, place, monkeypatch):
    from milepost.engine import sweeping

    root = tmp_path.as_uri() if place == "disk" else url
    if place == "memory":
        opened(lambda storage: storage)
    monkeypatch.setattr(doctoring, "new_attempt", lambda: "20010101T000000Z-0badcafe-1f-0123456789ab")
    monkeypatch.setattr(doctoring, "_removed", lambda _: [])
    doctor(root, size=SIZE)
    (found,) = sweeping.leftovers(root)
    assert (found.name, found.dead) == ("milepost-doctor", True)
    assert parse_attempt(found.attempt)
    assert [one.name for one in sweeping.sweep(root)] == ["milepost-doctor"]
    assert sweeping.leftovers(root) == []


# --- one defect each -------------------------------------------------------------------------------------------------


class StaleObjects(Store):
    """Remembers what it has read."""

    def __init__(self, storage):
        super().__init__(storage)
        self.known = {}

    def read(self, key, start=0, stop=None):
        if key not in self.known:
            self.known[key] = self.wrapped.read(key)
        return self.known[key][start:stop]


class StaleAbsence(Store):
    """Remembers what was not there."""

    def __init__(self, storage):
        super().__init__(storage)
        self.missing = set()

    def read(self, key, start=0, stop=None):
        if key in self.missing:
            raise NotFoundError(key)
        try:
            return self.wrapped.read(key, start, stop)
        except NotFoundError:
            self.missing.add(key)
            raise


class StaleSizes(Store):
    """Remembers sizes."""

    def __init__(self, storage):
        super().__init__(storage)
        self.known = {}

    def size(self, key):
        if key not in self.known:
            self.known[key] = self.wrapped.size(key)
        return self.known[key]


class StaleListings(Store):
    """Remembers listings."""

    def __init__(self, storage):
        super().__init__(storage)
        self.known = {}

    def children(self, prefix):
        return self.known.setdefault(prefix, list(self.wrapped.children(prefix)))


class EndsInclusive(Store):
    """Counts the end of a range in."""

    def read(self, key, start=0, stop=None):
        return self.wrapped.read(key, start, None if stop is None else stop + 1)


class RefusesRangesBeyond(Store):
    """Refuses ranges that begin at the end."""

    def read(self, key, start=0, stop=None):
        if start and start >= self.wrapped.size(key):
            raise StorageError("range not satisfiable")
        return self.wrapped.read(key, start, stop)


class DropsEmpty(Store):
    """Takes writing nothing for nothing to do."""

    def write(self, key, buffers):
        body = b"".join(map(bytes, buffers))
        if body or not key.endswith("/empty"):
            self.wrapped.write(key, [body])


class Unquotes(Store):
    """Takes names for quoted."""

    def write(self, key, buffers):
        self.wrapped.write(unquote(key), buffers)


class CutsShort(Store):
    """Loses the last part."""

    def write(self, key, buffers):
        self.wrapped.write(key, [b"".join(map(bytes, buffers))[: SIZE - 1]])


class SwapsParts(Store):
    """Puts parts together in another order."""

    def write(self, key, buffers):
        parts = list(map(bytes, buffers))
        self.wrapped.write(key, parts[::-1] if len(parts) == SIZE >> 20 and len(parts[0]) > 100 else parts)


class StoresHalves(Store):
    """Closes an upload whatever happened."""

    def write(self, key, buffers):
        taken = []
        try:
            taken.extend(map(bytes, buffers))
        finally:
            self.wrapped.write(key, taken)


class CarelessCreate(Store):
    """Ignores the condition of a create."""

    def create(self, key, buffers):
        self.wrapped.write(key, buffers)


class LooksThenCreates(Store):
    """Looks, lets the others look, too, and writes."""

    together = threading.Barrier(doctoring._CLIENTS)

    def create(self, key, buffers):
        there = key in keys(self.wrapped, key.rpartition("/")[0] + "/")
        if "/raced/" in key:
            self.together.wait(60)
        if there:
            raise AlreadyExistsError(key)
        self.wrapped.write(key, buffers)


class CarelessReplace(Store):
    """Ignores the condition of a replacement."""

    def replace(self, key, buffers, version):
        self.wrapped.write(key, buffers)


class LooksThenReplaces(Store):
    """Compares, lets the others compare, too, and swaps."""

    together = threading.Barrier(doctoring._CLIENTS)

    def replace(self, key, buffers, version):
        same = self.wrapped.version(key) == version
        if "/swap raced/" in key:
            self.together.wait(60)
        if not same:
            raise AlreadyExistsError(key)
        self.wrapped.write(key, buffers)


class ListsByUtf16(Store):
    """Orders keys as some languages order strings."""

    def keys_after(self, prefix, key):
        return sorted(self.wrapped.keys_after(prefix, key), key=lambda one: one.encode("utf-16-be"))


class ListsInclusively(Store):
    """Lists the key after which it should begin, too."""

    def keys_after(self, prefix, key):
        return [one for one in keys(self.wrapped, prefix) if one >= key]


class DeletesNeighbours(Store):
    """Takes a prefix for the beginning of a name."""

    def delete(self, key):
        for one in keys(self.wrapped):
            if one.startswith(key.rstrip("/")):
                self.wrapped.delete(one)


class DeletesNothing(Store):
    """Forgets to delete."""

    def delete(self, key):
        pass


class RaisesAnything(Store):
    """Has a bug in a method."""

    def keys_after(self, prefix, key):
        raise KeyError(key)


DEFECTS = {
    StaleObjects: ["overwrite", "delete"],
    StaleAbsence: ["write and read"],
    StaleSizes: ["overwrite"],
    StaleListings: ["listing", "delete"],
    EndsInclusive: ["ranges"],
    RefusesRangesBeyond: ["ranges"],
    DropsEmpty: ["empty object"],
    Unquotes: ["odd names"],
    CutsShort: ["large object"],
    SwapsParts: ["large object"],
    StoresHalves: ["broken off"],
    CarelessCreate: ["create only"],
    LooksThenCreates: ["create only, raced"],
    CarelessReplace: ["compare and swap"],
    LooksThenReplaces: ["compare and swap, raced"],
    ListsByUtf16: ["listing in order"],
    ListsInclusively: ["listing in order"],
    DeletesNeighbours: ["delete"],
    DeletesNothing: ["delete", LAST],
    RaisesAnything: ["listing in order"],
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_each_defect_fails_in_its_own_row_with_a_remedy(url, opened, defect):
    opened(defect)
    findings = doctor(url, size=SIZE)
    found = not_ok(findings)
    assert DEFECTS[defect] == [check for check, verdict in found.items() if verdict == "failed"]
    stands_on = {probe.name: probe.after for probe in PROBES}
    assert all(stands_on[check] in found for check, verdict in found.items() if verdict == "skipped")
    # Some defects need all buffers at once, so that nothing is under way while they come.
    assert {check for check, verdict in found.items() if verdict == "warning"} <= {"unfinished uploads"}
    assert all(one.remedy for one in findings if one.verdict == "failed")
    assert defect is DeletesNothing or keys(MemoryStorage(url)) == []


def test_whatever_no_strategy_of_the_root_stands_on_is_a_warning(url, opened, monkeypatch):
    monkeypatch.setenv("MILEPOST_TOML", "default.commit = 'marker'\n")
    opened(CarelessCreate)
    assert verdicts(doctor(url, size=SIZE))["create only"] == "warning"
    opened(CarelessReplace)
    assert verdicts(doctor(url, size=SIZE))["compare and swap"] == "warning"


# --- what is no defect, and should be known --------------------------------------------------------------------------


class Ahead(Store):
    """Has a clock that is ahead."""

    def time(self):
        return time.time() + 300


class HidesUploads(Store):
    """Denies to list uploads."""

    def uploads(self, prefix):
        raise StorageDeniedError("cannot list uploads: access denied")


class NoDriver(Store):
    """Cannot be told to TensorStore."""

    def kvstore(self, prefix):
        return None


@pytest.mark.parametrize(
    ("trait", "check", "said"),
    [
        (Ahead, "clock", "300 seconds ahead"),
        (HidesUploads, "unfinished uploads", "access denied"),
        (NoDriver, "native driver", "cannot be told"),
    ],
)
def test_what_is_no_defect_is_a_warning_with_a_remedy(url, opened, trait, check, said):
    opened(trait)
    findings = doctor(url, size=SIZE)
    assert not_ok(findings)[check] == "warning"
    assert "failed" not in verdicts(findings).values()
    (found,) = [one for one in findings if one.check == check]
    assert said in found.means
    assert found.remedy


def test_a_store_that_denies_everything_is_told_in_one_row(url, opened):
    class Denied(Store):
        def change(self, act):
            raise StorageDeniedError("cannot write: access denied")

    opened(Denied)
    findings = doctor(url, size=SIZE)
    failed = [one for one in findings if one.verdict == "failed"]
    assert [one.check for one in failed] == ["write and read", LAST]
    assert "permission" in failed[0].remedy


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(0, 120, 7))
def test_an_interrupted_doctor_leaves_nothing(url, opened, at):
    count = iter(range(at))

    class Interrupted(Store):
        def change(self, act):
            done = act()
            if threading.current_thread() is threading.main_thread() and next(count, None) is None and live:
                live.clear()
                raise KeyboardInterrupt
            return done

    live = [True]
    opened(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        doctor(url, size=SIZE)
    assert keys(MemoryStorage(url)) == []


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app(), list(map(str, arguments)))


def test_the_command_prints_a_table_and_ends_with_code_0(tmp_path):
    done = run("doctor", tmp_path, "--size", "3MiB")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == NAMES
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_remedies_and_ends_with_code_1_where_something_is_broken(url, opened):
    opened(CarelessCreate)
    done = run("doctor", url, "--size", "3MiB")
    assert done.exit_code == 1
    assert "failed: create only: enable conditional writes" in done.stdout
    document = json.loads(run("doctor", url, "--size", "3145728", "--json").stdout)
    assert (document["root"], document["fine"]) == (url, False)
    (found,) = [one for one in document["findings"] if one["verdict"] == "failed"]
    assert found["check"] == "create only"
    assert found["means"] == "an object can be created that is there already"


@pytest.mark.parametrize("size", ["much", "0", "-1", "3 apples"])
def test_a_size_that_is_none_is_wrong_use(tmp_path, size):
    assert run("doctor", tmp_path, "--size", size).exit_code == 2
