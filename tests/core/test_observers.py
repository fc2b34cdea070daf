"""Who listens learns what happened, and can change nothing; who wraps a storage sees every byte."""

from __future__ import annotations

import logging

import milepost
import numpy as np
import pytest
from core.fake_packages import HOOKIMPL, Site
from milepost import errors
from milepost.plugins import Plugins

LISTENER = f"""{HOOKIMPL}
events = []
@hookimpl
def save_started(event): events.append(("save_started", event))
@hookimpl
def save_committed(event): events.append(("save_committed", event))
@hookimpl
def save_failed(event): events.append(("save_failed", event))
@hookimpl
def restored(event): events.append(("restored", event))
"""

RAISING = f"""{HOOKIMPL}
@hookimpl
def save_started(event): raise RuntimeError("started badly")
@hookimpl
def save_committed(event): raise RuntimeError("committed badly")
@hookimpl
def save_failed(event): raise RuntimeError("failed badly")
@hookimpl
def restored(event): raise RuntimeError("restored badly")
"""

METER = f"""{HOOKIMPL}
written, read = [], []
class Metered:
    def __init__(self, storage): self._storage = storage
    def __getattr__(self, name): return getattr(self._storage, name)
    def write(self, key, buffers):
        def counted():
            for buffer in buffers:
                written.append((key, len(buffer)))
                yield buffer
        self._storage.write(key, counted())
    def read(self, key, start=0, stop=None):
        data = self._storage.read(key, start, stop)
        read.append((key, len(data)))
        return data
    def read_into(self, key, start, buffer):
        count = self._storage.read_into(key, start, buffer)
        read.append((key, count))
        return count
    def size(self, key): return self._storage.size(key)
    def children(self, prefix): return self._storage.children(prefix)
    def delete(self, key): self._storage.delete(key)
    def rename(self, source, target): self._storage.rename(source, target)
    def exchange(self, one, other): return self._storage.exchange(one, other)
    def sync(self, prefix): self._storage.sync(prefix)
@hookimpl(wrapper=True)
def open_storage(factory, url, options):
    return Metered((yield))
"""


@pytest.fixture
def using(tmp_path_factory, monkeypatch):
    """Install a package beside the real ones, and return its module."""
    site = Site(tmp_path_factory.mktemp("site"))
    monkeypatch.syspath_prepend(site.folder)

    def install(*sources):
        modules = {f"fake_observer_{number}": source for number, source in enumerate(sources)}
        for name, source in modules.items():
            site.install(name.replace("_", "-"), {"milepost.plugins": {name: name}}, {name: source})
        plugins = Plugins(())
        for module in ("engine.saving", "engine.loading", "engine.reading", "plugins", "routes"):
            monkeypatch.setattr(f"milepost.{module}.installed", lambda: plugins)
        import importlib

        return [importlib.import_module(name) for name in modules]

    yield install
    site.forget()


STATE = {"a": np.arange(1000, dtype=np.float32), "b": 7}


def test_who_listens_learns_of_a_save_and_a_load(using, tmp_path):
    (listener,) = using(LISTENER)
    milepost.save(tmp_path / "1", STATE)
    milepost.load(tmp_path / "1")
    assert [name for name, _ in listener.events] == ["save_started", "save_committed", "restored"]
    started, committed, restored = (event for _, event in listener.events)
    data = sum(file.stat().st_size for file in (tmp_path / "1" / "state").iterdir())
    assert {event.url for _, event in listener.events} == {f"file://{tmp_path}/1"}
    assert len({event.attempt for _, event in listener.events}) == 1
    assert started.attempt
    assert (started.bytes, committed.bytes, restored.bytes) == (0, data, data)
    assert all(event.error is None for _, event in listener.events)
    assert set(started.seconds) == {"prepare", "begin", "snapshot"}
    assert set(committed.seconds) == {"prepare", "begin", "snapshot", "write", "commit"}
    assert set(restored.seconds) == {"load"}
    assert all(0 <= spent < 60 for event in (committed, restored) for spent in event.seconds.values())


def test_who_listens_learns_why_a_save_failed(using, tmp_path, monkeypatch):
    (listener,) = using(LISTENER)

    def full(self, key, buffers):
        raise errors.StorageFullError(28, "no room")

    monkeypatch.setattr("milepost_posix.storage.PosixStorage.write", full)
    with pytest.raises(errors.StorageFullError) as caught:
        milepost.save(tmp_path / "1", STATE)
    assert [name for name, _ in listener.events] == ["save_started", "save_failed"]
    failed = listener.events[1][1]
    assert failed.error is caught.value
    assert failed.attempt == listener.events[0][1].attempt


def test_a_request_that_is_refused_is_no_event(using, tmp_path):
    (listener,) = using(LISTENER)
    with pytest.raises(errors.UnsupportedLeafError):
        milepost.save(tmp_path / "1", {"a": object()})
    with pytest.raises(errors.CheckpointNotFoundError):
        milepost.load(tmp_path / "1")
    assert listener.events == []


def test_a_listener_that_raises_changes_nothing_and_hides_nothing_from_others(using, tmp_path, caplog, monkeypatch):
    _, listener = using(RAISING, LISTENER)
    with caplog.at_level(logging.ERROR, "milepost"):
        milepost.save(tmp_path / "1", STATE)
        np.testing.assert_array_equal(STATE["a"], milepost.load(tmp_path / "1")["a"])
        with monkeypatch.context() as patched:
            patched.setattr("milepost_posix.storage.PosixStorage.rename", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                milepost.save(tmp_path / "2", STATE)
    names = ["save_started", "save_committed", "restored", "save_started", "save_failed"]
    assert [name for name, _ in listener.events] == names
    said = [record.exc_info[1].args[0] for record in caplog.records if record.exc_info]
    assert [text for text in said if text.endswith("badly")] == [
        *("started badly", "committed badly", "restored badly", "started badly", "failed badly")
    ]


def test_a_wrapper_sees_every_byte_of_saves_and_loads(using, tmp_path):
    (meter,) = using(METER)
    milepost.save(tmp_path / "1", STATE)
    on_disk = {str(file.relative_to(tmp_path / "1")): file.stat().st_size for file in (tmp_path / "1").rglob("*.*")}
    seen = {}
    for key, count in meter.written:
        name = key.partition("/")[2]
        seen[name] = seen.get(name, 0) + count
    assert {name: seen[name] for name in on_disk} == on_disk
    meter.read.clear()
    np.testing.assert_array_equal(STATE["a"], milepost.load(tmp_path / "1")["a"])
    assert sum(count for key, count in meter.read if key.endswith(".safetensors")) >= STATE["a"].nbytes
