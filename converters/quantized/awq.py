"""AWQ, in the layout of its GEMM kernels: 4-bit codes along the rows of the transposed matrix, eight to a word, interleaved.

``qweight [in, out / 8]``, ``qzeros [groups, out / 8]`` and ``scales [groups, out]``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.converters.quantized import coded
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import U8, CodedTensor, Encode
from qformat.converters.quantized.gptq import claimed_group
from qformat.converters.quantized.layer import Layer
from qformat.pipeline.source import SourceTensor

ROLES = ("qweight", "qzeros", "scales")
METHODS = (
    *("awq", "awq_marlin", "autoawq", "auto_awq", "auto-awq", "llm-awq", "rtn"),
    *("auto-round", "auto_round", "autoround", "intel/auto-round", "inc", "intel"),
)
#: labels of this layout in configuration files
FORMATS = ("gemm", "awq", "auto_round:auto_awq", "auto_round:awq", "awq_gemm")

# Of four bytes, the low halves hold the rows 0, 4, 1, 5 of eight and the high halves 2, 6, 3, 7
_LOW, _HIGH = [0, 4, 1, 5], [2, 6, 3, 7]


def is_awq(layer: Layer) -> bool:
    """Return whether the shapes of a layer's parts are those of AWQ."""
    if not layer.has("qweight", "scales"):
        return False
    words, scales = layer.parts["qweight"].shape, layer.parts["scales"].shape
    return len(words) == len(scales) == 2 and scales[1] == 8 * words[1] > 0


def awq_tensor(layer: Layer, claims: Claims) -> CodedTensor:
    """Return the weights of a layer; raise `SourceError` if its parts do not match, or contradict the configuration."""
    claims.expect_layout(layer.named("qweight"), "AWQ", METHODS, FORMATS)
    qweight = layer.part("qweight", "qweight", [coded.I32])
    qzeros = _zeros(layer, claims)
    scales = layer.part("scales", "qweight", coded.SCALES)
    (cols, words), (groups, rows) = qweight.shape, scales.shape
    if rows != 8 * words:
        raise coded.disagree(qweight, scales)
    if qzeros and qzeros.shape != (groups, words):
        raise coded.disagree(qzeros, scales)
    claims.expect(qweight.name, "bits", 4, "bits", "w_bit")
    columns = coded.grouping(scales.name, cols, groups, claimed_group(scales, cols, claims), None)
    sym = qzeros is None or bool((coded.whole(qzeros) == np.uint32(0x88888888)).all())
    codec = coded.affine_codec(qweight.name, 4, columns, sym=sym, scale=scales.dtype)

    def load() -> Encode:
        stored = coded.whole(qweight)

        def packed(start: int, stop: int) -> U8:
            first = start // 8
            codes = _unpack(stored[:, first : -(-stop // 8)])[start - 8 * first : stop - 8 * first]
            pairs = np.pad(codes, ((0, 0), (0, cols % 2))).view("<u2")
            both: U8 = (pairs | (pairs >> 4)).astype(np.uint8)
            return both

        zeros = None if sym or qzeros is None else _unpack(coded.whole(qzeros))
        return coded.affine_encode(codec, (rows, cols), coded.whole(scales).T, zeros, columns.places, packed)

    return CodedTensor(layer.named("weight"), (rows, cols), codec, load)


def _zeros(layer: Layer, claims: Claims) -> SourceTensor | None:
    """Return the zero points; None if all are in the middle, which only the configuration can say."""
    if "qzeros" not in layer.parts and any(claim.value is False for claim in claims.all("zero_point")):
        return None
    return layer.part("qzeros", "qweight", [coded.I32])


def _unpack(words: NDArray[np.uint32]) -> U8:
    """Return the codes of a transposed matrix, rows first."""
    stored = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    stored = np.ascontiguousarray(stored.transpose(1, 2, 0))
    codes = np.empty((len(stored), 8, len(words)), np.uint8)
    codes[:, _LOW], codes[:, _HIGH] = stored & np.uint8(15), stored >> np.uint8(4)
    return codes.reshape(-1, len(words))
