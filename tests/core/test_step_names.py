"""What names say, before any storage is looked at."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milepost.attempts import new_attempt
from milepost.errors import ConfigError, RequestError
from milepost.names import StandardNames, any_step, is_temporary, parse_temporary, step_of, temporary_name
from milepost.path import step
from milepost.path.step import (
    Metadata,
    NameFormat,
    build_step_metadatas,
    build_step_path,
    composite_name_format,
    get_save_directory,
    is_gcs_path,
    is_standard_name_format,
    single_host_load_and_broadcast_name_format,
    standard_name_format,
    step_from_checkpoint_name,
    step_prefix_with_underscore,
)
from milepost.v1 import path as v1_path
from milepost.v1.path import step as v1_step
from upath import UPath

PREFIXES = st.none() | st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), max_size=8)
LENGTHS = st.none() | st.integers(0, 12)
STEPS = st.integers(0, 10**15)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "length", "number", "name"),
    [
        (None, None, 23, "23"),
        (None, 4, 23, "0023"),
        ("step", None, 23, "step_23"),
        ("step", 4, 23, "step_0023"),
        ("", None, 3, "_3"),
        (None, 4, 123456, "123456"),
        (None, 0, 3, "3"),
        (None, None, -1, "-1"),
        (None, 4, -1, "-001"),
        (None, 2, np.int64(7), "07"),
    ],
)
def test_a_step_has_the_documented_name(prefix, length, number, name):
    assert name == standard_name_format(prefix, length).build_name(number)


def test_a_step_is_a_whole_number():
    with pytest.raises(TypeError):
        standard_name_format().build_name(3.0)


@given(PREFIXES, LENGTHS, STEPS)
def test_a_format_reads_the_names_it_writes(prefix, length, number):
    names = StandardNames(prefix, length)
    assert number == names.parse(names.build_name(number))


@given(PREFIXES, LENGTHS, st.from_regex(r"\A[a-z_]{0,3}[0-9]{0,6}\Z") | st.text(max_size=6))
def test_a_format_reads_no_name_that_it_does_not_write(prefix, length, name):
    names = StandardNames(prefix, length)
    number = names.parse(name)
    assert number is None or name == names.build_name(number)


@given(PREFIXES, STEPS)
def test_any_standard_name_is_a_step_of_some_format(prefix, number):
    assert number == any_step(StandardNames(prefix).build_name(number))


@pytest.mark.parametrize(
    "name", ["", "-1", "+1", " 1", "1 ", "1\n", "1_0", "٣", "²", "abc", "1.0", "1e3", "0x1", "007"]
)
def test_only_plain_digits_without_padding_are_a_number(name):
    assert StandardNames().parse(name) is None


def test_a_prefix_means_itself():
    names = StandardNames(".*", None)
    assert names.parse(".*_3") == 3
    assert names.parse("ab_3") is None


@pytest.mark.parametrize("names", [StandardNames(), StandardNames(None, 3)])
def test_a_number_that_python_would_not_read_is_no_step(names):
    assert names.parse("9" * 5000) is None
    assert any_step("9" * 5000) is None
    with pytest.raises(ValueError, match="no step can be told"):
        step_from_checkpoint_name("9" * 5000)


@pytest.mark.parametrize("prefix", ["a/b", "a\0", "x.orbax-checkpoint-tmp"])
def test_a_prefix_that_could_never_be_found_again_is_refused(prefix):
    with pytest.raises(ConfigError, match="no step can be named"):
        standard_name_format(prefix)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("5", 5),
        ("0010", 10),
        ("a_5", 5),
        ("a_b_5", 5),
        ("5.orbax-checkpoint-tmp", 5),
        ("_5.orbax-checkpoint-tmp", 5),
        ("x5.orbax-checkpoint-tmp-1", 5),
        ("a_b_7.orbax-checkpoint-tmp-17", 7),
        ("ckpt_12.orbax-checkpoint-tmp-20261122T160000Z-0badcafe-1f-0123456789ab", 12),
    ],
)
def test_the_step_of_a_name(name, number):
    assert number == step_from_checkpoint_name(name)


@pytest.mark.parametrize(
    "name", ["", "abc", "5_", "_5", "-5", "a_-5", "ckpt-5", "5.other", "٣", "abc.orbax-checkpoint-tmp-3"]
)
def test_a_name_without_a_step(name):
    with pytest.raises(ValueError, match="no step can be told from") as caught:
        step_from_checkpoint_name(name)
    assert isinstance(caught.value, RequestError)
    assert step_of(name) is None


# --- names of what is not finished -----------------------------------------------------------------------------------


@given(st.from_regex(r"\A[a-z_]{0,5}[0-9]{1,6}\Z"), st.sampled_from(["strategy", "caller", "reference"]))
def test_a_temporary_name_tells_what_it_is_for_and_who_made_it(final, maker):
    attempt = "" if maker == "reference" else new_attempt()
    infix = ".orbax-checkpoint-tmp"
    name = {
        "strategy": f"{final}{infix}-{attempt}",
        "caller": temporary_name(final, attempt),
        "reference": f"{final}{infix}-17",
    }[maker]
    found = parse_temporary(name)
    assert (final, maker, attempt) == (found.final, found.maker, found.attempt)
    assert is_temporary(name)
    assert parse_temporary(final) is None


@pytest.mark.parametrize("rest", ["late", "-x", "-1.backup", "-made-", ".old"])
def test_who_made_other_temporary_names_is_not_known(rest):
    assert parse_temporary(f"7.orbax-checkpoint-tmp{rest}").maker is None


def test_what_was_put_aside_is_told_from_what_is_written():
    attempt = new_attempt()
    ended = [parse_temporary(f"7.orbax-checkpoint-tmp-{attempt}{end}").ended for end in ("", ".old", ".deleted")]
    assert ended == [False, True, True]


# --- formats ---------------------------------------------------------------------------------------------------------


def test_formats_are_values():
    assert standard_name_format("a", 4) == standard_name_format(step_prefix="a", step_format_fixed_length=4)
    assert standard_name_format("a") != standard_name_format("b")
    assert len({standard_name_format(), standard_name_format(), standard_name_format("")}) == 2
    both = composite_name_format(standard_name_format(), [standard_name_format(), standard_name_format("a")])
    assert both == pickle.loads(pickle.dumps(both))  # noqa: S301 - made here
    assert both == copy.deepcopy(both)
    assert is_standard_name_format(standard_name_format())
    assert not is_standard_name_format(both)
    assert single_host_load_and_broadcast_name_format(both) == both
    assert standard_name_format(single_host_load_and_broadcast=True) == standard_name_format()


def test_the_face_v1_has_the_same_formats():
    assert v1_step.standard_name_format(step_prefix="a", step_format_fixed_length=3) == standard_name_format("a", 3)
    with pytest.raises(TypeError):
        v1_step.standard_name_format("a")
    assert v1_step.NameFormat is NameFormat
    assert v1_path.Path is UPath


def test_the_format_for_writing_must_be_one_for_reading():
    with pytest.raises(ValueError, match="cannot write names by"):
        composite_name_format(standard_name_format("a"), [standard_name_format()])


@pytest.mark.parametrize("missing", ["build_name", "build_metadata", "find_metadata"])
def test_a_format_must_have_what_the_protocol_asks_for(missing):
    body = {"build_name": str, "build_metadata": lambda *_: None, "find_metadata": lambda *_: None}
    assert isinstance(type("Whole", (NameFormat,), body)(), NameFormat)
    partial = type("Partial", (NameFormat,), {name: value for name, value in body.items() if name != missing})
    with pytest.raises(TypeError, match=missing):
        partial()


def test_the_prefix_stands_before_an_underscore():
    assert [step_prefix_with_underscore(prefix) for prefix in (None, "", "a")] == ["", "_", "a_"]


# --- metadata --------------------------------------------------------------------------------------------------------


def test_metadata_is_a_frozen_value():
    metadata = Metadata(2, UPath("/nowhere/2"))
    assert metadata == Metadata(step=2, path=UPath("/nowhere/2"))
    assert hash(metadata) == hash(Metadata(2, UPath("/nowhere/2")))
    assert metadata != Metadata(3, metadata.path)
    assert metadata != Metadata(2, UPath("/elsewhere/2"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        metadata.step = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        del metadata.path


def test_metadata_are_built_lazily_in_order_and_without_none():
    asked = []

    def build(path):
        asked.append(path.name)
        return Metadata(int(path.name), path) if path.name.isdigit() else None

    built = build_step_metadatas((UPath("/x", name) for name in ("3", "a", "1", "b", "2")), build)
    assert asked == []
    assert next(built).step == 3
    assert asked == ["3"]
    assert [metadata.step for metadata in built] == [1, 2]


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("/runs", "/runs/a_07"),
        ("runs", "runs/a_07"),
        (pathlib.PurePosixPath("/runs/"), "/runs/a_07"),
        ("file:///runs", "/runs/a_07"),
        ("memory://b//runs/", "memory://b/runs/a_07"),
        (UPath("memory://b/runs"), "memory://b/runs/a_07"),
    ],
)
def test_the_path_of_a_step(base, path):
    built = build_step_path(base, standard_name_format("a", 2), 7)
    assert isinstance(built, UPath)
    assert path == str(built)


def test_the_directory_of_an_item():
    assert get_save_directory(7, "/x") == UPath("/x/7")
    assert get_save_directory(7, "/x", "params", "a", step_format_fixed_length=3) == UPath("/x/a_007/params")
    assert get_save_directory(7, "/x", "params", "a", "/y", 3) == UPath("/y/params")
    assert get_save_directory(7, "/x", step_prefix="a", step_name_format=standard_name_format("b")) == UPath("/x/b_7")


@pytest.mark.parametrize("override", [None, "/y"])
def test_the_directory_of_an_item_needs_a_root(override):
    with pytest.raises(ValueError, match="the directory is None"):
        get_save_directory(7, None, override_directory=override)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("gs://b/x", True), (UPath("memory://b/x"), False), ("s3://b/x", False), ("/gs/x", False), ("gs", False)],
)
def test_which_path_is_of_google_cloud_storage(path, expected):
    assert expected == is_gcs_path(path)


def test_every_name_is_exported():
    assert [name for name in step.__all__ if not hasattr(step, name)] == []
