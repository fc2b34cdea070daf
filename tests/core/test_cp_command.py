"""The command `milepost cp`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import milepost
import numpy as np
import pytest
from core.fake_packages import Site
from milepost import cli
from milepost import plugins as plugins_module
from typer.testing import CliRunner

PLAIN = """
import json
import numpy as np
from milepost.hookspecs import hookimpl

class Plain:
    '''Each array a file; `note` is written beside them.'''
    def __init__(self, *, note=None): self.note = note
    def create(self, location, specs): pass
    def write(self, location, pieces, options):
        rows = []
        for number, piece in enumerate(pieces):
            data = piece.fetch()
            location.storage.write(f"{location.prefix}{number}.raw", [data.tobytes()])
            rows.append([piece.spec.name, str(data.dtype), data.shape, f"{number}.raw"])
        if self.note is not None:
            location.storage.write(location.prefix + "note.json", [json.dumps(self.note).encode()])
        return rows
    def read(self, location, records, requests, options):
        rows = {row[0]: row[1:] for record in records for row in record}
        for at, request in enumerate(requests):
            dtype, shape, name = rows[request.name]
            yield at, np.frombuffer(bytes(location.storage.read(location.prefix + name)), dtype).reshape(shape).copy()

@hookimpl
def register_arrays(register):
    register("plain", Plain)
"""


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"))
    site.install("plain", {"milepost.arrays": {"plain": "plain_module"}}, {"plain_module": PLAIN})
    sys.path.insert(0, str(site.folder))
    plugins_module.installed.cache_clear()
    yield site
    sys.path.remove(str(site.folder))
    site.forget()
    plugins_module.installed.cache_clear()


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    for name in ("MILEPOST_CONFIG", "MILEPOST_TOML", "MILEPOST_DISABLE_PLUGINS", "MILEPOST_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    milepost.save("runs/7", {"w": np.arange(6.0).reshape(2, 3), "step": 7})


def run(*arguments):
    return CliRunner().invoke(cli.app(), list(map(str, arguments)))


def process(*arguments, prelude=""):
    code = f"import sys\n{prelude}\nsys.argv[0] = 'milepost'\nfrom milepost.__main__ import main\nsys.exit(main())"
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})


def test_a_copy_says_what_it_did(tmp_path):
    done = run("cp", "runs/7", "backup/7")
    assert done.exit_code == 0, done.output
    assert re.search(r"^copied: file://.*/runs/7\nto: file://.*/backup/7: 1 file, .* B, as they are,", done.stdout)
    assert milepost.load("backup/7")["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_with_json_there_is_one_document(tmp_path):
    done = run("cp", "runs/7", "backup/7", "--json", "--arrays", "plain")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    written = json.loads((tmp_path / "backup/7/commit_success.txt").read_bytes())
    assert said == {
        "source": f"file://{tmp_path}/runs/7",
        "target": f"file://{tmp_path}/backup/7",
        "files_as_they_are": False,
        "items": {"state": "plain"},
        "attempt": written["attempt"],
        "files": 1,
        "bytes": 48,
    }
    assert milepost.load("backup/7")["step"] == 7


def test_options_of_the_array_writer_are_read_as_json_or_else_as_text(tmp_path):
    for text, value in (("3", 3), ("[1,2]", [1, 2]), ("zstd", "zstd"), ("a=b", "a=b"), ("true", True)):
        done = run("cp", "runs/7", "copy", "--arrays", "plain", "--arrays-option", f"note={text}", "--overwrite")
        assert done.exit_code == 0, done.output
        assert json.loads((tmp_path / "copy/state/note.json").read_bytes()) == value


def test_items_can_be_chosen():
    milepost.v1.save_checkpointables("runs/8", {"a": {"x": np.ones(2)}, "b": {"y": 1}, "c": {"z": 2}})
    done = run("cp", "runs/8", "few", "--item", "c", "--item", "a", "--json")
    assert json.loads(done.stdout)["items"] == {"a": "safetensors", "c": "safetensors"}
    assert milepost.v1.load_checkpointables("few")["c"] == {"z": 2}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["runs/9", "b"], 2, "nothing is there"),
        (["runs/7", "runs/7"], 2, "the same place"),
        (["runs/7", "runs/7/x"], 2, "within the other"),
        (["runs/7", "taken"], 2, "a checkpoint is there"),
        (["runs/7", "b", "--item", "x"], 2, "no such item|'x'"),
        (["runs/7", "b", "--arrays", "plian"], 3, "plian"),
        (["runs/7", "b", "--arrays", "plain", "--arrays-option", "colour=1"], 2, "colour"),
        (["runs/7", "b", "--arrays-option", "colour"], 2, "KEY=VALUE"),
        (["runs/damaged", "b"], 1, "damaged"),
    ],
)
def test_what_cannot_be_done_is_told_by_words_and_exit_code(tmp_path, arguments, code, words):
    milepost.save("taken", {"x": 1})
    milepost.save("runs/damaged", {"x": np.ones(1000)})
    (file,) = (tmp_path / "runs/damaged").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8] + b"rubbish!")
    done = run("cp", *arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    assert re.search(words, done.stderr)
    assert not (tmp_path / "b").exists()
    assert milepost.load("taken") == {"x": 1}


@pytest.mark.parametrize("options", [[], ["--arrays", "plain"]])
def test_no_copy_needs_jax(options):
    block = f"sys.path.insert(0, {sys.path[0]!r})\nsys.modules['jax'] = sys.modules['jaxlib'] = None"
    done = process("cp", "runs/7", "copy", *options, prelude=block)
    assert done.returncode == 0, done.stderr
    assert milepost.load("copy")["step"] == 7


def test_an_interrupted_copy_leaves_nothing(tmp_path):
    stop = """
import os, signal
import milepost.engine.stored as stored
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
read = stored.bytes_of
def interrupted(*arguments):
    yield from read(*arguments)
    os.kill(os.getpid(), signal.SIGINT)
stored.bytes_of = interrupted
"""
    done = process("cp", "runs/7", "backup/7", prelude=stop)
    assert done.returncode in (1, 130, -signal.SIGINT)
    assert done.stdout == ""
    assert not (tmp_path / "backup").exists() or list((tmp_path / "backup").iterdir()) == []
