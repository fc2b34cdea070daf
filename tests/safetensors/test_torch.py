"""PyTorch reads what is exported, and what it wrote is read.

PyTorch is large, so these tests have a session of their own: `nox -s torch`.
"""

from __future__ import annotations

import json

import milepost
import ml_dtypes
import numpy as np
import pytest
from milepost import cli
from typer.testing import CliRunner

pytestmark = pytest.mark.torch

NAMES = [
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
]


def some(name, shape):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    generator = np.random.default_rng([7, *name.encode()])
    if name == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    return np.frombuffer(generator.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape).copy()


@pytest.mark.parametrize("shard_size", ["1", "200", "5GB"])
def test_pytorch_reads_every_dtype_that_is_exported(tmp_path, shard_size):
    import safetensors.torch
    import torch

    state = {f"{name}{shape}": some(name, shape) for name in NAMES for shape in [(), (3,), (2, 0), (3, 5)]}
    milepost.save(tmp_path / "7", state)
    done = CliRunner().invoke(
        cli.app(), ["export", str(tmp_path / "7"), "--to", str(tmp_path / "out"), "--shard-size", shard_size]
    )
    assert done.exit_code == 0, done.output
    index, loaded = tmp_path / "out" / "model.safetensors.index.json", {}
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    for path in files:
        loaded |= safetensors.torch.load_file(path)
    assert index.exists() == (len(files) > 1)
    if index.exists():
        assert json.loads(index.read_text())["weight_map"].keys() == state.keys()
    assert loaded.keys() == state.keys()
    for name, array in state.items():
        tensor = loaded[name]
        assert (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) == (array.shape, array.dtype.name)
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_what_torch_wrote_loads_bit_for_bit(tmp_path):
    import safetensors.torch
    import torch

    tensors = {
        "half": torch.arange(8, dtype=torch.bfloat16).reshape(2, 4),
        "eight": torch.arange(4, dtype=torch.float32).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j, 3j], dtype=torch.complex64),
    }
    (tmp_path / "m").mkdir()
    safetensors.torch.save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    loaded = milepost.load(tmp_path / "m")
    assert [str(loaded[name].dtype) for name in tensors] == ["bfloat16", "float8_e4m3fn", "bool", "complex64"]
    for name, tensor in tensors.items():
        assert loaded[name].tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert milepost.v1.metadata(tmp_path / "m").custom_metadata == {"format": "pt"}
