"""Find the layers of a checkpoint that another tool has quantized: by their tensors, checked against the configuration.

To support another layout, write a module with the two functions of a row of `LAYOUTS`, and add the row.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qformat.converters.quantized import (
    awq,
    bitnet,
    bitsandbytes,
    comfy,
    compressed_tensors,
    fp8,
    gptq,
    hqq,
    microscaled,
    mlx,
    quanto,
    tinygemm,
    torchao,
)
from qformat.converters.quantized.claims import Claims
from qformat.converters.quantized.coded import CodedTensor
from qformat.converters.quantized.integers import each_possible
from qformat.converters.quantized.layer import Found, Layer, Layout, each, layers_of
from qformat.converters.quantized.meaning import check_keys
from qformat.converters.quantized.refused import unreadable
from qformat.converters.quantized.roles import WEIGHT, changes_weights, is_activation_only, is_plain
from qformat.converters.quantized.unknown import Unknown
from qformat.converters.sources.options import SourceOptions
from qformat.converters.wording import and_more
from qformat.errors import SourceError
from qformat.pipeline.source import SourceTensor

# Models with layers whose code multiplies from the other side (transformers' Conv1D), which GPTQ's layout does not show
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_OUTPUTS_FIRST = ("GPTQ", "bitsandbytes", "LLM.int8")  # which turn such matrices round


def _by_layer(
    format_: str,
    matches: Callable[[Layer], bool],
    tensor_of: Callable[[Layer, Claims], CodedTensor],
    roles: Sequence[str],
    read: Callable[..., Callable[..., Found]] = each,
) -> Layout:
    """Return a layout whose layers are independent; `read` is `each`, or `each_possible` if some are kept as they are."""
    return Layout(format_, matches, read(tensor_of, roles), roles)


LAYOUTS = (
    _by_layer("bitsandbytes", bitsandbytes.is_four_bit, bitsandbytes.four_bit_tensor, bitsandbytes.ROLES),
    _by_layer("LLM.int8", bitsandbytes.is_int8, bitsandbytes.int8_tensor, bitsandbytes.INT8_ROLES),
    _by_layer(
        "pack-quantized", microscaled.is_packed, microscaled.packed_tensor, microscaled.PACKED_ROLES, each_possible
    ),
    _by_layer("NVFP4", microscaled.is_nvfp4, microscaled.nvfp4_tensor, microscaled.NVFP4_ROLES, each_possible),
    _by_layer("FP4", microscaled.is_signed, microscaled.signed_tensor, microscaled.SIGNED_ROLES, each_possible),
    _by_layer("MXFP4", microscaled.is_blocks, microscaled.block_tensor, microscaled.BLOCK_ROLES, each_possible),
    _by_layer("MXFP4", microscaled.is_original, microscaled.original_tensor, microscaled.ORIGINAL_ROLES, each_possible),
    _by_layer(
        "pack-quantized",
        compressed_tensors.is_packed,
        compressed_tensors.packed_tensor,
        compressed_tensors.PACKED_ROLES,
    ),
    _by_layer("ComfyUI int8", comfy.is_int8, comfy.int8_tensor, comfy.INT8_ROLES, each_possible),
    _by_layer(
        "int-quantized", compressed_tensors.is_bytes, compressed_tensors.byte_tensor, compressed_tensors.BYTE_ROLES
    ),
    _by_layer("MLX", mlx.is_mlx, mlx.mlx_tensor, mlx.ROLES, each_possible),
    _by_layer("HQQ", hqq.is_hqq, hqq.hqq_tensor, hqq.ROLES, each_possible),
    Layout("torchao", torchao.is_torchao, torchao.torchao_tensors, torchao.ROLES),
    _by_layer("quanto", quanto.is_quanto, quanto.quanto_tensor, quanto.ROLES, each_possible),
    _by_layer("quanto, packed", quanto.is_packed, quanto.packed_tensor, quanto.PACKED_ROLES, each_possible),
    _by_layer("int4", tinygemm.is_tinygemm, tinygemm.tinygemm_layer, tinygemm.ROLES),
    _by_layer("int8", tinygemm.is_bytes, tinygemm.byte_layer, tinygemm.BYTE_ROLES),
    _by_layer("BitNet", bitnet.is_bitnet, bitnet.bitnet_tensor, bitnet.ROLES),
    Layout("FP8", fp8.is_fp8, fp8.fp8_tensors, fp8.ROLES),
    Layout("GPTQ", gptq.is_gptq, gptq.gptq_tensors, gptq.ROLES),
    _by_layer("AWQ", awq.is_awq, awq.awq_tensor, awq.ROLES),
)


@dataclass(frozen=True)
class Recognized:
    """The tensors of a checkpoint, with each quantized layer that is understood as one tensor.

    Attributes
    ----------
    tensors
        The tensors.
    warnings
        Warnings for the user, one line each.
    layers
        Whether a layer is quantized, in a known way or not.
    claimed
        Whether the configuration says so.
    """

    tensors: list[SourceTensor]
    warnings: list[str]
    layers: bool
    claimed: bool


def recognize(
    tensors: Sequence[SourceTensor],
    configs: Mapping[str, Mapping[str, Any]],
    options: SourceOptions,
    metadata: Mapping[str, str] | None = None,
) -> Recognized:
    """Join the tensors of each quantized layer that has a known layout, and keep all parts of the others.

    Parameters
    ----------
    tensors
        All tensors of a checkpoint.
    configs
        Its configuration files by name.
    options
        How to read it.
    metadata
        The metadata in the headers of its files.

    Raises
    ------
    SourceError
        If a layer of a known layout is damaged, contradicts the configuration, or has parts that the layout has not.
    """
    claims = Claims.of(configs, options.gptq_format, metadata)
    own: dict[Layout, list[Layer]] = {}
    refused: dict[str, str] = {}
    stale: dict[str, SourceTensor] = {}
    for layer in layers_of(tensors):
        older = _remove_older(layer)
        format_ = unreadable(layer, claims.about(layer.name))
        # no tool whose layout is known here has such names, but one whose scales divide
        layout = None if "/" in layer.name else next((layout for layout in LAYOUTS if layout.matches(layer)), None)
        if format_ is not None:
            refused[layer.name] = format_
        elif layout:
            own.setdefault(layout, []).append(layer)
            stale |= {tensor.name: tensor for tensor in older.values()}
    found = [layout.read(own[layout], claims) for layout in LAYOUTS if layout in own]
    coded = [tensor for part in found for tensor in part.tensors]
    replaced = {name for part in found for name in part.replaced} | stale.keys()
    warnings = [warning for part in found for warning in part.warnings]
    if coded:
        warnings += check_keys(claims)
        for layout, layers in own.items():
            _check_parts(layout, layers, replaced)
        _check_below(own, tensors, replaced)
    if stale:
        first = next(iter(stale))
        warnings.append(
            f"tensor {first!r}{and_more(stale)}: left out, since its layer has packed codes too, which count"
        )
    plain = [tensor for tensor in tensors if tensor.name not in replaced]
    unknown = Unknown(plain, claims, refused)
    warnings += unknown.warnings()
    if not coded and not unknown and claims.statements:
        claim = claims.method or next(iter(claims.every()))
        warnings.append(f"{claim}, but no tensor is quantized: they stay as they are if no type is given")
    model = configs.get("config.json", {}).get("model_type")
    for layout in own if model in _TRANSPOSED else ():
        if layout.format in _OUTPUTS_FIRST:
            warnings.append(
                f"{layout.format}: models of type {model} keep some matrices as [in, out], and those of quantized layers are "
                "[out, in] here"
            )
    return Recognized([*unknown.kept(plain), *coded], warnings, bool(coded or unknown), bool(claims.statements))


def _remove_older(layer: Layer) -> dict[str, SourceTensor]:
    """Remove the weight from the parts of a layer, and return it, if there are packed codes too, as in files saved over others."""
    roles: Sequence[str] = ()
    if layer.has("qweight", "scales"):
        roles = (WEIGHT, "weight_scale", "weight_scale_inv")
    elif layer.has("weight_packed"):
        roles = (WEIGHT,)
    return {role: layer.parts.pop(role) for role in roles if role in layer.parts}


def _check_below(
    own: Mapping[Layout, Sequence[Layer]], tensors: Sequence[SourceTensor], replaced: Container[str]
) -> None:
    """Raise `SourceError` if something in a module below a layer that was read changes what its weights are."""
    layouts = {
        layer.name: layout
        for layout, layers in own.items()
        for layer in layers
        if any(tensor.name in replaced for tensor in layer.parts.values())
    }
    for tensor in tensors:
        above = tensor.name
        while "." in above and tensor.name not in replaced:
            above = above.rpartition(".")[0]
            if above in layouts and changes_weights(tensor.name[len(above) + 1 :]):
                raise _foreign(tensor, layouts[above])


def _foreign(tensor: SourceTensor, layout: Layout) -> SourceError:
    """Return the error for a tensor of a layer that its layout does not have."""
    return SourceError(
        f"tensor {tensor.name!r} belongs to a layer in the format {layout.format}, and what it does to the weights "
        "there is not known; use the model as it was before quantization"
    )


def _check_parts(layout: Layout, layers: Sequence[Layer], replaced: Container[str]) -> None:
    """Raise `SourceError` if a layer that was read has parts that may change what its weights are."""
    for layer in layers:
        if not any(tensor.name in replaced for tensor in layer.parts.values()):
            continue
        for role, tensor in layer.parts.items():
            if tensor.name not in replaced and not is_plain(role, tensor) and not is_activation_only(role):
                raise _foreign(tensor, layout)
