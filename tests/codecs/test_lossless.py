"""``lossless``: every float dtype bit for bit, and small."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file as load_safetensors

import qformat
from qformat.codecs.layout import Matrix
from qformat.codecs.registry import parse_type
from qformat.converters.arrays import ArrayTensor
from qformat.converters.convert import convert
from qformat.dtypes import DTYPES, Elements
from qformat.errors import SourceError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from qformat.readers.torch import TORCH_DTYPES, load_file
from tests.helpers.codecs import chunks_of, decode, encode
from tests.helpers.kernels import modules

FLOATS = ("f8_e4m3", "f8_e5m2", "f16", "bf16", "f32", "f64")
every_float = pytest.mark.parametrize("name", FLOATS)
BOTH = [each["float_parts"] for each in modules("float_parts")]
CODEC = parse_type("lossless")


def elements(name: str, patterns: np.ndarray) -> Elements:
    dtype = DTYPES[name]
    return Elements(dtype, np.ascontiguousarray(patterns.astype(f"u{dtype.size}")).view(dtype.storage))


def noise(name: str, *shape: int, seed: int = 0) -> np.ndarray:
    return (
        np.random.default_rng(seed).integers(0, 1 << 8 * DTYPES[name].size, shape, np.uint64, endpoint=False)
        if (DTYPES[name].size < 8)
        else np.random.default_rng(seed).integers(0, 2**64, shape, np.uint64)
    )


def natural(name: str, *shape: int, seed: int = 0) -> Elements:
    """Weights whose rows have different scales."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * rng.lognormal(-3, 1, (*shape[:-1], 1))
    if name.startswith("f8"):
        return elements(name, torch.from_numpy(x).to(TORCH_DTYPES[name]).view(torch.uint8).numpy())
    return Elements(DTYPES[name], Elements(DTYPES["f64"], x).cast(DTYPES[name]))


def back(source: Elements) -> tuple[bytes, Elements]:
    chunk = encode(CODEC, source).parts[0]
    return chunk, Elements(source.dtype, decode(CODEC, [chunk], source.data.shape, source.dtype))


def same(a: Elements, b: Elements) -> bool:
    return a.dtype is b.dtype and a.data.tobytes() == b.data.tobytes()


# ---- bit for bit


@every_float
@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (3, 33), (40, 64), (200, 257)])
def test_lossless_returns_random_bits_exactly(name, shape):
    source = elements(name, noise(name, *shape))
    chunk, found = back(source)
    assert same(source, found)
    assert len(chunk) <= source.data.nbytes * 1.02 + 60


@every_float
@pytest.mark.parametrize("shape", [(1, 5000), (700, 96), (5, 3)])
def test_lossless_returns_weights_exactly_in_fewer_bytes(name, shape):
    source = natural(name, *shape)
    chunk, found = back(source)
    assert same(source, found)
    assert source.data.size < 1000 or len(chunk) < 0.98 * source.data.nbytes


@every_float
@given(data=st.data())
def test_lossless_returns_mixtures_of_weights_zeros_and_noise_exactly(name, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 40)), int(rng.integers(1, 90)))
    patterns = natural(name, *shape, seed=seed).data.view(f"u{DTYPES[name].size}").astype(np.uint64)
    for share, values in (
        (data.draw(st.sampled_from([0, 0.01, 0.5, 1])), [0]),
        (data.draw(st.sampled_from([0, 0.1])), noise(name, 5, seed=seed)),
        (0.05, [1, 1 << (8 * DTYPES[name].size - 1), (1 << 8 * DTYPES[name].size) - 1]),  # subnormal, -0, a NaN
    ):
        chosen = rng.random(shape) < share
        patterns[chosen] = rng.choice(np.array(values, np.uint64), int(chosen.sum()))
    if rng.random() < 0.5:
        patterns[: shape[0] // 2] &= np.uint64(
            2**64 - 2 ** (8 * DTYPES[name].size // 2)
        )  # short mantissas in some rows
    source = elements(name, patterns)
    assert same(source, back(source)[1])


def test_lossless_returns_exponents_far_apart_exactly():
    exponents = np.arange(0, 1024, dtype=np.uint64)[None] << 5
    every = elements("bf16", np.repeat(exponents, 3, axis=0) | (np.arange(3, dtype=np.uint64)[:, None] << 15) & 0xFFFF)
    assert same(every, back(every)[1])
    rare = np.full(4000, 0x3F80, np.uint64)
    rare[::97] = 0x0001
    rare[1::197] = 0x7FC1
    source = elements("bf16", rare[None])
    chunk, found = back(source)
    assert same(source, found)
    assert len(chunk) < 2000


@every_float
def test_both_readers_return_lossless_tensors_bit_for_bit(name, tmp_path, reference):
    sources = {
        "natural": natural(name, 60, 70),
        "noise": elements(name, noise(name, 9, 40)),
        "wide": elements(name, (np.arange(1_050_000, dtype=np.uint64) % 7 == 0)[None] * np.uint64(3)),
        "empty": elements(name, np.zeros((0, 4))),
        "vector": natural(name, 1, 77),
    }
    tensors = [
        ArrayTensor(key, Elements(e.dtype, e.data[0] if key == "vector" else e.data)) for key, e in sources.items()
    ]
    path = tmp_path / "x.qf"
    recipe = Recipe.parse("lossless", ["vector=lossless"])
    convert(Checkpoint(tensors), path, recipe, allow_nonfinite=True)
    loaded = load_file(path)
    file = reference.read(path.read_bytes())
    with qformat.safe_open(path) as f:
        for tensor in tensors:
            info = f.info(tensor.name)
            assert (info.codec, info.dtype, info.error) == ("lossless", name, None)
            raw = loaded[tensor.name].contiguous().view(torch.uint8).numpy().tobytes()
            assert raw == tensor.elements.data.tobytes()
            found = f.get_tensor(tensor.name)
            expected = tensor.elements.data if DTYPES[name].native else tensor.elements.to_f32()
            assert found.tobytes() == np.ascontiguousarray(expected).tobytes()
            np.testing.assert_array_equal(reference.decode(file.tensors[tensor.name]), found)
        rows = f.get_rows("natural", [59, 3, 3])
        np.testing.assert_array_equal(rows, f.get_tensor("natural")[[59, 3, 3]])


def test_rows_of_lossless_tensors_of_several_chunks_are_read(tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 1_100_000)).astype(np.float32)
    qformat.save_file({"x": x}, tmp_path / "x.qf", "lossless")
    with qformat.safe_open(tmp_path / "x.qf") as f:
        assert f.info("x").segments[1].length == 4 * 9
        np.testing.assert_array_equal(f.get_rows("x", [2, 0]), x[[2, 0]])
        np.testing.assert_array_equal(f.get_tensor("x"), x)


def test_lossless_tensors_can_be_read_in_other_dtypes(tmp_path):
    x = natural("f16", 20, 30).data
    qformat.save_file({"x": x}, tmp_path / "x.qf", "lossless")
    with qformat.safe_open(tmp_path / "x.qf") as f:
        assert f.get_tensor("x").dtype == np.float16
        np.testing.assert_array_equal(f.get_tensor("x", np.float64), x)
        assert f.get_rows("x", 3, np.float32).dtype == np.float32
    assert load_file(tmp_path / "x.qf", dtype=torch.bfloat16)["x"].dtype == torch.bfloat16


def test_lossless_stores_nan_and_infinity_only_with_allow_nonfinite(tmp_path):
    x = natural("f32", 5, 40).data
    for pattern in (0x7FC12345, 0xFF800001, 0x7F800000, 0xFF800000):  # NaNs of two kinds, infinities
        x.view(np.uint32)[3, 7] = pattern
        with pytest.raises(SourceError, match=r"tensor 'x' .*NaN or infinity") as caught:
            qformat.save_file({"x": x}, tmp_path / "x.qf", "lossless")
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())
        qformat.save_file({"x": x}, tmp_path / "x.qf", "lossless", allow_nonfinite=True)
        with qformat.safe_open(tmp_path / "x.qf") as f:
            assert f.get_tensor("x").tobytes() == x.tobytes()
        assert load_file(tmp_path / "x.qf")["x"].numpy().tobytes() == x.tobytes()
        (tmp_path / "x.qf").unlink()


@every_float
@pytest.mark.parametrize("shape", [(1, 100_000), (300, 300), (50_000, 2)])
def test_lossless_adds_at_most_one_percent_to_random_bits(name, shape):
    source = elements(name, noise(name, *shape, seed=3))
    chunk, found = back(source)
    assert same(source, found)
    assert len(chunk) <= 1.01 * source.data.nbytes


# ---- sizes


@pytest.mark.parametrize(("name", "most"), [("f32", 26.2), ("f16", 13.55), ("bf16", 10.6)])
def test_lossless_minilm_takes_few_bits_per_weight(name, most, minilm):
    bits = weights = 0
    for array in load_safetensors(minilm / "model.safetensors").values():
        if array.ndim < 2 or array.dtype != np.float32:
            continue
        matrix = Matrix.of(array.shape)
        source = Elements(DTYPES[name], Elements(DTYPES["f32"], array).cast(DTYPES[name]))
        for chunk in chunks_of(CODEC, array.shape):
            part = source.data.reshape(-1)[chunk.elements(matrix)].reshape(chunk.rows, chunk.cols)
            encoded = encode(CODEC, Elements(source.dtype, np.ascontiguousarray(part)))
            assert encoded.entropy <= 8 * len(encoded.parts[0]) <= 1.01 * encoded.entropy + 4000
            bits += 8 * (len(encoded.parts[0]) + 4)
        weights += array.size
    assert bits / weights <= most


def test_lossless_sparse_weights_take_little_more_than_the_nonzero_ones():
    source = natural("f32", 500, 400)
    dense = len(back(source)[0])
    source.data[np.random.default_rng(1).random((500, 400)) < 0.9] = 0
    chunk, found = back(source)
    assert same(source, found)
    assert 8 * len(chunk) < 0.1 * 8 * dense + 0.55 * source.data.size


def test_lossless_groups_rows_of_short_mantissas():
    full, short = natural("f32", 300, 128), natural("f16", 300, 128)
    mixed = Elements(DTYPES["f32"], np.empty((600, 128), np.float32))
    mixed.data[::2], mixed.data[1::2] = full.data, short.to_f32()
    apart = len(back(full)[0]) + len(back(Elements(DTYPES["f32"], short.to_f32()))[0])
    assert len(back(mixed)[0]) < 1.01 * apart


# ---- kernels


@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_float_part_kernels_of_numba_and_numpy_give_identical_results(seed, count):
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 2**32, count).astype(np.uint32)
    upper = (patterns >> 16).astype(np.uint16)
    base = int(rng.integers(0, 1024))
    results = []
    for kernels in BOTH:
        heads, low, high = (np.zeros(-(-count // each), np.uint8) for each in (1, 2, 4))
        elsewhere = kernels.split_upper(upper, base, heads, low, high)
        values = (upper[heads == 255] >> 5) & 1023
        joined = np.empty_like(upper)
        kernels.join_upper(heads, low, high, base, values, joined)
        np.testing.assert_array_equal(joined, upper)
        parts = np.empty(count, np.uint16), np.empty(count, np.uint8), np.empty(count, np.uint8)
        kernels.split_32(patterns, *parts)
        whole = np.empty_like(patterns)
        kernels.join_32(*parts, whole)
        np.testing.assert_array_equal(whole, patterns)
        halves = np.empty(count, np.uint8), np.empty(count, np.uint8)
        kernels.split_16(upper, *halves)
        kernels.join_16(*halves, joined)
        np.testing.assert_array_equal(joined, upper)
        cols = next(c for c in (7, 5, 3, 2, 1) if count % c == 0)
        sums, used, counts = (
            np.empty(count // cols, np.int64),
            np.empty(count // cols, np.uint32),
            np.zeros(4096, np.int64),
        )
        kernels.row_sums(upper, cols, 5, 1023, sums)
        kernels.row_bits(patterns, cols, used)
        kernels.count_rows(upper, cols, (np.arange(count // cols) % 4).astype(np.uint8), 5, 1023, counts)
        results.append((elsewhere, heads, low, high, *parts, *halves, sums, used, counts))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
