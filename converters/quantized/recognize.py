"""Which tensors of a checkpoint another tool has quantized; recognised by what is there, with the configuration as a witness."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qformat.converters.quantized import awq, bitnet, compressed_tensors, gptq
from qformat.converters.quantized.claims import Claim, Claims, contradiction
from qformat.converters.quantized.coded import CodedTensor, Parts, as_bytes, named, whole
from qformat.converters.quantized.fp8 import FORMATS, SUFFIXES, fp8_tensor
from qformat.dtypes import DTYPES
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor

# Models whose code multiplies from the other side in some layers (transformers' Conv1D), which GPTQ's layout does not tell
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_I8, _I32, _U8 = DTYPES["i8"], DTYPES["i32"], DTYPES["u8"]
# Formats that cannot be read, by parts of a layer that only they have together
_REFUSED = {
    ("weight_packed", "weight_global_scale"): "nvfp4-pack-quantized",
    ("weight", "weight_scale", "weight_scale_2"): "NVFP4",
    ("weight_packed", "scale_packed"): "marlin-24",
    ("compressed", "bitmask"): "sparse-bitmask",
    ("q_weight", "q_scale_max"): "EXL2",
    ("trellis", "suh"): "EXL3",
}


class Options(Protocol):
    """What the user may say of a checkpoint."""

    @property
    def gptq_format(self) -> str | None:
        """How GPTQ's zeros are stored: ``"v1"`` or ``"v2"``; None finds out."""


def recognize(
    tensors: Sequence[SourceTensor], configs: Mapping[str, Mapping[str, Any]], options: Options
) -> tuple[list[SourceTensor], list[str]]:
    """Replace what quantized layers consist of by tensors whose codes are copied.

    Parameters
    ----------
    tensors
        Every tensor of a checkpoint.
    configs
        What config.json, quantize_config.json and quantization_config.json hold, as far as they stand beside the tensors.
    options
        What the user says.

    Returns
    -------
    tuple of list of SourceTensor and list of str
        The tensors, of which those that belong to no quantized layer are the same; and warnings, a line each.

    Raises
    ------
    SourceError
        If a layer is not what its names say, contradicts the configuration, or has a format that is not known.
    """
    claims = Claims.of(configs)
    found = _Found(tensors)
    for name, parts in found.layers.items():
        _check_readable(name, parts)
        if "qweight" in parts:
            _sort_packed(name, parts, found, claims)
        elif "weight_packed" in parts:
            _check_compressed(name, claims)
            found.take(compressed_tensors.packed_tensor(name, parts, claims), parts, compressed_tensors.PACKED_ROLES)
        elif "weight" in parts and "weight_scale" in parts:
            _take_weight(name, parts, found, claims)
    warnings = _take_fp8(found, claims)
    rebuilt, more = gptq.gptq_tensors(found.gptq, claims, options.gptq_format)
    found.coded += [*rebuilt, *awq.awq_tensors(found.awq, claims)]
    if not found.coded and claims.method:
        more.append(
            f"{claims.method}, but no tensor is quantized in a way that is known: they stay as they are if no type is given"
        )
    model = configs.get("config.json", {}).get("model_type")
    if rebuilt and isinstance(model, str) and model in _TRANSPOSED:
        more.append(
            f"GPTQ: models of type {model} keep some matrices as [in, out], and those of quantized layers are [out, in] here"
        )
    return found.result(), [*warnings, *more]


class _Found:
    """The tensors of a checkpoint, by layer, and those that are made of them."""

    def __init__(self, tensors: Sequence[SourceTensor]) -> None:
        self.tensors = tensors
        self.by_name = {tensor.name: tensor for tensor in tensors}
        self.layers: dict[str, dict[str, SourceTensor]] = defaultdict(dict)
        for tensor in tensors:
            layer, _, role = tensor.name.rpartition(".")
            self.layers[layer][role] = tensor
        self.coded: list[CodedTensor] = []
        self.gptq: dict[str, Parts] = {}
        self.awq: dict[str, Parts] = {}
        self._used: set[str] = set()

    def use(self, parts: Parts, roles: Sequence[str]) -> None:
        """Leave parts of a layer out."""
        self._used |= {parts[role].name for role in roles if role in parts}

    def take(self, tensor: CodedTensor, parts: Parts, roles: Sequence[str]) -> None:
        """Put a tensor in place of parts of a layer."""
        self.coded.append(tensor)
        self.use(parts, roles)

    def result(self) -> list[SourceTensor]:
        """Return all tensors that there are now."""
        return [*(tensor for tensor in self.tensors if tensor.name not in self._used), *self.coded]


def _check_readable(name: str, parts: Parts) -> None:
    """Refuse layers of formats that only hold nonsense when they are taken as they are."""
    if "qzeros" in parts and "qweight" not in parts:
        raise SourceError(
            f"tensor {named(name, 'qweight')!r} is missing, to which {named(name, 'qzeros')!r} belongs; give the whole checkpoint"
        )
    for roles, kind in _REFUSED.items():
        if parts.keys() >= set(roles):
            raise _unreadable(named(name, roles[0]), kind)
    if "B" in parts and "s" in parts and parts["B"].dtype is _I32:
        raise _unreadable(named(name, "B"), "Marlin")
    if "weight_packed" in parts and parts["weight_packed"].dtype is _U8:
        raise _unreadable(named(name, "weight_packed"), "mxfp4-pack-quantized")


def _unreadable(name: str, kind: str) -> SourceError:
    return SourceError(
        f"tensor {name!r} is in the format {kind}, which cannot be read; use the model as it was before it was quantized"
    )


def _sort_packed(name: str, parts: Parts, found: _Found, claims: Claims) -> None:
    """Tell GPTQ's layers from AWQ's, by their shapes."""
    qweight, scales = parts["qweight"], parts.get("scales")
    labels = list(claims.all("checkpoint_format", "format", "packing_format", "version"))
    for claim in labels:
        if str(claim.value).lower() not in (*gptq.VERSIONS, *awq.FORMATS):
            raise SourceError(
                f"tensor {qweight.name!r} cannot be read: {claim}, and only GPTQ (gptq, gptq_v2) and AWQ (gemm) can be"
            )
    if any(claim.value is True for claim in claims.all("is_marlin_format")):
        raise _unreadable(qweight.name, "Marlin")
    widths = [tensor.shape[1] if tensor and len(tensor.shape) == 2 else 0 for tensor in (qweight, scales)]
    if 0 not in widths and widths[1] not in (widths[0], 8 * widths[0]):
        raise SourceError(
            f"tensor {qweight.name!r} of shape {list(qweight.shape)} with scales {widths[1]} wide has neither GPTQ's nor AWQ's "
            "layout: it may be packed for one kernel, such as Marlin; use the checkpoint that it was made of"
        )
    if 0 not in widths and widths[1] == 8 * widths[0]:
        found.awq[name] = parts
        _check_layout(qweight, "AWQ", awq.METHODS, awq.FORMATS, labels, claims)
        found.use(parts, awq.ROLES)
        return
    found.gptq[name] = parts  # also if something is wrong, which will be said then
    _check_layout(qweight, "GPTQ", gptq.METHODS, tuple(gptq.VERSIONS), labels, claims)
    found.use(parts, gptq.ROLES)


def _check_layout(
    qweight: SourceTensor,
    layout: str,
    methods: Sequence[str],
    formats: Sequence[str],
    labels: Sequence[Claim],
    claims: Claims,
) -> None:
    """Compare the layout that shapes show with the one that the configuration names."""
    wrong = [claim for claim in claims.all("quant_method", "method") if claim.value not in methods]
    wrong += [claim for claim in labels if str(claim.value).lower() not in formats]
    if wrong:
        raise contradiction(qweight.name, f"{layout}'s layout", wrong[0])


def _check_compressed(name: str, claims: Claims) -> None:
    if claims.method and claims.method.value != compressed_tensors.METHOD:
        raise contradiction(named(name, "weight_packed"), "compressed-tensors' layout", claims.method)
    for claim in claims.all("format"):
        if claim.value not in compressed_tensors.FORMATS:
            raise SourceError(f"tensor {named(name, 'weight_packed')!r} cannot be read: {claim}, which is not known")


def _take_weight(name: str, parts: Parts, found: _Found, claims: Claims) -> None:
    """Take a layer of a weight and its scale, if these are integers."""
    weight = parts["weight"]
    if weight.dtype is _I8:
        found.take(compressed_tensors.byte_tensor(name, parts, claims), parts, compressed_tensors.BYTE_ROLES)
    elif weight.dtype is _U8:
        if claims.method and claims.method.value != bitnet.METHOD:
            raise SourceError(
                f"tensor {weight.name!r} has bytes and a scale, which is known of BitNet only, but {claims.method}"
            )
        found.take(bitnet.bitnet_tensor(name, parts, claims), parts, bitnet.ROLES)


def _take_fp8(found: _Found, claims: Claims) -> list[str]:
    """Take the tensors of eight-bit floats that have scales; return a warning of those that stay as they are."""
    left = []
    for tensor in found.tensors:
        if tensor.dtype not in FORMATS:
            continue
        names = [tensor.name + suffix for suffix in SUFFIXES]
        if tensor.name.rpartition(".")[2] == "weight":
            names.append(tensor.name.removesuffix("weight") + "scale")  # as DeepSeek's own code has them
        scales = [found.by_name[name] for name in names if name in found.by_name]
        if len(scales) > 1:
            raise SourceError(f"tensor {tensor.name!r} has both {scales[0].name!r} and {scales[1].name!r}; remove one")
        if not scales or 0 in tensor.shape:
            continue
        scale = scales[0]
        if len(tensor.shape) > 2 and np.prod(scale.shape, dtype=int) > 1:
            left.append(tensor.name)
            continue
        offset = found.by_name.get(tensor.name + "_zero_point")
        if offset is not None and any(as_bytes(whole(offset))):
            raise SourceError(f"tensor {offset.name!r} is not zero, but eight-bit floats have no zero points")
        every = {"codes": tensor, "scale": scale} | ({} if offset is None else {"offset": offset})
        found.take(fp8_tensor(tensor, scale, claims), every, list(every))
    if not left:
        return []
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    return [
        f"tensor {left[0]!r}{more} of eight-bit floats has three dimensions: kept as it is, beside its scales, if no type is given"
    ]
