"""Loading into torch models: by the model's own protocol, tied weights, the meta device, and little memory."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

import qformat
from qformat.errors import FormatError, QualityError, SourceError
from qformat.readers.lazy_tensors import LazyTensor
from qformat.readers.torch import load_file, load_model


def save(path: Path, state: dict[str, torch.Tensor], types: Any = None) -> Path:
    path.unlink(missing_ok=True)
    qformat.save_file({name: tensor.detach().numpy() for name, tensor in state.items()}, path, types)
    return path


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ---- the model's own code


class WithExtraState(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)
        self.amax = [0.0, 0.0]

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.amax)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.amax = state.tolist()


def test_extra_states_are_set(tmp_path: Path) -> None:
    source, model = torch.nn.Sequential(WithExtraState()), torch.nn.Sequential(WithExtraState())
    source[0].amax = [3.5, 7.0]
    path = save(tmp_path / "m.qf", source.state_dict())
    assert load_model(model, path) == ([], [])
    assert model[0].amax == [3.5, 7.0]
    assert_same(model, source)
    state = source.state_dict()
    del state["0._extra_state"]
    save(path, state)
    with pytest.raises(SourceError, match=r"does not fit the model: missing 0\._extra_state"):
        load_model(model, path)
    assert load_model(model, path, strict=False) == (["0._extra_state"], [])
    save(path, source.state_dict())
    with pytest.raises(SourceError, match=r"unexpected 0\._extra_state"):
        load_model(torch.nn.Sequential(torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)})), path)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_old_weight_norm_is_converted_by_hooks(tmp_path: Path) -> None:
    source = old_weight_norm(torch.nn.Linear(4, 3))
    model = weight_norm(torch.nn.Linear(4, 3))
    assert load_model(model, save(tmp_path / "m.qf", source.state_dict())) == ([], [])
    x = torch.ones(1, 4)
    assert torch.allclose(model(x), source(x))


def test_batch_norms_of_old_checkpoints_are_loaded(tmp_path: Path) -> None:
    source = torch.nn.Sequential(torch.nn.BatchNorm2d(4))
    source[0].running_mean += 3
    state = {name: tensor for name, tensor in source.state_dict().items() if "num_batches" not in name}
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4))
    assert load_model(model, save(tmp_path / "m.qf", state)) == ([], [])
    assert_same(model, source)


def test_hooks_run_after_loading(tmp_path: Path) -> None:
    class Cached(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_load_state_dict_post_hook(lambda module, _: module.refresh())

        def refresh(self) -> None:
            self.transposed = self.weight.detach().t().contiguous()

    source, model = torch.nn.Linear(4, 4), Cached()
    assert load_model(model, save(tmp_path / "m.qf", source.state_dict())) == ([], [])
    assert model.transposed.equal(source.weight.t())


def test_hooks_may_rename_split_and_change_tensors(tmp_path: Path) -> None:
    class Renamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)
            self.halves = torch.nn.ParameterList([torch.zeros(2, 4), torch.zeros(2, 4)])
            self._register_state_dict_hook(lambda module, state, prefix, meta: {k: v.clone() for k, v in state.items()})
            self._register_load_state_dict_pre_hook(self.before)

        def before(self, state: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
            state["inner.weight"] = state.pop("weight")
            state["inner.bias"] = state.pop("bias")
            state["inner.bias"].mul_(2)
            state["inner.bias"] += 1
            state["halves.0"], state["halves.1"] = torch.chunk(state["inner.weight"], 2)

    source, model = torch.nn.Linear(4, 4), Renamed()
    assert load_model(model, save(tmp_path / "m.qf", source.state_dict())) == ([], [])
    assert model.inner.weight.equal(source.weight)
    assert model.inner.bias.equal(source.bias * 2 + 1)
    assert torch.cat([*model.halves]).equal(source.weight)


def test_tensors_that_a_module_keeps_have_values(tmp_path: Path) -> None:
    class Keeps(torch.nn.Linear):
        def _load_from_state_dict(self, state: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
            self.register_buffer("scale", state[prefix + "scale"])
            self.plain = state[prefix + "bias"]
            self.weight = torch.nn.Parameter(state[prefix + "weight"])
            super()._load_from_state_dict(state, prefix, *rest)

    source, model = torch.nn.Linear(4, 3), Keeps(4, 3)
    path = save(tmp_path / "m.qf", source.state_dict() | {"scale": torch.arange(3.0)})
    assert load_model(model, path) == ([], [])
    for kept in (model.scale, model.plain, model.weight, model.weight.data):
        assert not isinstance(kept, LazyTensor)
    assert model.scale.tolist() == [0, 1, 2]
    assert model.plain.equal(source.bias)
    assert model.weight.equal(source.weight)
    assert isinstance(model.weight, torch.nn.Parameter)


def test_lazy_modules_are_initialized(tmp_path: Path) -> None:
    source = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyBatchNorm1d())
    assert load_model(model, save(tmp_path / "m.qf", source.state_dict())) == ([], [])
    assert_same(model, source)


def test_one_element_is_loaded_into_a_scalar(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.register_parameter("scale", torch.nn.Parameter(torch.tensor(0.0)))
    assert load_model(model, save(tmp_path / "m.qf", {"scale": torch.tensor([2.5])})) == ([], [])
    assert model.scale.item() == 2.5


def test_errors_of_copies_keep_their_kind(tmp_path: Path) -> None:
    source = torch.nn.Linear(64, 64)
    path = save(tmp_path / "m.qf", source.state_dict(), "q8_0")
    with qformat.safe_open(path) as f:
        at = f.info("weight").segments[0].offset
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="tensor 'weight', segment 'blocks' is damaged"):
        load_model(torch.nn.Linear(64, 64), path)


def test_misfits_after_hooks_are_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "m.qf", torch.nn.BatchNorm2d(4).state_dict())
    with pytest.raises(SourceError, match=r"m\.qf: does not fit the model: size mismatch for weight.*") as caught:
        load_model(torch.nn.BatchNorm2d(5), path)
    assert "\n" not in str(caught.value)


# ---- what the lists name


def test_buffers_that_no_file_fills_are_named(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    path = save(tmp_path / "m.qf", model.state_dict())
    model.register_buffer("inv_freq", torch.ones(2), persistent=False)
    found = load_model(model, path)
    assert found == ([], [])
    assert (found.missing, found.unexpected, found.unfilled) == ([], [], ["inv_freq"])
    assert repr(found) == "Placement(missing=[], unexpected=[], unfilled=['inv_freq'])"
    assert pickle.loads(pickle.dumps(found)).unfilled == ["inv_freq"]
    save(path, torch.nn.Linear(4, 3).state_dict() | {"inv_freq": torch.zeros(2)})
    assert load_model(model, path).unfilled == []
    assert model.inv_freq.tolist() == [1, 1]  # torch does not load it either


class Tied(torch.nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.head = torch.nn.Linear(16, 50, bias=False)
        if tied:
            self.tie_weights()

    def tie_weights(self) -> None:
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("strict", [True, False])
def test_different_tensors_for_tied_weights_are_refused(tmp_path: Path, strict: bool) -> None:
    path = save(tmp_path / "m.qf", Tied(tied=False).state_dict())
    model = Tied()
    before = model.embed.weight.clone()
    with pytest.raises(
        SourceError, match=r"tensors 'embed\.weight' and 'head\.weight' differ, but the model ties them"
    ):
        load_model(model, path, strict=strict)
    assert model.embed.weight.equal(before)


@pytest.mark.parametrize("types", [None, {"embed.weight": "f32", "head.weight": "lossless"}])
def test_equal_tensors_for_tied_weights_are_loaded(tmp_path: Path, types: Any) -> None:
    source, model = Tied(), Tied()
    assert load_model(model, save(tmp_path / "m.qf", source.state_dict(), types)) == ([], [])
    assert model.head.weight is model.embed.weight
    assert_same(model, source)


def test_ties_that_were_lost_are_made_again(tmp_path: Path) -> None:
    source = Tied()
    state = {"embed.weight": source.embed.weight}
    path = save(tmp_path / "m.qf", state)
    with torch.device("meta"):
        model = Tied()
    for model_ in (model, Tied().to_empty(device="cpu"), Tied(tied=False)):
        assert load_model(model_, path) == ([], [])
        assert model_.head.weight is model_.embed.weight
        assert_same(model_, source)


# ---- the meta device


def test_models_on_the_meta_device_are_filled(tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2).half())

    source = make()
    source[0].weight.requires_grad_(False)
    path = save(tmp_path / "m.qf", source.state_dict())
    with torch.device("meta"):
        model = make()
        model[0].weight.requires_grad_(False)
        assert load_model(model, path) == ([], [])
    assert_same(model, source)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in source.parameters()]
    with torch.device("meta"):
        model = make()
    assert load_model(model, path, dtype="float64", device="cpu") == ([], [])
    assert model[2].weight.equal(source[2].weight.double())


def test_recurrent_modules_on_the_meta_device_compute_as_their_source(tmp_path: Path) -> None:
    source = torch.nn.LSTM(4, 5, 2)
    path = save(tmp_path / "m.qf", source.state_dict())
    with torch.device("meta"):
        model = torch.nn.LSTM(4, 5, 2)
    assert load_model(model, path) == ([], [])
    x = torch.randn(3, 4)
    assert model(x)[0].equal(source(x)[0])


def test_buffers_on_the_meta_device_that_no_file_fills_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.qf", torch.nn.Linear(4, 3).state_dict())
    with torch.device("meta"):
        model = torch.nn.Linear(4, 3)
        model.register_buffer("inv_freq", torch.ones(2), persistent=False)
    with pytest.raises(SourceError, match="buffer 'inv_freq' of the model is on the meta device, and no file holds it"):
        load_model(model, path)
    assert model.weight.is_meta
    model.register_buffer("inv_freq", torch.ones(2), persistent=False)
    assert load_model(model, path) == ([], [])
    assert not model.weight.is_meta


def test_missing_tensors_stay_on_the_meta_device(tmp_path: Path) -> None:
    path = save(tmp_path / "m.qf", {"weight": torch.ones(3, 4)})
    with torch.device("meta"):
        model = torch.nn.Linear(4, 3)
    with pytest.raises(SourceError, match="missing bias"):
        load_model(model, path)
    assert model.weight.is_meta
    assert load_model(model, path, strict=False) == (["bias"], [])
    assert model.weight.tolist() == [[1.0] * 4] * 3
    assert model.bias.is_meta


# ---- dtypes and devices


def test_values_too_large_for_a_dtype_are_refused(tmp_path: Path) -> None:
    wide = {"weight": torch.full((4, 4), 1e6)}
    path = save(tmp_path / "m.qf", wide, "bf16")
    message = r"m\.qf: tensor 'weight' has a value that is too large for f16; read it as bf16, f32 or f64"
    with pytest.raises(SourceError, match=message):
        load_file(path, dtype=torch.float16)
    with pytest.raises(SourceError, match=message):
        load_model(torch.nn.Linear(4, 4, bias=False).half(), path)
    with qformat.safe_open(path) as f:
        for read in (f.get_tensor, lambda name, dtype: f.get_rows(name, 0, dtype)):
            with pytest.raises(SourceError, match=message):
                read("weight", np.float16)
    assert load_file(path, dtype="bfloat16")["weight"].equal(torch.full((4, 4), 1e6).bfloat16())
    infinite = {"weight": np.array([[np.inf, np.nan, 1.0]], np.float32)}
    qformat.save_file(infinite, path, overwrite=True, allow_nonfinite=True)
    assert load_file(path, dtype="f16")["weight"][0, 0] == torch.inf  # as it was in the source


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_may_be_given_by_name(tmp_path: Path, name: Any) -> None:
    path = save(tmp_path / "m.qf", torch.nn.Linear(4, 3).state_dict())
    assert load_file(path, dtype=name)["weight"].dtype == torch.bfloat16
    assert load_model(torch.nn.Linear(4, 3), path, dtype=name) == ([], [])
    for wrong in ("int8", "bfloat", torch.int8):
        with pytest.raises(TypeError, match=f"dtype {wrong} is not one of float16, bfloat16, float32, float64"):
            load_file(path, dtype=wrong)


def test_device_contexts_do_not_change_what_is_read(tmp_path: Path) -> None:
    source = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.BatchNorm1d(32))
    state = {name: tensor for name, tensor in source.state_dict().items() if "num_batches" not in name}
    for types in (None, "q4_0"):
        path = save(tmp_path / "m.qf", state, types)
        expected = load_file(path)
        with torch.device("meta"):
            found = load_file(path)
        assert all(found[name].equal(tensor) for name, tensor in expected.items())
        model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.BatchNorm1d(32))
        with torch.device("meta"):
            assert load_model(model, path) == ([], [])
        with torch.inference_mode():
            assert load_model(model, path) == ([], [])
        assert model[0].weight.equal(expected["0.weight"])


def test_a_quality_without_layers_is_an_error_before_anything_is_changed(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    path = save(tmp_path / "m.qf", torch.nn.Linear(4, 3).state_dict())
    before = model.weight.clone()
    with pytest.raises(QualityError, match="holds no layered tensors"):
        load_model(model, path, quality=3)
    assert model.weight.equal(before)


def test_loading_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    layers = [torch.nn.Linear(256, 256, bias=False) for _ in range(24)]
    source, model = torch.nn.Sequential(*layers), torch.nn.Sequential(*layers)
    path = save(tmp_path / "m.qf", source.state_dict(), "f32")
    load_model(model, path)
    made: list[int] = []

    original = LazyTensor.values

    def values(self: LazyTensor, dtype: torch.dtype | None = None, *, keep: bool = True) -> torch.Tensor:
        assert not keep
        made.append(1)
        return original(self, dtype, keep=keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LazyTensor, "values", values)
        tracemalloc.start()
        load_model(model, path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(made) == 24
    assert peak < 4 << 20
