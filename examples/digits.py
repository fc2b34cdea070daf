"""Train a classifier of handwritten digits, survive being killed, and show that nothing was lost.

    python examples/digits.py

The driver runs the training twice, each time as a process of its own. One is left alone. The other is killed with
SIGKILL in the middle, while a save is on its way, and started again: it goes on from the newest checkpoint. Both must
end with the same parameters, optimizer state, PRNG key and place in the data, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import milepost
import numpy as np
import optax
from sklearn.datasets import load_digits

STEPS, BATCH, SAVE_EVERY, KILL_AT = 400, 64, 20, 220

optimizer = optax.adam(1e-3)


# --- the training: what a checkpoint must hold, and one step ---------------------------------------------------------


def fresh() -> tuple[dict[str, Any], Any]:
    """Return the state at the beginning, which is all that changes, and the rest of the model, which never does."""
    key, model_key = jax.random.split(jax.random.key(0))
    model = eqx.nn.MLP(in_size=64, out_size=10, width_size=256, depth=2, key=model_key)
    params, static = eqx.partition(model, eqx.is_array)  # a model holds functions too; a checkpoint does not
    return {"params": params, "optimizer": optimizer.init(params), "key": key, "position": 0}, static


@eqx.filter_jit
def update(state: dict[str, Any], static: Any, pixels: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Take one step on one batch; the place in the data is not the compiled program's business."""
    key, noise_key = jax.random.split(state["key"])
    noisy = pixels + 0.1 * jax.random.normal(noise_key, pixels.shape)

    def loss(params: Any) -> jax.Array:
        logits = jax.vmap(eqx.combine(params, static))(noisy)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    changes, opt_state = optimizer.update(jax.grad(loss)(state["params"]), state["optimizer"])
    return {"params": optax.apply_updates(state["params"], changes), "optimizer": opt_state, "key": key}


def newest(directory: Path) -> Path | None:
    """Return the newest checkpoint: a folder gets its final name only when the checkpoint in it is whole."""
    steps = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
    return directory / str(max(steps)) if steps else None


def train(directory: Path) -> None:
    """Train from the newest checkpoint, or from the beginning, to the end; save on the way."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)
    held_out = len(labels) // 5

    state, static = fresh()
    if checkpoint := newest(directory):
        state = milepost.load(checkpoint, state)
        print("resumed", state["position"], flush=True)

    saving, blocked, saves = None, 0.0, 0
    while state["position"] < STEPS:
        epoch, batch = divmod(state["position"], (len(labels) - held_out) // BATCH)
        order = held_out + np.random.default_rng(epoch).permutation(len(labels) - held_out)
        rows = order[batch * BATCH : (batch + 1) * BATCH]
        position = state.pop("position") + 1
        state = {**update(state, static, pixels[rows], labels[rows]), "position": position}

        if position % SAVE_EVERY == 0:
            jax.block_until_ready(state)  # so that the clock sees saving alone
            started = time.perf_counter()
            saving = milepost.save_async(directory / str(position), state)  # raises if the one before has failed
            blocked, saves = blocked + time.perf_counter() - started, saves + 1
            print("saving", position, flush=True)
    if saving:
        saving.result()

    logits = jax.vmap(eqx.combine(state["params"], static))(pixels[:held_out])
    accuracy = float((logits.argmax(axis=1) == labels[:held_out]).mean())
    print(json.dumps({"accuracy": accuracy, "blocked": blocked, "saves": saves, "digest": digest(state)}))


def digest(state: Any) -> str:
    """Return a hash over every bit of a state, and over the paths, types and shapes of its leaves."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        bits = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        found.update(f"{jax.tree_util.keystr(path)} {type(leaf)} {bits.dtype} {bits.shape}".encode())
        found.update(bits.tobytes())
    return found.hexdigest()


# --- the driver ------------------------------------------------------------------------------------------------------


def run(directory: Path, kill_at: int | None = None) -> list[str]:
    """Train in a process of its own and return what it printed; kill it when it begins to save step `kill_at`."""
    directory.mkdir(exist_ok=True)
    command = [sys.executable, __file__, str(directory)]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout or ():
            lines.append(line.strip())
            if line.split() == ["saving", str(kill_at)]:
                child.kill()
    expected = 0 if kill_at is None else -signal.SIGKILL
    if child.returncode != expected:
        sys.exit(f"the training ended with {child.returncode} instead of {expected}")
    return lines


def main() -> None:
    """Compare a training that was killed with one that was left alone."""
    with tempfile.TemporaryDirectory(prefix="digits-") as folder:
        calm, killed = Path(folder, "calm"), Path(folder, "killed")
        whole = json.loads(run(calm)[-1])
        steps = sorted(int(path.name) for path in calm.iterdir())
        files = [path for path in calm.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        print(f"left alone: {STEPS} steps, accuracy {whole['accuracy']:.1%} on digits never seen")
        print(f"saved: {len(steps)} checkpoints (steps {steps[0]} to {steps[-1]}), {size:.1f} MB in {len(files)} files")
        each = whole["blocked"] / whole["saves"]
        print(f"training was blocked by saving for {whole['blocked']:.3f} s in all, {each * 1e3:.1f} ms per save")

        run(killed, kill_at=KILL_AT)
        print(f"killed: with SIGKILL, while step {KILL_AT} was being saved")
        lines = run(killed)
        resumed = json.loads(lines[-1])
        print(f"started again: {lines[0].replace(' ', ' from step ')}, accuracy {resumed['accuracy']:.1%}")

    identical = whole["digest"] == resumed["digest"]
    print("model, optimizer, key and position are", "identical, bit for bit" if identical else "NOT IDENTICAL")
    sys.exit(0 if identical and lines[0].startswith("resumed") else 1)


if __name__ == "__main__":
    train(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
