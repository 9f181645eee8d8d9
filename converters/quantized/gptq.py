"""GPTQ: 32-bit words of codes down the columns, zero points along the rows, and maybe columns in an order of their own.

``qweight [in × bits / 32, out]``, ``qzeros [groups, out × bits / 32]``, ``scales [groups, out]`` and maybe ``g_idx [in]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qformat.converters.quantized import coded
from qformat.converters.quantized.claims import Claim, Claims
from qformat.converters.quantized.coded import U8, CodedTensor, Encode, Grouping, Width
from qformat.converters.quantized.layer import Found, Layer
from qformat.converters.wording import and_more
from qformat.dtypes import DTYPES
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor

ROLES = ("qweight", "qzeros", "scales", "g_idx")
#: labels in configuration files, and how zero points are stored: less one (v1), or as they are (v2)
VERSIONS = {
    "gptq": "v1",
    "gptq_v2": "v2",
    "auto_round:auto_gptq": "v1",
    "auto_round:gptq": "v1",
    "auto_round:gptqmodel": "v2",
    "auto_round": "v2",
    "auto_round:exllamav2": "v2",
    "auto_round:triton": "v2",
    "auto_round:marlin": "v2",
    "auto_round:tritonv2": "v2",
}
METHODS = (
    *(
        "gptq",
        "gptq_v2",
        "optq",
        "gptqmodel",
        "autogptq",
        "auto_gptq",
        "auto-gptq",
        "gptq_marlin",
        "gptq_bitblas",
        "rtn",
    ),
    *("auto-round", "auto_round", "autoround", "intel/auto-round", "inc", "intel"),
)
_CORRUPT = np.uint32(0xFFFF0000)


@dataclass(frozen=True)
class _Layer:
    """A checked layer."""

    name: str
    qweight: SourceTensor
    qzeros: SourceTensor
    scales: SourceTensor
    bits: Width
    grouping: Grouping
    least: int  # zero point, as stored
    most: int
    corrupt: bool  # whether zero points look damaged
    claims: Claims

    def tensor(self, version: str) -> CodedTensor:
        shape = self.qweight.shape[1], 32 * self.qweight.shape[0] // self.bits
        middle = (1 << (self.bits - 1)) - (version == "v1")
        sym = self.least == self.most == middle
        codec = coded.affine_codec(self.qweight.name, self.bits, self.grouping, sym=sym, scale=self.scales.dtype)

        def load() -> Encode:
            words = coded.whole(self.qweight)  # the rows of a chunk are spread all over it

            def packed(start: int, stop: int) -> U8:
                near = np.ascontiguousarray(words[:, start:stop])  # so that the transposition stays in cache
                return np.ascontiguousarray(near.T).view(np.uint8)

            zeros = None if sym else _read_zeros(self.qzeros, self.bits, version, whole=_by_words(self.claims)).T
            return coded.affine_encode(codec, shape, coded.whole(self.scales).T, zeros, self.grouping.places, packed)

        return CodedTensor(self.name, shape, codec, load)


def is_gptq(layer: Layer) -> bool:
    """Return whether a layer is GPTQ's: ``qweight`` of any shape that is not AWQ's, to be checked later."""
    if not layer.has("qweight", "scales"):
        return layer.has("qweight")
    words, scales = layer.parts["qweight"].shape, layer.parts["scales"].shape
    return not (len(words) == len(scales) == 2 and scales[1] == 8 * words[1] > 0)


def gptq_tensors(layers: Sequence[Layer], claims: Claims) -> Found:
    """Return the weights of all layers.

    Raises `SourceError` if the parts of a layer do not match, or contradict the configuration.
    """
    checked = [_checked(layer, claims.about(layer.name)) for layer in layers]
    # other layers show that a quantizer is not symmetric, though all zero points of a small one may be equal
    varied = any(layer.least != layer.most for layer in checked)
    versions: list[str] = []
    doubts: dict[_Doubt, list[str]] = {}
    for layer in checked:
        version, doubt = (claims.gptq_format, None) if claims.gptq_format else _version(layer, varied=varied)
        versions.append(version)
        if doubt:
            doubts.setdefault(doubt, []).append(layer.name)
    warnings = [_warning(doubt, names, whole=len(names) == len(checked)) for doubt, names in doubts.items()]
    corrupt = [
        layer.qzeros.name for layer, version in zip(checked, versions, strict=True) if layer.corrupt and version == "v1"
    ]
    if corrupt:
        warnings.append(
            f"tensor {corrupt[0]!r}{and_more(corrupt)} has words whose upper half is all ones, as AutoGPTQ up to 0.7 writes "
            "them if a zero point is 0: the bits below are lost, and weights may be wrong; quantize again with another tool"
        )
    replaced = {name for layer in layers for name in layer.names(ROLES)}
    tensors = [layer.tensor(version) for layer, version in zip(checked, versions, strict=True)]
    return Found(tensors, replaced, warnings)


def _checked(layer: Layer, claims: Claims) -> _Layer:
    claims.expect_layout(layer.named("qweight"), "GPTQ", METHODS, tuple(VERSIONS))
    qweight = layer.part("qweight", "qweight", [coded.I32])
    qzeros = layer.part("qzeros", "qweight", [coded.I32])
    scales = layer.part("scales", "qweight", coded.SCALES)
    (words, rows), (groups, zero_words) = qweight.shape, qzeros.shape
    bits, remainder = divmod(32 * zero_words, rows)
    if scales.shape != (groups, rows) or remainder:
        raise coded.disagree(qzeros, scales)
    width = next((width for width in coded.WIDTHS if width == bits), None)
    if width is None:
        raise SourceError(
            f"tensor {qzeros.name!r}: its shape means {bits}-bit codes, but only 2, 3, 4 and 8 bits can be stored"
        )
    cols, remainder = divmod(32 * words, bits)
    if remainder:
        raise coded.disagree(qweight, qzeros)
    claims.expect(qzeros.name, "bits", bits, "bits")
    places, named_by = None, scales.name
    if layer.has("g_idx"):
        g_idx = layer.part("g_idx", "qweight", [coded.I32, DTYPES["i64"]], dims=1)
        if g_idx.shape != (cols,):
            raise coded.disagree(g_idx, qweight)
        places, named_by = coded.whole(g_idx).view(np.int32 if g_idx.dtype is coded.I32 else np.int64), g_idx.name
    elif groups > 1 and any(claim.value is True for claim in claims.all("desc_act")):
        raise SourceError(
            f"tensor {layer.named('g_idx')!r} is missing, though desc_act in the configuration means that columns are in any order"
        )
    columns = coded.grouping(named_by, cols, groups, claimed_group(scales, cols, claims), places)
    stored = coded.whole(qzeros)
    fields = coded.unpack(stored, width)
    corrupt = width != 3 and bool((stored >= _CORRUPT).any())
    name, least, most = layer.named("weight"), int(fields.min()), int(fields.max())
    return _Layer(name, qweight, qzeros, scales, width, columns, least, most, corrupt, claims)


def claimed_group(scales: SourceTensor, cols: int, claims: Claims) -> int | None:
    """Return the group size in the configuration; raise `SourceError` if it contradicts the number of scales."""
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


class _Doubt(NamedTuple):
    """A reason to doubt how zero points are stored: the version of the label, the other one, the label, and which was chosen."""

    version: str
    other: str
    source: str
    chosen: str


def _version(layer: _Layer, *, varied: bool) -> tuple[str, _Doubt | None]:
    """Return how the zero points of a layer are stored: as the configuration says, unless their values prove it wrong.

    A symmetric quantizer puts every zero point in the middle, 2^(bits - 1), so that all of them are equal. If they are next to the
    middle when read as the label says, and in the middle when read the other way, then the label is wrong: no asymmetric quantizer
    finds the same zero point for every group. Following the label would shift all weights by a step and leave a model that talks
    nonsense. The label is believed if the configuration says that zero points are asymmetric, or if those of other layers are
    (`varied`) and it does not say that they are symmetric.
    """
    claims = layer.claims
    labels = [claim for claim in claims.labels() if _version_of(claim)]
    for claim in labels:
        if _version_of(claim) != _version_of(labels[0]):
            raise SourceError(
                f"{labels[0]}, but {claim}; correct the one that is wrong, or give --gptq-format v1 or v2"
            )
    version = _version_of(labels[0]) if labels else "v1"
    other = "v2" if version == "v1" else "v1"
    if not layer.least == layer.most == (1 << (layer.bits - 1)) - (other == "v1"):
        return version, None
    symmetric = [claim.value for claim in claims.all("sym")]
    if varied and True not in symmetric:
        return version, None
    source = str(labels[0]) if labels else "no file says checkpoint_format, which means v1"
    chosen = version if False in symmetric else other
    return chosen, _Doubt(version, other, source, chosen)


def _warning(doubt: _Doubt, names: Sequence[str], *, whole: bool) -> str:
    version, other, source, chosen = doubt
    zeros = "all zero points" if whole else f"all zero points of {names[0]!r}{and_more(names)}"
    finding = f"GPTQ: {zeros} are in the middle if read as {other}, and next to it as {version}, but {source}"
    if chosen == version:
        return f"{finding}, and sym is false: read as {version}; --gptq-format {other} reads them as {other}"
    return (
        f"{finding}: read as with --gptq-format {other}; if that is wrong, convert again with --gptq-format {version}"
    )


def _version_of(claim: Claim) -> str:
    return VERSIONS.get(claim.value.lower(), "") if isinstance(claim.value, str) else ""


def _by_words(claims: Claims) -> bool:
    """Return whether the tool subtracted one from words of zero points as a whole, and not from each, as GPTQModel does."""
    return any("gptqmodel" in str(claim.value).lower() for claim in claims.all("meta", "quantizer", "provider"))


def _read_zeros(qzeros: SourceTensor, bits: int, version: str, *, whole: bool) -> NDArray[Any]:
    """Return the zero point of each group and row."""
    words = coded.whole(qzeros)
    if version == "v2":
        return coded.unpack(words, bits)
    if bits == 3 or not whole:  # each field is stored less one
        return (coded.unpack(words, bits) + np.uint8(1)) & np.uint8((1 << bits) - 1)
    # a zero point of 0 has borrowed from its neighbors
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return coded.unpack(words + ones, bits)
