"""The registry, type strings, records, block and raw codecs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qformat
from qformat.codecs.layout import CHUNK_ELEMENTS, Matrix
from qformat.codecs.raw import Raw
from qformat.codecs.registry import codec_of, codecs, parse_type, register
from qformat.dtypes import DTYPES, F32, Elements
from qformat.errors import FormatError, TypeSpecError
from qformat.records import Segment, TensorRecord

ENTROPY_CODED = ("ternary", "levels", "lossless", "scm")
METRICS = ("max_rmse", "max_abs", "mean_abs")
COPIED = ("fp8", "ggml", "scaled", "codebook")  # never made of floats


def round_trip(tmp_path, array, types, **options):
    path = tmp_path / "x.qf"
    qformat.save_file({"x": array}, path, types, overwrite=True, **options)
    with qformat.safe_open(path) as f:
        return f.get_tensor("x"), f.info("x")


def test_the_registry_holds_the_codecs_of_the_spec():
    assert set(codecs()) == {
        *DTYPES,
        *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "affine", "lut", "nlm"),
        *ENTROPY_CODED,
        *COPIED,
    }


def test_registering_a_codec_id_twice_is_refused():
    with pytest.raises(ValueError, match="already taken by Q4_0"):
        register(type("Other", (Raw,), {"id": "q4_0"}))


#: malformed types by a part of the message
MALFORMED: dict[str, str] = {
    "there is no codec 'q4_00'; did you mean q4_0? the types for weights are affine, bf16, f16, f32, f64, levels": "q4_00",
    "there is no codec ''": "",
    "no parameter ''": "q4_0: q4_0:,",
    "q4_0 has no parameter 'depth'; it knows coded, search": "q4_0:depth=3",
    "f32 has no parameter 'x'; it has none": "f32:x=1",
    "search may be naive or table or exact, not 'best'": "q4_0:search=best",
    "give search once": "q4_0:search q4_0:search=naive,search=naive",
    "bits may be 2 or 3 or 4 or 8": "affine:bits=5",
    "multiple of 32": "affine:group=0 affine:group=-32 affine:group=33 affine:group=2097152 ternary:scale=group,group=40",
    "group": "affine:group=col",
    "sym": "affine:sym=1",
    "scale may be f16 or bf16 or f32": "affine:scale=f64",
    "size may be 4 or 8 or 16": "lut:size=5",
    "block=256 needs scope=block": "lut:block=256",
    "block may be 128 or 256, not '64'": "lut:scope=block,block=64",
    "block may be 128 or 256, not '0'": "lut:scope=block,block=0",
    "scale=row needs scope=tensor": "lut:scope=block,scale=row",
    "fit=gauss needs scope=tensor": "lut:scope=block,fit=gauss",
    "fit may be lloyd or percentile or gauss": "lut:fit=best",
    "scope may be tensor or block": "lut:scope=row",
    "sparsity may be a number from 0 to below 1, not '1'": "ternary:sparsity=1",
    "sparsity may be": "ternary:sparsity=-0.1 ternary:sparsity=nan ternary:sparsity=x",
    "bpw may be a number above 0 or any, not '0'": "levels:bpw=0",
    "bpw may be": "levels:bpw=inf scm:bpw=0 scm:bpw=-3 scm:bpw=nan scm:bpw=inf scm:bpw=",
    "exclude each other": "levels:bpw=1,sparsity=0.5",
    "n may be 3 or 5 or 7 or 9 or 11 or 13 or 15, not '4'": "levels:n=4",
    "n may be": "levels:n=17",
    "ternary has no parameter 'n'": "ternary:n=3",
    "group=64 needs scale=group": "ternary:group=64",
    "dtype=f32 needs scale=row or scale=group": "ternary:scale=tensor,dtype=f32",
    "bpw may be a number from 1.5 to 8, not '1.49'": "scm:bpw=1.49",
    "bpw may be a number from 1.5 to 8, not '8.01'": "scm:bpw=8.01",
    "bpw may be a number from 1.5 to 8, not 'many'": "scm:bpw=many",
    "give bpw once, as bpw=VALUE": "scm:bpw",
    "give bpw once": "scm:bpw=3,bpw=4",
    "give one of bpw, max_rmse, max_abs, mean_abs and lossless, not 2 of them": "scm:bpw=3,max_rmse=0.1",
    "not 2 of them": "scm:max_abs=0.1,mean_abs=0.1 scm:bpw=3,lossless=true",
    "not 3 of them": "scm:bpw=3,max_rmse=0.1,lossless=true",
    "lossless may be true or false, not '1'": "scm:lossless=1",
    "scm has no parameter 'layers'": "scm:layers=3",
    "scm has no parameter 'rate'; it knows bpw, max_rmse, max_abs, mean_abs, lossless": "scm:rate=3",
}
MALFORMED |= {
    f"{metric} may be a number from 0 on, not '{wrong}'": f"scm:{metric}={wrong}"
    for metric in METRICS
    for wrong in ("-0.1", "nan", "inf", "x", "1%")
}
CASES = [(type_, message) for message, types in MALFORMED.items() for type_ in types.split(" ")]


@pytest.mark.parametrize(("type_", "message"), CASES, ids=[type_ for type_, _ in CASES])
def test_malformed_types_are_refused_with_an_explanation(type_, message):
    with pytest.raises(TypeSpecError) as caught:
        parse_type(type_)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_types_print_as_they_are_written():
    assert str(parse_type("q4_0")) == str(parse_type("q4_0:search=table")) == "q4_0"
    assert str(parse_type("q4_0:search=exact")) == "q4_0:search=exact"
    for type_ in ("bf16", "affine", "affine:bits=8,group=row", "affine:bits=2,scale=bf16,sym=false"):
        assert str(parse_type(type_)) == type_
    for type_ in ("lut", "lut:fit=gauss,scale=row", "lut:block=256,scope=block,size=4"):
        assert str(parse_type(type_)) == type_


@given(st.integers(0, 50), st.integers(0, 3_000_000), st.sampled_from([1, 32]))
def test_chunks_cover_a_matrix_once_in_order(rows, cols, block):
    matrix = Matrix(rows, cols)
    position = 0
    for chunk in matrix.chunks(block):
        elements = chunk.elements(matrix)
        assert elements.start == position
        assert 0 < elements.stop - elements.start <= CHUNK_ELEMENTS
        assert chunk.col % block == 0
        assert (chunk.col, chunk.cols) == (0, cols) or chunk.rows == 1
        position = elements.stop
    assert position == rows * cols


#: type strings that give gguf's bytes, by gguf's name
NAIVE = {"Q4_0": "q4_0:search=naive", "Q4_1": "q4_1:search=naive", "Q5_0": "q5_0", "Q5_1": "q5_1", "Q8_0": "q8_0"}


@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize("shape", [(3, 64), (5, 341), (7, 1), (8, 5, 3), (2, 2, 2, 40), (33,), (), (0, 32), (4, 0)])
def test_block_codecs_pad_rows_of_every_shape_as_gguf_does(tmp_path, shape, name):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    decoded, info = round_trip(tmp_path, x, {"x": NAIVE[name]})
    kind = gguf.GGMLQuantizationType[name]
    matrix = Matrix.of(shape)
    padded = np.zeros((matrix.rows, -(-matrix.cols // 32) * 32), np.float32)
    padded[:, : matrix.cols] = x.reshape(matrix.rows, matrix.cols)
    if name.endswith("1") and x.size:  # these cannot store a zero anywhere, and repeat the last element
        padded[:, matrix.cols :] = padded[:, matrix.cols - 1 : matrix.cols]
    with np.errstate(all="ignore"):
        blocks = gguf.quants.quantize(padded, kind) if x.size else np.zeros((0, 18), np.uint8)
        expected = gguf.quants.dequantize(blocks, kind) if x.size else padded
    np.testing.assert_array_equal(decoded, expected[: matrix.rows, : matrix.cols].reshape(shape))
    assert info.nbytes == blocks.size
    if x.size:
        error = (x - decoded).astype(np.float64)
        assert info.error.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-6)
        assert info.error.maximum == pytest.approx(np.abs(error).max(), rel=1e-6)


def test_rows_longer_than_a_chunk_give_the_same_bytes(tmp_path, monkeypatch):
    x = np.random.default_rng(2).standard_normal((3, 1000)).astype(np.float32)
    whole, info = round_trip(tmp_path, x, "q4_0")
    monkeypatch.setattr("qformat.codecs.layout.CHUNK_ELEMENTS", 96)
    cut, cut_info = round_trip(tmp_path, x, "q4_0")
    np.testing.assert_array_equal(whole, cut)
    assert info.segments[0].sha256 == cut_info.segments[0].sha256
    assert cut_info.error.rmse == pytest.approx(info.error.rmse, rel=1e-6)


@pytest.mark.parametrize("name", NAIVE)
def test_minilm_is_quantized_byte_for_byte_as_by_gguf(minilm, reference, tmp_path, name):
    from safetensors.numpy import load_file

    source = load_file(minilm / "model.safetensors")
    kind = gguf.GGMLQuantizationType[name]
    qformat.save_file(source, tmp_path / "x.qf", NAIVE[name])
    file = reference.read((tmp_path / "x.qf").read_bytes())
    count = 0
    with qformat.safe_open(tmp_path / "x.qf") as f:
        for key, tensor in file.tensors.items():
            if tensor.codec == name.lower():
                expected = gguf.quants.quantize(source[key], kind)
                assert tensor.segments[0][1] == expected.tobytes()
                np.testing.assert_array_equal(f.get_tensor(key), gguf.quants.dequantize(expected, kind))
                count += 1
    assert count == 40


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_storing_f32_in_16_bits_rounds_to_nearest_and_records_the_error(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(3).standard_normal((40, 50)).astype(np.float32)
    decoded, info = round_trip(tmp_path, x, dtype)
    expected = torch.from_numpy(x).to({"f16": torch.float16, "bf16": torch.bfloat16}[dtype]).float().numpy()
    np.testing.assert_array_equal(decoded.astype(np.float32), expected)
    error = (x - expected).astype(np.float64)
    assert info.error.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-6)
    assert info.error.maximum == pytest.approx(np.abs(error).max(), rel=1e-6)


@pytest.mark.parametrize(("source", "stored"), [("float16", "f32"), ("float32", "f64"), ("float16", "f64")])
def test_storing_in_a_wider_dtype_is_lossless(tmp_path, source, stored):
    x = np.random.default_rng(3).standard_normal((4, 5)).astype(source)
    decoded, info = round_trip(tmp_path, x, stored)
    np.testing.assert_array_equal(decoded, x)
    assert info.error is None


def test_storing_f64_as_f32_rounds_and_records_the_error(tmp_path):
    x = np.random.default_rng(3).standard_normal((4, 5))
    decoded, info = round_trip(tmp_path, x, "f32")
    np.testing.assert_array_equal(decoded, x.astype(np.float32))
    error = x - x.astype(np.float32)
    assert info.error.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-9)
    assert info.error.maximum == pytest.approx(np.abs(error).max(), rel=1e-9)


@pytest.mark.parametrize("dtype", ["f8_e4m3", "f8_e5m2"])
def test_every_float8_pattern_has_the_same_value_as_in_torch(dtype):
    torch = pytest.importorskip("torch")
    patterns = np.arange(256, dtype=np.uint8)
    kind = {"f8_e4m3": torch.float8_e4m3fn, "f8_e5m2": torch.float8_e5m2}[dtype]
    expected = torch.from_numpy(patterns).view(kind).float().numpy()
    np.testing.assert_array_equal(Elements(DTYPES[dtype], patterns).to_f32(), expected)


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.floating])
def test_nan_and_infinity_are_found_in_every_dtype(name):
    dtype = DTYPES[name]
    storage = np.dtype(f"u{dtype.size}")
    bits = 8 * dtype.size
    count = min(bits, 16)
    patterns = (np.arange(1 << count, dtype=np.uint64) << np.uint64(bits - count)).astype(storage)
    values = patterns.view(dtype.storage)
    finite = np.isfinite(Elements(dtype, values).to_f32()) if dtype.size < 4 else np.isfinite(values)
    for value, good in zip(values[::7], finite[::7], strict=True):
        assert Elements(dtype, np.array([value, value], dtype.storage)).all_finite() == good


def record(**changes):
    x = TensorRecord("x", (2, 64), "f32", "q4_0", {}, (Segment("blocks", 64, 72, "0" * 64),))
    error = qformat.codecs.base.MeasuredError(0.0, 0.0)
    return replace(x, **({"error": error} | changes))


def test_a_valid_record_has_a_codec():
    assert codec_of(record()).id == "q4_0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "q9"}, "unknown codec 'q9'"),
        ({"dtype": "f9"}, "unknown dtype 'f9'"),
        ({"dtype": "i32"}, "q4_0 cannot hold i32"),
        ({"params": {"deep": 1}}, "parameter 'deep' is unknown"),
        ({"error": None}, "an error is recorded where none can be, or missing"),
        ({"shape": (2, 65)}, "needs segments"),
        ({"segments": ()}, "needs segments"),
        ({"refusal": "tensor 'x' needs more"}, "needs more"),
    ],
)
def test_impossible_records_are_refused_by_name(changes, message):
    with pytest.raises(FormatError) as caught:
        codec_of(record(**changes))
    assert message in str(caught.value)
    assert "'x'" in str(caught.value)


def test_a_registered_class_is_usable_as_a_codec(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Halved(Raw):
        id = "halved"
        decoded = F32

    for table in (qformat.codecs.registry._codecs, qformat.codecs.registry._encoders):
        monkeypatch.setitem(table, "halved", Halved)
    decoded, info = round_trip(tmp_path, np.ones((2, 2), np.float32), "halved")
    assert info.codec == "halved"
    np.testing.assert_array_equal(decoded, 1)
