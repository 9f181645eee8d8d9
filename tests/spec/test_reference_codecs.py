"""Bytes made by hand from the text of spec/codecs.md, decoded by the independent reader."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.helpers.reference import decode, reference

ERROR = {"rmse": "0.000000000e+00", "max": "0.000000000e+00"}
NLM, AFFINE = {"block": 64}, {"bits": 4, "group": 32, "sym": False, "scale": "bf16"}
LUT = {"scope": "tensor", "block": 128, "size": 8, "scale": "row"}
LUT_BLOCKS = {"scope": "block", "block": 128, "size": 4, "scale": "tensor"}

# Elements 0 to 15 of a block have the codes 0 to 15, elements 16 to 31 the codes 15 to 0.
UP_AND_DOWN = bytes.fromhex("f0e1d2c3b4a5968778695a4b3c2d1e0f")
Q = [*range(16), *range(15, -1, -1)]
# d 0x3e00 = 1.5, m 0xb400 = -0.25; then d 0x0001 = 2^-24, m 0x3c00 = 1: sums in steps of 2^-23, ties to even.
Q4_1 = bytes.fromhex("003e00b4") + UP_AND_DOWN + bytes.fromhex("0100003c") + UP_AND_DOWN
STEPS = [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7, 8]
# The integer 0x80010009: the fifth bit is set in elements 0, 3, 16 and 31.
Q5_1 = bytes.fromhex("003e00b409000180") + UP_AND_DOWN
# h = 512 | 0xbe0 << 10 | 3 << 22: r 0x4000 = 2, m 0xbe00 = -1.5, mapping 3; codes 15 in element 32 and 7 in element 1.
# h = 1 | 0x3c0 << 10 | 1 << 22: r 0x0020 = 2^-19, m 0x3c00 = 1, mapping 1; codes 11, 7, 3 in elements 0, 1 and 5.
NLM_BLOCKS = bytes.fromhex("0082ef f007") + bytes(30) + bytes.fromhex("01004f 0b0700000003") + bytes(26)
# Eight codes of 3 bits, from the lowest bit on: 111 000 100 010 110 001 101 011; and the same codes backwards.
CODES_3 = bytes.fromhex("4734d6") + bytes(9) + bytes.fromhex("773905") + bytes(9)
ENTRIES = [-2, -1, -0.5, 0.25, 1, 3, 65504, 2**-24]
# 4-bit codes 5, 9 in columns 0, 1; 15 in column 31; 3 in column 32; 14 in column 39; 15 in column 63, which is not there.
CODES_4 = bytes.fromhex("95") + bytes(14) + bytes.fromhex("f003") + bytes(2) + bytes.fromhex("e0") + bytes(11) + b"\xf0"
# 2-bit codes 0, 1, 2, 3 in columns 0 to 3 and 1, 3 in columns 128, 129, of two rows.
CODES_2 = (bytes.fromhex("e4") + bytes(31) + bytes.fromhex("0d") + bytes(7)) * 2


def halves(*values: float) -> bytes:
    return np.array(values, "<f2").tobytes()


# Codec, shape, params, segments, values.
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any], dict[str, bytes], list[float]]] = {}
VALUES = [1.5 * q - 0.25 for q in Q] + [1 + STEPS[q] * 2**-23 for q in Q]
CASES["q4_1"] = ("q4_1", (60,), {}, {"blocks": Q4_1}, VALUES[:60])
VALUES = [1.5 * (q + 16 * (i in {0, 3, 16, 31})) - 0.25 for i, q in enumerate(Q)]
CASES["q5_1"] = ("q5_1", (1, 32), {}, {"blocks": Q5_1}, VALUES)
SEGMENTS = {"scales": bytes.fromhex("c03f00c0"), "zeros": bytes([5, 200]), "codes": CODES_4}  # bf16: 1.5 and -2
VALUES = [0, 6, *[-7.5] * 29, 15, 394, *[400] * 6, 372]
CASES["affine zeros"] = ("affine", (1, 40), AFFINE, SEGMENTS, VALUES)
# 0x3eaaaaab = 11184811 * 2^-25, and 11184811 * 127 = 11097430 * 128 - 43
SEGMENTS = {"scales": bytes.fromhex("abaaaa3e"), "codes": bytes([255, 0, 128]) + bytes(29)}
VALUES = [11097430 * 2**-18, -11184811 * 2**-18, 0]
CASES["affine sym"] = ("affine", (1, 3), {"bits": 8, "group": "row", "sym": True, "scale": "f32"}, SEGMENTS, VALUES)
SEGMENTS = {"codebooks": halves(*ENTRIES), "scales": halves(2, -(2**-24)), "codes": CODES_3}
VALUES = [2 * ENTRIES[q] for q in (7, 0, 1, 2, 3, 4, 5, 6, 0, 0)]
VALUES += [-(2**-24) * ENTRIES[q] for q in (7, 6, 5, 4, 3, 2, 1, 0, 0, 0)]
CASES["lut tensor"] = ("lut", (2, 5, 2), LUT, SEGMENTS, VALUES)
SEGMENTS = {"codebooks": halves(*(10 * q + book for book in range(4) for q in range(4))), "codes": CODES_2}
VALUES = [0, 10, 20, 30, *[0] * 124, 11, 31, 2, 12, 22, 32, *[2] * 124, 13, 33]
CASES["lut block"] = ("lut", (2, 130), LUT_BLOCKS, SEGMENTS, VALUES)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_decodes_blocks_made_by_hand(case: str) -> None:
    codec, shape, params, segments, expected = CASES[case]
    values = decode(codec, shape, params, segments)
    assert values.dtype == np.float32
    assert values.tobytes() == np.array(expected, np.float32).tobytes()
    assert values.shape == shape
    wrong = [segments | {name: b"\0" + segments[name]} for name in segments]
    wrong += [segments | {name: segments[name][1:]} for name in segments]
    for bad in [*wrong, {"other": b""} | segments, dict(list(segments.items())[1:])]:
        with pytest.raises(reference.SpecError, match="segments"):
            decode(codec, shape, params, bad)
    for none in ((0, 32), (3, 0)):
        assert decode(codec, none, params, dict.fromkeys(segments, b"")).shape == none
        with pytest.raises(reference.SpecError, match="segments"):
            decode(codec, none, params, segments)
    with pytest.raises(reference.SpecError, match="dtype"):
        decode(codec, shape, params, segments, "i32")
    tensor = reference.Tensor("t", shape, "f32", codec, {"params": params}, tuple(segments.items()), "")
    with pytest.raises(reference.SpecError, match="must have an error"):
        reference.decode(tensor)


def test_the_reference_refuses_infinite_and_nan_scales() -> None:
    for case, name, at, number in (
        ("q4_1", "blocks", 2, "007c"),
        ("q5_1", "blocks", 0, "00fe"),
        ("affine zeros", "scales", 2, "807f"),
        ("affine sym", "scales", 2, "807f"),
        ("lut tensor", "codebooks", 14, "007e"),
        ("lut tensor", "scales", 0, "00fc"),
    ):
        codec, shape, params, segments, _ = CASES[case]
        changed = segments[name][:at] + bytes.fromhex(number) + segments[name][at + 2 :]
        with pytest.raises(reference.SpecError, match="infinite or NaN"):
            decode(codec, shape, params, segments | {name: changed})


def test_the_reference_decodes_nlm_blocks_made_by_hand() -> None:
    import reference_codecs

    t = [[Fraction(level, 16384) for level in row] for row in reference_codecs.NLM_LEVELS]
    first, second = [Fraction(-3, 2) + 2 * t[3][0]] * 64, [1 + t[1][0] / 2**19] * 6
    first[1], first[32] = Fraction(-3, 2) + 2 * t[3][7], Fraction(-3, 2) + 2 * t[3][15]
    second[0], second[1], second[5] = (1 + t[1][q] / 2**19 for q in (11, 7, 3))
    expected = np.array([float(value) for value in first + second], np.float32)  # in binary64 they are exact
    assert decode("nlm", (70,), NLM, {"blocks": NLM_BLOCKS}).tobytes() == expected.tobytes()
    assert decode("nlm", (0, 70), NLM, {"blocks": b""}).shape == (0, 70)
    for params, blocks in ((NLM, NLM_BLOCKS[:-1]), ({"block": 32}, NLM_BLOCKS), (NLM, b"\xff\x03" + NLM_BLOCKS[2:])):
        with pytest.raises(reference.SpecError):
            decode("nlm", (70,), params, {"blocks": blocks})


@pytest.mark.parametrize(
    ("codec", "params", "wrong"),
    [
        ("q4_1", {}, [{"block": 32}]),
        ("q5_1", {}, [{"bits": 5}]),
        ("nlm", NLM, [{"block": True}, {"block": "64"}, {"block": 256}, {"mapping": 0}]),
        ("affine", AFFINE, [{"bits": 5}, {"bits": "4"}]),
        ("affine", AFFINE, [{"group": 0}, {"group": 48}, {"group": "col"}, {"group": True}]),
        ("affine", AFFINE, [{"sym": 0}, {"sym": "false"}, {"scale": "f64"}, {"scale": 16}, {"zeros": "u8"}]),
        ("lut", LUT, [{"block": 256}, {"block": 0}, {"block": False}]),
        ("lut", LUT, [{"scope": "row"}, {"size": 32}, {"scale": "block"}, {"bits": 3}]),
        ("lut", LUT_BLOCKS, [{"scale": "row"}, {"block": 0}, {"block": 512}, {"size": "4"}]),
    ],
)
def test_the_reference_refuses_impossible_parameters(
    codec: str, params: dict[str, Any], wrong: list[dict[str, Any]]
) -> None:
    names = {"affine": ["scales", "zeros", "codes"], "lut": ["codebooks", *["scales"] * (params == LUT), "codes"]}
    segments = dict.fromkeys(names.get(codec, ["blocks"]), b"")  # of a tensor without elements
    assert decode(codec, (0,), params, segments).shape == (0,)
    missing = [{key: value for key, value in params.items() if key != name} for name in params]
    for bad in [*(params | change for change in wrong), *missing]:
        with pytest.raises(reference.SpecError, match=r"params|is missing|is .* none of|is not a multiple"):
            decode(codec, (0,), bad, segments)
