from __future__ import annotations

import errno
import gc
import subprocess
import sys
import uuid

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from milepost.errors import NotFoundError, StorageDeniedError, StorageError, StorageFullError
from milepost.generic import FsspecStorage
from milepost.testing.faults import emptied, keys
from milepost.testing.storage import StorageContract


class TestLocalFiles(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path):
        return FsspecStorage(f"file://{tmp_path}/root")

    @pytest.fixture
    def other(self, tmp_path):
        return FsspecStorage(f"local://{tmp_path}/root/")

    def test_keys_are_paths(self, storage, tmp_path):
        storage.write("7/state/a b#%", [b"12", b"3"])
        assert (tmp_path / "root" / "7" / "state" / "a b#%").read_bytes() == b"123"
        storage.delete("7/state/a b#%")
        assert list((tmp_path / "root").iterdir()) == []

    def test_a_write_that_was_killed_is_not_listed(self, storage, tmp_path):
        storage.write("7/a", [b"1"])
        (tmp_path / "root" / "7" / "b.part-0123456789ab").write_bytes(b"half")
        assert list(storage.children("7/")) == ["a"]
        storage.delete("7/")
        assert list((tmp_path / "root").iterdir()) == []

    def test_what_may_not_be_written_says_so(self, tmp_path, monkeypatch):
        def refuse(number):
            def opened(self, path, mode="rb", **_):
                raise OSError(number, "refused", path)

            monkeypatch.setattr(LocalFileSystem, "_open", opened)

        storage = FsspecStorage(f"file://{tmp_path}")
        for number, kind in (
            (errno.ENOSPC, StorageFullError),
            (errno.EACCES, StorageDeniedError),
            (errno.EROFS, StorageDeniedError),
            (errno.EIO, StorageError),
        ):
            refuse(number)
            with pytest.raises(kind, match="cannot write") as caught:
                storage.write("k", [b"1"])
            assert caught.value.errno == number


class TestMemory(StorageContract):
    @pytest.fixture
    def root(self):
        url = f"memory://{uuid.uuid4()}/root"
        yield url
        emptied(FsspecStorage(url))

    @pytest.fixture
    def storage(self, root):
        return FsspecStorage(root)

    @pytest.fixture
    def other(self, root):
        return FsspecStorage(f"{root}/")


class TestShownDirectory(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path):
        return FsspecStorage("dir://root", path=str(tmp_path), target_protocol="file")

    @pytest.fixture
    def other(self, tmp_path):
        return FsspecStorage(f"file://{tmp_path}/root")


class UploadingFile(AbstractBufferedFile):
    """A file as object stores have it: an object only once it is closed."""

    def _initiate_upload(self):
        self.parts = []

    def _upload_chunk(self, final=False):  # noqa: FBT002 - the signature is fsspec's
        self.parts.append(self.buffer.getvalue())
        if final:
            self.fs.objects[self.path] = b"".join(self.parts)
        return True

    def discard(self):
        self.fs.discarded += 1


class UploadingFileSystem(MemoryFileSystem):
    protocol = "uploading"
    cachable = False

    def __init__(self, **options):
        super().__init__(**options)
        self.objects, self.discarded = {}, 0

    def _open(self, path, mode="rb", **_):
        assert mode == "wb"
        return UploadingFile(self, path, mode, block_size=1 << 20)


class StrictFileSystem(MemoryFileSystem):
    """A file system that takes no options but its own."""

    protocol = "strict"

    def __init__(self, colour="blue"):
        super().__init__()
        self.colour = colour


@pytest.fixture
def register():
    # fsspec has no way back from a registration, so that each test uses a name of its own.
    def registered(kind):
        name = f"x{uuid.uuid4().hex}"
        fsspec.register_implementation(name, type(kind.__name__, (kind,), {"protocol": name}))
        return name

    return registered


@pytest.fixture
def uploading(register):
    storage = FsspecStorage(f"{register(UploadingFileSystem)}://bucket/root")
    return storage, storage._fs


def test_a_big_object_is_uploaded_in_parts_without_being_joined(uploading):
    storage, system = uploading
    storage.write("k", (bytes([index]) * (1 << 20) for index in range(20)))
    ((path, body),) = system.objects.items()
    assert path.endswith("bucket/root/k")
    assert body == b"".join(bytes([index]) * (1 << 20) for index in range(20))


def test_an_upload_that_fails_is_discarded_and_not_completed_by_the_garbage_collector(uploading):
    storage, system = uploading

    def failing():
        for _ in range(20):
            yield bytes(1 << 20)
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        storage.write("k", failing())
    gc.collect()
    assert system.objects == {}
    assert system.discarded == 1


def test_a_range_behind_the_end_is_empty_where_the_server_refuses_it(monkeypatch):
    storage = FsspecStorage(f"memory://{uuid.uuid4()}")
    storage.write("k", [b"123"])

    def refuse(self, path, start=None, end=None, **_):
        raise ValueError("416 requested range not satisfiable")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
    assert storage.read("k", 3, 9) == b""
    with pytest.raises(StorageError, match="416"):
        storage.read("k", 2, 9)
    with pytest.raises(NotFoundError):
        storage.read("missing", 3, 9)
    monkeypatch.undo()
    emptied(storage)
    assert keys(storage) == []


def test_it_claims_nothing_that_it_cannot_know():
    storage = FsspecStorage("memory://claims")
    assert storage.commit == "marker"
    for verb in ("create", "replace", "rename", "exchange", "map", "sync"):
        assert not hasattr(storage, verb)


def test_options_are_those_of_the_file_system_and_a_wrong_one_is_refused_in_its_words(register):
    name = register(StrictFileSystem)
    assert FsspecStorage(f"{name}://root", colour="red")._fs.colour == "red"
    with pytest.raises(TypeError, match="flavour"):
        FsspecStorage(f"{name}://root", flavour="sour")


def test_importing_it_does_not_import_fsspec():
    code = "import sys, milepost.generic; sys.exit('fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
