"""Arrays of numpy and tensors of torch as the input of `save_file`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import qformat
from qformat.errors import SourceError
from qformat.readers.torch import TORCH_DTYPES, load_file

BASE = torch.arange(48, dtype=torch.float32).reshape(6, 8)


def test_torch_tensors_of_every_dtype_are_saved_bit_for_bit(tmp_path):
    patterns = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).repeat(8)
    tensors = {
        name: (patterns > 0) if dtype is torch.bool else patterns.clone().view(dtype)
        for name, dtype in TORCH_DTYPES.items()
    }
    qformat.save_file(tensors, tmp_path / "a.qf", allow_nonfinite=True)
    stored = load_file(tmp_path / "a.qf")
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8))


def test_torch_tensors_are_saved_whatever_their_strides(tmp_path):
    tensors = {
        "transposed": BASE.T,
        "columns": BASE[:, ::2],
        "expanded": BASE[:1].expand(5, 8),
        "parameter": torch.nn.Parameter(BASE),
        "bf16": BASE.bfloat16().T,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "negative": torch.view_as_complex(BASE.reshape(6, 4, 2)).conj().imag,
    }
    qformat.save_file(tensors, tmp_path / "a.qf")
    stored = load_file(tmp_path / "a.qf")
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor), name
    qformat.save_file({"w": BASE.bfloat16(), "n": BASE.numpy()}, tmp_path / "b.qf", types="q8_0")
    with qformat.safe_open(tmp_path / "b.qf") as file:
        assert (file.info("w").codec, file.info("w").dtype) == ("q8_0", "bf16")


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({1: BASE}, r"names of tensors are strings, not 1 \(int\)"),
        ({None: BASE}, r"names of tensors are strings, not None \(NoneType\)"),
        ({"a": 3.0}, "tensor 'a': a float is no array; give numpy.asarray of it, or a torch tensor"),
        ({"a": [1.0]}, "tensor 'a': a list is no array"),
        ({"a": None}, "tensor 'a': a NoneType is no array"),
        ({"a": np.ma.masked_array([1.0], [True])}, "tensor 'a': a masked array cannot be stored; fill it first"),
        ({"a": np.ones(2, np.complex64)}, "tensor 'a': arrays of complex64 cannot be stored"),
        ({"a": np.array(["a"])}, "tensor 'a': arrays of str32 cannot be stored"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "tensor 'a': tensors of complex64 cannot be stored"),
        ({"a": torch.eye(3).to_sparse()}, "tensor 'a': a sparse or nested tensor cannot be stored"),
        ({"a": torch.empty(3, device="meta")}, "tensor 'a': a tensor on the meta device has no values"),
        (
            {"a": torch.nn.parameter.UninitializedParameter()},
            "tensor 'a': a tensor of the class torch.nn.parameter.UninitializedParameter is no plain tensor",
        ),
    ],
)
def test_what_is_no_array_is_refused_by_name(tmp_path, tensors: Any, says):
    with pytest.raises(SourceError, match=says):
        qformat.save_file(tensors, tmp_path / "a.qf")
