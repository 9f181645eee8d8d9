from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qformat
from qformat.errors import FormatError, SourceError
from qformat.readers.torch import load_file, load_model


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "w": rng.standard_normal((700, 900)).astype(np.float32),
        "odd": rng.standard_normal((50, 77)).astype(np.float16),
        "stack": rng.standard_normal((4, 6, 64)).astype(np.float32),
        "n": np.arange(12).reshape(3, 4),
        "b": rng.standard_normal(9).astype(np.float32),
    }


@pytest.fixture(params=["q4_0", None])
def path(request, arrays, tmp_path):
    qformat.save_file(arrays, tmp_path / "x.qf", request.param)
    return tmp_path / "x.qf"


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    "rows", [0, -1, slice(None), slice(5, 2), slice(40, 3, -3), [1], [3, 3, 2, 0, 1, 2], np.array([], int), [-1, 0]]
)
def test_get_rows_returns_the_rows_of_the_whole_tensor(path, rows):
    with qformat.safe_open(path) as f:
        for name in ("w", "odd", "stack", "n"):
            shape = f.info(name).shape
            limited = rows if isinstance(rows, (int, slice)) else np.asarray(rows) % shape[0] if len(rows) else rows
            whole = f.get_tensor(name)
            np.testing.assert_array_equal(f.get_rows(name, limited), whole[limited])


def test_get_rows_refuses_rows_out_of_range(path):
    with qformat.safe_open(path) as f:
        with pytest.raises(IndexError):
            f.get_rows("n", 3)
        with pytest.raises(IndexError):
            f.get_rows("n", [0, 3])
        with pytest.raises(IndexError, match=r"'b'.* has no rows"):
            f.get_rows("b", 0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_get_tensor_returns_the_requested_dtype(path, dtype):
    with qformat.safe_open(path) as f:
        for name in ("w", "odd"):
            array = f.get_tensor(name, dtype)
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, f.get_tensor(name).astype(dtype))
        with pytest.raises(TypeError, match="'n' holds i64 and cannot be given as"):
            f.get_tensor("n", dtype)
        with pytest.raises(TypeError, match="cannot be given as int32"):
            f.get_tensor("w", "int32")


def test_raw_tensors_read_without_a_copy_are_views(arrays, tmp_path):
    qformat.save_file(arrays, tmp_path / "x.qf")
    with qformat.safe_open(tmp_path / "x.qf") as f:
        view = f.get_tensor("w", copy=False)
    np.testing.assert_array_equal(view, arrays["w"])  # also after closing
    assert not view.flags.writeable
    assert not view.flags.owndata


def test_damaged_tensors_are_refused_by_every_reader(path):
    with qformat.safe_open(path) as f:
        segment = f.info("w").segments[0]
    flip(path, segment.offset + 100)
    with qformat.safe_open(path) as f:
        f.get_tensor("odd")
        with pytest.raises(FormatError, match=r"tensor 'w', segment .* is damaged"):
            f.get_tensor("w")
        with pytest.raises(FormatError, match="'w'"):
            f.get_rows("w", 0)
    with pytest.raises(FormatError, match="'w'"):
        load_file(path)
    with qformat.safe_open(path, verify=False) as f:
        f.get_tensor("w")
    assert set(load_file(path, verify=False)) == {"w", "odd", "stack", "n", "b"}


def test_load_file_returns_the_dtypes_of_the_source(path, arrays):
    loaded = load_file(path)
    with qformat.safe_open(path) as f:
        for name, array in arrays.items():
            expected = f.get_tensor(name).astype(array.dtype)
            assert loaded[name].dtype == torch.from_numpy(array).dtype
            np.testing.assert_array_equal(loaded[name].numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_load_file_returns_the_requested_dtype(path, dtype):
    exact = load_file(path, dtype=torch.float32)
    for name, tensor in load_file(path, dtype=dtype, jobs=1).items():
        if name == "n":
            assert tensor.dtype == torch.int64
        else:
            assert tensor.dtype == dtype
            assert tensor.equal(exact[name].to(dtype))


def test_load_file_refuses_integer_dtypes(path):
    with pytest.raises(TypeError, match="not one of float16"):
        load_file(path, dtype=torch.int8)


def test_load_file_puts_tensors_on_a_device(path):
    assert all(tensor.is_meta for tensor in load_file(path, device="meta").values())


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(40, 64)
        self.norm = torch.nn.LayerNorm(64)
        self.head = torch.nn.Linear(64, 40, bias=False)
        self.head.weight = self.embed.weight


def test_load_model_keeps_ties_and_reports_missing_and_unexpected_tensors(tmp_path):
    path = tmp_path / "x.qf"
    source = Tied()
    state = {name: value.numpy() for name, value in source.state_dict().items() if name != "head.weight"}
    qformat.save_file(state, path, "q4_0")
    model = Tied()
    assert load_model(model, path) == ([], [])
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.equal(load_file(path)["embed.weight"])
    assert model.norm.weight.equal(source.norm.weight)

    qformat.save_file(state | {"extra": np.ones(3, np.float32)}, path, overwrite=True)
    with pytest.raises(SourceError, match="unexpected extra"):
        load_model(Tied(), path)
    assert load_model(Tied(), path, strict=False) == ([], ["extra"])

    del state["norm.bias"]
    qformat.save_file(state, path, overwrite=True)
    with pytest.raises(SourceError, match=r"missing norm\.bias"):
        load_model(Tied(), path)
    assert load_model(Tied(), path, strict=False) == (["norm.bias"], [])

    qformat.save_file(state | {"norm.weight": np.ones(3, np.float32)}, path, overwrite=True)
    with pytest.raises(SourceError, match=r"'norm.weight': the model has shape \(64,\), the file \(3,\)"):
        load_model(Tied(), path, strict=False)


def test_load_model_casts_to_the_requested_dtype(tmp_path):
    path = tmp_path / "x.qf"
    source = torch.nn.Linear(64, 8)
    qformat.save_file({name: value.numpy() for name, value in source.state_dict().items()}, path)
    model = torch.nn.Linear(64, 8)
    load_model(model, path, dtype=torch.bfloat16, device="cpu")
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.equal(source.weight.bfloat16())
    assert model.bias.equal(source.bias.bfloat16())


def test_values_do_not_depend_on_the_number_of_threads(tmp_path):
    x = np.random.default_rng(0).standard_normal((3000, 1000)).astype(np.float32)
    qformat.save_file({"w": x}, tmp_path / "x.qf", "q4_0")
    results = []
    for jobs in (1, 2, 7):
        with qformat.safe_open(tmp_path / "x.qf", jobs=jobs) as f:
            results.append(f.get_tensor("w").tobytes())
    assert len(set(results)) == 1


def test_readers_leave_no_file_descriptor_open(path, tmp_path):
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("needs /proc")
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        load_file(path)
        with qformat.safe_open(path) as f:
            f.get_tensor("w")
        (tmp_path / "bad.qf").write_bytes(path.read_bytes()[:-1])
        with pytest.raises(FormatError):
            qformat.safe_open(tmp_path / "bad.qf")
    assert len(list(descriptors.iterdir())) == before


def test_load_model_refuses_partly_shared_and_integer_parameters(tmp_path):
    class Sliced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("big", torch.zeros(8))
            self.register_buffer("head", self.big[:4])

    path = tmp_path / "x.qf"
    qformat.save_file({"head": np.ones(4, np.float32)}, path)
    with pytest.raises(SourceError, match="missing big"):
        load_model(Sliced(), path)

    integers = torch.nn.Module()
    integers.register_buffer("head", torch.zeros(4, dtype=torch.int8))
    with pytest.raises(SourceError, match=r"'head': the model has torch\.int8, the file f32"):
        load_model(integers, path)


def test_get_rows_of_narrow_tensors_returns_all_rows(tmp_path):
    x = np.random.default_rng(0).standard_normal((40_000, 3)).astype(np.float32)
    qformat.save_file({"x": x}, tmp_path / "x.qf", "q8_0")
    with qformat.safe_open(tmp_path / "x.qf") as f:
        whole = f.get_tensor("x")
        np.testing.assert_allclose(whole, x, atol=0.02)
        np.testing.assert_array_equal(f.get_rows("x", slice(None)), whole)
