from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/digits.py"


def run(program, folder):
    return subprocess.run(
        [sys.executable, program],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_training_that_is_killed_ends_where_one_that_is_left_alone_ends(tmp_path):
    done = run(EXAMPLE, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "identical, bit for bit" in done.stdout
    assert "resumed from step" in done.stdout


def test_the_example_fails_when_the_checkpoint_is_not_what_was_saved(tmp_path):
    # The bite: the same program, with a load that forgets the PRNG key, must not call the runs identical.
    code = EXAMPLE.read_text(encoding="utf-8")
    loading = "state = milepost.load(checkpoint, state)"
    assert loading in code
    broken = tmp_path / "broken.py"
    broken.write_text(code.replace(loading, f'{loading}; state["key"] = jax.random.key(1)'), encoding="utf-8")
    done = run(broken, tmp_path)
    assert done.returncode == 1
    assert "NOT IDENTICAL" in done.stdout
