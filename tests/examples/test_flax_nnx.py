from __future__ import annotations

import jax
import jax.numpy as jnp
import milepost
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

optimizer = optax.adam(1e-3)


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, pixels):
        return self.last(self.dropout(nnx.relu(self.first(pixels))))


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    return jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(labels)


def fresh(seed):
    model = Classifier(nnx.Rngs(seed))
    model.train()
    return model, {
        "model": nnx.state(model),
        "optimizer": optimizer.init(nnx.state(model, nnx.Param)),
        "position": 0,
    }


@nnx.jit
def update(model, opt_state, pixels, labels):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(pixels), labels).mean()

    params = nnx.state(model, nnx.Param)
    changes, opt_state = optimizer.update(nnx.grad(loss)(model), opt_state, params)
    nnx.update(model, optax.apply_updates(params, changes))
    return opt_state


def trained(model, state, digits, steps):
    pixels, labels = digits
    nnx.update(model, state["model"])
    opt_state = state["optimizer"]
    for position in range(state["position"], steps):
        rows = np.random.default_rng(position).integers(0, len(labels), 32)
        opt_state = update(model, opt_state, pixels[rows], labels[rows])
    return {"model": nnx.state(model), "optimizer": opt_state, "position": steps}


def bits(state):
    def of(leaf):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        return str(array.dtype), array.shape, array.tobytes()

    return {jax.tree_util.keystr(path): of(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def test_a_training_with_flax_nnx_resumes_bit_for_bit(tmp_path, digits):
    model, state = fresh(seed=0)
    halfway = trained(model, state, digits, steps=10)
    at_save = bits(halfway)
    milepost.save_async(tmp_path / "10", halfway).result()
    whole = bits(trained(model, halfway, digits, steps=20))

    other_model, target = fresh(seed=1)
    assert at_save != bits(target)
    resumed = milepost.load(tmp_path / "10", target)
    assert at_save == bits(resumed)
    assert whole == bits(trained(other_model, resumed, digits, steps=20))


def test_a_flax_nnx_state_can_be_loaded_without_a_target(tmp_path):
    _, state = fresh(seed=0)
    milepost.save(tmp_path / "0", state)
    loaded = milepost.load(tmp_path / "0")
    assert jax.tree.structure(state) == jax.tree.structure(loaded)
    assert bits(state) == bits(loaded)
