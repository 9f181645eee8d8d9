"""Magnitude pruning against torch's, and against sorting."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch.nn.utils.prune import l1_unstructured

import qformat
from qformat.converters import prune as prune_module
from qformat.converters.arrays import ArrayTensor
from qformat.converters.prune import Pruned, Pruning, find_cut
from qformat.converters.sources.detect import open_checkpoint
from qformat.dtypes import DTYPES, Elements, from_array
from qformat.errors import SourceError, TypeSpecError
from qformat.pipeline.source import Checkpoint
from qformat.readers.torch import TORCH_DTYPES
from tests.helpers.cli import invoke

TORCH = {name: TORCH_DTYPES[name] for name in ("f8_e4m3", "f8_e5m2", "f16", "bf16", "f32", "f64")}


def run(*args: object, code: int = 0) -> Result:
    return invoke("convert", *args, code=code)


def tensor_of(bits: np.ndarray, dtype: str, name: str = "w") -> ArrayTensor:
    return ArrayTensor(name, Elements(DTYPES[dtype], bits.view(DTYPES[dtype].storage)))


def whole(tensor) -> np.ndarray:
    """Return the bits of all elements."""
    size = int(np.prod(tensor.shape, dtype=int))
    return tensor.read(slice(0, size)).data.view(f"u{tensor.dtype.size}")


def sorted_out(bits: np.ndarray, dtype: str, rank: int) -> tuple[np.ndarray, int]:
    """Return the bits after pruning and the number of zeros, by sorting the values that torch sees."""
    flat = bits.reshape(-1)
    values = np.abs(torch.from_numpy(flat.copy()).view(TORCH[dtype]).double().numpy())
    finite = np.sort(values[np.isfinite(values)])
    if finite.size == 0:
        return flat, 0
    gone = values <= finite[min(rank, finite.size) - 1]
    return np.where(gone, 0, flat).astype(flat.dtype), int(gone.sum())


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_minilm_is_pruned_as_by_torch(minilm, sparsity):
    checkpoint = Pruning.parse(sparsity).apply(open_checkpoint(minilm))
    source = load_file(minilm / "model.safetensors")
    pruned = [tensor for tensor in checkpoint.tensors if isinstance(tensor, Pruned)]
    assert len(pruned) == 37
    for tensor in pruned[::4]:
        rank = int(sparsity * source[tensor.name].size)
        module = torch.nn.Module()
        module.w = torch.nn.Parameter(torch.from_numpy(source[tensor.name]))
        l1_unstructured(module, "w", amount=rank)
        theirs = module.w.detach().numpy()
        ours = tensor.read(slice(0, theirs.size)).data.reshape(theirs.shape)
        # torch keeps some of those that tie with the last one to go
        ties = (ours == 0) & (theirs != 0)
        assert ours[~ties].tobytes() == (theirs[~ties] + np.float32(0)).tobytes()
        assert np.unique(np.abs(theirs[ties])).size <= 1
        assert tensor.zeros == (ours == 0).sum() >= rank
        assert tensor.zeros - ties.sum() == rank


@pytest.mark.parametrize("dtype", TORCH)
@given(data=st.data())
def test_pruning_zeroes_the_smallest_magnitudes_of_every_dtype(dtype, data):
    size = DTYPES[dtype].size
    raw = data.draw(st.binary(min_size=size, max_size=40 * size).map(lambda raw: raw[: len(raw) // size * size]))
    bits = np.frombuffer(raw, f"u{size}")
    # few distinct values, so that many tie
    bits = bits[np.array(data.draw(st.lists(st.integers(0, bits.size - 1), min_size=1, max_size=60)))].reshape(1, -1)
    rank = data.draw(st.integers(1, bits.size))
    pruned = Pruned(tensor_of(bits, dtype), rank)
    expected, zeros = sorted_out(bits, dtype, rank)
    np.testing.assert_array_equal(whole(pruned), expected)
    assert pruned.zeros == zeros


@pytest.mark.parametrize("dtype", TORCH)
def test_pruning_works_across_chunks(dtype, monkeypatch):
    monkeypatch.setattr(prune_module, "CHUNK_ELEMENTS", 1000)
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((37, 200))).to(TORCH[dtype])
    size = DTYPES[dtype].size
    bits = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).numpy().view(f"u{size}")
    for rank in (1, 2, 3333, 7399, 7400):
        pruned = Pruned(tensor_of(bits, dtype), rank)
        expected, zeros = sorted_out(bits, dtype, rank)
        np.testing.assert_array_equal(whole(pruned), expected)
        assert pruned.cut().zeros == zeros
        part = pruned.read(slice(500, 2500)).data.view(bits.dtype)
        np.testing.assert_array_equal(part, expected[500:2500])


def test_pruning_removes_all_ties_and_counts_zeros():
    ties = from_array(np.array([[1, -2, 2, 2], [-2, 3, 4, 5]], np.float32))
    pruned = Pruned(ArrayTensor("w", ties), 2)
    assert pruned.cut().zeros == 5
    assert pruned.read(slice(0, 8)).data.tolist() == [0, 0, 0, 0, 0, 3, 4, 5]
    zeros = from_array(np.array([[0, -0.0, 0, 0], [1, -2, 3, 4]], np.float16))
    pruned = Pruned(ArrayTensor("w", zeros), 3)
    assert whole(pruned)[:4].tolist() == [0, 0, 0, 0]
    assert pruned.read(slice(4, 8)).data.tolist() == [1, -2, 3, 4]
    assert pruned.zeros == 4


def test_pruning_keeps_a_tensor_of_zeros():
    zeros = np.zeros((8, 8), np.float32)
    assert find_cut(ArrayTensor("w", from_array(zeros)), 10).zeros == 64
    pruned = Pruned(ArrayTensor("w", from_array(-zeros)), 10)
    assert not whole(pruned).any()


def test_pruning_does_not_change_the_source_array():
    array = np.arange(-8, 8, dtype=np.float32).reshape(4, 4)
    before = array.copy()
    assert (whole(Pruned(ArrayTensor("w", from_array(array)), 8)) == 0).sum() == 9  # +-4 tie
    np.testing.assert_array_equal(array, before)


def test_sparsities_are_exact_decimal_fractions():
    assert int(Pruning.parse(0.29).default * 100) == 29
    assert int(0.29 * 100) == 28
    assert Pruning.parse("5e-1").default == Fraction(1, 2)


def test_the_pruning_threshold_is_computed_once_for_all_threads():
    class Counting(ArrayTensor):
        def read(self, elements: slice) -> Elements:
            reads.append(elements)
            return super().read(elements)

    reads: list[slice] = []
    array = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    pruned = Pruned(Counting("w", from_array(array)), 2048)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: pruned.read(slice(64 * i, 64 * i + 64)).data, range(64)))
    assert sum(chunk == slice(0, 4096) for chunk in reads) == 2
    np.testing.assert_array_equal(np.concatenate(parts).view(np.uint32), sorted_out(array.view("u4"), "f32", 2048)[0])


def shares(
    names: list[str], pruning: Pruning, shape: tuple[int, ...] = (10, 10), dtype: str = "f32"
) -> dict[str, float]:
    array = Elements(DTYPES[dtype], np.ones(shape, DTYPES[dtype].storage))
    return {name: float(pruning.sparsity_for(ArrayTensor(name, array))) for name in names}


def test_embeddings_and_output_heads_are_not_pruned_by_default():
    kept = [
        *("model.embed_tokens.weight", "embeddings.word_embeddings.weight", "tok_embeddings.weight"),
        *("token_embd.weight", "transformer.wte.weight", "wpe.weight", "emb.weight", "shared.weight"),
        *("model.shared.weight", "lm_head.weight", "lm_head.decoder.weight", "head.weight", "output.weight"),
        *("proj_out.weight", "score.weight", "classifier.weight", "cls.predictions.decoder.weight"),
        "params.Embed_0.embedding",
    ]
    taken = [
        "model.layers.0.self_attn.q_proj.weight",
        "encoder.layer.0.attention.output.dense.weight",
        *("layers.0.attention.output.weight", "mlp.shared_expert.up_proj.weight", "blk.0.attn_output.weight"),
        *("multihead_attn.in_proj_weight", "pooler.dense.weight"),
    ]
    assert shares(kept, Pruning.parse(0.5)) == dict.fromkeys(kept, 0.0)
    assert shares(taken, Pruning.parse(0.5)) == dict.fromkeys(taken, 0.5)


def test_only_floating_matrices_are_pruned():
    everything = Pruning.parse(0.5, ["*=0.5"])
    assert shares(["x"], everything, (3, 2, 2)) == {"x": 0.5}
    assert shares(["x"], everything, (100,)) == {"x": 0.0}
    assert shares(["x"], everything, ()) == {"x": 0.0}
    assert shares(["x"], everything, dtype="i32") == {"x": 0.0}


def test_the_last_matching_pattern_decides_the_sparsity():
    names = ["layer.0.w", "layer.1.w", "embed.w"]
    assert shares(names, Pruning.parse(0.5, ["layer.*=0.7", "layer.1.*=0"])) == dict(
        zip(names, [0.7, 0, 0], strict=True)
    )
    assert shares(names, Pruning.parse(0.5, {"layer.1.*": 0, "*": 0.2})) == dict.fromkeys(names, 0.2)
    assert shares(["a=b"], Pruning.parse(0, ["a=b=0.25"])) == {"a=b": 0.25}


@pytest.mark.parametrize("wrong", [1, 1.5, -0.1, "nan", "inf", "half", "", None])
def test_sparsities_out_of_range_are_refused(wrong):
    with pytest.raises(TypeSpecError, match="from 0 to less than 1"):
        Pruning.parse(wrong)
    with pytest.raises(TypeSpecError, match="from 0 to less than 1"):
        Pruning.parse(0.5, {"*": wrong})


@pytest.mark.parametrize("wrong", ["=0.5", "w=", "w", ""])
def test_malformed_sparsity_overrides_are_refused(wrong):
    with pytest.raises(TypeSpecError, match="PATTERN=SPARSITY"):
        Pruning.parse(0.5, [wrong])


def test_sparsity_patterns_that_match_nothing_are_refused(tmp_path):
    arrays = {"w": np.ones((4, 4), np.float32), "b": np.ones(4, np.float32)}
    with pytest.raises(TypeSpecError, match=r"no tensor matches the pattern of x\*=0.5"):
        qformat.save_file(arrays, tmp_path / "x.qf", prune={"x*": 0.5})
    with pytest.raises(TypeSpecError, match="never pruned, such as 'b'"):
        qformat.save_file(arrays, tmp_path / "x.qf", prune={"b": 0.5})
    assert list(tmp_path.iterdir()) == []


def test_pruning_reads_no_tensor_before_it_is_needed():
    class Unreadable(ArrayTensor):
        def read(self, elements: slice) -> Elements:
            raise AssertionError

    tensors = [
        Unreadable("w", from_array(np.ones((8, 8), np.float32))),
        Unreadable("small", from_array(np.ones((1, 1), np.float32))),
        Unreadable("empty", from_array(np.ones((0, 8), np.float32))),
    ]
    found = Pruning.parse(0.5).apply(Checkpoint(tensors, warnings=["w"]))
    assert [isinstance(tensor, Pruned) for tensor in found.tensors] == [True, False, False]
    assert found.warnings == ["w"]
    assert Pruning.parse(0).apply(Checkpoint(tensors)) == Checkpoint(tensors, warnings=[])
    (warning,) = Pruning.parse(0.5).apply(Checkpoint(tensors[1:])).warnings
    assert "nothing is pruned" in warning


def test_save_file_measures_errors_against_the_pruned_weights(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((64, 96)).astype(np.float32) for name in ("w", "embed.weight")}
    arrays["b"] = rng.standard_normal(64).astype(np.float32)
    qformat.save_file(arrays, tmp_path / "x.qf", "q4_0", prune=0.5)
    left = sorted_out(arrays["w"].view("u4"), "f32", 3072)[0].view(np.float32).reshape(64, 96)
    with qformat.safe_open(tmp_path / "x.qf") as f:
        got = f.get_tensor("w")
        rmse = np.sqrt(np.mean((got.astype(np.float64) - left) ** 2))
        assert f.info("w").error.rmse == pytest.approx(rmse, rel=1e-6)
        assert not got[left == 0].any()
        np.testing.assert_array_equal(f.get_tensor("b"), arrays["b"])
        embeddings = f.get_tensor("embed.weight")
    qformat.save_file(arrays, tmp_path / "y.qf", "q4_0")
    with qformat.safe_open(tmp_path / "y.qf") as f:
        np.testing.assert_array_equal(f.get_tensor("embed.weight"), embeddings)
    qformat.save_file(arrays, tmp_path / "raw.qf", prune={"w": 0.5, "e*": 0})
    with qformat.safe_open(tmp_path / "raw.qf") as f:
        np.testing.assert_array_equal(f.get_tensor("w"), left)
        np.testing.assert_array_equal(f.get_tensor("embed.weight"), arrays["embed.weight"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 12, 16])
def test_pruning_does_not_hide_nan_and_infinity(tmp_path, bad, count):
    array = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    array.reshape(-1)[:count] = bad
    for type_ in ("q4_0", None):
        with pytest.raises(SourceError, match="'w' holds NaN or infinity"):
            qformat.save_file({"w": array}, tmp_path / "x.qf", type_, prune=0.5)
    qformat.save_file({"w": array}, tmp_path / "x.qf", "q4_0", prune=0.5, allow_nonfinite=True)
    with qformat.safe_open(tmp_path / "x.qf") as f:
        got = f.get_tensor("w")
    expected = np.where(np.isfinite(array) & (array <= count + 8), 0, array)
    np.testing.assert_array_equal(got, expected)


def test_the_convert_command_prunes_minilm(minilm, minilm_qf, tmp_path):
    target = tmp_path / "x.qf"
    dry = json.loads(run(minilm, target, "--prune", 0.5, "-n", "--json").stdout)
    assert not target.exists()
    done = json.loads(run(minilm, target, "--prune", 0.5, "--json", "-j", 1).stdout)
    assert dry["bytes"] == done["bytes"] == target.stat().st_size == minilm_qf.stat().st_size
    assert (dry["pruned_tensors"], dry["pruned_weights"]) == (37, None)
    assert done["pruned_tensors"] == 37
    assert done["pruned_weights"] == pytest.approx(5_382_144, abs=100)
    again = run(minilm, tmp_path / "y.qf", "--prune", "0.50", "-j", 3).stdout.splitlines()
    assert (tmp_path / "y.qf").read_bytes() == target.read_bytes()
    assert again[2] == "5.4M of 10.8M weights in 37 tensors are pruned"
    run(minilm, tmp_path / "z.qf", "--prune", 0)
    assert (tmp_path / "z.qf").read_bytes() == minilm_qf.read_bytes()


def test_verbose_output_shows_the_pruned_share_of_each_tensor(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((50, 40)).astype(np.float32) for name in ("a", "b", "embed")}
    save_file(arrays, tmp_path / "x.safetensors")
    args = (tmp_path / "x.safetensors", tmp_path / "x.qf", "-v", "--prune", "0.5", "--prune-tensor", "b=0.755")
    for more, last in ((("-n",), "at least 2.5k of 4.0k weights in 2 tensors would be pruned"), ((), "are pruned")):
        lines = run(*args, *more).stdout.splitlines()
        assert lines[0].endswith("rmse  pruned")
        assert lines[1].endswith("   50.0%")
        assert lines[2].endswith("   75.5%")
        assert not lines[3].endswith("%")
        assert any(line.endswith(last) for line in lines[4:])


def test_the_convert_command_warns_if_nothing_or_everything_is_pruned(tmp_path):
    save_file({"lm_head.weight": np.ones((8, 8), np.float32)}, tmp_path / "x.safetensors")
    args = (tmp_path / "x.safetensors", tmp_path / "x.qf", "-f")
    assert "nothing is pruned" in run(*args, "--prune", 0.5).stderr
    assert "nothing is pruned" not in run(*args).stderr
    warning = run(*args, "--prune-tensor", "lm_head.*=0.5").stderr
    assert "all weights pruned, because they are equal: tensor 'lm_head.weight'" in warning
    assert "--prune-tensor lm_head.weight=0" in warning


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prune", "1"), "out of range"),
        (("--prune", "nan"), "out of range"),
        (("--prune", "-0.5"), "out of range"),
        (("--prune", "much"), "not a valid float"),
        (("--prune-tensor", "w"), "PATTERN=SPARSITY"),
        (("--prune-tensor", "w=2"), "out of range"),
        (("--prune-tensor", "nothing=0.5"), "no tensor matches"),
    ],
)
def test_wrong_pruning_options_exit_with_status_2(tmp_path, args, message):
    save_file({"w": np.ones((8, 8), np.float32)}, tmp_path / "x.safetensors")
    assert message in run(tmp_path / "x.safetensors", tmp_path / "x.qf", *args, code=2).stderr
    assert not (tmp_path / "x.qf").exists()
