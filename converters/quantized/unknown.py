"""Find the layers that are quantized in a way that no layout explains: they are kept as they are, down to the last part.

Taken as plain numbers, codes would lose their scales, and scales their precision. So whatever may be codes, and has a companion
that may say what they mean, counts as quantized, in any spelling; and all codes do if a file says that the checkpoint is quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod

from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.layer import Layer, layers_of
from qformat.converters.quantized.roles import (
    WEIGHT,
    is_plain,
    is_weight,
    may_be_codes,
    tells_of_codes,
)
from qformat.converters.wording import and_more
from qformat.dtypes import DTYPES
from qformat.pipeline.source import FixedSource, SourceTensor

# The formats by parts of a layer that only they have together
_FORMATS: Mapping[tuple[str, ...], str] = {
    ("weight_packed", "weight_global_scale"): "nvfp4-pack-quantized",
    ("weight_packed", "scale_packed"): "marlin-24",
    ("weight", "weight_scale", "weight_scale_2"): "NVFP4",
    ("compressed", "bitmask"): "sparse-bitmask",
    ("q_weight", "q_scale_max"): "EXL2",
    ("trellis", "suh"): "EXL3",
    ("trellis", "svh"): "EXL3",
    ("B", "s"): "Marlin",
    ("B", "s_channel"): "QQQ",
    ("B_24", "s"): "Marlin 2:4",
    ("qweight", "wscales"): "SVDQuant (nunchaku)",
    ("codes", "codebooks"): "AQLM",
    ("indices", "weight_scale"): "VPTQ",
    ("weight", "weight_scales"): "EETQ",
    ("qweight", "forward_hadamard_matrix"): "FP-Quant",
    ("Qidxs", "SU"): "QuIP#",
    ("dense_weights", "row_offsets"): "SpQR",
    ("weight", "tables2"): "HIGGS",
    ("weight", "SCB"): "LLM.int8",
    ("weight", "weight.absmax"): "bitsandbytes",
    ("weight", "weight_scale", "deq_scale"): "W8A8 (Ascend)",
    ("weight", "quant_bias", "deq_scale"): "W8A8 (Ascend)",
    ("weight", "weights_scaling_factor"): "TensorRT-LLM",
    ("W_q", "scale2"): "SINQ",
    ("W_q", "scale"): "HQQ",
    ("weight", "scales", "biases"): "MLX",
    ("_weight_qdata", "_weight_scale"): "torchao",
    ("weight._data", "weight._scale"): "quanto",
    ("weight._data._data", "weight._scale"): "quanto",
    ("weight", "scales_and_zeros"): "gpt-fast int4",
    ("weight", "comfy_quant"): "ComfyUI",
}
_U8 = DTYPES["u8"]


class Unknown:
    """The layers of a checkpoint that are quantized in an unknown way.

    Parameters
    ----------
    tensors
        The tensors that no layout has explained.
    claims
        What the files say.
    refused
        Layers that a layout does not read after all, and their formats.
    """

    def __init__(
        self, tensors: Sequence[SourceTensor], claims: Claims, refused: Mapping[str, str] | None = None
    ) -> None:
        every = layers_of(tensors)
        self.formats: dict[str, str] = {}
        self._layer_of: dict[str, str] = {}
        linked = _linked(every)
        for layer in every:
            name = layer.named(WEIGHT) if layer.joined else layer.name
            format_ = (refused or {}).get(layer.name)
            if format_ is None and not _is_unknown(layer, linked.get(layer.name, ()), claims):
                continue
            self.formats[name] = format_ or format_of(layer, claims)
            for tensor in (*layer.parts.values(), *linked.get(layer.name, ())):
                self._layer_of.setdefault(tensor.name, name)

    def __bool__(self) -> bool:
        return bool(self.formats)

    def kept(self, tensors: Iterable[SourceTensor]) -> list[SourceTensor]:
        """Return tensors with those of unknown layers as ones that stay as they are."""
        return [
            FixedSource(tensor, self._because(self._layer_of[tensor.name])) if tensor.name in self._layer_of else tensor
            for tensor in tensors
        ]

    def warnings(self) -> list[str]:
        """Return a warning for each format."""
        named: dict[str, list[str]] = {}
        for name, format_ in self.formats.items():
            named.setdefault(format_, []).append(name)
        return [
            f"layer {names[0]!r}{and_more(names)}: quantized in {_format(format_)}; all its tensors are kept as they are"
            for format_, names in named.items()
        ]

    def _because(self, layer: str) -> str:
        return f"belongs to layer {layer!r}, which is quantized in {_format(self.formats[layer])}"


def _format(format_: str) -> str:
    return f"the format {format_}, which cannot be read" if format_ else "an unknown format"


def _is_unknown(layer: Layer, linked: Sequence[SourceTensor], claims: Claims) -> bool:
    codes = {role: tensor for role, tensor in layer.parts.items() if may_be_codes(role, tensor)}
    others = [role for role, tensor in layer.parts.items() if role not in codes and not is_plain(role, tensor)]
    telling = any(map(tells_of_codes, others))
    for role, tensor in codes.items():
        weight = layer.joined or is_weight(role)
        companions = len(others) + len(codes) > 1 if weight else telling
        if companions or linked or claims.statements:
            return True
        if not tensor.dtype.floating and (weight or (tensor.dtype.size == 1 and layer.name and others)):
            return True
    # floats that store codes, or that are scaled, are no weights by themselves
    floats = layer.parts.get(WEIGHT)
    if floats is None or not floats.dtype.floating or len(floats.shape) < 2:
        return False
    return any(role.startswith(WEIGHT) and tells_of_codes(role) for role in others)


def _linked(layers: Sequence[Layer]) -> dict[str, list[SourceTensor]]:
    """Return companions that are not among the parts of a layer, by the layer's name: below it, or under another prefix."""
    owners: dict[str, list[Layer]] = {}
    weights: dict[str, Layer] = {}
    for layer in layers:
        codes = [role for role, tensor in layer.parts.items() if may_be_codes(role, tensor)]
        if codes:
            owners.setdefault(_essence(layer.name), []).append(layer)
        if layer.name and any(map(is_weight, codes)):
            weights[layer.name] = layer
    found: dict[str, list[SourceTensor]] = {}
    for layer in layers if owners else ():
        for tensor in layer.parts.values():
            if tells_of_codes(tensor.name):
                alike = owners.get(_essence(tensor.name), ())
                for owner in (*filter(partial(_is_larger, tensor), alike), *map(weights.get, _above(layer.name))):
                    if owner and owner is not layer:
                        found.setdefault(owner.name, []).append(tensor)
    return found


def _is_larger(tensor: SourceTensor, layer: Layer) -> bool:
    return 2 * prod(tensor.shape) <= max(prod(part.shape) for part in layer.parts.values())


def _above(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


_WORDS = re.compile(r"weights?|w|inv|data|factor|points?|map|meta|and|packed|qdata|(fp|u?int)\d+")


def _essence(name: str) -> str:
    """Return a name without the words for weights and their companions, and without separators."""
    words = re.split(r"[._/:\-]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    return ".".join(word for word in words if word and not _WORDS.fullmatch(word) and not tells_of_codes(word))


def format_of(layer: Layer, claims: Claims) -> str:
    """Return the format of a layer that no layout explains, as far as its parts or a file tell it."""
    for roles, format_ in _FORMATS.items():
        if layer.has(*roles):
            return format_
    if WEIGHT in layer.parts and layer.has("weight_scale") and layer.parts["weight_scale"].dtype is _U8:
        return "mxfp8"
    if "weight_packed" in layer.parts and layer.parts["weight_packed"].dtype is _U8:
        return "mxfp4-pack-quantized"
    about = claims.about(layer.name)
    named = [*about.all("quant_method", "method", "quant_algo"), *about.labels()]
    return next((claim.value for claim in named if isinstance(claim.value, str)), "")
