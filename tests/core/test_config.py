from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from milepost.config import (
    BUILT_IN,
    SETTINGS,
    Layer,
    configured,
    current_layers,
    did_you_mean,
    lookup,
    make_layer,
    parse_layer,
    read_layers,
)
from milepost.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def value(layers, url, setting="threads"):
    return lookup(layers, url)[setting].value


def notes(error):
    return " ".join(getattr(error.value, "__notes__", ()))


# --- which setting holds ---------------------------------------------------------------------------------------------


def test_without_layers_every_setting_has_its_built_in_value():
    found = lookup((), "file:///a")
    assert {name: chosen.value for name, chosen in found.items()} == {one.name: one.default for one in SETTINGS}
    assert {chosen.origin for chosen in found.values()} == {BUILT_IN}


@pytest.mark.parametrize(
    ("prefix", "url", "covers"),
    [
        ("gs://bucket", "gs://bucket/7", True),
        ("gs://bucket", "gs://bucket", True),
        ("gs://bucket/", "gs://bucket/7", True),
        ("gs://buck", "gs://bucket/7", False),
        ("gs://bucket/run", "gs://bucket/runs/7", False),
        ("gs://bucket/runs/7", "gs://bucket/runs", False),
        ("gs://", "gs://bucket/7", True),
        ("GS://", "gs://bucket/7", True),
        ("gs://", "s3://bucket/7", False),
        ("file:///", "file:///a/7", True),
        ("file://", "file:///a/7", True),
        ("/", "file:///a/7", True),
        ("/", "gs://a/7", False),
        ("/a", "file:///a/7", True),
        ("/a", "file:///ab/7", False),
        ("runs", "file:///project/runs/7", True),
        (".", "file:///project/runs/7", True),
        ("..", "file:///other/7", True),
        ("~", "file:///home/me/7", True),
        ("~/runs", "file:///home/me/runs/7", True),
        ("~/runs", "file:///project/~/runs/7", False),
    ],
)
def test_a_prefix_covers_by_whole_segments(prefix, url, covers):
    layer = make_layer({"url": {prefix: {"threads": 3}}}, "here", base="/project", home="/home/me")
    assert value([layer], url) == (3 if covers else None)


def test_each_setting_takes_its_own_longest_prefix():
    layer = parse_layer(
        """
        default.threads = 1
        default.arrays = "plain"
        [url."gs://b/runs"]
        threads = 3
        [url."gs://b"]
        threads = 2
        verify = false
        """,
        "here",
    )
    found = lookup([layer], "gs://b/runs/7")
    assert [found[name].value for name in ("threads", "verify", "arrays")] == [3, False, "plain"]
    assert found["threads"].origin == 'here [url."gs://b/runs"]'
    assert found["arrays"].origin == "here [default]"


def test_at_one_prefix_the_stronger_layer_wins():
    weak, strong = (make_layer({"url": {"gs://b": {"threads": n}}}, str(n)) for n in (1, 2))
    assert value([weak, strong], "gs://b/7") == 2


def test_a_longer_prefix_in_a_weaker_layer_wins():
    weak = make_layer({"url": {"gs://b/runs": {"threads": 1}}}, "weak")
    strong = make_layer({"url": {"gs://b": {"threads": 2}}, "default": {"threads": 3}}, "strong")
    assert value([weak, strong], "gs://b/runs/7") == 1
    assert value([weak, strong], "gs://b/7") == 2
    assert value([weak, strong], "s3://b/7") == 3


def test_option_tables_replace_each_other_whole():
    layer = parse_layer(
        'default.storage_options = {timeout = 1, retries = 2}\n[url."gs://b"]\nstorage_options = {timeout = 3}', "here"
    )
    assert value([layer], "gs://b/7", "storage_options") == {"timeout": 3}


NAMES = st.lists(st.sampled_from(["a", "b", "ab"]), max_size=3)


@given(st.lists(st.dictionaries(NAMES.map(tuple), st.integers(1, 9), max_size=6), max_size=4), NAMES)
def test_lookup_agrees_with_the_rule_spelled_out(tables, path):
    layers = [
        make_layer({"url": {"/".join(["gs://x", *prefix]): {"threads": n} for prefix, n in table.items()}}, str(index))
        for index, table in enumerate(tables)
    ]
    candidates = [
        (len(prefix), strength, n)
        for strength, table in enumerate(tables)
        for prefix, n in table.items()
        if list(prefix) == path[: len(prefix)]
    ]
    expected = max(candidates)[2] if candidates else None
    assert value(layers, "/".join(["gs://x", *path])) == expected


# --- what a layer may say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("default.verfy = true", r"unknown setting 'verfy' in here \[default\]", "did you mean 'verify'?"),
        ('[url."gs://b"]\nthread = 1', r"unknown setting 'thread' in here \[url\.\"gs://b\"\]", "'threads'"),
        ("defaults.threads = 1", "unknown key 'defaults' in here", "did you mean 'default'?"),
        ("threads = 1", "unknown key 'threads' in here", "write default.threads"),
        ("default = 1", r"here \[default\]: it must be a table", ""),
        ("url = 1", r"here \[url\]: it must be a table", ""),
        ('url."gs://b" = 1', "it must be a table", ""),
        ("default.threads = 0", "threads = 0 in here .*whole number from 1", ""),
        ("default.threads = true", "threads = True", ""),
        ("default.threads = 1.5", "threads = 1.5", ""),
        ("default.verify = 1", "verify = 1 .*true or false", ""),
        ("default.arrays = ''", "arrays = '' .*a name", ""),
        ("default.arrays = 3", "arrays = 3 .*a name", ""),
        ("default.storage_options = []", r"storage_options = \[\] .*a table", ""),
        ("default.save_budget = 0", "save_budget = 0 .*64MiB", ""),
        ("default.save_budget = -1", "save_budget = -1", ""),
        ("default.save_budget = true", "save_budget = True", ""),
        ("default.save_budget = '64 parsecs'", "save_budget = '64 parsecs'", ""),
        ("default.save_budget = ''", "save_budget = ''", ""),
        ("default.save_budget = '0.1B'", "save_budget = '0.1B'", ""),
        ("not toml", "cannot read here: it is no TOML", ""),
        (f"default.threads = {'9' * 5000}", "cannot read here", ""),
        ('[url."gs://b"]\nthreads = 1\n[url."gs://b/"]\nthreads = 2', "another prefix of the same file", ""),
        ('[url."gs://b/../c"]\nthreads = 1', "plain names", ""),
        ('[url.""]\nthreads = 1', "empty", ""),
        ('[url."gs:/b"]\nthreads = 1', "lost a slash", ""),
    ],
)
def test_what_cannot_be_meant_is_refused(text, said, hint):
    with pytest.raises(ConfigError, match=said) as error:
        parse_layer(text, "here")
    assert hint in notes(error)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("64MiB", 64 * 2**20),
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("10 kb", 10**4),
        ("7B", 7),
        ("1TiB", 2**40),
    ],
)
def test_budgets_are_bytes_with_units(written, expected):
    layer = make_layer({"default": {"load_budget": written}}, "here")
    assert value([layer], "gs://b/7", "load_budget") == expected


def test_every_setting_takes_a_value_of_its_kind():
    examples = {"name": "x", "table": {"a": 1}, "bytes": 1, "count": 1, "flag": True}
    layer = make_layer({"default": {setting.name: examples[setting.kind] for setting in SETTINGS}}, "here")
    assert {chosen.origin for chosen in lookup([layer], "gs://b/7").values()} == {"here [default]"}


def test_suggestions_name_the_nearest_or_list_all():
    assert did_you_mean("lod", ["load", "save"]) == "did you mean 'load'?"
    assert did_you_mean("x", ["load", "save"], ["xx"]) == "did you mean 'xx'?"
    assert did_you_mean("zzz", ["load", "save"], ["xx"]) == "there are: 'load', 'save'"
    assert did_you_mean("zzz", []) == "there are none"


# --- where layers come from ------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    (tmp_path / "home/.config/milepost").mkdir(parents=True)
    (tmp_path / "jobs/project/deep").mkdir(parents=True)
    return tmp_path


def write(path: Path, threads: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"default.threads = {threads}\n")
    return str(path)


def read(place: Path, cwd="jobs/project/deep", **env: str) -> tuple[Layer, ...]:
    return read_layers(env, str(place / cwd), str(place / "home"))


def test_nothing_written_is_no_layer(place):
    assert read(place) == ()


def test_layers_come_weakest_first(place):
    user = write(place / "home/.config/milepost/milepost.toml", 1)
    project = write(place / "jobs/milepost.toml", 2)
    layers = read(place, MILEPOST_TOML="default.threads = 3")
    assert [layer.origin for layer in layers] == [user, project, "$MILEPOST_TOML"]
    assert [value(layers[: n + 1], "gs://b/7") for n in range(3)] == [1, 2, 3]


def test_the_nearest_project_file_counts_alone(place):
    write(place / "jobs/milepost.toml", 1)
    nearest = write(place / "jobs/project/milepost.toml", 2)
    assert [layer.origin for layer in read(place)] == [nearest]


def test_a_named_file_stands_in_for_the_project_file(place):
    write(place / "jobs/milepost.toml", 1)
    named = write(place / "elsewhere/settings.toml", 2)
    assert [layer.origin for layer in read(place, MILEPOST_CONFIG=named)] == [named]
    (relative,) = read(place, cwd="elsewhere", MILEPOST_CONFIG="settings.toml")
    assert value([relative], "gs://b/7") == 2


def test_a_named_file_must_exist(place):
    with pytest.raises(ConfigError, match="no such file") as error:
        read(place, MILEPOST_CONFIG=str(place / "missing.toml"))
    assert "MILEPOST_CONFIG" in notes(error)


def test_empty_variables_count_as_not_set(place):
    project = write(place / "jobs/milepost.toml", 1)
    layers = read(place, MILEPOST_CONFIG="", MILEPOST_TOML="", XDG_CONFIG_HOME="")
    assert [layer.origin for layer in layers] == [project]


def test_the_user_file_follows_xdg_config_home(place):
    user = write(place / "xdg/milepost/milepost.toml", 1)
    assert [layer.origin for layer in read(place, XDG_CONFIG_HOME=str(place / "xdg"))] == [user]


def test_local_prefixes_begin_at_the_file(place):
    (place / "jobs/milepost.toml").write_text('url."runs".threads = 5\nurl."~/runs".threads = 6\n')
    layers = read(place)
    assert value(layers, f"file://{place}/jobs/runs/7") == 5
    assert value(layers, f"file://{place}/home/runs/7") == 6
    assert value(layers, f"file://{place}/jobs/project/deep/runs/7") is None


def test_a_changed_file_is_read_again(place):
    write(place / "jobs/milepost.toml", 1)
    before = read(place)
    assert read(place)[0] is before[0]
    os.utime(write(place / "jobs/milepost.toml", 2), ns=(1, 1))
    assert value(read(place), "gs://b/7") == 2
    (place / "jobs/milepost.toml").unlink()
    assert read(place) == ()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"default.verfy = true", b"[["])
def test_an_unusable_file_is_named(place, content):
    path = place / "jobs/milepost.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read(place)
    assert str(path) in str(error.value)


# --- settings from code ----------------------------------------------------------------------------------------------


@pytest.fixture
def _bare(place, monkeypatch):
    monkeypatch.chdir(place / "jobs/project")
    monkeypatch.setenv("HOME", str(place / "home"))
    for name in ("MILEPOST_CONFIG", "MILEPOST_TOML", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_bare")
def test_settings_from_code_are_strongest_and_hold_in_their_block(monkeypatch):
    monkeypatch.setenv("MILEPOST_TOML", "default.threads = 2\ndefault.verify = false")
    with configured({"default": {"threads": 3}}):
        assert value(current_layers(), "gs://b/7") == 3
        assert value(current_layers(), "gs://b/7", "verify") is False
        with configured({"default": {"threads": 4}}):
            assert value(current_layers(), "gs://b/7") == 4
        assert lookup(current_layers(), "gs://b/7")["threads"].origin == "milepost.configured [default]"
    assert value(current_layers(), "gs://b/7") == 2


@pytest.mark.usefixtures("_bare")
def test_a_block_ends_when_it_raises():
    with pytest.raises(KeyError), configured({"default": {"threads": 3}}):
        raise KeyError
    assert current_layers() == ()


@pytest.mark.usefixtures("_bare")
def test_a_block_holds_for_its_own_thread():
    seen = []
    with configured({"default": {"threads": 3}}):
        thread = threading.Thread(target=lambda: seen.append(current_layers()))
        thread.start()
        thread.join()
    assert seen == [()]


@pytest.mark.usefixtures("_bare")
def test_settings_from_code_are_checked_before_the_block_begins():
    with pytest.raises(ConfigError, match="'verfy'"):
        configured({"default": {"verfy": False}}).__enter__()


@pytest.mark.usefixtures("_bare")
def test_a_removed_working_directory_leaves_absolute_paths_usable(place, monkeypatch):
    (place / "gone").mkdir()
    monkeypatch.chdir(place / "gone")
    (place / "gone").rmdir()
    with configured({"default": {"threads": 3}}):
        assert value(current_layers(), "gs://b/7") == 3
    monkeypatch.chdir(place)
