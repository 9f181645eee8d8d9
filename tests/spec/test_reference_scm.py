"""Layered tensors made from the text of spec/codecs.md, decoded by the independent reader."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from tests.helpers import scm_encoder as scm
from tests.helpers.files import Draft, drop, put, raw_tensor
from tests.helpers.reference import reference
from tests.helpers.stream_encoder import CHUNK_ELEMENTS, CONSTANT, RAW, join, random_symbols, stream


def check(chunks: Sequence[tuple[Sequence[int], scm.Choices]], dtype: str, shape: Any) -> scm.Case:
    """Assert that each layer, and all of them, decode to the values of the encoder."""
    case, known = scm.encode(chunks, dtype, shape)
    x = scm.source([pattern for patterns, _ in chunks for pattern in patterns], dtype)
    before: list[tuple[int, Fraction, float]] = []
    for number, layer in enumerate(known):
        values = scm.decode(case, number + 1)
        assert values.dtype == np.float32
        assert values.shape == shape
        values = values.reshape(-1)
        assert values.tobytes() == np.array([found for _, _, found in layer], np.float32).tobytes()
        widths = np.array([float(width) for _, width, _ in layer])
        if before:
            assert np.all(widths <= [float(width) for _, width, _ in before])
        errors = np.abs(values.astype(np.float64) - x.astype(np.float64))
        errors[np.isinf(values)] = 0  # writers refuse that
        offset = bytes([128] * 32) == chunks[0][1].offsets
        # Beyond the cell there is only the rounding to binary32.
        assert np.all(errors <= widths * (0.5 if offset else 1) + np.abs(x.astype(np.float64)) * 2.0**-22)
        before = layer
    everything = scm.decode(case)
    if case.params["lossless"]:
        assert everything.dtype == x.dtype
        assert everything.reshape(-1).tobytes() == x.tobytes()
    else:
        assert everything.tobytes() == scm.decode(case, len(known)).tobytes()
    assert everything.shape == shape
    return case


# ---- round trips


@settings(max_examples=150)
@given(scm.tensors())
def test_the_reference_decodes_scm_tensors_of_the_test_encoder(
    drawn: tuple[str, list[int], scm.Choices, tuple[int, int]],
) -> None:
    dtype, patterns, choices, shape = drawn
    check([(patterns, choices)], dtype, shape)


@pytest.mark.parametrize("dtype", scm.MANTISSA)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_reference_decodes_every_part_of_scm_tensors(dtype: str, sparse: bool) -> None:
    """More than 2048 elements, so that parts come again; ends in the midst of each part's turn, each with its own section."""
    rng = np.random.default_rng(sparse)
    magnitudes = [scm.largest_below(dtype, Fraction(float(u))) for u in rng.exponential(1, 2500)]
    patterns = [int(m) + scm.SIGN[dtype] * int(rng.integers(2)) for m in magnitudes]
    for i in range(0, len(patterns), 7):
        patterns[i] &= scm.SIGN[dtype]
    ends = [0, 5, 32, 33, 70, 70, 128, 200, 511, 512]
    modes = iter(lambda: bool(rng.integers(2)), None)
    choices = scm.Choices(
        (Fraction(1, 8), Fraction(3, 16)), rng.bytes(32), ends, sparse, False, [0] * 25, lambda: next(modes)
    )
    check([(patterns, choices)], dtype, (25, 10, 10))


@pytest.mark.parametrize("dtype", scm.MANTISSA)
def test_the_reference_decodes_extreme_scm_values_in_cells_of_all_widths(dtype: str) -> None:
    """The largest finite number, the smallest subnormal one, both zeros, in cells of all widths."""
    m = scm.MANTISSA[dtype]
    for exponent in (-100, -30, -6, 0, 15, 100, 126):
        step = Fraction(2) ** exponent
        top = scm.largest_below(dtype, 2**22 * step - Fraction(1, 2**200))
        magnitudes = [0, 1, 2, 2**m - 1, 2**m, top, top - 1, top // 2]
        magnitudes += [
            scm.largest_below(dtype, step),
            scm.largest_below(dtype, step) - 1,
            scm.largest_below(dtype, 7 * step) + 1,
        ]
        both = [s + min(max(p, 0), top) for p in magnitudes for s in (0, scm.SIGN[dtype])]
        for sparse in (False, True):
            for ends in ((0,), (512,), (3, 64, 65, 400)):
                choices = scm.Choices((step, step), ends=ends, sparse=sparse, z=(0,))
                check([(both, choices)], dtype, (1, len(both)))
    assert top == scm.LARGEST[dtype]


def test_the_reference_decodes_sparse_scm_chunks_without_elements() -> None:
    for z in (None, (0, 1, 2), (23, 23, 23)):
        for wide in (False, True):
            choices = scm.Choices((Fraction(1), Fraction(2)), ends=(3, 512), sparse=True, wide=wide, z=z)
            check([([0, 1 << 31, 0, 1 << 31, 0, 0, 0, 0, 1 << 31], choices)], "f32", (3, 3))
    # All count.
    choices = scm.Choices((Fraction(1), Fraction(2)), ends=(3, 512), sparse=True, z=(0,))
    check([([0x3F800000, 0xBF800001], choices)], "f32", (2,))
    check([([0xBF800001], choices)], "f32", ())


@pytest.mark.parametrize("shape", [(5, 200_000), (2, CHUNK_ELEMENTS + 1), (CHUNK_ELEMENTS + 1,)])
def test_the_reference_cuts_scm_tensors_into_chunks_as_the_spec_says(shape: tuple[int, ...]) -> None:
    """Each with its own end, and each of another kind; most elements are zeros."""
    sizes = {5: [400_000, 400_000, 200_000], 2: [CHUNK_ELEMENTS, 1] * 2}.get(shape[0], [CHUNK_ELEMENTS, 1])
    chunks: list[tuple[list[int], scm.Choices]] = []
    for number, size in enumerate(sizes):
        patterns = [0] * size
        patterns[-1] = 0xBC00 + number
        patterns[:: size // 90 + 1] = [0x3C01 + number + i for i in range(-(-size // (size // 90 + 1)))]
        ends = (number, 40 + number, 512 - number)
        rows = size // 200_000 if shape[0] == 5 else 1
        chunks.append((patterns, scm.Choices((Fraction(1, 4), Fraction(1)), ends=ends, sparse=True, z=[0] * rows)))
    case, _ = scm.encode(chunks, "f16", shape)
    x = scm.source([pattern for patterns, _ in chunks for pattern in patterns], "f16")
    assert scm.decode(case).tobytes() == x.tobytes()
    for k in (1, 2, 3):
        values = scm.decode(case, k).reshape(-1)
        assert np.abs(values - x).max() <= (0.5, 0.5, 2**-8)[k - 1]
        assert np.all(values[x == 0] == 0)


def test_the_reference_decodes_large_dense_scm_chunks() -> None:
    """Two chunks of 300,000 weights, with coded streams; the reader needs some seconds."""
    count = 300_000
    # All of one phase's elements take turns with the other's, in blocks of 32.
    block = np.arange(count) // 32
    t = np.array(random_symbols(count, 15, 3))
    first = [struct.pack("<HB", 0, 0)]
    signs = np.array(random_symbols(count, 2, 4))
    for phase in (0, 1):
        first.append(stream(join(t[block % 2 == phase].tolist(), 16), 16))
        first += [b"\0", stream(join(signs[block % 2 == phase].tolist(), 2), 2, RAW)]
    bits = np.random.default_rng(0).integers(0, 2, count)
    second = [struct.pack("<H", 64)]
    for phase in (0, 1):
        second += [b"\0", stream(join(bits[block % 2 == phase].tolist(), 2), 2, RAW)]
    choices = scm.Choices((Fraction(1), Fraction(3)))
    segments = {
        "grid": scm.grid(choices),
        "layer.1": scm.cut([b"".join(first)] * 2),
        "layer.2": scm.cut([b"".join(second)] * 2),
    }
    case = scm.Case("bf16", (2, count), {"layers": 2, "lossless": False}, segments)
    steps = np.where(block % 2 == 0, 1, 3) * np.where(signs == 1, -1, 1)
    expected = ((2 * t + bits + 0.5) * steps / 2).astype(np.float32)
    assert scm.decode(case).tobytes() == expected.tobytes() * 2
    assert scm.decode(case, 1).tobytes() == ((t + 0.5) * steps).astype(np.float32).tobytes() * 2


# ---- by hand


def test_the_reference_decodes_scm_tensors_made_by_hand() -> None:
    assert scm.decode(scm.BY_HAND, 1).tolist() == [1.5, -0.5, 20.5]
    # Magnitudes 2, 1, 40 and cells 1, 0, 3: only the first one has the other o.
    assert scm.decode(scm.BY_HAND, 2).tolist() == [1.125, -0.75, 20.25]
    assert scm.decode(scm.BY_HAND, 3).tolist() == [1.375, -0.625, 20.125]
    assert scm.decode(scm.BY_HAND).tolist() == [1.25, -0.5, 20]
    assert scm.decode(scm.LOSSY).tolist() == [1.125, -0.75, 20.25]
    assert scm.decode(scm.SPARSE, 2).tolist() == [[1.125, 0, 0], [-0.75, 20.25, 0], [0, 0, 0]]
    expected = np.array([[1.25, 0, -0.0], [-0.5, 20, 0], [0, 0, -0.0]], np.float32)
    assert scm.decode(scm.SPARSE).tobytes() == expected.tobytes()
    assert not np.any(np.signbit(scm.decode(scm.SPARSE, 1)[expected == 0]))
    for layers in (0, 4, -1):
        with pytest.raises(reference.SpecError, match="there are 3 layers"):
            scm.decode(scm.BY_HAND, layers)


def test_scm_records_naming_fewer_layers_decode_to_those_layers() -> None:
    for case, most in ((scm.BY_HAND, 3), (scm.LOSSY, 2), (scm.SPARSE, 2)):
        for count in range(1, most + 1):
            names = list(case.segments)[: count + 1]
            segments = {name: case.segments[name] for name in names}
            fewer = scm.Case(case.dtype, case.shape, {"layers": count, "lossless": False}, segments)
            assert read_and_decode(fewer.draft().pack()).tobytes() == scm.decode(case, count).tobytes()


def test_the_reference_reads_only_the_requested_scm_layers() -> None:
    broken = scm.BY_HAND.with_segments(layer_3=b"", rest=b"\0")
    assert scm.decode(broken, 2).tolist() == [1.125, -0.75, 20.25]
    for layers in (3, None):
        with pytest.raises(reference.SpecError, match="are needed"):
            scm.decode(broken, layers)
    other = reference.Tensor("t", (0,), "f32", "f32", {"params": {}}, (("data", b""),), "")
    assert reference.decode(other).shape == (0,)
    with pytest.raises(reference.SpecError, match="has no layers"):
        reference.decode(other, layers=1)


def test_scm_magnitudes_and_sums_are_rounded_before_the_product() -> None:
    """Magnitude 2^21 + 1, then the bits 0, 0, 1: t = 2^24 + 9, which is rounded to 2^24 + 8; with ½ it would not be."""
    step = bytes.fromhex("00002040")  # 2.5
    first = bytes.fromhex("0000 00 02000000010f 01002000 00020000000100")
    second = bytes.fromhex("8100 00020000000100 00020000000100 00020000000101")
    segments = {"grid": step * 2 + bytes([128] * 32), "layer.1": scm.cut([first]), "layer.2": scm.cut([second])}
    case = scm.Case("f32", (), {"layers": 2, "lossless": False}, segments)
    expected = np.float32(2**24 + 8) * np.float32(2.5 / 8)
    assert scm.decode(case).tobytes() == expected.tobytes()


def test_scm_signs_may_be_stored_by_classes() -> None:
    """Signs of magnitudes 0, 1, and 2 and more: those of one element each."""
    signs = bytes.fromhex("00 020000000102")
    assert scm.LAYER_1.endswith(signs)
    first = scm.LAYER_1.removesuffix(signs) + bytes.fromhex("01 020000000100 020000000101 020000000101")
    case = scm.BY_HAND.with_segments(layer_1=scm.cut([first]))
    assert scm.decode(case, 1).tolist() == [-1.5, 0.5, -20.5]
    assert scm.decode(case).tolist() == [-1.25, 0.5, -20]


def test_scm_zeros_keep_their_sign() -> None:
    case = scm.LOSSY.with_segments(grid=scm.GRID[:8] + bytes(32))
    expected = np.array([1, -0.0, 20], np.float32)
    assert scm.decode(case, 1).tobytes() == expected.tobytes()


def test_scm_elements_of_two_phases_decode_as_made_by_hand() -> None:
    """Elements from 32 on are in phase 1: signs stand with their phase's magnitudes; r < 16 is a class of both phases."""
    patterns = [*[0x3C00 + i % 2 for i in range(31)], 0x3009, 0xC401, 0x4400, 0x380F, 0x3025]
    # From 1 on in cells of 2^-9, from 4 on of 2^-7: class 2. From 1/8 on of 2^-9, from 1/2 on of 2^-7: r = 16 and classes
    # 16 and 19. From 1/8 on of 2^-7: r = 64, class 21, y = 1.
    first = bytes.fromhex("0000 00") + stream([0xFF] * 16, 256, CONSTANT) + struct.pack("<32I", *[512] * 31, 64)
    first += b"\0" + stream([0] * 4, 256, CONSTANT)
    first += stream([0xFF] * 2, 256, CONSTANT) + struct.pack("<4I", 512, 512, 64, 16) + b"\0" + scm.constant(1)
    rest = scm.constant(0) + stream([*[i % 2 for i in range(31)], 1, 0], 256, RAW) + scm.constant(9, 15, 18, 1)
    steps = np.array([2.0**-9, 2.0**-7], "<f4").tobytes()
    segments = {"grid": steps + bytes(32), "layer.1": scm.cut([first]), "rest": scm.cut([rest])}
    case = scm.Case("f16", (36,), {"layers": 1, "lossless": True}, segments)
    assert scm.decode(case, 1).tolist() == [*[1] * 31, 0.125, -4, 4, 0.5, 0.125]
    assert scm.decode(case).view(np.uint16).tolist() == patterns


def test_scm_magnitudes_may_be_stored_elsewhere_without_need() -> None:
    first = scm.LAYER_1.replace(bytes.fromhex("010f 14000000"), bytes.fromhex("0f0f 01000000 14000000"))
    assert scm.decode(scm.BY_HAND.with_segments(layer_1=scm.cut([first]))).tolist() == [1.25, -0.5, 20]


def test_padding_digits_in_scm_symbols_are_ignored() -> None:
    changed = {
        "layer_1": scm.cut([scm.LAYER_1.replace(b"\1\x0f", b"\1\xff").replace(b"\1\2", b"\1\xfa")]),
        "layer_2": scm.cut([scm.LAYER_2.replace(b"\1\2", b"\1\xfa")]),
    }
    assert scm.decode(scm.BY_HAND.with_segments(**changed)).tolist() == [1.25, -0.5, 20]
    # A bit for each element that counts, signs of the others, and the last bits of the rest.
    changed = {
        "layer_1": scm.cut([scm.SPARSE_1.replace(b"\x19\0", b"\x19\xfe")]),
        "rest": scm.cut([scm.SPARSE_REST.replace(b"\1\x22", b"\1\xe2")[:-1] + b"\x80"]),
    }
    assert scm.decode(scm.SPARSE.with_segments(**changed)).tobytes() == scm.decode(scm.SPARSE).tobytes()


# ---- refusals


@pytest.mark.parametrize(
    ("case", "name", "chunk", "old", "new", "message"),
    scm.WRONG,
    ids=[f"{number} {wrong[1]}" for number, wrong in enumerate(scm.WRONG)],
)
def test_the_reference_refuses_wrong_scm_chunks(
    case: scm.Case, name: str, chunk: bytes, old: str, new: str, message: str
) -> None:
    assert case.segments[name] == scm.cut([chunk])
    assert bytes.fromhex(old) in chunk
    wrong = case.with_segments(**{name: scm.cut([chunk.replace(bytes.fromhex(old), bytes.fromhex(new), 1)])})
    with pytest.raises(reference.SpecError, match=f"^tensor 't': {name}.*({message})"):
        scm.decode(wrong)


def test_the_reference_refuses_nonfinite_scm_patterns() -> None:
    """One element of the cell from 0 to 2^100."""
    first = bytes.fromhex("0000 00 020000000100 00020000000100")
    segments = {"grid": bytes.fromhex("00008071") * 2 + bytes(32), "layer.1": scm.cut([first])}
    not_finite = "is not that of a finite number"

    def values(dtype: str, rest: bytes) -> np.ndarray:
        case = scm.Case(dtype, (1,), {"layers": 1, "lossless": True}, segments | {"rest": scm.cut([rest])})
        found: np.ndarray = scm.decode(case)
        return found

    # Of f16, z = 0: a = 0, r = 0x7bff, b = 15, y = 9. The upper part, bits 0 to 7, bit 8.
    assert values("f16", scm.constant(0, 0x3D, 0xFF, 1)).tolist() == [65504]
    for wrong in ((0, 0x3E, 0, 0), (0, 0x3E, 1, 0), (0, 0xFF, 0xFF, 1)):
        with pytest.raises(reference.SpecError, match=not_finite):
            values("f16", scm.constant(*wrong))
    # Of bf16, z = 7: r = 227, b = 8, y = 2. The upper part, bits 0 and 1.
    assert values("bf16", scm.constant(7, 0x3F, 2)).tolist() == [2.0**127]
    assert values("bf16", scm.constant(7, 0x3F, 0xFE)).tolist() == [2.0**127]
    for upper, lower in ((0x3F, 3), (0x40, 0), (0xFF, 3)):
        with pytest.raises(reference.SpecError, match=not_finite):
            values("bf16", scm.constant(7, upper, lower))
    # Of f32, z = 0: r = 0x71800000, b = 31, y = 25. The upper part, bits 0 to 7, 8 to 15, 16 to 23, bit 24.
    assert values("f32", scm.constant(0, 0x20, 1, 2, 3, 1)).view(np.uint32).tolist() == [0x41030201]
    assert values("f32", scm.constant(0, 0x3F, 1, 2, 0x7F, 1)).view(np.uint32).tolist() == [0x7F7F0201]
    for wrong in (
        (0x3F, 1, 2, 0x80, 1),
        (0x80, 0, 0, 0, 0),
        (0xFF, 1, 2, 3, 1),
    ):  # 2^32 and more would be finite in 32 bits
        with pytest.raises(reference.SpecError, match=not_finite):
            values("f32", scm.constant(0, *wrong))


def test_scm_layers_that_overflow_decode_to_infinity() -> None:
    """The last value exceeds binary32, which writers refuse; later layers may still be right."""
    step = bytes.fromhex("0000807e")  # 2^126
    assert scm.decode(scm.LOSSY.with_segments(grid=step * 2 + scm.GRID[8:]), 1).tolist() == [
        1.5 * 2.0**126,
        -(2.0**125),
        float("inf"),
    ]
    # The largest number of f32 in the cell from 1.875 × 2^126 × 2 on, and o = 255 / 256 of it.
    for dtype, largest in (("f32", 0x7F7FFFFF), ("bf16", 0x7F7F)):
        choices = scm.Choices((Fraction(15, 8) * 2**125,) * 2, bytes([255] * 32), z=(0,))
        case = check([([largest, largest + scm.SIGN[dtype]], choices)], dtype, (2,))
        assert scm.decode(case, 1).tolist() == [float("inf"), -float("inf")]


BAD_STEPS = ("00000000", "000080bf", "0100803f", "8000803f")
BAD_SECOND_STEPS = (
    *("0000807f", "0000c07f", "0001807e", "0000007f"),
    *("00ff7f0d", "000080f1", "00000080", "00010000"),
)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (b"", "0 bytes"),
        (scm.GRID[:-1], "39 bytes"),
        (scm.GRID + b"\0", "41 bytes"),
        *((bytes.fromhex(step) + scm.GRID[4:], "a step of") for step in BAD_STEPS),
        *((scm.GRID[:4] + bytes.fromhex(step) + scm.GRID[8:], "a step of") for step in BAD_SECOND_STEPS),
    ],
)
def test_the_reference_refuses_wrong_scm_grids(grid: bytes, message: str) -> None:
    with pytest.raises(reference.SpecError, match=message):
        scm.decode(scm.BY_HAND.with_segments(grid=grid))


def test_the_reference_decodes_the_smallest_and_the_largest_scm_step() -> None:
    for step, size in (("0000800d", 2.0**-100), ("0000007c", 2.0**121), ("00ffff3f", 2 - 2.0**-15)):
        case = scm.LOSSY.with_segments(grid=bytes.fromhex(step) * 2 + scm.GRID[8:])
        assert scm.decode(case, 1).tolist() == [1.5 * size, -0.5 * size, 20.5 * size]


@pytest.mark.parametrize(
    "change",
    [
        *({"layers": layers} for layers in (0, 65, 2**53 - 1, True, "3", 2, 4)),
        *({"lossless": lossless} for lossless in (1, 0, "true", False)),
        {"unit": 1},
        {"coded": True},
    ],
)
def test_the_reference_refuses_impossible_scm_parameters(change: dict[str, Any]) -> None:
    wrong = scm.Case("f32", (3,), scm.BY_HAND.params | change, scm.BY_HAND.segments)
    with pytest.raises(reference.SpecError, match=r"'layers'|'lossless'|unknown params|segments are|segment .* must"):
        scm.decode(wrong)
    for key in scm.BY_HAND.params:
        params = {k: v for k, v in scm.BY_HAND.params.items() if k != key}
        with pytest.raises(reference.SpecError, match=f"'{key}' is missing"):
            scm.decode(scm.Case("f32", (3,), params, scm.BY_HAND.segments))


def test_the_reference_decodes_at_most_64_scm_layers() -> None:
    choices = scm.Choices((Fraction(1), Fraction(2)), ends=tuple(range(64)), z=(0,))
    check([([0x3F800001] * 70, choices)], "f32", (70,))
    choices.ends = tuple(range(65))
    with pytest.raises(reference.SpecError, match="'layers' 65 is not 1 to 64"):
        check([([0x3F800001] * 70, choices)], "f32", (70,))


@pytest.mark.parametrize("dtype", ["f64", "f8_e4m3", "f8_e5m2", "i32", "bool", "f128"])
def test_the_reference_refuses_scm_tensors_of_other_dtypes(dtype: str) -> None:
    with pytest.raises(reference.SpecError, match="dtype"):
        scm.decode(scm.Case(dtype, (3,), scm.BY_HAND.params, scm.BY_HAND.segments))


def test_the_reference_refuses_wrong_scm_segments() -> None:
    every = scm.BY_HAND.segments
    for shape in ((3,), (0,)):
        segments = every if shape == (3,) else dict.fromkeys(every, b"")
        measures = scm.BY_HAND.measures if shape == (3,) else scm.ZERO
        scm.decode(scm.Case("f32", shape, scm.BY_HAND.params, segments, measures))
        without = [{k: v for k, v in segments.items() if k != name} for name in segments]
        backwards = dict(reversed(segments.items()))
        renamed = {name.replace(".", ""): content for name, content in segments.items()}
        for wrong in (*without, backwards, renamed, segments | {"layer.4": b""}, segments | {"more": b""}, {}):
            with pytest.raises(reference.SpecError, match=r"segments are|segment .* must (not )?have"):
                scm.decode(scm.Case("f32", shape, scm.BY_HAND.params, wrong, measures))


@pytest.mark.parametrize("shape", [(0,), (0, 70), (3, 0), (0, 2**53 - 1), (2**53 - 1, 0)])
@pytest.mark.parametrize("dtype", scm.MANTISSA)
def test_the_reference_decodes_scm_tensors_without_elements(dtype: str, shape: tuple[int, ...]) -> None:
    for lossless in (False, True):
        names = ["grid", "layer.1", "layer.2", *["rest"] * lossless]
        params = {"layers": 2, "lossless": lossless}
        case = scm.Case(dtype, shape, params, dict.fromkeys(names, b""), scm.ZERO)
        values = scm.decode(case)
        assert values.shape == shape
        assert values.dtype == (np.float16 if lossless and dtype == "f16" else np.float32)
        assert scm.decode(case, 1).dtype == np.float32
        for name in names:
            with pytest.raises(reference.SpecError, match="is not empty"):
                scm.decode(case.with_segments(**{name: bytes(40 if name == "grid" else 4)}))
        with pytest.raises(reference.SpecError, match="no elements"):
            scm.decode(scm.Case(dtype, shape, params, case.segments))


def test_the_reference_refuses_wrong_scm_chunk_lengths() -> None:
    for name, content in scm.BY_HAND.segments.items():
        if name == "grid":
            continue
        for wrong, message in (
            (b"", "are needed|too few"),
            (content[:3], "are needed"),
            (content[:-1], "have the sum"),
            (content + b"\0", "have the sum"),
            (content[1:2] + content[1:], "have the sum"),
            (struct.pack("<I", len(content) - 3) + content[4:] + b"\0", "left over"),
            (struct.pack("<I", len(content) - 3) + bytes(4) + content[4:], "have the sum"),
            (bytes(4), "are needed|fewer than 1"),
        ):
            with pytest.raises(reference.SpecError, match=message):
                scm.decode(scm.BY_HAND.with_segments(**{name: wrong}))


def test_only_chunks_of_the_first_scm_layer_are_padded() -> None:
    """40,000 elements, which need 40 bytes; all of them are zeros and do not count."""
    stored = {"layer.1": bytes.fromhex("0000 01") + scm.constant(0), "layer.2": bytes(2), "rest": scm.constant(0, 0)}
    right = {"grid": scm.GRID} | {
        name: scm.cut([chunk.ljust(40 * (name == "layer.1"), b"\0")]) for name, chunk in stored.items()
    }
    case = scm.Case("f32", (200, 200), {"layers": 2, "lossless": True}, right)
    assert not np.any(scm.decode(case))
    for name, chunk in stored.items():
        for size in (30, 39, 40, 41) if name == "layer.1" else (len(chunk) + 1, 40):
            wrong = case.with_segments(**{name: scm.cut([chunk.ljust(size, b"\0")])})
            if (name, size) != ("layer.1", 40):
                with pytest.raises(reference.SpecError, match=r"left over|fewer than 40|too few for 40000"):
                    scm.decode(wrong)
    for filling in (b"\1".rjust(31, b"\0"), b"\1".ljust(31, b"\0")):
        with pytest.raises(reference.SpecError, match="left over"):
            scm.decode(case.with_segments(layer_1=scm.cut([stored["layer.1"] + filling])))


def test_the_reference_refuses_scm_tensors_with_too_many_elements() -> None:
    """Refused before the list of chunks or the result is made."""
    for shape in ((2**53 - 1,), (2**50, 8), (1, 2**52), (2**26, 2**26), (64 * 1024,)):
        case = scm.Case("f32", shape, scm.BY_HAND.params, scm.BY_HAND.segments)
        with pytest.raises(reference.SpecError, match="too few for"):
            scm.decode(case)


def test_truncated_or_changed_scm_segments_raise_only_spec_errors() -> None:
    """No other error than `SpecError` leaves the reader."""
    rng = np.random.default_rng(0)
    patterns = [scm.largest_below("f32", Fraction(float(u))) for u in rng.exponential(4, 300)]
    patterns = [0 if i % 5 == 0 else int(pattern) for i, pattern in enumerate(patterns)]
    modes = iter(lambda: bool(rng.integers(2)), None)
    choices = scm.Choices(
        (Fraction(1), Fraction(2)), rng.bytes(32), (0, 40, 200), True, False, [0] * 10, lambda: next(modes)
    )
    case, _ = scm.encode([(patterns, choices)], "f32", (10, 30))
    scm.decode(case)
    refused = 0
    for name, content in case.segments.items():
        for end in rng.integers(4, len(content), 6):
            body = content[4:end]
            cuts = [content[:end], body, struct.pack("<I", len(body)) + body]
            for wrong in cuts:
                with pytest.raises(reference.SpecError):
                    scm.decode(case.with_segments(**{name: wrong}))
        for _ in range(60):
            changed = bytearray(content)
            changed[rng.integers(len(content))] ^= rng.integers(1, 256)
            try:
                scm.decode(case.with_segments(**{name: bytes(changed)}))
            except reference.SpecError:
                refused += 1
    assert refused > 60


# ---- records

LAST = ("segments", -1, "error")  # of LOSSY, that of its last layer
TENSOR = ("tensors", "t")
OTHER = {"rmse": "2.000000000e+00", "max": "1.000000000e+00"}
WRONG_RECORDS: dict[str, tuple[scm.Case, Any, str]] = {
    "no range": (scm.LOSSY, drop(*TENSOR, "range"), "'range' is missing"),
    "no error": (scm.LOSSY, drop(*TENSOR, "error"), "must have an error"),
    "no error of a layer": (scm.LOSSY, drop(*TENSOR, *LAST), "'layer.2' must have an error"),
    "no error of the first layer": (scm.BY_HAND, drop(*TENSOR, "segments", 1, "error"), "'layer.1' must have an error"),
    "an error of all that is kept": (scm.BY_HAND, put(*TENSOR, "error", OTHER), "must not have an error"),
    "an error of the grid": (
        scm.LOSSY,
        put(*TENSOR, "segments", 0, "error", OTHER | {"mean": scm.ZERO}),
        "'grid' must not",
    ),
    "an error of the rest": (
        scm.BY_HAND,
        put(*TENSOR, *LAST, OTHER | {"mean": scm.ZERO}),
        "'rest' must not have an error",
    ),
    "another root mean square": (scm.LOSSY, put(*TENSOR, "error", OTHER), "not that of its last layer"),
    "another largest error": (scm.LOSSY, put(*TENSOR, *LAST, "max", scm.ZERO), "not that of its last layer"),
    "no mean": (scm.LOSSY, drop(*TENSOR, *LAST, "mean"), "'mean' is missing"),
    "no root mean square": (scm.LOSSY, drop(*TENSOR, "segments", 1, "error", "rmse"), "'rmse' is missing"),
    "no largest error": (scm.LOSSY, drop(*TENSOR, "segments", 1, "error", "max"), "'max' is missing"),
    "a mean of another form": (scm.LOSSY, put(*TENSOR, *LAST, "mean", "1.0e+00"), "mean is not in the form"),
    "a mean below 0": (scm.LOSSY, put(*TENSOR, *LAST, "mean", "-1.000000000e+00"), "mean is not in the form"),
    "a mean that is a number": (scm.LOSSY, put(*TENSOR, *LAST, "mean", 0), "'mean' is missing or not of type"),
    "an error that is a list": (scm.LOSSY, put(*TENSOR, *LAST, []), "'error' is missing or not of type"),
    "a range of another form": (scm.LOSSY, put(*TENSOR, "range", "1"), "range is not in the form"),
    "a range below 0": (scm.LOSSY, put(*TENSOR, "range", "-1.000000000e+00"), "range is not in the form"),
    "a range of three digits": (scm.LOSSY, put(*TENSOR, "range", "1.000000000e-100"), "range is not in the form"),
    "a range that is a number": (scm.LOSSY, put(*TENSOR, "range", 1), "'range' is missing or not of type"),
    "an unknown key of a layer": (scm.LOSSY, put(*TENSOR, "segments", 1, "must_understand", ["mean"]), "'mean'"),
}


def read_and_decode(data: bytes) -> np.ndarray:
    values: np.ndarray = reference.decode(reference.read(data).tensors["t"])
    return values


@pytest.mark.parametrize("name", WRONG_RECORDS)
def test_the_reference_refuses_wrong_scm_records(name: str) -> None:
    case, edit, message = WRONG_RECORDS[name]
    assert read_and_decode(case.draft().pack()).tobytes() == scm.decode(case).tobytes()
    draft = case.draft()
    edit(draft)
    with pytest.raises(reference.SpecError, match=message):
        read_and_decode(draft.pack())


def test_known_keys_of_scm_records_may_be_listed_in_must_understand() -> None:
    draft = scm.BY_HAND.draft()
    put(*TENSOR, "must_understand", ["range", "error"])(draft)
    put(*TENSOR, "segments", 1, "must_understand", ["error"])(draft)
    put(*TENSOR, "segments", 1, "error", "more", 7)(draft)
    assert read_and_decode(draft.pack()).tolist() == [1.25, -0.5, 20]


def test_ranges_and_layer_errors_of_other_codecs_are_refused() -> None:
    error = dict.fromkeys(["rmse", "max", "mean"], scm.ZERO)
    for edit in (put(*TENSOR, "range", scm.ZERO), put(*TENSOR, "segments", 0, "error", error)):
        draft = Draft(tensors=[raw_tensor("t", "f32", np.ones(3, "<f4"))])
        assert read_and_decode(draft.pack()).tolist() == [1, 1, 1]
        edit(draft)
        with pytest.raises(reference.SpecError, match="is not layered"):
            read_and_decode(draft.pack())
        put(*TENSOR, "codec", "other")(draft)
        with pytest.raises(reference.SpecError, match="unknown codec"):
            read_and_decode(draft.pack())
