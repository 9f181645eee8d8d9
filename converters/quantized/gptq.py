"""GPTQ's layers: 32-bit words of codes down the columns, zeros along the rows, and perhaps columns in an order of their own.

``qweight [in × bits / 32, out]``, ``qzeros [groups, out × bits / 32]``, ``scales [groups, out]`` and maybe ``g_idx [in]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.converters.quantized.claims import Claim, Claims
from qformat.converters.quantized.coded import (
    I32,
    SCALES,
    U8,
    WIDTHS,
    CodedTensor,
    Encode,
    Grouping,
    Parts,
    Width,
    affine_codec,
    affine_encode,
    disagree,
    grouping,
    named,
    part,
    unpack,
    whole,
)
from qformat.dtypes import DTYPES
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor

ROLES = ("qweight", "qzeros", "scales", "g_idx")
#: what files call the two ways of storing zeros: less one, or as they are
VERSIONS = {
    "gptq": "v1",
    "gptq_v2": "v2",
    "auto_round:auto_gptq": "v1",
    "auto_round:gptq": "v1",
    "auto_round:gptqmodel": "v2",
    "auto_round": "v2",
}
METHODS = ("gptq", "auto-round", "intel/auto-round")
_CORRUPT = np.uint32(0xFFFF0000)


@dataclass(frozen=True)
class _Zeros:
    """What is known of a layer's zeros as they are stored: the least, the largest, and whether words look corrupted."""

    least: int
    most: int
    corrupt: bool


@dataclass(frozen=True)
class _Layer:
    name: str
    qweight: SourceTensor
    qzeros: SourceTensor
    scales: SourceTensor
    bits: Width
    rows: int
    cols: int
    grouping: Grouping

    def zeros(self) -> _Zeros:
        words = whole(self.qzeros)
        fields = unpack(words, self.bits)
        corrupt = self.bits != 3 and bool((words >= _CORRUPT).any())
        return _Zeros(int(fields.min()), int(fields.max()), corrupt)

    def tensor(self, version: str, zeros: _Zeros) -> CodedTensor:
        middle = (1 << (self.bits - 1)) - (version == "v1")
        sym = zeros.least == zeros.most == middle
        codec = affine_codec(self.qweight.name, self.bits, self.grouping, sym=sym, scale=self.scales.dtype)

        def load() -> Encode:
            words = whole(self.qweight)  # the rows of a chunk are spread all over it

            def packed(start: int, stop: int) -> U8:
                near = np.ascontiguousarray(words[:, start:stop])  # so that transposing stays in cache
                return np.ascontiguousarray(near.T).view(np.uint8)

            own = None if sym else _read_zeros(self.qzeros, self.bits, version).T
            shape = (self.rows, self.cols)
            return affine_encode(codec, shape, whole(self.scales).T, own, self.grouping.places, packed)

        return CodedTensor(named(self.name, "weight"), (self.rows, self.cols), codec, load)


def gptq_tensors(
    layers: Mapping[str, Parts], claims: Claims, version: str | None
) -> tuple[list[CodedTensor], list[str]]:
    """Return the tensors of GPTQ's layers, and warnings.

    Parameters
    ----------
    layers
        The parts of each layer.
    claims
        The configuration.
    version
        How zeros are stored, ``"v1"`` or ``"v2"``; None finds out.

    Raises
    ------
    SourceError
        If a layer is none of GPTQ's, or contradicts the configuration.
    """
    if not layers:
        return [], []
    checked = [_checked(name, parts, claims) for name, parts in layers.items()]
    zeros = [layer.zeros() for layer in checked]
    version, warnings = (version, []) if version else _version(checked, zeros, claims)
    corrupt = [layer.qzeros.name for layer, own in zip(checked, zeros, strict=True) if own.corrupt]
    if corrupt and version == "v1":
        more = f" and {len(corrupt) - 1} more" if len(corrupt) > 1 else ""
        warnings.append(
            f"tensor {corrupt[0]!r}{more} has words whose upper half is all ones, as AutoGPTQ up to 0.7 leaves them where a zero "
            "point is 0: what stood there is lost, and their weights may be wrong; quantize the model again with another tool"
        )
    return [layer.tensor(version, own) for layer, own in zip(checked, zeros, strict=True)], warnings


def _checked(name: str, parts: Parts, claims: Claims) -> _Layer:
    qweight = part(parts, name, "qweight", "qweight", [I32])
    qzeros = part(parts, name, "qzeros", "qweight", [I32])
    scales = part(parts, name, "scales", "qweight", SCALES)
    (words, rows), (groups, zero_words) = qweight.shape, qzeros.shape
    if scales.shape != (groups, rows):
        raise disagree(qzeros, scales)
    bits, left = divmod(32 * zero_words, rows)
    if left:
        raise disagree(qzeros, scales)
    width = next((width for width in WIDTHS if width == bits), None)
    if width is None:
        raise SourceError(
            f"tensor {qzeros.name!r}: its shape means {bits}-bit codes, but only 2, 3, 4 and 8 bits can be stored"
        )
    cols, left = divmod(32 * words, bits)
    if left:
        raise disagree(qweight, qzeros)
    claims.expect(qzeros.name, "bits", bits, "bits")
    places = None
    if "g_idx" in parts:
        g_idx = part(parts, name, "g_idx", "qweight", [I32, DTYPES["i64"]], dims=1)
        if g_idx.shape != (cols,):
            raise disagree(g_idx, qweight)
        places = whole(g_idx).view(np.int32 if g_idx.dtype is I32 else np.int64)
    elif groups > 1 and any(claim.value is True for claim in claims.all("desc_act")):
        raise SourceError(
            f"tensor {named(name, 'g_idx')!r} is missing, though the configuration says desc_act, so that columns are in any order"
        )
    return _Layer(
        name,
        qweight,
        qzeros,
        scales,
        width,
        rows,
        cols,
        grouping(
            g_idx.name if places is not None else scales.name, cols, groups, claimed_group(scales, cols, claims), places
        ),
    )


def claimed_group(scales: SourceTensor, cols: int, claims: Claims) -> int | None:
    """Return how many columns share a scale by the configuration, if it says so.

    Raises
    ------
    SourceError
        If that would need another number of scales.
    """
    groups = scales.shape[0]
    claim = claims.get("group_size", "q_group_size")
    if claim is None or not isinstance(claim.value, int):
        return None
    size = cols if claim.value == -1 else claim.value
    if size > 0 and -(-cols // size) == groups:
        return size
    if not claims.per_layer:
        raise SourceError(
            f"tensor {scales.name!r} has scales for {groups} groups in rows of {cols} columns, but {claim}; "
            "correct the one that is wrong"
        )
    return None


def _version(layers: list[_Layer], zeros: list[_Zeros], claims: Claims) -> tuple[str, list[str]]:
    """Return how zeros are stored, by the configuration, or by their values if these leave no doubt.

    A symmetric quantizer puts every zero in the middle, 2^(bits - 1), so that all zeros of such a checkpoint are one number. If the
    way that the label says makes it one beside the middle, and the other way the middle itself, then the label is wrong: no
    asymmetric quantizer finds the same zero for every group. Following the label would shift all weights by a step and leave a
    model that talks nonsense. Only where the configuration says that zeros are asymmetric it has the last word.
    """
    labels = [claim for claim in claims.all("checkpoint_format", "packing_format", "format") if _version_of(claim)]
    for claim in labels:
        if _version_of(claim) != _version_of(labels[0]):
            raise SourceError(
                f"{labels[0]}, but {claim}; correct the one that is wrong, or give --gptq-format v1 or v2"
            )
    label = labels[0] if labels else None
    version = _version_of(label) if label else "v1"
    other = "v2" if version == "v1" else "v1"
    middles = [(1 << (layer.bits - 1)) - (other == "v1") for layer in layers]
    if not all(own.least == own.most == middle for own, middle in zip(zeros, middles, strict=True)):
        return version, []
    said = str(label) if label else "no file says checkpoint_format, which means v1"
    found = f"all zero points are in the middle if read as {other}, and one beside it as {version}, but {said}"
    if any(claim.value is False for claim in claims.all("sym")):
        return version, [
            f"GPTQ: {found}, and sym is false: read as {version}; --gptq-format {other} reads them as {other}"
        ]
    return other, [
        f"GPTQ: {found}: read as with --gptq-format {other}; if that is wrong, convert again with --gptq-format {version}"
    ]


def _version_of(claim: Claim) -> str:
    return VERSIONS.get(claim.value.lower(), "") if isinstance(claim.value, str) else ""


def _read_zeros(qzeros: SourceTensor, bits: int, version: str) -> NDArray[Any]:
    """Return the zero of each group and row of a layer."""
    words = whole(qzeros)
    if version == "v2":
        return unpack(words, bits)
    if bits == 3:  # stored less one in each field
        return (unpack(words, 3) + np.uint8(1)) & np.uint8(7)
    # stored less one in each field too, but whole words were counted down: a zero of 0 has borrowed from its neighbours
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return unpack(words + ones, bits)
