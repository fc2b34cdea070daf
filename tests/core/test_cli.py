from __future__ import annotations

import datetime as dt
import inspect
import json
import os
import re
import subprocess
import sys

import milepost
import numpy as np
import pytest
from core.fake_packages import Site
from milepost import cli
from milepost import plugins as plugins_module
from milepost.attempts import new_attempt
from typer.testing import CliRunner

TREE = {
    "params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.int8)},
    "step": 7,
    "empty": {},
    "none": None,
    "name": "adam",
}
DEAD = "20010101T000000Z-0badcafe-1f-0123456789ab"


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    for name in ("MILEPOST_CONFIG", "MILEPOST_TOML", "MILEPOST_DISABLE_PLUGINS", "MILEPOST_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(tmp_path):
    milepost.save(tmp_path / "runs/7", TREE, custom_metadata={"loss": 0.5})
    milepost.save(tmp_path / "runs/10", {"x": np.ones(3)}, checkpointable_name="other")
    return tmp_path / "runs"


def run(*arguments):
    return CliRunner().invoke(cli.app(), list(map(str, arguments)))


def document(*arguments, code=0):
    done = run(*arguments, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def process(*arguments, prelude="", **environment):
    start = "sys.argv[0] = 'milepost'\nfrom milepost.__main__ import main\nsys.exit(main())"
    code = f"import sys\n{prelude}\n{start}"
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def flip(folder):
    (file,) = folder.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[data.index(np.arange(6, dtype=np.float32).tobytes()) + 7] ^= 1
    file.write_bytes(data)
    return file.relative_to(folder).as_posix()


# --- ls --------------------------------------------------------------------------------------------------------------


def test_ls_lists_checkpoints_in_numeric_order_with_what_matters(runs):
    first, second = document("ls", runs)["checkpoints"]
    assert (first["name"], second["name"]) == ("7", "10")
    assert (first["items"], first["leaves"]) == (["state"], 4)
    assert first["bytes"] == sum(file.stat().st_size for file in (runs / "7").rglob("*.safetensors"))
    committed = dt.datetime.fromisoformat(first["committed"])
    assert abs(dt.datetime.now(dt.UTC) - committed) < dt.timedelta(hours=1)
    assert re.search(r"^7 +\S+Z +.* 4 +state$", run("ls", runs).stdout, re.MULTILINE)


def test_ls_shows_a_checkpoint_that_cannot_be_read_beside_the_others(runs):
    (runs / "10/commit_success.txt").write_bytes(b'{"format":"milepost"')
    done = run("ls", runs)
    assert done.exit_code == 1
    assert re.search(r"^10 +unreadable .*manifest", done.stdout, re.MULTILINE)
    assert re.search(r"^7 +20", done.stdout, re.MULTILINE)
    assert "manifest" in document("ls", runs, code=1)["checkpoints"][1]["error"]


def test_ls_shows_leftovers_only_when_asked(runs):
    left = f"9.orbax-checkpoint-tmp-{DEAD}"
    (runs / left).mkdir()
    assert left not in run("ls", runs).stdout
    assert "leftovers" not in document("ls", runs)
    (found,) = document("ls", runs, "--all")["leftovers"]
    assert (found["prefix"], found["name"], found["dead"]) == (f"{left}/", "9", True)


def test_ls_of_nothing_is_wrong_use_and_of_a_folder_without_checkpoints_an_empty_list(tmp_path):
    done = run("ls", tmp_path / "absent")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("milepost: cannot list ")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    assert document("ls", tmp_path / "other")["checkpoints"] == []


# --- show ------------------------------------------------------------------------------------------------------------


def test_show_computes_bytes_from_shapes_and_names_every_leaf(runs):
    shown = document("show", runs / "7")
    leaves = {leaf["path"]: leaf for leaf in shown["items"]["state"]["leaves"]}
    assert set(leaves) == {"['params']['w']", "['params']['b']", "['step']", "['name']"}
    w = leaves["['params']['w']"]["arrays"][""]
    assert (w["shape"], w["dtype"], w["bytes"]) == ([2, 3], "float32", 24)
    assert shown["items"]["state"]["bytes"] == 28
    assert shown["custom_metadata"] == {"loss": 0.5}
    assert shown["written_by"]["milepost"] == milepost.__version__


def test_show_prints_the_tree(runs):
    text = run("show", runs / "7").stdout
    for line in (
        r"^ +\['w'\] +float32\[2, 3\] +24 B +np\.ndarray$",
        r"^ +\['empty'\] +dict \{\}, empty$",
        r"^ +\['none'\] +None$",
        r"^ +\['step'\] +7 +int$",
        r"^ +\['name'\] +'adam' +str$",
        r"^ +written by +milepost ",
        r"^ +metadata +\{'loss': 0\.5\}$",
        r"^ +state/arrays\S+ +.* xxh3_64:[0-9a-f]{16}$",
    ):
        assert re.search(line, text, re.MULTILINE), line


def test_show_shows_saved_shardings_and_kinds_of_containers(tmp_path):
    import collections

    import jax
    import jax.numpy as jnp

    pair = collections.namedtuple("pair", "left right")  # noqa: PYI024 - made here, and gone when it is shown
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tree = pair(jax.device_put(jnp.ones(4), sharding), [jnp.zeros(2, jnp.bfloat16), jax.random.key(0)])
    milepost.save(tmp_path / "7", tree)
    text = run("show", tmp_path / "7").stdout
    assert re.search(r"<root> +pair$", text, re.MULTILINE)
    assert re.search(r"\.left +float32\[4\] +16 B +jax\.Array +P\('data'\) on 1 cpu$", text, re.MULTILINE)
    assert re.search(r"\[0\] +bfloat16\[2\] +4 B +jax\.Array +cpu:0$", text, re.MULTILINE)
    assert re.search(r"\[1\] +key<\w+>\[\] ", text, re.MULTILINE)


def test_thousands_of_leaves_are_cut_off_plainly_and_never_in_json(tmp_path):
    milepost.save(tmp_path / "7", {f"layer{at:04}": at for at in range(3000)})
    done = run("show", tmp_path / "7", "--max-leaves", 10)
    assert "layer0009" in done.stdout
    assert "layer0010" not in done.stdout
    assert "and 2,990 more leaves" in done.stdout
    assert "layer2999" in run("show", tmp_path / "7", "--max-leaves", 0).stdout
    assert len(document("show", tmp_path / "7", "--max-leaves", "10")["items"]["state"]["leaves"]) == 3000


def test_show_takes_an_item_by_name(runs):
    assert list(document("show", runs / "10", "--item", "other")["items"]) == ["other"]
    done = run("show", runs / "10", "--item", "state")
    assert done.exit_code == 2
    assert "'other'" in done.stderr


def test_no_name_can_command_the_terminal(tmp_path):
    milepost.save(tmp_path / "7", {"a\x1b[31m": 1}, custom_metadata={"\x1b]0;title\x07": "[bold]\x1b[2J"})
    text = run("show", tmp_path / "7").stdout
    assert [one for one in text if not one.isprintable() and one != "\n"] == []
    assert "[bold]" in text


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_of_a_root_verifies_all_checkpoints_below_it(runs):
    checkpoints = document("verify", runs)["checkpoints"]
    assert [(one["url"].rpartition("/")[2], one["state"]) for one in checkpoints] == [("7", "intact"), ("10", "intact")]
    assert run("verify", runs).stdout.count("intact: file://") == 2


def test_a_damaged_byte_is_found_and_file_and_leaf_are_named(runs):
    path = flip(runs / "7")
    done = run("verify", runs)
    assert done.exit_code == 1
    assert f"{path}: its bytes are not those that were saved" in done.stdout
    assert "leaf ['params']['w'] of item 'state'" in done.stdout
    assert "['params']['b']" not in done.stdout
    assert f"intact: {(runs / '10').as_uri()}" in done.stdout
    damaged, intact = document("verify", runs / "7", runs / "10", code=1)["checkpoints"]
    assert damaged["files"][0]["leaves"] == [{"item": "state", "path": "['params']['w']"}]
    assert (damaged["state"], intact["state"]) == ("damaged", "intact")


@pytest.mark.parametrize("remove", [True, False])
def test_a_file_deleted_or_cut_short_is_bad_news(runs, remove):
    (file,) = (runs / "7").rglob("*.safetensors")
    if remove:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])
    done = run("verify", runs / "7")
    assert done.exit_code == 1
    assert ("it is missing" in done.stdout) == remove
    assert "leaf ['params']['w'] of item 'state'" in done.stdout


def test_a_damaged_manifest_is_bad_news(runs):
    commit = runs / "7/commit_success.txt"
    commit.write_bytes(commit.read_bytes().replace(b"float32", b"float64"))
    assert document("verify", runs / "7", code=1)["checkpoints"][0]["error"]["error"] == "ManifestError"
    assert run("verify", runs).exit_code == 1
    assert run("show", runs / "7").exit_code == 1


def test_a_newer_format_is_not_called_damaged(runs):
    commit = runs / "7/commit_success.txt"
    body = commit.read_text()
    assert '"version":1' in body
    commit.write_text(body.replace('"version":1', '"version":99'))
    done = run("verify", runs / "7")
    assert done.exit_code == 3
    assert "pip install --upgrade milepost" in done.stdout


def test_damage_outweighs_what_is_not_there(runs, tmp_path):
    assert run("verify", tmp_path / "absent").exit_code == 2
    flip(runs / "7")
    assert run("verify", tmp_path / "absent", runs / "7").exit_code == 1


def test_a_checkpoint_overwritten_while_it_is_read_is_read_again(runs, monkeypatch):
    from milepost.cli import verdicts

    flip(runs / "7")
    read = verdicts.verify_files
    tries = []

    def overwritten_after_the_first(checkpoint, **options):
        reports = list(read(checkpoint, **options))
        if not tries:
            milepost.save(runs / "7", TREE, overwrite=True)
        tries.append([report.problem is None for report in reports])
        return reports

    monkeypatch.setattr(verdicts, "verify_files", overwritten_after_the_first)
    assert document("verify", runs / "7")["checkpoints"][0]["state"] == "intact"
    assert tries == [[False], [True]]


def test_a_terminal_gets_a_progress_bar_and_nobody_else(runs):
    import pty

    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "milepost", "verify", str(runs), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, check=False)
    os.close(terminal)
    assert done.returncode == 0
    assert len(json.loads(done.stdout)["checkpoints"]) == 2
    assert b"10" in os.read(main, 1 << 16)
    os.close(main)
    assert process("verify", runs).stderr == ""


def test_a_stranger_in_a_checkpoint_is_a_note_and_no_error(runs):
    (runs / "7/mine.txt").write_text("")
    done = run("verify", runs / "7")
    assert done.exit_code == 0
    assert "note: mine.txt is not in the manifest" in done.stdout


# --- explain, plugins ------------------------------------------------------------------------------------------------


def test_explain_says_who_chose_each_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("MILEPOST_TOML", f'[url."{tmp_path}/runs"]\nthreads = 3\n')
    found = document("explain", tmp_path / "runs/7")
    assert found["settings"]["threads"]["value"] == 3
    assert "MILEPOST_TOML" in found["settings"]["threads"]["origin"]
    assert found["settings"]["commit"]["value"] == "rename"
    text = run("explain", tmp_path / "runs/7").stdout
    assert f"promise: {found['commit_promise']}" in text
    assert re.search(r"^ +threads +3 +.*MILEPOST_TOML", text, re.MULTILINE)


def test_explain_of_what_cannot_work_is_bad_news_with_the_way_out():
    done = run("explain", "nosuch://bucket/7")
    assert done.exit_code == 1
    assert "nosuch" in document("explain", "nosuch://bucket/7", code=1)["problems"][0]


@pytest.fixture
def site(tmp_path, monkeypatch):
    site = Site(tmp_path / "site")
    site.folder.mkdir()
    yield site
    site.forget()


def test_plugins_shows_what_is_broken_and_why(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site.folder))
    site.install("bad-package", {"milepost.storage": {"bad": "bad_module"}}, {"bad_module": "import no_such_thing"})
    plugins_module.installed.cache_clear()
    try:
        done = run("plugins")
        listed = {(one["group"], one["name"]): one for one in document("plugins", code=1)["plugins"]}
    finally:
        plugins_module.installed.cache_clear()
    assert done.exit_code == 1
    assert "no_such_thing" in done.stdout
    assert listed["milepost.storage", "bad"]["state"] == "broken"
    assert listed["milepost.storage", "file"]["state"] == "fine"
    assert listed["milepost.storage", "file"]["distribution"] == "milepost-posix"


def test_the_packages_of_this_project_are_in_order():
    done = process("plugins", "--json")
    assert done.returncode == 0, done.stdout
    assert {one["state"] for one in json.loads(done.stdout)["plugins"]} == {"fine"}


def test_plugins_shows_what_is_switched_off():
    done = process("plugins", "--json", MILEPOST_DISABLE_PLUGINS="safetensors")
    states = {one["name"]: one["state"] for one in json.loads(done.stdout)["plugins"]}
    assert states["safetensors"] == "switched off"


# --- sweep -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def littered(runs):
    for attempt in (DEAD, new_attempt()):
        folder = runs / f"9.orbax-checkpoint-tmp-{attempt}"
        folder.mkdir()
        (folder / "part").write_bytes(b"half")
    return runs


def staged(runs):
    return sorted(path.name for path in runs.iterdir() if "orbax-checkpoint-tmp" in path.name)


def test_sweep_changes_nothing_unless_told_to(littered):
    before = staged(littered)
    done = run("sweep", littered)
    assert done.exit_code == 0
    assert "nothing was removed" in done.stdout
    assert before == staged(littered)
    found = document("sweep", littered)
    assert found["dry_run"]
    assert sorted(one["dead"] for one in found["leftovers"]) == [False, True]
    assert not any(one["removed"] for one in found["leftovers"])


def test_sweep_removes_what_is_dead_and_keeps_what_may_live(littered):
    found = document("sweep", littered, "--yes")["leftovers"]
    assert {one["attempt"]: one["removed"] for one in found}[DEAD]
    (kept,) = staged(littered)
    assert DEAD not in kept
    assert run("verify", littered).exit_code == 0


def test_sweep_takes_ages_as_people_write_them(littered):
    assert document("sweep", littered, "--older-than", "1.5h")["older_than_seconds"] == 5400
    assert document("sweep", littered)["older_than_seconds"] == 86400
    done = run("sweep", littered, "--older-than", "soon")
    assert done.exit_code == 2
    assert "soon" in done.stderr


# --- ends ------------------------------------------------------------------------------------------------------------


def test_errors_go_to_stderr_without_a_traceback_and_with_their_notes(runs):
    done = process("show", runs / "8")
    assert (done.returncode, done.stdout) == (2, "")
    first, *notes = done.stderr.splitlines()
    assert first == f"milepost: cannot open {(runs / '8').as_uri()!r}: nothing is there"
    assert any("near by" in note for note in notes)


def test_errors_are_json_on_stderr_with_json(runs):
    done = process("show", runs / "8", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    said = json.loads(done.stderr)
    assert said["error"] == "CheckpointNotFoundError"
    assert said["notes"]


def test_a_traceback_is_printed_when_asked_for(runs):
    for done in (process("show", runs / "8", "--traceback"), process("show", runs / "8", MILEPOST_TRACEBACK="1")):
        assert done.returncode == 2
        assert "Traceback (most recent call last)" in done.stderr


def test_a_command_nobody_knows_is_wrong_use():
    assert process("lst").returncode == 2
    assert run().exit_code == 2


def test_a_storage_that_refuses_is_trouble(runs):
    refuse = """
import milepost_posix.storage as posix
from milepost.errors import StorageDeniedError
def read(self, key, start=0, stop=None): raise StorageDeniedError(f"cannot read {key!r}: permission denied")
posix.PosixStorage.read = read
"""
    done = process("show", runs / "7", prelude=refuse)
    assert done.returncode == 3
    assert "permission denied" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    milepost.save(tmp_path / "7", {f"layer{at:05}": at for at in range(20000)})
    command = [sys.executable, "-m", "milepost", "show", str(tmp_path / "7"), "--max-leaves", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        started.stdout.readline()
        started.stdout.close()
        complaint = started.stderr.read()
    assert (started.returncode, complaint) == (0, b"")


@pytest.mark.parametrize(
    "arguments",
    [("ls", "--all"), ("show",), ("verify",), ("explain",), ("plugins",), ("sweep",), ("verify", "--json")],
    ids=" ".join,
)
def test_no_command_needs_jax(runs, arguments):
    block = "sys.modules['jax'] = sys.modules['jaxlib'] = None"
    command, *options = arguments
    path = {"ls": [runs], "sweep": [runs], "plugins": []}.get(command, [runs / "7"])
    done = process(command, *path, *options, prelude=block)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_packages_the_command_line_says_how_to_get_them(missing):
    done = process("ls", ".", prelude=f"sys.modules[{missing!r}] = None")
    assert done.returncode == 2
    assert done.stdout == ""
    assert 'pip install "milepost[cli]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_json_costs_no_rich(runs):
    watch = "import atexit\natexit.register(lambda: print('rich.console' in sys.modules, file=sys.stderr))"
    done = process("ls", runs, "--json", prelude=watch)
    assert (done.returncode, done.stderr) == (0, "False\n")


def test_every_command_has_help_and_the_same_two_options():
    for command in cli.app().registered_commands:
        assert inspect.getdoc(command.callback)
        assert {"as_json", "show_traceback"} <= set(inspect.signature(command.callback).parameters)
        done = run(command.name or command.callback.__name__, "--help")
        assert done.exit_code == 0
        assert "--json" in done.stdout


def test_the_version_is_told():
    assert run("--version").exit_code == 0
    assert run("--version").stdout == f"milepost {milepost.__version__}\n"


class Counter:
    def __init__(self):
        self.count = 3

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


def test_an_item_with_files_of_its_own_is_shown_as_such_and_metrics_as_they_were_given(tmp_path):
    with milepost.v1.training.Checkpointer(tmp_path) as checkpointer:
        items = {"state": {"a": np.arange(4)}, "data": Counter()}
        checkpointer.save_checkpointables(3, items, metrics={"loss": float("nan")})
    shown = run("show", tmp_path / "3").stdout
    assert "metrics     {'loss': nan}" in shown
    assert "item 'state': 1 leaf, 32 B of arrays, written by 'safetensors'" in shown
    assert "item 'data': files of its own, written by milepost.v1.handlers." in shown
    assert run("verify", tmp_path / "3").exit_code == 0
