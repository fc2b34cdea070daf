from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from milepost import urls
from milepost.errors import RequestError
from upath import UPath

SEGMENT = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text not in {".", ".."}
)
SCHEME = st.sampled_from(["gs", "s3", "memory", "hf", "abfs"])


def notes(error):
    return " ".join(getattr(error.value, "__notes__", ()))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/data/7", "file:///data/7"),
        ("/data//7/", "file:///data/7"),
        ("//data/7", "file:///data/7"),
        ("/data/./x/../7", "file:///data/7"),
        ("/", "file:///"),
        ("/~/a b%20c?#", "file:///~/a b%20c?#"),
        ("file:///data/7/", "file:///data/7"),
        ("file://localhost/data/7", "file:///data/7"),
        ("FILE:///data/../7", "file:///7"),
        ("file:///a%20b", "file:///a%20b"),
        ("file:///", "file:///"),
        ("file://", "file:///"),
        ("local:///data", "file:///data"),
        ("gs://bucket", "gs://bucket"),
        ("gs://bucket/", "gs://bucket"),
        ("GS://Bucket//a///b/", "gs://Bucket/a/b"),
        ("memory://a", "memory://a"),
        ("memory:///a/b", "memory:///a/b"),
        ("s3://b/step=7/a b", "s3://b/step=7/a b"),
        ("/a\nb/ü", "file:///a\nb/ü"),
        ("C:/data", None),
    ],
)
def test_every_place_has_one_spelling(given, expected):
    assert urls.locate(given) == (expected or f"file://{Path.cwd() / given}")


def test_relative_paths_begin_at_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert urls.locate("run/7") == f"file://{tmp_path}/run/7"
    assert urls.locate(Path("run/7")) == f"file://{tmp_path}/run/7"
    assert urls.locate("~/run") == f"file://{tmp_path}/~/run"
    assert urls.locate(".") == urls.locate(Path()) == f"file://{tmp_path}"
    assert urls.locate("../x") == f"file://{tmp_path.parent}/x"


def test_links_are_not_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert urls.locate(tmp_path / "link" / "7") == f"file://{tmp_path}/link/7"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (UPath("/a b/7"), "file:///a b/7"),
        (UPath("file:///a b/7"), "file:///a b/7"),
        (UPath("memory://a/b c"), "memory://a/b c"),
        (PurePosixPath("/a/7"), "file:///a/7"),
    ],
)
def test_path_objects_are_understood(given, expected):
    assert urls.locate(given) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "empty"),
        ("a\0b", "null"),
        (7, "not int"),
        (None, "not NoneType"),
        (b"/a", "not bytes"),
        ("file://data/7", "'data' stands where a host name stands"),
        ("gs://bucket/a/../b", "plain names"),
        ("gs://bucket/./b", "plain names"),
        ("filecache::gs://bucket/a", "chain"),
        ("gs:/bucket/a", "lost a slash"),
        (Path("gs://bucket/a"), "lost a slash"),
    ],
)
def test_what_is_no_place_is_refused(given, said):
    with pytest.raises(RequestError, match=said):
        urls.locate(given)


def test_a_url_that_pathlib_folded_is_given_back_whole():
    with pytest.raises(RequestError) as error:
        urls.locate(Path("gs://bucket/a"))
    assert "'gs://bucket/a' as a str" in notes(error)


@given(SCHEME, st.lists(SEGMENT, min_size=1, max_size=5))
def test_locating_is_idempotent_and_joining_undoes_splitting(scheme, segments):
    url = urls.locate(f"{scheme}://{'//'.join(segments)}/")
    assert urls.locate(url) == url
    assert urls.parts(url) == (scheme, *segments)
    if len(segments) > 1:
        root, name = urls.split(url)
        assert (urls.join(root, name), name) == (url, segments[-1])
        assert urls.locate(root) == root


@given(st.lists(SEGMENT, max_size=5))
def test_local_paths_come_back_as_they_were(segments):
    path = "/" + "/".join(segments)
    url = urls.locate(path)
    assert urls.local_path(url) == os.path.normpath(path)
    assert urls.locate(url) == url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file:///7", ("file:///", "7")),
        ("file:///a/7", ("file:///a", "7")),
        ("gs://bucket/7", ("gs://bucket", "7")),
        ("memory:///7", ("memory:///", "7")),
    ],
)
def test_a_url_divides_into_root_and_name(url, expected):
    assert urls.split(url) == expected
    assert urls.join(*expected) == url


@pytest.mark.parametrize("url", ["file:///", "gs://bucket", "memory:///"])
def test_a_root_is_no_checkpoint(url):
    with pytest.raises(RequestError, match="it is a root") as error:
        urls.split(url)
    assert notes(error) == "name a checkpoint below it"


def test_only_file_urls_have_a_local_path():
    assert urls.local_path("file:///") == "/"
    with pytest.raises(RequestError, match="'gs'"):
        urls.local_path("gs://bucket/a")
    assert urls.scheme("gs://bucket/a") == "gs"
