"""Steps are named and found as the reference names and finds them, on directories of every kind.

Where the two differ on purpose, the difference is asserted, so that it is known when it goes away.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milepost.path import step as ours
from orbax.checkpoint.path import step as theirs

NUMBERS = st.sampled_from(["0", "1", "2", "3", "10", "12345", "02", "003", "0010", "00000", "-1", "-001", "1_0", "1.5"])
PREFIXES = st.sampled_from([None, "", "ckpt", "a_b", "a"])
SUFFIXES = st.sampled_from(["", "", "", "", ".orbax-checkpoint-tmp", ".orbax-checkpoint-tmp-0", ".other"])
NAMES = st.builds(
    lambda prefix, number, suffix: ours.step_prefix_with_underscore(prefix) + number + suffix,
    PREFIXES,
    NUMBERS,
    SUFFIXES,
) | st.sampled_from(["abc", "metrics", ".hidden", "ckpt_", "ckpt", "_"])
KINDS = st.sampled_from(["folder", "folder", "folder", "file", "link", "dangling"])
LISTINGS = st.dictionaries(NAMES, KINDS, max_size=12)
FORMATS = st.tuples(PREFIXES, st.sampled_from([None, 0, 1, 3, 4, 5]))
SETTINGS = settings(deadline=None, max_examples=60)


@contextlib.contextmanager
def directory(listing):
    with tempfile.TemporaryDirectory() as made:
        root = pathlib.Path(made, "root")
        elsewhere = pathlib.Path(made, "elsewhere")
        for path in (root, elsewhere):
            path.mkdir()
        for name, kind in listing.items():
            if kind == "folder":
                (root / name).mkdir()
            elif kind == "file":
                (root / name).touch()
            elif ".orbax-checkpoint-tmp" in name:
                (root / name).mkdir()  # nobody writes into a link; the reference takes such a one for no directory
            else:
                (root / name).symlink_to(elsewhere if kind == "link" else elsewhere / "nothing")
        yield root


def formats(module, form):
    prefix, length = form
    return module.standard_name_format(step_prefix=prefix, step_format_fixed_length=length)


def composite(module, forms):
    parts = [formats(module, form) for form in forms]
    return module.composite_name_format(parts[0], parts)


def shown(metadata):
    return None if metadata is None else (metadata.step, str(metadata.path))


def outcome(act):
    """Return what a call gives, or that it raises a `ValueError`."""
    try:
        return act()
    except ValueError:
        return ValueError


@SETTINGS
@given(LISTINGS, FORMATS)
def test_one_format_finds_the_same(listing, form):
    with directory(listing) as root:
        mine, reference = formats(ours, form), formats(theirs, form)
        assert sorted(map(shown, mine.find_all(root))) == sorted(map(shown, reference.find_all(root)))
        assert shown(ours.latest_step_metadata(root, mine)) == shown(theirs.latest_step_metadata(root, reference))
        for number in (0, 1, 2, 3, 10, 12345, 77):
            assert outcome(lambda number=number: shown(mine.find_step(root, number))) == outcome(
                lambda number=number: shown(reference.find_step(root, number))
            )
            assert shown(ours.maybe_find_step_metadata(root, mine, step=number)) == shown(
                theirs.maybe_find_step_metadata(root, reference, step=number)
            )
            assert str(ours.build_step_path(root, mine, number)) == str(theirs.build_step_path(root, reference, number))


@SETTINGS
@given(LISTINGS, FORMATS)
def test_the_step_of_a_path_is_the_same(listing, form):
    with directory(listing) as root:
        mine, reference = formats(ours, form), formats(theirs, form)
        for name in (*listing, "missing"):
            assert outcome(lambda name=name: shown(ours.step_metadata_of_checkpoint_path(root / name, mine))) == (
                outcome(lambda name=name: shown(theirs.step_metadata_of_checkpoint_path(root / name, reference)))
            )


@SETTINGS
@given(LISTINGS, st.lists(FORMATS, min_size=1, max_size=3))
def test_several_formats_find_the_same_steps(listing, forms):
    with directory(listing) as root:
        mine, reference = composite(ours, forms), composite(theirs, forms)
        found = list(mine.find_all(root))
        every = list(reference.find_all(root))
        assert {metadata.step for metadata in found} == {metadata.step for metadata in every}
        # The reference yields a step once for each of its names; here it is one step.
        assert len(found) == len({metadata.step for metadata in every})
        assert set(map(shown, found)) <= set(map(shown, every))
        for metadata in found:
            assert shown(metadata) == shown(mine.find_step(root, metadata.step))
            assert shown(metadata) == shown(reference.find_step(root, metadata.step))
        latest, theirs_latest = ours.latest_step_metadata(root, mine), theirs.latest_step_metadata(root, reference)
        assert (latest and latest.step) == (theirs_latest and theirs_latest.step)
        assert mine.build_name(7) == reference.build_name(7)
        assert outcome(lambda: shown(mine.find_step(root, 77))) == outcome(lambda: shown(reference.find_step(root, 77)))


@SETTINGS
@given(LISTINGS)
def test_the_helpers_find_the_same(listing):
    with directory(listing) as root:
        mine, reference = ours.checkpoint_steps_paths(root), theirs.checkpoint_steps_paths(root)
        assert sorted(map(str, mine)) == sorted(map(str, reference))
        assert ours.tmp_checkpoints(root) == sorted(theirs.tmp_checkpoints(root))
        assert sorted((str(one.get()), str(one.get_final())) for one in ours.all_temporary_paths(root)) == sorted(
            (str(one.get()), str(one.get_final())) for one in theirs.all_temporary_paths(root)
        )
        unprefixed = {path.name for path in mine if path.name.rpartition("_")[:2] == ("", "_")}
        if unprefixed:
            # The reference names a step so, and then raises when it counts its steps.
            with pytest.raises(ValueError, match="Unrecognized name format"):
                theirs.checkpoint_steps(root)
        else:
            assert ours.checkpoint_steps(root) == sorted(theirs.checkpoint_steps(root))
        steps = ours.checkpoint_steps(root)
        assert ours.any_checkpoint_step(root) in (steps or [None])
        for name, kind in listing.items():
            assert ours.is_tmp_checkpoint(root / name) == theirs.is_tmp_checkpoint(root / name)
            assert ours.is_path_temporary(root / name) == theirs.is_path_temporary(root / name)
            assert ours.is_path_finalized(root / name) == theirs.is_path_finalized(root / name)
            if kind in {"folder", "link"}:
                assert ours.is_checkpoint_finalized(root / name) == theirs.is_checkpoint_finalized(root / name)


@SETTINGS
@given(LISTINGS, FORMATS, st.sampled_from([0, 1, 2, 3, 10]))
def test_unfinished_steps_are_found_the_same(listing, form, number):
    with directory(listing) as root:
        mine, reference = formats(ours, form), formats(theirs, form)
        found, expected = (
            outcome(
                lambda module=module, name_format=name_format: str(
                    module.find_step_path(root, name_format, step=number, include_uncommitted=True)
                )
            )
            for module, name_format in ((ours, mine), (theirs, reference))
        )
        unfinished = [name for name in listing if name.partition(".")[0] == mine.build_name(number)]
        if len([name for name in unfinished if "tmp" in name and listing[name] in {"folder", "link"}]) < 2:
            assert expected == found
        else:
            assert {pathlib.Path(found).name, pathlib.Path(expected).name} <= set(unfinished)


@given(NAMES)
def test_the_step_of_a_name_is_the_same(name):
    assert outcome(lambda: theirs.step_from_checkpoint_name(name)) == outcome(
        lambda: ours.step_from_checkpoint_name(name)
    )


@given(FORMATS, st.integers(-(10**6), 10**12))
def test_a_step_has_the_same_name(form, number):
    assert formats(theirs, form).build_name(number) == formats(ours, form).build_name(number)
    assert str(formats(theirs, form)) == str(formats(ours, form))


@given(st.lists(FORMATS, min_size=1, max_size=3))
def test_several_formats_are_shown_the_same(forms):
    assert str(composite(theirs, forms)) == str(composite(ours, forms))


@given(
    st.sampled_from(["/x", "x", None]),
    st.sampled_from([None, "params"]),
    PREFIXES,
    st.sampled_from([None, "/y"]),
    st.sampled_from([None, 4]),
)
def test_the_directory_of_an_item_is_the_same(directory, name, prefix, override, length):
    arguments = (7, directory, name, prefix, override, length)
    assert outcome(lambda: str(theirs.get_save_directory(*arguments))) == outcome(
        lambda: str(ours.get_save_directory(*arguments))
    )


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "{}",
        '{"init_timestamp_nsecs": 5, "commit_timestamp_nsecs": 1500000000123456789}',
        '{"init_timestamp_nsecs": 5, "commit_timestamp_nsecs": null}',
    ],
)
def test_timestamps_are_the_same(tmp_path, text):
    if text is not None:
        (tmp_path / "_CHECKPOINT_METADATA").write_text(text)
    os.utime(tmp_path, (1, 1_600_000_000))  # the reference tells whole seconds only
    mine, reference = ours.Metadata(7, tmp_path), theirs.Metadata(7, theirs.epath.Path(tmp_path))
    assert reference.init_timestamp_nsecs == mine.init_timestamp_nsecs
    assert reference.commit_timestamp_nsecs == mine.commit_timestamp_nsecs
    assert reference.commit_timestamp == mine.commit_timestamp


def test_where_the_document_and_the_release_differ_the_document_holds(tmp_path):
    assert not theirs.is_checkpoint_finalized(theirs.epath.Path(tmp_path, "missing"))
    with pytest.raises(ValueError, match="nothing is there"):
        ours.is_checkpoint_finalized(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        ours.any_checkpoint_step(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        theirs.any_checkpoint_step(theirs.epath.Path(tmp_path, "missing"))


def test_digits_are_ascii_and_a_prefix_means_itself(tmp_path):
    for name in ("1٣", "ab_3", ".*_4"):
        (tmp_path / name).mkdir()
    wild = {"step_prefix": ".*"}
    assert [metadata.step for metadata in theirs.standard_name_format().find_all(tmp_path)] == [13]
    assert [metadata.step for metadata in ours.standard_name_format().find_all(tmp_path)] == []
    assert [metadata.step for metadata in theirs.standard_name_format(**wild).find_all(tmp_path)] == [4]
    assert [metadata.step for metadata in ours.standard_name_format(**wild).find_all(tmp_path)] == [4]
