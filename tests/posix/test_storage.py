from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from milepost import protocols
from milepost.errors import (
    AlreadyExistsError,
    ConfigError,
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
)
from milepost_posix import PosixStorage


@pytest.fixture
def root(tmp_path):
    return tmp_path / "new" / "root"


@pytest.fixture
def storage(root):
    return PosixStorage(f"file://{root}")


def test_it_can_do_what_it_says(storage):
    kinds = [protocols.Storage, protocols.CreatesOnly, protocols.RenamesPrefixes, protocols.ExchangesPrefixes]
    kinds += [protocols.SyncsPrefixes, protocols.ReadsInto, protocols.MapsFiles]
    assert [kind for kind in kinds if not isinstance(storage, kind)] == []
    assert not isinstance(storage, protocols.ReplacesObjects)


def test_opening_makes_nothing(storage, root):
    assert list(storage.children("")) == []
    assert not root.parent.exists()


@pytest.mark.parametrize("url", ["file://relative", "/plain", "gs://bucket", "file:///a\0b"])
def test_a_url_of_something_else_is_refused(url):
    with pytest.raises(ConfigError, match="no absolute file URL"):
        PosixStorage(url)


def test_special_characters_in_a_path_mean_themselves(tmp_path):
    PosixStorage(f"file://{tmp_path}/a%20b #?é").write("k", [b"x"])
    assert (tmp_path / "a%20b #?é" / "k").read_bytes() == b"x"


def names(path):
    return [child.name for child in path.iterdir()]


# --- reading and writing ---------------------------------------------------------------------------------------------


def test_what_is_written_is_there(storage, root, tree):
    storage.write("7/state/a", [b"12", memoryview(b"34"), bytearray(b"5"), b""])
    assert tree(root) == {"7": None, "7/state": None, "7/state/a": b"12345"}
    assert bytes(storage.read("7/state/a", 1, 3)) == b"23"
    assert bytes(storage.read("7/state/a", 3, 99)) == b"45"
    assert bytes(storage.read("7/state/a", 9)) == b""
    assert storage.size("7/state/a") == 5
    assert sorted(storage.children("")) == ["7/"]
    assert sorted(storage.children("7/state/")) == ["a"]


@pytest.mark.parametrize("sizes", [[], [0], [1, 70_000, 2], [40_000] * 5, [33 << 20, 1, 100_000]])
def test_buffers_may_be_reused_once_the_next_is_taken(storage, root, sizes):
    expected = b"".join(bytes([65 + n]) * size for n, size in enumerate(sizes))
    memory = bytearray(max(sizes, default=0))

    def reused():
        for n, size in enumerate(sizes):
            view = memoryview(memory)[:size]
            view[:] = bytes([65 + n]) * size
            yield view
            view[:] = b"!" * size

    storage.write("k", reused())
    assert (root / "k").read_bytes() == expected


def test_short_reads_are_gone_on_with(storage, root, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:999]], at))
    data = os.urandom(300_000)
    storage.write("k", [data[:10], data[10:]])
    assert (root / "k").read_bytes() == data
    assert bytes(storage.read("k")) == data


def test_buffers_are_not_joined(storage):
    block = bytes(16 << 20)
    tracemalloc.start()
    storage.write("k", (block for _ in range(4)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_read_into_fills_what_there_is(storage):
    storage.write("k", [b"12345"])
    buffer = bytearray(b"......")
    assert storage.read_into("k", 2, memoryview(buffer)) == 3
    assert buffer == b"345..."
    assert storage.read_into("k", 9, memoryview(buffer)) == 0
    assert storage.read_into("k", 0, memoryview(b"")) == 0


def test_a_mapping_is_private_and_outlives_its_file(storage, root):
    storage.write("7/k", [b"12345"])
    mapped = storage.map("7/k")
    mapped[0] = ord("X")
    assert (root / "7/k").read_bytes() == b"12345"
    storage.delete("7/")
    assert bytes(mapped) == b"X2345"


def test_an_empty_file_can_be_mapped(storage):
    storage.write("k", [])
    assert bytes(storage.map("k")) == b""


def test_a_file_is_replaced_and_a_failure_keeps_the_former(storage, root, tree):
    storage.write("k", [b"old"])

    def failing():
        yield bytes(1 << 20)
        raise OSError(errno.EIO, "the producer's own")

    for key in ("k", "a/b/c"):
        with pytest.raises(OSError, match="the producer's own") as caught:
            storage.write(key, failing())
        assert not isinstance(caught.value, StorageError)
    assert tree(root) == {"k": b"old"}


def test_a_writer_may_lose_its_directory_to_one_that_fails(storage, root, tree, monkeypatch):
    opened, left = io.open, iter(range(5))

    def overtaken(file, *args, **more):
        if next(left, None) is not None:
            with contextlib.suppress(FileNotFoundError):
                Path(file).parent.rmdir()
                root.rmdir()
        return opened(file, *args, **more)

    monkeypatch.setattr(io, "open", overtaken)
    storage.write("7/k", [b"x"])
    assert list(left) == []
    monkeypatch.undo()
    assert tree(root) == {"7": None, "7/k": b"x"}


def test_a_root_that_is_a_link_to_nothing_yet_is_made(storage, root, tmp_path, tree):
    (tmp_path / "link").symlink_to(root)
    PosixStorage(f"file://{tmp_path}/link").write("7/k", [b"x"])
    assert tree(root) == {"7": None, "7/k": b"x"}


@pytest.mark.parametrize("action", ["read", "size", "map"])
@pytest.mark.parametrize("key", ["nothing", "folder", "file/below"])
def test_what_is_no_file_is_not_found(storage, action, key):
    storage.write("folder/k", [b""])
    storage.write("file", [b""])
    with pytest.raises(NotFoundError, match=key) as caught:
        getattr(storage, action)(key)
    assert caught.value.errno in {errno.ENOENT, errno.EISDIR, errno.ENOTDIR}
    assert isinstance(caught.value.__cause__, OSError)


def test_temporary_names_are_no_keys(storage, root):
    seen = []

    def looking():
        yield b"x"
        seen.extend(names(root))
        seen.extend(storage.children(""))

    storage.write("k", looking())
    (name,) = seen  # on the disk, and not among the children
    with pytest.raises(StorageError, match="key"):
        storage.read(name)


def test_deleting_what_is_gone_is_no_error(storage, root, tree):
    storage.write("7/a/k", [b""])
    storage.write("8", [b""])
    for key in ("7/", "7/", "8", "8", "nothing/below/", "7/a/k"):
        storage.delete(key)
    assert tree(root) == {}


# --- creating only ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch):
    if request.param == "no links":

        def refuse(*_, **__):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)


def test_create_makes_a_file_once(storage, root, tree, links):
    storage.create("7/k", [b"on", b"e"])
    with pytest.raises(AlreadyExistsError):
        storage.create("7/k", [b"two"])
    assert tree(root) == {"7": None, "7/k": b"one"}


def test_the_slower_of_two_creators_changes_nothing(storage, root, tree, links):
    def overtaken():
        yield b"slow"
        storage.create("k", [b"fast"])

    with pytest.raises(AlreadyExistsError, match="k"):
        storage.create("k", overtaken())
    assert tree(root) == {"k": b"fast"}


# --- durability ------------------------------------------------------------------------------------------------------


@pytest.fixture
def synced(monkeypatch):
    """Collect the paths that are synced, in order, as they are called at that time."""
    fsync, paths = os.fsync, []

    def spy(file):
        paths.append(Path(f"/proc/self/fd/{file}").readlink())
        fsync(file)

    monkeypatch.setattr(os, "fsync", spy)
    return paths


def test_a_new_file_and_every_new_directory_are_synced(storage, root, tmp_path, synced):
    storage.write("7/k", [b"x"])
    directories = [tmp_path, tmp_path / "new", root]
    assert synced[:3] == directories
    assert synced[3].parent == root / "7"
    assert synced[4:] == [root / "7"]


def test_sync_reaches_everything_others_wrote_and_the_way_to_it(storage, root, synced):
    (root / "7/a/b").mkdir(parents=True)
    for name in ("7/k", "7/a/k", "7/a/b/k"):
        (root / name).write_bytes(b"x")
    (root / "7/link").symlink_to("/dev/null")
    os.mkfifo(root / "7/pipe")
    storage.sync("7/")
    expected = [root / name for name in ("7/k", "7/a/k", "7/a/b/k", "7/a/b", "7/a", "7")] + [*root.parents, root]
    assert sorted(synced) == sorted(expected)
    order = [synced.index(root / name) for name in ("7/a/b/k", "7/a/b", "7/a", "7", "")]
    assert order == sorted(order)


def test_sync_of_nothing_is_not_found(storage):
    with pytest.raises(NotFoundError):
        storage.sync("7/")


# --- renaming --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["renameat2", "old kernel"])
def kernel(request):
    if request.param == "old kernel":
        request.getfixturevalue("old_kernel")
    return request.param


def test_rename_moves_everything(storage, root, tree, kernel):
    storage.write("a/k", [b"1"])
    storage.rename("a/", "far/b/")
    assert tree(root) == {"far": None, "far/b": None, "far/b/k": b"1"}
    with pytest.raises(NotFoundError):
        storage.rename("a/", "c/")


@pytest.mark.parametrize("taken", ["file", "full", "link", "dangling"])
def test_rename_replaces_nothing(storage, root, tree, kernel, taken):
    storage.write("a/k", [b"1"])
    storage.write("full/k", [b"2"])
    storage.write("file", [b"3"])
    (root / "link").symlink_to("full")
    (root / "dangling").symlink_to("nowhere")
    before = {name: os.lstat(root / name).st_ino for name in names(root)}
    with pytest.raises(AlreadyExistsError, match=taken):
        storage.rename("a/", f"{taken}/")
    assert {name: os.lstat(root / name).st_ino for name in names(root)} == before


def test_an_empty_directory_is_nothing_to_a_rename(storage, root, tree, kernel):
    storage.write("a/k", [b"1"])
    (root / "empty").mkdir()
    storage.rename("a/", "empty/")
    assert tree(root) == {"empty": None, "empty/k": b"1"}


def test_what_comes_into_an_empty_directory_is_safe_from_a_rename(storage, root, tree, kernel, monkeypatch):
    storage.write("a/k", [b"1"])
    (root / "taken").mkdir()
    rmdir = os.rmdir

    def overtaken(path, **more):
        (root / "taken/k").write_bytes(b"quicker")
        rmdir(path, **more)

    monkeypatch.setattr(os, "rmdir", overtaken)
    with pytest.raises(AlreadyExistsError, match="taken"):
        storage.rename("a/", "taken/")
    assert tree(root) == {"a": None, "a/k": b"1", "taken": None, "taken/k": b"quicker"}


@pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EEXIST])
def test_file_systems_disagree_about_the_number_for_taken(storage, old_kernel, monkeypatch, code):
    storage.write("a/k", [b"1"])

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(AlreadyExistsError):
        storage.rename("a/", "b/")


def test_exchange_swaps_or_says_that_it_cannot(storage, root, tree, kernel):
    storage.write("a/k", [b"1"])
    storage.write("b/k", [b"2"])
    before = tree(root)
    done = storage.exchange("a/", "b/")
    assert done is (kernel == "renameat2")
    assert tree(root) == ({"a": None, "a/k": b"2", "b": None, "b/k": b"1"} if done else before)


def test_a_directory_is_not_exchanged_for_a_file_or_a_link(storage, root):
    storage.write("a/k", [b"1"])
    storage.write("file", [b"2"])
    (root / "link").symlink_to("a")
    with pytest.raises(StorageError, match=r"file' is not a directory"):
        storage.exchange("a/", "file/")
    with pytest.raises(StorageError, match=r"link' is a link"):
        storage.exchange("a/", "link/")


# --- links and hostile keys ------------------------------------------------------------------------------------------


def test_links_to_directories_are_followed_when_reading(storage, root, tmp_path):
    storage.write("7/k", [b"x"])
    (tmp_path / "link").symlink_to(root)
    (root / "latest").symlink_to("7")
    (root / "loop").symlink_to("loop")
    other = PosixStorage(f"file://{tmp_path}/link")
    assert sorted(other.children("")) == ["7/", "latest/", "loop"]
    assert bytes(other.read("latest/k")) == b"x"
    with pytest.raises(StorageError, match="symbolic links"):
        other.read("loop/k")


def test_deleting_a_link_keeps_what_it_leads_to(storage, root, tree):
    storage.write("7/k", [b"x"])
    (root / "latest").symlink_to("7")
    storage.delete("latest/")
    assert tree(root) == {"7": None, "7/k": b"x"}


@pytest.mark.parametrize(
    "key", ["..", "../x", "a/../../x", "/etc/x", "a//b", "a/./b", "", "/", "a\0b", "a/\udfff\ud800"]
)
@pytest.mark.parametrize("action", ["read", "write", "create", "delete", "size", "map", "rename", "exchange", "sync"])
def test_no_key_leads_out_of_the_root(storage, root, tmp_path, tree, action, key):
    storage.write("k", [b"x"])
    (tmp_path / "new/x").write_bytes(b"keep")
    before = tree(tmp_path)
    if (action, key) == ("delete", ""):
        key = ".."  # the empty prefix is the whole storage
    more = {"write": ([b"evil"],), "create": ([b"evil"],), "rename": ("k2/",), "exchange": ("k2/",)}
    with pytest.raises(StorageError, match="no relative path") as caught:
        getattr(storage, action)(key, *more.get(action, ()))
    assert caught.value.errno == errno.EINVAL
    assert tree(tmp_path) == before


# --- permissions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def umask():
    former = os.umask(0o077)
    yield
    os.umask(former)


def _bits(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_umask_decides_without_a_mode(storage, root, umask):
    storage.write("7/k", [b"x"])
    assert (_bits(root / "7"), _bits(root / "7/k")) == (0o700, 0o600)


@pytest.mark.parametrize("mode", ["0750", "0o750", 0o750])
def test_a_mode_holds_whatever_the_umask(root, umask, mode):
    storage = PosixStorage(f"file://{root}", mode=mode)
    storage.write("7/k", [b"x"])
    storage.create("7/c", [b"x"])
    assert [_bits(root), _bits(root / "7"), _bits(root / "7/k"), _bits(root / "7/c")] == [0o750, 0o750, 0o640, 0o640]


@pytest.mark.parametrize("mode", [750, 755, 777, "0650", "rwx", "", -1, "77777"])
def test_a_mode_that_is_none_is_refused(mode):
    with pytest.raises(ConfigError, match="mode"):
        PosixStorage("file:///x", mode=mode)


# --- refusals of the system ------------------------------------------------------------------------------------------


def test_a_parent_that_is_a_file_is_named(storage, root):
    storage.write("a", [b"x"])
    with pytest.raises(StorageError, match=f"{root}/a' is not a directory") as caught:
        storage.write("a/b/c", [b"y"])
    assert caught.value.errno == errno.ENOTDIR


def test_a_name_too_long_says_how_long_it_may_be(storage, root):
    storage.write("k" * 255, [b"x"])
    with pytest.raises(StorageError, match="has 256 bytes, and 255 are allowed") as caught:
        storage.write("é" * 128, [b"x"])
    assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(StorageError, match="4095 are allowed"):
        storage.write("/".join(["k" * 100] * 50), [b"x"])
    assert names(root) == ["k" * 255]


@pytest.mark.root
def test_a_full_disk_keeps_what_was_there(tmpfs, tree):
    point = tmpfs("size=512k")
    storage = PosixStorage(f"file://{point}")
    storage.write("6/k", [b"x"])
    with pytest.raises(StorageFullError, match="no space left") as caught:
        storage.write("7/k", (bytes(100_000) for _ in range(9)))
    assert caught.value.errno == errno.ENOSPC
    assert tree(point) == {"6": None, "6/k": b"x"}


@pytest.mark.root
def test_a_read_only_disk_is_said_to_be_one(tmpfs, tree):
    point = tmpfs("size=512k")
    storage = PosixStorage(f"file://{point}")
    storage.write("6/k", [b"x"])
    tmpfs("remount,ro")
    for act in (lambda: storage.write("7/k", [b""]), lambda: storage.delete("6/"), lambda: storage.rename("6/", "7/")):
        with pytest.raises(StorageDeniedError, match="read-only") as caught:
            act()
        assert caught.value.errno == errno.EROFS
    assert tree(point) == {"6": None, "6/k": b"x"}


def test_a_limit_on_the_size_of_files_is_said_to_be_one(root, tree):
    script = (
        "import resource, signal, sys; from milepost_posix import PosixStorage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "try: PosixStorage(sys.argv[1]).write('7/k', [bytes(200_000), bytes(200_000)])\n"
        "except OSError as error: print(type(error).__name__, error.errno, *error.__notes__)"
    )
    said = subprocess.run([sys.executable, "-c", script, f"file://{root}"], check=True, capture_output=True, text=True)
    assert said.stdout.startswith(f"StorageFullError {errno.EFBIG} see `ulimit -f`")
    assert tree(root.parent) == {}


def test_a_directory_of_somebody_else_is_denied(tmp_path, tree, request):
    closed, shut = tmp_path / "closed", tmp_path / "shut"
    PosixStorage(f"file://{closed}").write("6/k", [b"x"])
    PosixStorage(f"file://{shut}").write("6/k", [b"x"])
    before = tree(tmp_path)
    closed.chmod(0o555)
    shut.chmod(0o000)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o711)  # so that it is not the way to them that is denied
    request.getfixturevalue("nobody")
    acts = [lambda: PosixStorage(f"file://{closed}").write("7/k", [b""])]
    acts += [lambda: PosixStorage(f"file://{closed}").delete("6/k")]
    acts += [lambda: PosixStorage(f"file://{shut}").read("6/k"), lambda: PosixStorage(f"file://{shut}").children("6/")]
    for act in acts:
        with pytest.raises(StorageDeniedError, match="permission denied") as caught:
            act()
        assert caught.value.errno == errno.EACCES
    if os.getuid() == 0:
        os.seteuid(0)
    shut.chmod(0o755)
    assert tree(tmp_path) == before


def test_a_temporary_root_commits_by_rename(storage):
    assert storage.commit == "rename"
